"""Attention: a weighted average whose weights are learned (Vaswani et al. 2017).

    A(Q, K, V) = softmax(Q K^T / sqrt(width of a head) + mask) V

A query is compared with all keys, and the result is the average of their values, weighted by
similarity. The causal mask hides every later key. Rotary positions (Su et al. 2021) rotate queries
and keys by an angle proportional to their position, so that a score depends on the distance
between the two. RMS-normalized queries and keys (Henry et al. 2020) keep scores small. In grouped-query
attention (Ainslie et al. 2023) several query heads share a head of keys and values, and the cache is
that much smaller.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.kernels.rms_norm import rms_norm
from gpt.models.base import State


def attention_weights(
    queries_BHTK: Tensor, keys_BHSK: Tensor, mask_B1TS: Tensor | None = None
) -> Tensor:
    """Return weights_BHTS = softmax(Q K^T / sqrt(K)), exactly 0 where the mask is False.

    The layers below compute averages by torch's fused kernel instead, without materializing the
    weights, or by `chunked_causal_attention`. Keys may have fewer heads, each for a group of query
    heads.
    """
    keys_BHSK = repeat_heads(keys_BHSK, queries_BHTK.shape[-3])
    scores_BHTS = (queries_BHTK / keys_BHSK.shape[-1] ** 0.5) @ keys_BHSK.transpose(-1, -2)
    if mask_B1TS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_B1TS, -torch.inf)
    return scores_BHTS.softmax(dim=-1)


def repeat_heads(x_BHSK: Tensor, heads: int) -> Tensor:
    """Return keys or values with as many heads as there are query heads."""
    groups = heads // x_BHSK.shape[-3]
    return x_BHSK.repeat_interleave(groups, dim=-3) if groups > 1 else x_BHSK


def chunked_causal_attention(
    queries_BHTK: Tensor, keys_BHSK: Tensor, values_BHSK: Tensor, chunk: int
) -> Tensor:
    """Return averages_BHTK of causal attention, S = T, for `chunk` queries at a time.

    The weights of a chunk are computed for the keys up to its last query only, and kept for the
    backward pass. It is computed in the values' precision.
    """
    queries_BHTK = queries_BHTK.type_as(values_BHSK) / queries_BHTK.shape[-1] ** 0.5
    keys_BHSK, values_BHSK = (
        repeat_heads(x_BHSK, queries_BHTK.shape[1])
        for x_BHSK in (keys_BHSK.type_as(values_BHSK), values_BHSK)
    )
    future_TT = torch.ones(chunk, chunk, dtype=torch.bool, device=queries_BHTK.device).triu(1)
    averages, end = [], 0
    for chunk_BHTK in queries_BHTK.split(chunk, dim=2):
        start, end = end, end + chunk_BHTK.shape[2]
        scores_BHTS = chunk_BHTK @ keys_BHSK[:, :, :end].mT
        # Without a gradient: that of the softmax is 0 wherever a weight is.
        with torch.no_grad():
            future = future_TT[: end - start, : end - start]
            scores_BHTS[..., start:].masked_fill_(future, -torch.inf)
        averages.append(scores_BHTS.softmax(-1) @ values_BHSK[:, :, :end])
    return torch.cat(averages, dim=2)


def source_mask(lengths_B: Tensor, length: int) -> Tensor:
    """Return mask_BS: True on each row's own tokens, False on the padding after them.

    A row of length 0 is True everywhere, as a softmax needs at least one score; the values of such
    a row must be zero.
    """
    positions_S = torch.arange(length, device=lengths_B.device)
    lengths_B1 = lengths_B.unsqueeze(1)
    return (positions_S < lengths_B1) | (lengths_B1 == 0)


def rotary_table(positions: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cos_SK and sin_SK of position * base^(-2i / K), i < K/2, the same in both halves of K."""
    frequencies = base ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(positions).double(), frequencies)
    angles_SK = torch.cat([angles, angles], dim=-1)
    return angles_SK.cos().float(), angles_SK.sin().float()


