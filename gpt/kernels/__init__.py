"""Hand-written operations for speed: fused gradients and 8-bit matrices."""
