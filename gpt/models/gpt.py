"""The decoder-only transformer, which predicts the next token (Radford et al. 2018).

    x      = embedding(tokens)
    x      = x + attention(norm(x))              each block: gather from earlier tokens,
    x      = x + mlp(norm(x))                    then transform each token by itself
    logits = unembedding(norm(x))

One forward pass over a text trains the prediction of every token in it. Compared with the
encoder-decoder Transformer there is one stack of blocks instead of two, and any text is training
data. A sentence pair is concatenated into one text, source before target, and only the target is
scored. Limitations: the cost of a token grows with the tokens before it, and attention reaches back
no further than the context length.

`GPT2` (2019) has learned positions, LayerNorm, GELU and biases; OpenAI's weights fit it.
`GPT` is a modern decoder: RMSNorm (Zhang & Sennrich 2019) before each branch, rotary positions
and normalized queries and keys (see `attention`), SwiGLU (Shazeer 2020), no biases. Without
n-grams, the Qwen3 architecture (2025) can express it weight for weight.
"""

from collections.abc import Callable, Iterable
from functools import partial
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
    """A gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD -> x_BTD, each token by itself."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """One layer: attention, then a feed-forward layer, each pre-normed and with a residual."""

    def __init__(
        self,
        norm: Callable[[], nn.Module],
        attention: CausalSelfAttention,
        mlp: SwiGLU | FeedForward,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(), attention
        self.mlp_norm, self.mlp = norm(), mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, positions: Positions, cache: KVCache | None) -> Tensor:
        """x_BTD -> x_BTD."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), positions, cache))
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))


