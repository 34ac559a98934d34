"""The Transformer: throw away the recurrence, keep the attention (Vaswani et al. 2017).

    x = embedding(tokens) + positions
    encoder block   x = x + self-attention(norm(x))        every word looks at every word
                    x = x + mlp(norm(x))                   mlp(x) = down(relu(up(x)))
    decoder block   y = y + causal-self-attention(norm(y)) what is written so far
                    y = y + cross-attention(norm(y), x)    what was read
                    y = y + mlp(norm(y))
    logits = unembedding(norm(y))

    positions: sin(t / 10000^(2i/D)), cos(t / 10000^(2i/D)) for each pair i of the width

An average does not know the order of what it averages: without positions, "I eat bread" and
"bread eat I" are one set of words. What it mends in the recurrent encoder-decoder: between
any two words lies one step, not a chain of them, and a whole sentence is computed at once.
What it leaves broken: every token is compared with every other; and of two stacks of
blocks, what one learns the other cannot use.

Where it differs from the paper: the norms stand before the branches, not after the sums
(Xiong et al. 2020), which trains without a long warm-up; and embeddings of size 1 are what
the paper's sqrt(D) makes of its own.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from gpt.models.attention import (
    CausalSelfAttention,
    KVCache,
    MultiHeadAttention,
    Positions,
    attention_weights,
    cache_prefix,
    check_sizes,
    init_cache,
    source_mask,
)
from gpt.models.base import ActivationMap, EncoderDecoder, State


class Attention(MultiHeadAttention):
    """Everyone may look everywhere: the encoder's at itself, the decoder's at the encoder."""

    def remember(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """keys_BHSK and values_BHSK of what is looked at."""
        return self.split(self.key(x_BSD)), self.split(self.value(x_BSD))

    def forward(
        self, x_BTD: Tensor, keys_BHSK: Tensor, values_BHSK: Tensor, mask_B11S: Tensor
    ) -> Tensor:
        """x_BTD -> x_BTD."""
        return self.attend(self.split(self.query(x_BTD)), keys_BHSK, values_BHSK, mask_B11S)

    def attention_weights(self, x_BTD: Tensor, keys_BHSK: Tensor, mask_B11S: Tensor) -> Tensor:
        """weights_BHTS: how much of each value a token takes."""
        return attention_weights(self.split(self.query(x_BTD)), keys_BHSK, mask_B11S)


class FeedForward(nn.Module):
    """Two layers, each token by itself: down(bend(up(x)))."""

    def __init__(self, width: int, hidden: int, bend: nn.Module, *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.bend = bend
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD -> x_BTD."""
        return self.down(self.bend(self.up(x_BTD)))


