"""What is written by hand for speed: fused operations and 8-bit matrices. The models read well without it."""
