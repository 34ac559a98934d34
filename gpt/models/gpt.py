"""The decoder alone: keep only the half that writes, and predict the next token (Radford et al. 2018).

    x      = embedding(tokens)
    x      = x + attention(norm(x))              in every block: look back and mix,
    x      = x + mlp(norm(x))                    then think about each token alone
    logits = unembedding(norm(x))

One pass over a text trains the prediction of every one of its tokens. What it mends in the
encoder-decoder Transformer: one stack of blocks, and every text is training data. A pair of
sentences is one more text: the source, then the target, which alone is scored. What it
leaves broken: a token costs the more the longer the text before it, and no further than
the context does it look.

`GPT2` (2019) has learned positions, LayerNorm, GELU and biases: weight for weight OpenAI's.
`GPT` is today's block: RMSNorm (Zhang & Sennrich 2019) before each branch, rotary positions
and normalised queries and keys (see `attention`), SwiGLU (Shazeer 2020), no biases; the
Qwen3 architecture (2025) can express it weight for weight.
"""

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.attention import (
    CausalSelfAttention,
    KVCache,
    Positions,
    RMSNorm,
    RotarySelfAttention,
    cache_prefix,
    check_sizes,
    init_cache,
    rotary_table,
)
from gpt.models.base import ActivationMap, LanguageModel, State
from gpt.models.transformer import FeedForward


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

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: CausalSelfAttention,
        mlp_norm: nn.Module,
        mlp: SwiGLU | FeedForward,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, places: Positions, cache: KVCache | None) -> Tensor:
        """x_BTD -> x_BTD."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), places, cache))
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))


class DecoderOnly(LanguageModel):
    """What every GPT shares; a model brings its blocks, its last norm and its kind of positions.

    Args:
        vocab_size: Number of token ids, V.
        context_length: The most tokens it can look back on, S.
        width: Width of the residual stream, D.
        depth: Number of blocks, L.
        heads: Attention heads of each block, H.
        block: Makes one block.
        norm: What the unembedding's input goes through.
        tied: Use the embedding as the unembedding too.
        dropout: Share of the embedding that training drops.
    """

    supported_tasks = ("text", "translation")

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        width: int,
        depth: int,
        heads: int,
        block: Callable[[], Block],
        norm: nn.Module,
        tied: bool,
        dropout: float,
    ) -> None:
        super().__init__(vocab_size, context_length)
        self.width, self.depth, self.heads = width, depth, heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm = norm
        self.unembedding = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.unembedding.weight = self.embedding.weight

    def positions(self, tokens_BT: Tensor, state: State | None) -> Positions:
        """Where the tokens stand, as the model's attention wants to know it."""
        return Positions(tokens_BT, state)

    def embed(self, tokens_BT: Tensor, places: Positions, state: State | None) -> Tensor:  # noqa: ARG002 (for those that need it)
        """x_BTD, what the first block sees."""
        return self.embedding(tokens_BT)

    @property
    def max_length(self) -> int:
        """Positions and the training end at the context."""
        return self.context_length

    def max_target_length(self, source: int) -> int:
        """What the source leaves of the context."""
        return self.context_length - source

    def flops_per_token(self, length: int) -> float:
        """Adds the attention's scores and averages: 12 L D T (Chowdhery et al. 2022)."""
        tied = self.unembedding.weight is self.embedding.weight
        unembedding = 6.0 * self.embedding.weight.numel() if tied else 0.0
        return (
            super().flops_per_token(length) + unembedding + 12.0 * self.depth * self.width * length
        )

    def init_state(self, rows: int, length: int) -> State:
        """position_B, keys_BLHSK and values_BLHSK, on the device of the weights."""
        weight, length = self.embedding.weight, min(length, self.context_length)
        return init_cache(weight, rows, self.depth, self.heads, length, self.cache_dtype)

    def prefix_view(self, state: State, length: int) -> State:
        """Its first `length` positions."""
        return state | cache_prefix(state, length)

    def encode_source(self, source_BS: Tensor, lengths_B: Tensor) -> State:
        """A state in which each row has its source for a prefix.

        What follows is written over the padding before anything looks there.
        """
        state = self.init_state(len(source_BS), self.context_length)
        self.features(source_BS, self.prefix_view(state, source_BS.shape[1]))
        state["position"].copy_(lengths_B)
        return state

    def features_and_targets(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """features_BTD and targets_BT; of pairs, the target's part of one text: source, then target."""
        if len(batch) == 2:
            return super().features_and_targets(*batch)
        source_BS, lengths_B, tokens_BT, targets_BT = batch
        features_BND = self.features(one_text(source_BS, lengths_B, tokens_BT))
        places_T = torch.arange(tokens_BT.shape[1], device=source_BS.device)
        rows_B1 = torch.arange(len(source_BS), device=source_BS.device).unsqueeze(1)
        return features_BND[rows_B1, lengths_B.unsqueeze(1) + places_T], targets_BT

    @torch.no_grad()
    def xray(self, *batch: Tensor) -> list[ActivationMap]:
        """What it listens to in text; a pair is one text: source, then target."""
        if len(batch) == 3:
            batch = (one_text(*batch),)
        return super().xray(*batch)

    def activation_maps(self, tokens_BT: Tensor) -> list[ActivationMap]:
        """`attention`, by layer and head: rows sum to one, exactly zero above the diagonal."""
        self._check(tokens_BT.shape[1])
        places = self.positions(tokens_BT, None)
        x_BTD = self.embed(tokens_BT, places, None)
        maps = []
        for block in cast(Iterable[Block], self.blocks):
            maps.append(block.attention.attention_weights(block.attention_norm(x_BTD), places))
            x_BTD = block(x_BTD, places, None)
        return [ActivationMap("attention", torch.stack(maps, dim=1), tokens_BT, tokens_BT)]

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """features_BTD; with a state, the new tokens follow those already in it."""
        length = tokens_BT.shape[1]
        self._check(length)
        places = self.positions(tokens_BT, state)
        x_BTD = self.dropout(self.embed(tokens_BT, places, state))
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, places, None if state is None else KVCache(state, layer))
        if state is not None:
            state["position"] += length
        return self.norm(x_BTD)

    def _check(self, length: int) -> None:
        if length > self.context_length:
            raise ValueError(f"{length} tokens do not fit in the context of {self.context_length}")


