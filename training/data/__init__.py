"""Text from anywhere to prepared token files, and batches from them."""