def rotate(x_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + K/2}) by its position's angle, given as its cosine and sine."""
    first_BHTJ, second_BHTJ = x_BHTK.chunk(2, dim=-1)
    turned_BHTK = torch.cat([-second_BHTJ, first_BHTJ], dim=-1)
    cos_B1TK, sin_B1TK = (table.unsqueeze(-3).type_as(x_BHTK) for table in (cos_BTK, sin_BTK))
    return x_BHTK * cos_B1TK + turned_BHTK * sin_B1TK


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), in the precision of x."""

    eps: float  # torch's may be None

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)
        self.is_for_cpu = False
        """Whether training computes it by `rms_norm` of gpt.kernels, which is faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of x."""
        if self.is_for_cpu and self.training and not torch.compiler.is_compiling():
            return rms_norm(x, self.weight, self.eps)
        # Under autocast x can be bfloat16 and the weight float32; no fused kernel takes both.
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


def check_sizes(
    width: int,
    depth: int,
    heads: int,
    hidden: int,
    kv_heads: int = 0,
    head_width: int = 0,
    rotary: bool = False,
) -> None:
    """Raise a ValueError if the sizes of a stack of attention blocks do not fit together."""
    if min(width, depth, heads) < 1 or hidden < 0:
        raise ValueError(
            f"width, depth and heads must be at least 1 and hidden at least 0, not {width}, "
            f"{depth}, {heads} and {hidden}"
        )
    if kv_heads < 0 or (kv_heads and heads % kv_heads):
        raise ValueError(f"kv_heads must divide heads, not {kv_heads} with {heads} heads")
    if head_width < 0 or (rotary and head_width % 2):
        raise ValueError(f"head_width must be even and at least 0, not {head_width}")
    if not head_width and width % (2 * heads if rotary else heads):
        divisor = "2 * heads for rotary positions" if rotary else "heads"
        raise ValueError(f"width must be a multiple of {divisor}, not {width} with {heads} heads")


class Positions:
    """Positions and mask of one forward pass, computed once and shared by all layers.

    Without a state, the tokens are at positions 0..T-1. With a state made by `init_cache`, each
    sequence continues from its position and attends to all positions that the state has room for,
    less those masked. `rotary` are the tables cos_SK and sin_SK, for rotary attention.
    """

    def __init__(
        self, tokens_BT: Tensor, state: State | None, rotary: tuple[Tensor, Tensor] | None = None
    ) -> None:
        length, device = tokens_BT.shape[1], tokens_BT.device
        self.mask_B1TS: Tensor | None = None
        self.positions_BT = torch.arange(length, device=device)  # the same for all sequences
        if state is not None:
            position_B1 = state["position"].unsqueeze(1)
            self.positions_BT = position_B1 + self.positions_BT
            self.batch_B1 = torch.arange(position_B1.shape[0], device=device).unsqueeze(1)
            keys_S = torch.arange(state["keys"].shape[-2], device=device)
            self.mask_B1TS = (keys_S <= self.positions_BT.unsqueeze(-1)).unsqueeze(1)
        if rotary is not None:
            self.cos_BTK, self.sin_BTK = (table_SK[self.positions_BT] for table_SK in rotary)


def init_cache(
    weight: Tensor, shape_BLHSK: tuple[int, int, int, int, int], dtype: torch.dtype | None
) -> State:
    """Return an empty KV cache of that shape: position_B, keys_BLHSK and values_BLHSK.

    It is on the device of `weight`, and has its dtype if `dtype` is None.
    """
    return {
        "position": torch.zeros(shape_BLHSK[0], dtype=torch.long, device=weight.device),
        "keys": weight.new_zeros(shape_BLHSK, dtype=dtype),
        "values": weight.new_zeros(shape_BLHSK, dtype=dtype),
    }


def cache_prefix(state: State, length: int) -> State:
    """Return views of the first `length` positions of a KV cache's keys and values."""
    return {name: state[name][..., :length, :] for name in ("keys", "values")}


