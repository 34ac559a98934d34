"""The GPT: keep only the decoder, and predict the next token (Radford et al. 2018).

    x      = embedding(tokens)
    x      = x + attention(norm(x))              in every block: look back and mix,
    x      = x + mlp(norm(x))                    then think about each token alone
    logits = unembedding(norm(x))

One pass over a text trains the prediction of every one of its tokens. This is today's
block: RMSNorm (Zhang & Sennrich 2019) before each branch, rotary positions and
normalised queries and keys (see `attention`), SwiGLU (Shazeer 2020), no biases; the
Qwen3 architecture (2025) can express it weight for weight. What it mends in the
encoder-decoder Transformer: one stack of blocks, and every text is training data.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.attention import Cache, CausalSelfAttention, Places, RMSNorm, rotary_table
from gpt.model import LanguageModel, State


class SwiGLU(nn.Module):
    """A gated feed-forward block: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD -> x_BTD, each token by itself."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """One layer: attention, then the feed-forward block, each added to what came in."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.mlp_norm = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, places: Places, cache: Cache | None) -> Tensor:
        """x_BTD -> x_BTD."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), places, cache))
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))


class GPT(LanguageModel):
    """Today's decoder-only transformer.

    Args:
        vocabulary: Number of token ids, V.
        context: The most tokens it can look back on, S.
        width: Width of the residual stream, D.
        depth: Number of blocks, L.
        heads: Attention heads of each block, H.
        hidden: Width inside the feed-forward block, F; 0 means 8/3 of the width, rounded to 64.
        tied: Use the embedding as the unembedding too.
        dropout: Share of each branch's output that training drops.
        rotary_base: Base of the rotary angles: larger sees farther.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        width: int = 192,
        depth: int = 4,
        heads: int = 3,
        hidden: int = 0,
        tied: bool = False,
        dropout: float = 0.0,
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__(vocabulary, context)
        if min(width, depth, heads) < 1 or hidden < 0:
            raise ValueError(
                f"width, depth and heads must be at least 1 and hidden at least 0, not {width}, "
                f"{depth}, {heads} and {hidden}"
            )
        if width % (2 * heads):
            raise ValueError(
                f"width must be a multiple of 2 * heads for rotary positions, not {width} with "
                f"{heads} heads"
            )
        hidden = hidden or max(64, round(width * 8 / 3 / 64) * 64)
        self.width, self.depth, self.heads = width, depth, heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, dropout) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.unembedding = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.unembedding.weight = self.embedding.weight
        cos_SK, sin_SK = rotary_table(context, width // heads, rotary_base)
        self.cos_SK: Tensor
        self.sin_SK: Tensor
        self.register_buffer("cos_SK", cos_SK, persistent=False)
        self.register_buffer("sin_SK", sin_SK, persistent=False)
        self._init_weights(tied)

    def _init_weights(self, tied: bool) -> None:
        """Every matrix keeps the size of what goes through it; every branch starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for block in cast(Iterable[Block], self.blocks):
            nn.init.zeros_(block.attention.output.weight)
            nn.init.zeros_(block.mlp.down.weight)
        if not tied:
            nn.init.zeros_(self.unembedding.weight)
            # Between 0.1 and 1 by trial: small enough to be learned away, large enough to tell apart.
            nn.init.normal_(self.embedding.weight, std=0.3)

    @property
    def limit(self) -> int:
        """The rotary table and the training end at the context."""
        return self.context

    def flops_per_token(self, length: int) -> float:
        """Adds the attention's scores and averages: 12 L D T (Chowdhery et al. 2022)."""
        tied = self.unembedding.weight is self.embedding.weight
        unembedding = 6.0 * self.embedding.weight.numel() if tied else 0.0
        return (
            super().flops_per_token(length) + unembedding + 12.0 * self.depth * self.width * length
        )

    def init_state(self, rows: int, length: int) -> State:
        """position_B, keys_BLHSK and values_BLHSK, in the dtype and on the device of the weights."""
        weight = self.embedding.weight
        shape = (rows, self.depth, self.heads, min(length, self.context), self.width // self.heads)
        return {
            "position": torch.zeros(rows, dtype=torch.long, device=weight.device),
            "keys": weight.new_zeros(shape),
            "values": weight.new_zeros(shape),
        }

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """features_BTD; with a state, the new tokens follow those already in it."""
        length = tokens_BT.shape[1]
        if length > self.context:
            raise ValueError(f"{length} tokens do not fit in the context of {self.context}")
        position_B = None if state is None else state["position"]
        places = Places(length, self.cos_SK, self.sin_SK, position_B)
        x_BTD = self.dropout(self.embedding(tokens_BT))
        for layer, block in enumerate(self.blocks):
            cache = None
            if state is not None:
                cache = Cache(state["keys"][:, layer], state["values"][:, layer])
            x_BTD = block(x_BTD, places, cache)
        if state is not None:
            state["position"] += length
        return self.norm(x_BTD)

    def logits(self, features_BTD: Tensor) -> Tensor:
        """logits_BTV."""
        return self.unembedding(features_BTD)
