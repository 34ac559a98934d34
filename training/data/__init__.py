"""From text anywhere to prepared tokens on disk, and training batches from them."""
