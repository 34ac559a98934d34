"""What makes a train step fast on a CPU."""

import torch

from gpt import Model
from gpt.device import matmul_dtype
from gpt.models.attention import CausalSelfAttention, RMSNorm

QUERY_CHUNK = 128
"""Queries whose attention is computed at a time."""
MAX_LENGTH = 512
"""Of sequences whose attention weights are kept for the backward pass: their memory is quadratic."""


def tune_for_cpu(model: Model, precision: str, context_length: int) -> None:
    """Let training compute some layers otherwise than torch does, which is slower on a CPU.

    These are RMSNorm and, in bfloat16, causal attention, in chunks.
    """
    is_bfloat16 = matmul_dtype(torch.device("cpu"), precision) == torch.bfloat16
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.is_for_cpu = True
        if isinstance(module, CausalSelfAttention) and is_bfloat16 and context_length <= MAX_LENGTH:
            module.query_chunk = QUERY_CHUNK
