"""What makes a train step fast on a CPU."""

import torch

from gpt import Model
from gpt.device import matmul_dtype
from gpt.models.attention import CausalSelfAttention

QUERY_CHUNK = 128
"""Queries whose attention is computed at a time."""
MAX_LENGTH = 512
"""Of sequences whose attention weights are kept for the backward pass: their memory is quadratic."""


def tune_for_cpu(model: Model, precision: str, context_length: int) -> None:
    """In bfloat16, let training compute attention in chunks: torch's fused kernel is slower there."""
    is_bfloat16 = matmul_dtype(torch.device("cpu"), precision) == torch.bfloat16
    if is_bfloat16 and context_length <= MAX_LENGTH:
        for module in model.modules():
            if isinstance(module, CausalSelfAttention):
                module.query_chunk = QUERY_CHUNK