def one_text(source_BS: Tensor, lengths_B: Tensor, tokens_BT: Tensor) -> Tensor:
    """tokens_BN, N = S + T: each row's target moves up to its source's end, the padding goes behind both."""
    source, length = source_BS.shape[1], tokens_BT.shape[1]
    places_N = torch.arange(source + length, device=source_BS.device)
    after_BN = (places_N - lengths_B.unsqueeze(1)).clamp(max=length - 1)
    from_BN = torch.where(after_BN < 0, places_N, source + after_BN)
    return torch.cat([source_BS, tokens_BT], dim=1).gather(1, from_BN)


class GPT2(DecoderOnly):
    """GPT-2, the unembedding tied to the embedding.

    Args:
        vocab_size: Number of token ids, V.
        context_length: The most tokens it can look back on, S.
        width: Width of the residual stream, D.
        depth: Number of blocks, L.
        heads: Attention heads of each block, H.
        hidden: Width inside the feed-forward block, F; 0 means 4 times the width.
        dropout: Share of the embedding, the attention weights and each branch's output that
            training drops; OpenAI's is 0.1.
        bias: Whether norms and linear maps add one; OpenAI's do, and without they are a little faster.
    """

    chapter = 14
    year = 2019
    paper = "Radford et al., Language Models are Unsupervised Multitask Learners"
    idea = "keep only the decoder"

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        width: int = 192,
        depth: int = 4,
        heads: int = 3,
        hidden: int = 0,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        check_sizes(width, depth, heads, hidden)
        hidden = hidden or 4 * width

        def block() -> Block:
            return Block(
                nn.LayerNorm(width, bias=bias),
                CausalSelfAttention(width, heads, bias=bias, dropout=dropout),
                nn.LayerNorm(width, bias=bias),
                FeedForward(width, hidden, nn.GELU("tanh"), bias=bias),
                dropout,
            )

        super().__init__(
            vocab_size,
            context_length,
            width=width,
            depth=depth,
            heads=heads,
            block=block,
            norm=nn.LayerNorm(width, bias=bias),
            tied=True,
            dropout=dropout,
        )
        self.position = nn.Embedding(context_length, width)
        self._init_weights()

    def _init_weights(self) -> None:
        """OpenAI's: all small, and the smaller what is added to the stream the more often it is."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in cast(Iterable[Block], self.blocks):
            for matrix in (block.attention.output, block.mlp.down):
                nn.init.normal_(matrix.weight, std=0.02 / (2 * self.depth) ** 0.5)

    def embed(self, tokens_BT: Tensor, places: Positions, state: State | None) -> Tensor:  # noqa: ARG002
        """x_BTD: a vector for what the token is, plus one for where it stands."""
        return self.embedding(tokens_BT) + self.position(places.positions_BT)


class NGrams(nn.Module):
    """A vector for the last two tokens together, and one for the last three (Pagnoni et al. 2024).

    What stands close by is most of what there is to know about the next character: looked up, not
    computed, it costs next to nothing. N-grams are numbered and share the rows of a table modulo
    its size. What is before the first token counts as token 0.

    Args:
        vocab_size: Number of token ids, V.
        rows: Rows of each of the two tables.
        width: Width of a vector, D.
    """

    def __init__(self, vocab_size: int, rows: int, width: int) -> None:
        super().__init__()
        self.vocabulary = vocab_size
        self.pairs = nn.Embedding(min(rows, vocab_size**2), width)
        self.triples = nn.Embedding(min(rows, vocab_size**3), width)

    def forward(self, seen_BS: Tensor, places: Positions) -> Tensor:
        """x_BTD of the tokens in their places; seen_BS are those from the first position on."""
        positions_BT = places.positions_BT

        def back(distance: int) -> Tensor:
            """tokens_BT so many places before each."""
            there_BT = (positions_BT - distance).clamp(min=0).expand(seen_BS.shape[0], -1)
            return seen_BS.gather(1, there_BT) * (positions_BT >= distance)

        pairs_BT = back(1) * self.vocabulary + back(0)
        triples_BT = back(2) * self.vocabulary**2 + pairs_BT
        return self.pairs(pairs_BT % len(self.pairs.weight)) + self.triples(
            triples_BT % len(self.triples.weight)
        )


class GPT(DecoderOnly):
    """Today's decoder-only transformer.

    Args:
        vocab_size: Number of token ids, V.
        context_length: The most tokens it can look back on, S.
        width: Width of the residual stream, D.
        depth: Number of blocks, L.
        heads: Attention heads of each block, H.
        hidden: Width inside the feed-forward block, F; 0 means 8/3 of the width, rounded to 64.
        tied: Use the embedding as the unembedding too.
        dropout: Share of each branch's output that training drops.
        rotary_base: Base of the rotary angles: larger sees farther.
        ngrams: Rows of a table of pairs of tokens and of one of triples, which are added to the
            embedding; 0 for neither. Learns a small vocabulary much sooner; no other tool knows it.
    """

    chapter = 15
    year = 2025
    paper = "Yang et al., Qwen3 Technical Report; its parts in 2019-2021"
    idea = "today's block"

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        width: int = 192,
        depth: int = 4,
        heads: int = 3,
        hidden: int = 0,
        tied: bool = False,
        dropout: float = 0.0,
        rotary_base: float = 10_000.0,
        ngrams: int = 0,
    ) -> None:
        check_sizes(width, depth, heads, hidden, rotary=True)
        if ngrams < 0:
            raise ValueError(f"ngrams must be at least 0, not {ngrams}")
        hidden = hidden or max(64, round(width * 8 / 3 / 64) * 64)

        def block() -> Block:
            return Block(
                RMSNorm(width),
                RotarySelfAttention(width, heads),
                RMSNorm(width),
                SwiGLU(width, hidden),
                dropout,
            )

        super().__init__(
            vocab_size,
            context_length,
            width=width,
            depth=depth,
            heads=heads,
            block=block,
            norm=RMSNorm(width),
            tied=tied,
            dropout=dropout,
        )
        self.ngrams = NGrams(vocab_size, ngrams, width) if ngrams else None
        cos_SK, sin_SK = rotary_table(context_length, width // heads, rotary_base)
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
        if self.ngrams:
            nn.init.zeros_(self.ngrams.pairs.weight)
            nn.init.zeros_(self.ngrams.triples.weight)
        if not tied:
            nn.init.zeros_(self.unembedding.weight)
            # Between 0.1 and 1 by trial: small enough to be learned away, large enough to tell apart.
            nn.init.normal_(self.embedding.weight, std=0.3)

    def positions(self, tokens_BT: Tensor, state: State | None) -> Positions:
        """With the turns of the positions."""
        return Positions(tokens_BT, state, (self.cos_SK, self.sin_SK))

    def init_state(self, rows: int, length: int) -> State:
        """With n-grams also tokens_BS, to look back on."""
        state = super().init_state(rows, length)
        if self.ngrams:
            state["tokens"] = state["position"].new_zeros(rows, state["keys"].shape[3])
        return state

    def prefix_view(self, state: State, length: int) -> State:
        """Its first `length` positions."""
        part = super().prefix_view(state, length)
        return part | {"tokens": state["tokens"][:, :length]} if self.ngrams else part

    def embed(self, tokens_BT: Tensor, places: Positions, state: State | None) -> Tensor:
        """x_BTD: a vector for what the token is, and for what it is with those before it."""
        x_BTD = self.embedding(tokens_BT)
        if self.ngrams:
            seen_BS = tokens_BT
            if state is not None:
                seen_BS = state["tokens"]
                seen_BS[places.rows_B1, places.positions_BT] = tokens_BT
            x_BTD = x_BTD + self.ngrams(seen_BS, places)
        return x_BTD
