"""Score runs: loss, perplexity, bits per byte; compare the models of all chapters."""
