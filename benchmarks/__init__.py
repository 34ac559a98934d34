"""Scripts that compare tinygpt with others, print a table and write JSON."""
