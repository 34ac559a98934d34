"""Rotary positions with a hand-written gradient: half the passes over memory that autograd makes.

    y_i       = x_i cos - x_{i + K/2} sin
    y_{i+K/2} = x_{i + K/2} cos + x_i sin

The gradient of a rotation is the rotation by the opposite angle.
"""

from typing import Any

import torch
from torch import Tensor


def rotate_pairs(x_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + K/2}) by its position's angle, given as its cosine and sine."""
    return _Rotation.apply(x_BHTK, cos_BTK, sin_BTK)  # type: ignore[no-untyped-call]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:  # noqa: ANN401 (torch's own)
        ctx.save_for_backward(cos_BTK, sin_BTK)
        return _rotate(x_BHTK, cos_BTK, sin_BTK)

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        cos_BTK, sin_BTK = ctx.saved_tensors
        return _rotate(grad_BHTK, cos_BTK, -sin_BTK), None, None


def _rotate(x_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    half = x_BHTK.shape[-1] // 2
    sin_B1TJ = sin_BTK.unsqueeze(-3)[..., :half]
    y_BHTK = x_BHTK * cos_BTK.unsqueeze(-3)
    y_BHTK[..., :half].addcmul_(x_BHTK[..., half:], sin_B1TJ, value=-1)
    y_BHTK[..., half:].addcmul_(x_BHTK[..., :half], sin_B1TJ)
    return y_BHTK
