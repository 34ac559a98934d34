"""RMSNorm for training on a CPU, where torch computes it and its gradient by many operations.

    y     = n * w,  n = x * r,  r = 1 / sqrt(mean(x^2) + eps)
    dL/dw = sum over rows of  g * n,  g = dL/dy
    dL/dx = (g * w - n * mean(g * w * n)) * r

The means are over a row's D numbers. It is computed in float32; under autocast y has its precision,
in which the matrix products that follow would cast it once each.
"""

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x with its last axis normalized and multiplied by the weights, computed in float32."""
    return _RMSNorm.apply(x, weight_D.float(), eps)  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:  # noqa: ANN401 (torch's own)
        dtype, device_type = x.dtype, x.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        x_ND = x.reshape(-1, x.shape[-1]).float()
        square_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square_()
        rsqrt_N1 = (square_N1 / len(weight_D) + eps).rsqrt_()
        normed_ND = x_ND * rsqrt_N1
        ctx.save_for_backward(normed_ND, rsqrt_N1, weight_D)
        ctx.dtype = x.dtype
        return (normed_ND * weight_D).to(dtype).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        normed_ND, rsqrt_N1, weight_D = ctx.saved_tensors
        # Operations on two data types take twice as long.
        grad_ND = grad.reshape(normed_ND.shape).float()
        product_ND = normed_ND * grad_ND
        mean_N1 = (product_ND @ weight_D).unsqueeze(1) / len(weight_D)
        grad_x_ND = (grad_ND * weight_D).addcmul_(normed_ND, mean_N1, value=-1).mul_(rsqrt_N1)
        return grad_x_ND.to(ctx.dtype).view_as(grad), product_ND.sum(0), None
