"""Cross-entropy behind a linear unembedding, without ever holding all logits or computing one twice.

    loss             = sum_n  -log softmax(W x_n + b)[target_n]
    d loss/d logits  = softmax(W x_n + b) - onehot(target_n)

The gradient is known as soon as the logits are. So a few positions at a time are unembedded,
scored and turned into their share of the gradients of x, W and b at once, and the logits are
dropped (as in Liger Kernel, Hsu et al. 2024); the backward pass has only to scale what is there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    features_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, size: int
) -> Tensor:
    """The sum of the cross-entropies in nats; a target of -100 does not count.

    Args:
        features_ND: What is unembedded: under autocast in its precision, the softmax in float32.
        weight_VD: The unembedding.
        bias_V: Its bias, if it has one.
        targets_N: The tokens to predict.
        size: Positions whose logits exist at a time.
    """
    return _LinearNLL.apply(features_ND, weight_VD, bias_V, targets_N, size)  # type: ignore[no-untyped-call]


def _scored(logits_NV: Tensor, targets_N: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies, computed in `wide`, and its gradient by_logits_NV."""
    counts_N = (targets_N != -100).to(wide)
    places = torch.arange(len(targets_N), device=targets_N.device), targets_N.clamp(min=0)
    log_NV = logits_NV.log_softmax(-1, dtype=wide)
    log_N = log_NV[places]
    by_logits_NV = log_NV.exp_().mul_(counts_N.unsqueeze(1)).to(logits_NV.dtype)
    # p - 1 at the target: rounded only once it is known, however near to 1 p is.
    by_logits_NV[places] = (log_N.expm1() * counts_N).to(logits_NV.dtype)
    return -(log_N * counts_N).sum(), by_logits_NV


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (autograd's)
        features_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        size: int,
    ) -> Tensor:
        kind = features_ND.device.type
        narrow = weight_VD.dtype
        if torch.is_autocast_enabled(kind):
            narrow = torch.get_autocast_dtype(kind)
        wide = torch.promote_types(narrow, torch.float32)
        matrix_VD = weight_VD.to(narrow)
        shift_V = None if bias_V is None else bias_V.to(narrow)
        total = features_ND.new_zeros((), dtype=wide)
        by_features = []
        by_weight_VD = torch.zeros_like(weight_VD, dtype=wide)
        by_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
        for some_ND, some_N in zip(features_ND.split(size), targets_N.split(size), strict=True):
            x_ND = some_ND.to(narrow)
            nll, by_logits_NV = _scored(F.linear(x_ND, matrix_VD, shift_V), some_N, wide)
            total += nll
            by_features.append((by_logits_NV @ matrix_VD).to(features_ND.dtype))
            by_weight_VD += by_logits_NV.mT @ x_ND
            if by_bias_V is not None:
                by_bias_V += by_logits_NV.sum(0)
        ctx.save_for_backward(
            torch.cat(by_features),
            by_weight_VD.to(weight_VD.dtype),
            None if by_bias_V is None else by_bias_V.to(weight_VD.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, by_total: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        def scaled(by: Tensor | None) -> Tensor | None:
            return None if by is None else (by.to(by_total.dtype) * by_total).to(by.dtype)

        return *map(scaled, ctx.saved_tensors), None, None
