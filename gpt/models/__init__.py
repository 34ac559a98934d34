"""The models in the order of the chapters, and `base`, the interface that they share."""