class EncoderBlock(nn.Module):
    """One layer of the network that reads."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width, hidden, nn.ReLU())
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor) -> Tensor:
        """x_BSD -> x_BSD."""
        normed_BSD = self.attention_norm(x_BSD)
        keys_BHSK, values_BHSK = self.attention.remember(normed_BSD)
        found_BSD = self.attention(normed_BSD, keys_BHSK, values_BHSK, mask_B11S)
        x_BSD = x_BSD + self.dropout(found_BSD)
        return x_BSD + self.dropout(self.mlp(self.mlp_norm(x_BSD)))

    def attention_weights(self, x_BSD: Tensor, mask_B11S: Tensor) -> Tensor:
        """weights_BHSS of the attention, in `forward` on the same."""
        normed_BSD = self.attention_norm(x_BSD)
        keys_BHSK, _ = self.attention.remember(normed_BSD)
        return self.attention.attention_weights(normed_BSD, keys_BHSK, mask_B11S)


class DecoderBlock(nn.Module):
    """One layer of the network that writes."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width, hidden, nn.ReLU())
        self.dropout = nn.Dropout(dropout)

    def remember(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """keys_BHSK and values_BHSK of the source."""
        return self.cross.remember(x_BSD)

    def forward(
        self,
        x_BTD: Tensor,
        places: Positions,
        cache: KVCache | None,
        keys_BHSK: Tensor,
        values_BHSK: Tensor,
        mask_B11S: Tensor,
    ) -> Tensor:
        """x_BTD -> x_BTD; keys, values and mask are the source's."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), places, cache))
        found_BTD = self.cross(self.cross_norm(x_BTD), keys_BHSK, values_BHSK, mask_B11S)
        x_BTD = x_BTD + self.dropout(found_BTD)
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))

    def attention_weights(
        self, x_BTD: Tensor, places: Positions, keys_BHSK: Tensor, mask_B11S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """weights_BHTT of the attention to what is written, and weights_BHTS to the source, in `forward`."""
        normed_BTD = self.attention_norm(x_BTD)
        own_BHTT = self.attention.attention_weights(normed_BTD, places)
        x_BTD = x_BTD + self.attention(normed_BTD, places)
        return own_BHTT, self.cross.attention_weights(self.cross_norm(x_BTD), keys_BHSK, mask_B11S)


def sinusoids(positions: int, width: int) -> Tensor:
    """positions_SD: for each position, sines and cosines of ever longer wavelengths."""
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(positions).double(), frequencies)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width].float()


class Transformer(EncoderDecoder):
    """The encoder-decoder transformer.

    Args:
        vocab_size: Number of token ids, V, of source and target alike.
        context_length: The most tokens that it can read, and the most that it can write.
        width: Width of the residual stream, D.
        depth: Number of blocks of the encoder, and of the decoder, L.
        heads: Attention heads of each block, H.
        hidden: Width inside the feed-forward block, F; 0 means 4 times the width.
        dropout: Share of embeddings and branch outputs that training drops, as in the paper.
    """

    chapter = 13
    year = 2017
    paper = "Vaswani et al., Attention Is All You Need"
    idea = "throw away the recurrence"

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        width: int = 160,
        depth: int = 2,
        heads: int = 4,
        hidden: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, context_length)
        check_sizes(width, depth, heads, hidden)
        hidden = hidden or 4 * width
        self.width, self.depth, self.heads = width, depth, heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(
            EncoderBlock(width, heads, hidden, dropout) for _ in range(depth)
        )
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(
            DecoderBlock(width, heads, hidden, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.unembedding = nn.Linear(width, vocab_size, bias=False)
        self.positions_SD: Tensor
        self.register_buffer("positions_SD", sinusoids(context_length, width), persistent=False)

    @property
    def max_length(self) -> int:
        """The table of positions ends at the context."""
        return self.context_length

    def flops_per_token(self, length: int) -> float:
        """Adds scores and averages: each half of the window to itself, and the second to the first."""
        return super().flops_per_token(length) + 12.0 * self.depth * self.width * length * 3 / 4

    def init_state(self, rows: int, length: int) -> State:
        """position_B, keys_BLHSK and values_BLHSK of what is written; source_* of what was read."""
        shape, dtype = (self.embedding.weight, rows, self.depth, self.heads), self.cache_dtype
        own = init_cache(*shape, min(length, self.context_length), dtype)
        source = init_cache(*shape, self.context_length, dtype)
        return own | {
            "source_length": source["position"],
            "source_keys": source["keys"],
            "source_values": source["values"],
        }

    def prefix_view(self, state: State, length: int) -> State:
        """The first `length` positions of what is written, and all of what was read."""
        return state | cache_prefix(state, length)

    def encode(self, source_BS: Tensor, lengths_B: Tensor) -> State:
        """source_length_B, and each decoder layer's source_keys_BLHSK and source_values_BLHSK."""
        length = source_BS.shape[1]
        self._check(length)
        mask_BS = source_mask(lengths_B, length)
        x_BSD = self.dropout(self.embedding(source_BS) + self.positions_SD[:length])
        for block in self.encoder:
            x_BSD = block(x_BSD, mask_BS[:, None, None])
        x_BSD = self.encoder_norm(x_BSD)
        decoder = cast(Iterable[DecoderBlock], self.decoder)
        memories = [block.remember(x_BSD) for block in decoder]
        keys_BLHSK = torch.stack([keys_BHSK for keys_BHSK, _ in memories], dim=1)
        values_BLHSK = torch.stack([values_BHSK for _, values_BHSK in memories], dim=1)
        absent_BS = torch.arange(length, device=lengths_B.device) >= lengths_B.unsqueeze(1)
        absent_B11S1 = absent_BS[:, None, None, :, None]
        return {
            "source_length": lengths_B,
            "source_keys": keys_BLHSK.masked_fill(absent_B11S1, 0.0),
            "source_values": values_BLHSK.masked_fill(absent_B11S1, 0.0),
        }

    def decode(self, tokens_BT: Tensor, encoded: State, state: State | None = None) -> Tensor:
        """features_BTD of the tokens written so far; with a state, the new ones follow those in it."""
        length = tokens_BT.shape[1]
        self._check(length)
        places = Positions(tokens_BT, state)
        keys_BLHSK, values_BLHSK = encoded["source_keys"], encoded["source_values"]
        mask_BS = source_mask(encoded["source_length"], keys_BLHSK.shape[-2])
        x_BTD = self.dropout(self.embedding(tokens_BT) + self.positions_SD[places.positions_BT])
        for layer, block in enumerate(self.decoder):
            x_BTD = block(
                x_BTD,
                places,
                None if state is None else KVCache(state, layer),
                keys_BLHSK[:, layer],
                values_BLHSK[:, layer],
                mask_BS[:, None, None],
            )
        if state is not None:
            state["position"] += length
        return self.norm(x_BTD)

    def pair_activation_maps(
        self, source_BS: Tensor, lengths_B: Tensor, tokens_BT: Tensor
    ) -> list[ActivationMap]:
        """`encoder attention`, `decoder attention` and `cross-attention`, by layer and head.

        Rows sum to one: exactly zero on padding and, in the decoder's, above the diagonal.
        """
        encoded = self.encode(source_BS, lengths_B)
        mask_B11S = source_mask(lengths_B, source_BS.shape[1])[:, None, None]
        x_BSD = self.embedding(source_BS) + self.positions_SD[: source_BS.shape[1]]
        read = []
        for reader in cast(Iterable[EncoderBlock], self.encoder):
            read.append(reader.attention_weights(x_BSD, mask_B11S))
            x_BSD = reader(x_BSD, mask_B11S)

        self._check(tokens_BT.shape[1])
        places = Positions(tokens_BT, None)
        y_BTD = self.embedding(tokens_BT) + self.positions_SD[places.positions_BT]
        written, crossed = [], []
        for writer, keys_BHSK, values_BHSK in zip(
            cast(Iterable[DecoderBlock], self.decoder),
            encoded["source_keys"].unbind(1),
            encoded["source_values"].unbind(1),
            strict=True,
        ):
            own_BHTT, cross_BHTS = writer.attention_weights(y_BTD, places, keys_BHSK, mask_B11S)
            written.append(own_BHTT)
            crossed.append(cross_BHTS)
            y_BTD = writer(y_BTD, places, None, keys_BHSK, values_BHSK, mask_B11S)
        return [
            ActivationMap("encoder attention", torch.stack(read, dim=1), source_BS, source_BS),
            ActivationMap("decoder attention", torch.stack(written, dim=1), tokens_BT, tokens_BT),
            ActivationMap("cross-attention", torch.stack(crossed, dim=1), tokens_BT, source_BS),
        ]

    def _check(self, length: int) -> None:
        if length > self.context_length:
            raise ValueError(f"{length} tokens do not fit in the context of {self.context_length}")
