"""RMS norm for a CPU, on which torch has no fused kernel.

    y  = n * weight                                n = x / sqrt(mean(x^2) + eps)
    dx = (g - n * mean(g * n)) / sqrt(...)         g = dy * weight

Two passes over memory forward and four backward; torch makes more than twice as many.
"""

from typing import Any

import torch
from torch import Tensor


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm over the last axis of x, in the precision of x."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN401 (torch's own)
        dtype = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        inverse_rms = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_().type_as(x)
        normalized = x * inverse_rms
        ctx.save_for_backward(normalized, inverse_rms, weight)
        return normalized * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        normalized, inverse_rms, weight = ctx.saved_tensors
        product = grad * normalized
        # The component along x is removed: scaling x does not change the output.
        negative_mean = (product @ weight).div_(-len(weight)).unsqueeze(-1)
        grad_x = torch.addcmul(grad * weight, normalized, negative_mean).mul_(inverse_rms)
        return grad_x, product.flatten(0, -2).sum(0), None
