"""Attention: a weighted average whose weights are learned (Vaswani et al. 2017).

    A(Q, K, V) = softmax(Q K^T / sqrt(width of a head) + mask) V

A query looks for keys like itself and takes the average of their values. The causal
mask hides every key that comes later; rotary positions (Su et al. 2021) turn queries
and keys by an angle that grows with their place, so that a score depends on how far
apart the two are; RMS-normalised queries and keys (Henry et al. 2020) keep scores small.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.base import State


def attention_weights(
    queries_BHTK: Tensor, keys_BHSK: Tensor, mask_B1TS: Tensor | None = None
) -> Tensor:
    """weights_BHTS: softmax(Q K^T / sqrt(K)), exactly 0 where the mask is False.

    The layers below leave this product to torch's fused kernel, which never shows it.
    """
    scores_BHTS = queries_BHTK @ keys_BHSK.transpose(-1, -2) / keys_BHSK.shape[-1] ** 0.5
    if mask_B1TS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_B1TS, -torch.inf)
    return scores_BHTS.softmax(dim=-1)


def source_mask(lengths_B: Tensor, length: int) -> Tensor:
    """mask_BS: True on each row's own tokens, False on the padding after them.

    True everywhere in a row that has none: a softmax needs something to look at. What
    such a row looks at must be all zero.
    """
    places_S = torch.arange(length, device=lengths_B.device)
    lengths_B1 = lengths_B.unsqueeze(1)
    return (places_S < lengths_B1) | (lengths_B1 == 0)


def rotary_table(positions: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos_SK and sin_SK: the turn at each position, each angle twice, for both halves of a head."""
    frequencies = base ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(positions).double(), frequencies)
    angles_SK = torch.cat([angles, angles], dim=-1)
    return angles_SK.cos().float(), angles_SK.sin().float()