class DecoderOnly(LanguageModel):
    """The base class of GPT models. A subclass provides blocks, final norm and kind of positions.

    Args:
        vocab_size: Number of token ids, V.
        context_length: Maximum number of tokens of a sequence, S.
        width: Width of the residual stream, D.
        depth: Number of blocks, L.
        heads: Attention heads of each block, H.
        block: Creates a block.
        norm: Creates a norm, here the one before the unembedding.
        tied: Whether the embedding is also the unembedding.
        dropout: Fraction of the embedding that training drops.
    """

    supported_tasks = ("text", "translation")

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        depth: int,
        heads: int,
        block: Callable[[], Block],
        norm: Callable[[], nn.Module],
        tied: bool,
        dropout: float,
    ) -> None:
        super().__init__(vocab_size, context_length)
        self.width, self.depth, self.heads = width, depth, heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm = norm()
        self.unembedding = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.unembedding.weight = self.embedding.weight

    # Forward pass

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """Return features_BTD. With a state, the new tokens follow those in it."""
        length = tokens_BT.shape[1]
        self._check_length(length)
        positions = self.positions(tokens_BT, state)
        x_BTD = self.dropout(self.embed(tokens_BT, positions, state))
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, positions, None if state is None else KVCache(state, layer))
        if state is not None:
            state["position"] += length
        return self.norm(x_BTD)

    def positions(self, tokens_BT: Tensor, state: State | None) -> Positions:
        """Return the positions of the new tokens, shared by all blocks."""
        return Positions(tokens_BT, state)

    def embed(self, tokens_BT: Tensor, positions: Positions, state: State | None) -> Tensor:  # noqa: ARG002 (used by subclasses)
        """Return x_BTD, the input of the first block."""
        return self.embedding(tokens_BT)

    @property
    def first_block(self) -> Block:
        """The first block; all have the same sizes."""
        return cast(Block, self.blocks[0])

    def flops_per_token(self, length: int) -> float:
        """Add attention scores and averages: 12 L H K T (Chowdhery et al. 2022)."""
        attention = self.first_block.attention
        width = attention.heads * attention.head_width
        return super().flops_per_token(length) + 12.0 * self.depth * width * length

    # State

    @property
    def max_length(self) -> int:
        """The context length: no position after it was trained."""
        return self.context_length

    def init_state(self, batch_size: int, length: int) -> State:
        """Return position_B and an empty KV cache, keys_BLHSK and values_BLHSK."""
        attention, length = self.first_block.attention, min(length, self.context_length)
        heads, width = attention.kv_heads, attention.head_width
        shape_BLHSK = (batch_size, self.depth, heads, length, width)
        return init_cache(self.embedding.weight, shape_BLHSK, self.cache_dtype)

    def prefix_view(self, state: State, length: int) -> State:
        """Return a view of the first `length` positions."""
        return state | cache_prefix(state, length)

    # Translation

    def features_and_targets(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return features_BTD and targets_BT. Pairs are concatenated; only targets are scored."""
        if len(batch) == 2:
            return super().features_and_targets(*batch)
        source_BS, lengths_B, tokens_BT, targets_BT = batch
        features_BND = self.features(concatenate_pairs(source_BS, lengths_B, tokens_BT))
        target_positions_T = torch.arange(tokens_BT.shape[1], device=source_BS.device)
        batch_B1 = torch.arange(len(source_BS), device=source_BS.device).unsqueeze(1)
        return features_BND[batch_B1, lengths_B.unsqueeze(1) + target_positions_T], targets_BT

    def encode_source(self, source_BS: Tensor, lengths_B: Tensor) -> State:
        """Return a state with each source as the prefix of its sequence.

        Padding is overwritten by the tokens that follow, before any of them attends to it.
        """
        state = self.init_state(len(source_BS), self.context_length)
        self.features(source_BS, self.prefix_view(state, source_BS.shape[1]))
        state["position"].copy_(lengths_B)
        return state

    def max_target_length(self, source_length: int) -> int:
        """Return what the source leaves of the context length."""
        return self.context_length - source_length

    # Visualization

    @torch.no_grad()
    def xray(self, *batch: Tensor) -> list[ActivationMap]:
        """Return the attention weights of a text. A pair is concatenated into one text."""
        if len(batch) == 3:
            batch = (concatenate_pairs(*batch),)
        return super().xray(*batch)

    def activation_maps(self, tokens_BT: Tensor) -> list[ActivationMap]:
        """Return `attention`, by layer and head. Rows sum to one; the future is exactly zero."""
        self._check_length(tokens_BT.shape[1])
        positions = self.positions(tokens_BT, None)
        x_BTD = self.embed(tokens_BT, positions, None)
        weights_BHTS = []
        for block in cast(Iterable[Block], self.blocks):
            normed_BTD = block.attention_norm(x_BTD)
            weights_BHTS.append(block.attention.attention_weights(normed_BTD, positions))
            x_BTD = block(x_BTD, positions, None)
        return [ActivationMap("attention", torch.stack(weights_BHTS, dim=1), tokens_BT, tokens_BT)]


def concatenate_pairs(source_BS: Tensor, lengths_B: Tensor, tokens_BT: Tensor) -> Tensor:
    """Return tokens_BN, N = S + T: each source, its target, then the padding of both."""
    source_length, target_length = source_BS.shape[1], tokens_BT.shape[1]
    positions_N = torch.arange(source_length + target_length, device=source_BS.device)
    target_positions_BN = (positions_N - lengths_B.unsqueeze(1)).clamp(max=target_length - 1)
    indices_BN = source_length + target_positions_BN
    indices_BN = torch.where(target_positions_BN < 0, positions_N, indices_BN)
    return torch.cat([source_BS, tokens_BT], dim=1).gather(1, indices_BN)


class GPT2(DecoderOnly):
    """GPT-2. The embedding is also the unembedding.

    Args:
        hidden: Width of the feed-forward layers, F; 0 means 4 times the width.
        dropout: Fraction of embeddings, attention weights and branch outputs dropped; OpenAI: 0.1.
        bias: Whether norms and linear layers have biases; OpenAI's do. Without is a little faster.
    """

    chapter = 14
    year = 2019
    paper = "Radford et al., Language Models are Unsupervised Multitask Learners"
    idea = "only the decoder"
    equation = "x = x + attention(x), x = x + mlp(x)"

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

        norm = partial(nn.LayerNorm, width, bias=bias)

        def block() -> Block:
            attention = CausalSelfAttention(width, heads, bias=bias, dropout=dropout)
            mlp = FeedForward(width, hidden, nn.GELU("tanh"), bias=bias)
            return Block(norm, attention, mlp, dropout)

        super().__init__(
            vocab_size, context_length, width, depth, heads, block, norm, tied=True, dropout=dropout
        )
        self.position = nn.Embedding(context_length, width)
        # As OpenAI does: smaller for the 2 L projections into the residual stream.
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in cast(Iterable[Block], self.blocks):
            for projection in (block.attention.output, block.mlp.down):
                nn.init.normal_(projection.weight, std=0.02 / (2 * depth) ** 0.5)

    def embed(self, tokens_BT: Tensor, positions: Positions, state: State | None) -> Tensor:  # noqa: ARG002
        """Return x_BTD: token embedding plus position embedding."""
        return self.embedding(tokens_BT) + self.position(positions.positions_BT)


class NGrams(nn.Module):
    """Embeddings of the last two and of the last three tokens (Pagnoni et al. 2024).

    Nearby tokens predict most of the next one, above all of the next character; a lookup costs
    almost nothing. N-grams are numbered and hashed modulo `table_size`, the most rows of each of
    the two tables. Positions before the first count as token 0.
    """

    def __init__(self, vocab_size: int, table_size: int, width: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.bigrams = nn.Embedding(min(table_size, vocab_size**2), width)
        self.trigrams = nn.Embedding(min(table_size, vocab_size**3), width)

    def forward(self, sequence_BS: Tensor, positions: Positions) -> Tensor:
        """Return x_BTD of the tokens at `positions`, from the sequence up to there."""
        positions_BT = positions.positions_BT

        def previous(distance: int) -> Tensor:
            """Return tokens_BT, each that many positions before; 0 before the first."""
            indices_BT = (positions_BT - distance).clamp(min=0).expand(sequence_BS.shape[0], -1)
            return sequence_BS.gather(1, indices_BT) * (positions_BT >= distance)

        bigrams_BT = previous(1) * self.vocab_size + previous(0)
        trigrams_BT = previous(2) * self.vocab_size**2 + bigrams_BT
        bigrams_BTD = self.bigrams(bigrams_BT % self.bigrams.num_embeddings)
        return bigrams_BTD + self.trigrams(trigrams_BT % self.trigrams.num_embeddings)


class GPT(DecoderOnly):
    """A modern decoder-only transformer.

    Args:
        hidden: Width of the feed-forward layers, F; 0 means 8/3 of the width, rounded to 64.
        kv_heads: Heads of keys and values, each for a group of query heads; 0 means as many.
        head_width: Width of a head, K; 0 means D / H.
        dropout: Fraction of the embedding and of branch outputs that training drops.
        rotary_base: Base of the rotary angles; a larger one suits longer contexts.
        ngrams: Rows of the n-gram tables; 0 for none. Speeds up small vocabularies; not in Qwen3.
    """

    chapter = 15
    year = 2025
    paper = "Yang et al., Qwen3 Technical Report; its parts in 2019-2021"
    idea = "a modern block: RMSNorm, rotary positions, SwiGLU"
    equation = "mlp(x) = down(silu(gate(x)) * up(x))"

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        width: int = 192,
        depth: int = 4,
        heads: int = 3,
        kv_heads: int = 0,
        head_width: int = 0,
        hidden: int = 0,
        tied: bool = False,
        dropout: float = 0.0,
        rotary_base: float = 10_000.0,
        ngrams: int = 0,
    ) -> None:
        check_sizes(width, depth, heads, hidden, kv_heads, head_width, rotary=True)
        if ngrams < 0:
            raise ValueError(f"ngrams must be at least 0, not {ngrams}")
        if rotary_base <= 0:
            raise ValueError(f"rotary_base must be above 0, not {rotary_base}")
        hidden = hidden or max(64, round(width * 8 / 3 / 64) * 64)

        norm = partial(RMSNorm, width)

        def block() -> Block:
            attention = RotarySelfAttention(width, heads, kv_heads, head_width)
            return Block(norm, attention, SwiGLU(width, hidden), dropout)

        super().__init__(
            vocab_size, context_length, width, depth, heads, block, norm, tied=tied, dropout=dropout
        )
        self.rotary_base = rotary_base
        self.ngrams = NGrams(vocab_size, ngrams, width) if ngrams else None
        cos_SK, sin_SK = rotary_table(context_length, head_width or width // heads, rotary_base)
        self.cos_SK: Tensor
        self.sin_SK: Tensor
        self.register_buffer("cos_SK", cos_SK, persistent=False)
        self.register_buffer("sin_SK", sin_SK, persistent=False)
        # Matrices preserve the scale of their inputs; all branches are zero at first.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for block in cast(Iterable[Block], self.blocks):
            nn.init.zeros_(block.attention.output.weight)
            nn.init.zeros_(block.mlp.down.weight)
        if self.ngrams:
            nn.init.zeros_(self.ngrams.bigrams.weight)
            nn.init.zeros_(self.ngrams.trigrams.weight)
        if not tied:
            nn.init.zeros_(self.unembedding.weight)
            # Tried 0.1 to 1: small enough to be overwritten, large enough to tell tokens apart.
            nn.init.normal_(self.embedding.weight, std=0.3)

    def positions(self, tokens_BT: Tensor, state: State | None) -> Positions:
        """Return the positions of the new tokens with their rotary angles."""
        return Positions(tokens_BT, state, (self.cos_SK, self.sin_SK))

    def embed(self, tokens_BT: Tensor, positions: Positions, state: State | None) -> Tensor:
        """Return x_BTD: token embedding plus n-gram embeddings."""
        x_BTD = self.embedding(tokens_BT)
        if self.ngrams:
            sequence_BS = tokens_BT
            if state is not None:
                sequence_BS = state["tokens"]
                sequence_BS[positions.batch_B1, positions.positions_BT] = tokens_BT
            x_BTD = x_BTD + self.ngrams(sequence_BS, positions)
        return x_BTD

    def init_state(self, batch_size: int, length: int) -> State:
        """Return position_B and an empty KV cache, and tokens_BS for n-grams."""
        state = super().init_state(batch_size, length)
        if self.ngrams:
            state["tokens"] = state["position"].new_zeros(batch_size, state["keys"].shape[3])
        return state

    def prefix_view(self, state: State, length: int) -> State:
        """Return a view of the first `length` positions."""
        tokens = {"tokens": state["tokens"][:, :length]} if self.ngrams else {}
        return super().prefix_view(state, length) | tokens
