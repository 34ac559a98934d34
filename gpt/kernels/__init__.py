"""Hand-written operations for speed: fused operations with their gradients and 8-bit matrices."""