def rotate(x_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Turn each pair (i, i + K/2) of a head by its position's angle."""
    return _Rotation.apply(x_BHTK, cos_BTK, sin_BTK)  # type: ignore[no-untyped-call]


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation back, which autograd does not know: half the passes over memory."""

    @staticmethod
    def forward(ctx: Any, x_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:  # noqa: ANN401 (torch's own)
        ctx.save_for_backward(cos_BTK, sin_BTK)
        return _turned(x_BHTK, cos_BTK, sin_BTK)

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        cos_BTK, sin_BTK = ctx.saved_tensors
        return _turned(grad_BHTK, cos_BTK, -sin_BTK), None, None


def _turned(x_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    half = x_BHTK.shape[-1] // 2
    sin_B1TJ = sin_BTK.unsqueeze(-3)[..., :half]
    turned_BHTK = x_BHTK * cos_BTK.unsqueeze(-3)
    turned_BHTK[..., :half].addcmul_(x_BHTK[..., half:], sin_B1TJ, value=-1)
    turned_BHTK[..., half:].addcmul_(x_BHTK[..., :half], sin_B1TJ)
    return turned_BHTK


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), in the precision of x."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """X -> x of the same shape, over the last axis."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _NormOnCPU.apply(x, self.weight.type_as(x), self.eps)  # type: ignore[no-untyped-call]
        return self.fused(x)

    def fused(self, x: Tensor) -> Tensor:
        """The same through torch's kernel, which a CPU does not have."""
        # Under autocast x can be bfloat16 beside a float32 weight, which has no fused kernel.
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class _NormOnCPU(torch.autograd.Function):
    """Two passes over memory forward and four back, where torch makes more than twice as many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN401 (torch's own)
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_().type_as(x)
        normal = x * inverse
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        normal, inverse, weight = ctx.saved_tensors
        along = grad * normal
        # What would only make x longer is taken out: normal * mean(grad * weight * normal).
        mean = (along @ weight).div_(-len(weight)).unsqueeze(-1)
        grad_x = torch.addcmul(grad * weight, normal, mean).mul_(inverse)
        return grad_x, along.flatten(0, -2).sum(0), None


def check_sizes(width: int, depth: int, heads: int, hidden: int, rotary: bool = False) -> None:
    """A ValueError says which size of a stack of attention blocks cannot be."""
    if min(width, depth, heads) < 1 or hidden < 0:
        raise ValueError(
            f"width, depth and heads must be at least 1 and hidden at least 0, not {width}, "
            f"{depth}, {heads} and {hidden}"
        )
    if rotary and width % (2 * heads):
        raise ValueError(
            f"width must be a multiple of 2 * heads for rotary positions, not {width} with "
            f"{heads} heads"
        )
    if width % heads:
        raise ValueError(f"width must be a multiple of heads, not {width} with {heads} heads")


class Positions:
    """Where this call's tokens stand, worked out once and used by every layer.

    Without a state the tokens are positions 0..T-1 of their rows. With one, row b continues
    from its position, and everything that the state has room for is looked at, or masked.

    Args:
        tokens_BT: The new tokens.
        state: Has `position`, and the keys and values that `Cache` reads.
        rotary: The tables cos_SK and sin_SK, where attention is to turn by them.
    """

    def __init__(
        self, tokens_BT: Tensor, state: State | None, rotary: tuple[Tensor, Tensor] | None = None
    ) -> None:
        length, device = tokens_BT.shape[1], tokens_BT.device
        self.mask_B1TS: Tensor | None = None
        self.positions_BT = torch.arange(length, device=device)  # of every row alike
        if state is not None:
            position_B1 = state["position"].unsqueeze(1)
            self.positions_BT = position_B1 + self.positions_BT
            self.rows_B1 = torch.arange(position_B1.shape[0], device=device).unsqueeze(1)
            keys_S = torch.arange(state["keys"].shape[-2], device=device)
            self.mask_B1TS = (keys_S <= self.positions_BT.unsqueeze(-1)).unsqueeze(1)
        if rotary is not None:
            self.cos_BTK, self.sin_BTK = (table_SK[self.positions_BT] for table_SK in rotary)


def init_cache(
    weight: Tensor,
    rows: int,
    depth: int,
    heads: int,
    length: int,
    dtype: torch.dtype | None = None,
) -> State:
    """position_B, keys_BLHSK and values_BLHSK, empty, on the device of `weight`; without a dtype, in its own.

    The last axis of `weight` is the width of the residual stream.
    """
    shape = (rows, depth, heads, length, weight.shape[-1] // heads)
    return {
        "position": torch.zeros(rows, dtype=torch.long, device=weight.device),
        "keys": weight.new_zeros(shape, dtype=dtype),
        "values": weight.new_zeros(shape, dtype=dtype),
    }


def cache_prefix(state: State, length: int) -> State:
    """`LanguageModel.part` of a state made by `init_cache`: its first `length` positions."""
    return {name: state[name][..., :length, :] for name in ("keys", "values")}


class KVCache:
    """One layer's keys and values, in a state made by `init_cache`."""

    def __init__(self, state: State, layer: int) -> None:
        self.keys_BLHSK, self.values_BLHSK, self.layer = state["keys"], state["values"], layer

    def extend(
        self, keys_BHTK: Tensor, values_BHTK: Tensor, places: Positions
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values in their places; return all that may be attended to."""
        # All of the state is indexed at once, by tensors: a compiler then writes in place, where it
        # would copy what is written to through a view.
        layer_11 = places.rows_B1.new_full((1, 1), self.layer)
        where = (places.rows_B1, layer_11, slice(None), places.positions_BT)
        self.keys_BLHSK[where] = keys_BHTK.transpose(1, 2).to(self.keys_BLHSK.dtype)
        self.values_BLHSK[where] = values_BHTK.transpose(1, 2).to(self.values_BLHSK.dtype)
        return self.keys_BLHSK[:, self.layer], self.values_BLHSK[:, self.layer]


class MultiHeadAttention(nn.Module):
    """The four matrices of an attention, shared among several heads that look at once.

    Args:
        width: Width of the residual stream, D.
        heads: Number of heads, H; each has width D / H.
        bias: Whether the four maps add one.
        dropout: Share of the weights of the average that training drops.
    """

    def __init__(self, width: int, heads: int, *, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def split(self, x_BTD: Tensor) -> Tensor:
        """x_BHTK: each head's part of the width."""
        return x_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(
        self,
        queries_BHTK: Tensor,
        keys_BHSK: Tensor,
        values_BHSK: Tensor,
        mask_B1TS: Tensor | None,
        causal: bool = False,
    ) -> Tensor:
        """x_BTD: what all heads found, as `importance` weighs it, through the output matrix."""
        mixed_BHTK = F.scaled_dot_product_attention(
            queries_BHTK,
            keys_BHSK.type_as(queries_BHTK),
            values_BHSK.type_as(queries_BHTK),
            attn_mask=mask_B1TS,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        return self.output(mixed_BHTK.transpose(1, 2).flatten(2))


class CausalSelfAttention(MultiHeadAttention):
    """Every token looks back at itself and those before it."""

    def forward(self, x_BTD: Tensor, places: Positions, cache: KVCache | None = None) -> Tensor:
        """x_BTD -> x_BTD."""
        queries_BHTK, keys_BHSK = self.queries_and_keys(x_BTD, places)
        values_BHSK = self.split(self.value(x_BTD))
        if cache is not None:
            keys_BHSK, values_BHSK = cache.extend(keys_BHSK, values_BHSK, places)
        return self.attend(queries_BHTK, keys_BHSK, values_BHSK, places.mask_B1TS, cache is None)

    def attention_weights(self, x_BTD: Tensor, places: Positions) -> Tensor:
        """weights_BHTS, S = T: how much of each token's value a token takes in `forward` without a cache."""
        past_TS = places.positions_BT.unsqueeze(-1) >= places.positions_BT
        return attention_weights(*self.queries_and_keys(x_BTD, places), past_TS)

    def queries_and_keys(self, x_BTD: Tensor, places: Positions) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """queries_BHTK and keys_BHTK; here x says itself where its tokens stand."""
        return self.split(self.query(x_BTD)), self.split(self.key(x_BTD))


class RotarySelfAttention(CausalSelfAttention):
    """The same without biases; its queries and keys are normalised and turned by their places."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, bias=False)
        self.query_norm = RMSNorm(width // heads)
        self.key_norm = RMSNorm(width // heads)

    def queries_and_keys(self, x_BTD: Tensor, places: Positions) -> tuple[Tensor, Tensor]:
        """queries_BHTK and keys_BHTK."""
        queries_BHTK, keys_BHTK = super().queries_and_keys(x_BTD, places)
        cos_BTK, sin_BTK = places.cos_BTK, places.sin_BTK
        return (
            rotate(self.query_norm(queries_BHTK), cos_BTK, sin_BTK),
            rotate(self.key_norm(keys_BHTK), cos_BTK, sin_BTK),
        )