class KVCache:
    """One layer's keys and values, in a state made by `init_cache`."""

    def __init__(self, state: State, layer: int) -> None:
        self.keys_BLHSK, self.values_BLHSK, self.layer = state["keys"], state["values"], layer

    def extend(
        self, keys_BHTK: Tensor, values_BHTK: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values at their positions; return all keys_BHSK and values_BHSK."""
        # The whole state is indexed at once, by tensors: a compiler then writes in place, where it
        # would copy a view before writing to it.
        layer_11 = positions.batch_B1.new_full((1, 1), self.layer)
        index = (positions.batch_B1, layer_11, slice(None), positions.positions_BT)
        self.keys_BLHSK[index] = keys_BHTK.transpose(1, 2).to(self.keys_BLHSK.dtype)
        self.values_BLHSK[index] = values_BHTK.transpose(1, 2).to(self.values_BLHSK.dtype)
        return self.keys_BLHSK[:, self.layer], self.values_BLHSK[:, self.layer]


class MultiHeadAttention(nn.Module):
    """The query, key, value and output matrices of attention, each shared by all heads.

    Args:
        width: Width of the residual stream, D.
        heads: Query heads, H.
        kv_heads: Heads of keys and values, each for a group of query heads; 0 means as many.
        head_width: Width of a head, K; 0 means D / H.
        bias: Whether the matrices have biases.
        dropout: Fraction of attention weights that training drops.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int = 0,
        head_width: int = 0,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.query_chunk = 0
        """Training computes causal attention for this many queries at a time; 0: by torch's fused kernel."""
        self.heads, self.kv_heads, self.dropout = heads, kv_heads or heads, dropout
        self.head_width = head_width or width // heads
        self.query = nn.Linear(width, heads * self.head_width, bias=bias)
        self.key = nn.Linear(width, self.kv_heads * self.head_width, bias=bias)
        self.value = nn.Linear(width, self.kv_heads * self.head_width, bias=bias)
        self.output = nn.Linear(heads * self.head_width, width, bias=bias)

    def split_heads(self, x_BTN: Tensor) -> Tensor:
        """Return x_BHTK: the last axis divided into heads."""
        return x_BTN.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def attend(
        self, queries_BHTK: Tensor, keys_BHSK: Tensor, values_BHSK: Tensor, mask_B1TS: Tensor | None
    ) -> Tensor:
        """Return x_BTD: averages of values by `attention_weights`, through the output matrix.

        Without a mask, each token attends to itself and those before it.
        """
        if self.query_chunk and self.training and mask_B1TS is None and not self.dropout:
            averages_BHTK = chunked_causal_attention(
                queries_BHTK, keys_BHSK, values_BHSK, self.query_chunk
            )
        else:
            averages_BHTK = F.scaled_dot_product_attention(
                queries_BHTK,
                keys_BHSK.type_as(queries_BHTK),
                values_BHSK.type_as(queries_BHTK),
                attn_mask=mask_B1TS,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=mask_B1TS is None,
                **({"enable_gqa": True} if self.kv_heads < self.heads else {}),
            )
        return self.output(averages_BHTK.transpose(1, 2).flatten(2))


class CausalSelfAttention(MultiHeadAttention):
    """Every token attends to itself and those before it."""

    def forward(self, x_BTD: Tensor, positions: Positions, cache: KVCache | None = None) -> Tensor:
        """x_BTD -> x_BTD; with a cache, also attends to the positions in it, and extends it."""
        queries_BHTK, keys_BHSK = self.queries_and_keys(x_BTD, positions)
        values_BHSK = self.split_heads(self.value(x_BTD))
        if cache is not None:
            keys_BHSK, values_BHSK = cache.extend(keys_BHSK, values_BHSK, positions)
        return self.attend(queries_BHTK, keys_BHSK, values_BHSK, positions.mask_B1TS)

    def attention_weights(self, x_BTD: Tensor, positions: Positions) -> Tensor:
        """Return weights_BHTS, S = T, with which `forward` without a cache averages the values."""
        mask_TS = positions.positions_BT.unsqueeze(-1) >= positions.positions_BT
        return attention_weights(*self.queries_and_keys(x_BTD, positions), mask_TS)

    def queries_and_keys(self, x_BTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return queries_BHTK and keys_BHTK; here x already contains the position embeddings."""
        return self.split_heads(self.query(x_BTD)), self.split_heads(self.key(x_BTD))


class RotarySelfAttention(CausalSelfAttention):
    """Causal self-attention without biases, with normalized and rotated queries and keys."""

    def __init__(self, width: int, heads: int, kv_heads: int = 0, head_width: int = 0) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, head_width=head_width, bias=False)
        self.query_norm = RMSNorm(self.head_width)
        self.key_norm = RMSNorm(self.head_width)

    def queries_and_keys(self, x_BTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return queries_BHTK and keys_BHTK."""
        queries_BHTK, keys_BHTK = super().queries_and_keys(x_BTD, positions)
        angles = positions.cos_BTK, positions.sin_BTK
        queries_BHTK = rotate(self.query_norm(queries_BHTK), *angles)
        return queries_BHTK, rotate(self.key_norm(keys_BHTK), *angles)
