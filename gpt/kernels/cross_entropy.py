"""Cross-entropy after a linear unembedding, in chunks: all logits never exist at once.

    loss             = sum_n  -log softmax(W x_n + b)[target_n]
    d loss/d logits  = softmax(W x_n + b) - onehot(target_n)

With label smoothing e (Szegedy et al. 2016) the target is a distribution: 1 - e on the token itself
and e spread evenly over all V of them. It takes the place of onehot, and the loss is the
cross-entropy with it.

The gradient is known as soon as the logits are. So each chunk of positions is unembedded and
scored, and its part of the gradients of x, W and b is computed at once; then its logits are
dropped (as in Liger Kernel, Hsu et al. 2024). No logit is computed twice: the backward pass only
scales the stored gradients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_FLOAT16_CHUNK = 2**12
"""Positions of a chunk in float16, whose largest number is 65,504: a gradient is a sum over them."""


def linear_cross_entropy(
    features_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    chunk_size: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the sum of the cross-entropies in nats; targets of -100 are ignored.

    Weight and bias are the unembedding's, and `chunk_size` is in positions. Under autocast,
    products are computed in its precision, and the softmax in float32.
    """
    return _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        features_ND, weight_VD, bias_V, targets_N, chunk_size, label_smoothing
    )


def _loss_and_gradient(
    logits_NV: Tensor, targets_N: Tensor, dtype: torch.dtype, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropies, computed in `dtype`, and its gradient grad_NV."""
    counted_N = (targets_N != -100).to(dtype)
    at_targets = torch.arange(len(targets_N), device=targets_N.device), targets_N.clamp(min=0)
    p_NV = logits_NV.softmax(-1, dtype=dtype)
    # log p is the logit less the largest, plus its log p: exact also where p is too small for a float.
    max_logit_N, max_log_p_N = logits_NV.amax(-1).to(dtype), p_NV.amax(-1).log()
    log_p_N = logits_NV[at_targets] - max_logit_N + max_log_p_N
    loss_N, spread = -log_p_N, label_smoothing / logits_NV.shape[-1]
    if label_smoothing:
        mean_log_p_N = logits_NV.mean(-1, dtype=dtype) - max_logit_N + max_log_p_N
        loss_N = (1 - label_smoothing) * loss_N - label_smoothing * mean_log_p_N
        p_NV -= spread
    grad_NV = p_NV.to(logits_NV.dtype).mul_(counted_N.to(logits_NV.dtype).unsqueeze(1))
    # p - 1 at the target: rounded only after the subtraction, however near to 1 p is.
    grad_N = log_p_N.expm1() + (label_smoothing - spread)
    grad_NV[at_targets] = (grad_N * counted_N).to(logits_NV.dtype)
    return (loss_N * counted_N).sum(), grad_NV


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's own)
        features_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        chunk_size: int,
        label_smoothing: float,
    ) -> Tensor:
        device_type, dtype = features_ND.device.type, weight_VD.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        if dtype == torch.float16:
            chunk_size = min(chunk_size, MAX_FLOAT16_CHUNK)
        cast_weight_VD = weight_VD.to(dtype)
        cast_bias_V = None if bias_V is None else bias_V.to(dtype)
        total = features_ND.new_zeros((), dtype=sum_dtype)
        grad_features = []
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=sum_dtype)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=sum_dtype)
        chunks = zip(features_ND.split(chunk_size), targets_N.split(chunk_size), strict=True)
        for chunk_ND, chunk_targets_N in chunks:
            x_ND = chunk_ND.to(dtype)
            logits_NV = F.linear(x_ND, cast_weight_VD, cast_bias_V)
            loss, grad_NV = _loss_and_gradient(
                logits_NV, chunk_targets_N, sum_dtype, label_smoothing
            )
            total += loss
            grad_features.append((grad_NV @ cast_weight_VD).to(features_ND.dtype))
            grad_weight_VD += grad_NV.mT @ x_ND
            if grad_bias_V is not None:
                grad_bias_V += grad_NV.sum(0)
        ctx.save_for_backward(
            torch.cat(grad_features),
            grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(weight_VD.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        def scale(grad: Tensor | None) -> Tensor | None:
            return None if grad is None else (grad.to(grad_total.dtype) * grad_total).to(grad.dtype)

        return *map(scale, ctx.saved_tensors), None, None, None
