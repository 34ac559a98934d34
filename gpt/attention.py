"""Attention: a weighted average whose weights are learned (Vaswani et al. 2017).

    A(Q, K, V) = softmax(Q K^T / sqrt(width of a head) + mask) V

A query looks for keys like itself and takes the average of their values. The causal
mask hides every key that comes later; rotary positions (Su et al. 2021) turn queries
and keys by an angle that grows with their place, so that a score depends on how far
apart the two are; RMS-normalised queries and keys (Henry et al. 2020) keep scores small.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary_table(positions: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos_SK and sin_SK: the turn at each position, each angle twice, for both halves of a head."""
    frequencies = base ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(positions).double(), frequencies)
    angles_SK = torch.cat([angles, angles], dim=-1)
    return angles_SK.cos().float(), angles_SK.sin().float()


def rotate(x_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Turn each pair (i, i + K/2) of a head by its position's angle."""
    first, second = x_BHTK.chunk(2, dim=-1)
    turned_BHTK = torch.cat([-second, first], dim=-1)
    return x_BHTK * cos_BTK.unsqueeze(-3) + turned_BHTK * sin_BTK.unsqueeze(-3)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2)) * weight (Zhang & Sennrich 2019), in the precision of x."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """X -> x of the same shape, over the last axis."""
        # Under autocast x can be bfloat16 beside a float32 weight, which has no fused kernel.
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class Places:
    """Where this call's tokens stand, worked out once and used by every layer.

    Without a cache the tokens are positions 0..T-1 of their rows. With one, row b
    continues from `position_B[b]`, and the cache is read as far as the longest row goes.
    """

    def __init__(
        self, length: int, cos_SK: Tensor, sin_SK: Tensor, position_B: Tensor | None = None
    ) -> None:
        self.mask_B1TS: Tensor | None = None
        if position_B is None:
            self.cos_BTK, self.sin_BTK = cos_SK[:length], sin_SK[:length]
            return
        self.rows_B1 = torch.arange(len(position_B), device=position_B.device).unsqueeze(1)
        self.positions_BT = position_B.unsqueeze(1) + torch.arange(length, device=position_B.device)
        self.cos_BTK, self.sin_BTK = cos_SK[self.positions_BT], sin_SK[self.positions_BT]
        self.read = int(position_B.max()) + length
        if len(position_B) > 1 or length > 1:
            keys_S = torch.arange(self.read, device=position_B.device)
            self.mask_B1TS = (keys_S <= self.positions_BT.unsqueeze(-1)).unsqueeze(1)


class Cache:
    """One layer's keys_BHSK and values_BHSK, views into the model's state."""

    def __init__(self, keys_BHSK: Tensor, values_BHSK: Tensor) -> None:
        self.keys_BHSK, self.values_BHSK = keys_BHSK, values_BHSK

    def extend(
        self, keys_BHTK: Tensor, values_BHTK: Tensor, places: Places
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values in their places; return all that may be attended to."""
        for kept_BHSK, new_BHTK in ((self.keys_BHSK, keys_BHTK), (self.values_BHSK, values_BHTK)):
            kept_BHSK[places.rows_B1, :, places.positions_BT] = new_BHTK.transpose(1, 2).to(
                kept_BHSK.dtype
            )
        return self.keys_BHSK[:, :, : places.read], self.values_BHSK[:, :, : places.read]


class CausalSelfAttention(nn.Module):
    """Every token looks back at itself and those before it, with several heads at once.

    Args:
        width: Width of the residual stream, D.
        heads: Number of heads, H; each has width D / H.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.query_norm = RMSNorm(width // heads)
        self.key_norm = RMSNorm(width // heads)

    def forward(self, x_BTD: Tensor, places: Places, cache: Cache | None = None) -> Tensor:
        """x_BTD -> x_BTD."""

        def split(x_BTD: Tensor) -> Tensor:
            return x_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        cos_BTK, sin_BTK = places.cos_BTK, places.sin_BTK
        queries_BHTK = rotate(self.query_norm(split(self.query(x_BTD))), cos_BTK, sin_BTK)
        keys_BHSK = rotate(self.key_norm(split(self.key(x_BTD))), cos_BTK, sin_BTK)
        values_BHSK = split(self.value(x_BTD))
        if cache is not None:
            keys_BHSK, values_BHSK = cache.extend(keys_BHSK, values_BHSK, places)
        mixed_BHTK = F.scaled_dot_product_attention(
            queries_BHTK,
            keys_BHSK,
            values_BHSK,
            attn_mask=places.mask_B1TS,
            is_causal=cache is None,
        )
        return self.output(mixed_BHTK.transpose(1, 2).flatten(2))
