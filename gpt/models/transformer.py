"""The Transformer: attention without recurrence (Vaswani et al. 2017).

    x = embedding(source) + positions
    encoder block   x = x + self-attention(norm(x))          attends to the whole source
                    x = x + mlp(norm(x))                     mlp(x) = down(relu(up(x)))
    y = embedding(target) + positions
    decoder block   y = y + causal-self-attention(norm(y))   attends to earlier target tokens
                    y = y + cross-attention(norm(y), x)      attends to the source
                    y = y + mlp(norm(y))
    logits = unembedding(norm(y))

    positions: sin(t / 10000^(2i/D)), cos(t / 10000^(2i/D)) for each pair i of the width

A weighted average ignores order: without positions, "I eat bread" and "bread eat I" are the same
set of words. Compared with the recurrent encoder-decoder, any two words are one step apart
instead of a chain of steps, and a whole sentence is computed at once. Limitations: every token is
compared with every other, and there are two stacks of blocks, neither of which can use what the
other learns.

Two differences from the paper: norms precede the branches (Xiong et al. 2020), unless `norm_first`
is False; and embeddings have an initial scale of 1, to which the paper scales its own by sqrt(D).

    pre-norm    x + branch(norm(x))      the sum itself is never normalized: a direct path for gradients
    post-norm   norm(x + branch(x))      as in the paper; deep stacks need a long warmup
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
from gpt.models.base import ActivationMap, State
from gpt.models.encoder_decoder import EncoderDecoder


class Attention(MultiHeadAttention):
    """Attention without a causal mask: the encoder's self-attention and the cross-attention."""

    def keys_and_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys_BHSK and values_BHSK of the attended sequence."""
        return self.split_heads(self.key(x_BSD)), self.split_heads(self.value(x_BSD))

    def forward(
        self, x_BTD: Tensor, keys_BHSK: Tensor, values_BHSK: Tensor, mask_B11S: Tensor
    ) -> Tensor:
        """x_BTD -> x_BTD."""
        return self.attend(self.split_heads(self.query(x_BTD)), keys_BHSK, values_BHSK, mask_B11S)

    def attention_weights(self, x_BTD: Tensor, keys_BHSK: Tensor, mask_B11S: Tensor) -> Tensor:
        """Return weights_BHTS of each value for each token."""
        return attention_weights(self.split_heads(self.query(x_BTD)), keys_BHSK, mask_B11S)


class FeedForward(nn.Module):
    """A feed-forward layer for each token by itself: down(activation(up(x)))."""

    def __init__(
        self, width: int, hidden: int, activation: nn.Module, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.activation = activation
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD -> x_BTD."""
        return self.down(self.activation(self.up(x_BTD)))


class Block(nn.Module):
    """A stack of branches, each of which is added to its input.

    `norm_first` (torch's name) is pre-norm, otherwise post-norm.
    """

    def __init__(self, norm_first: bool, dropout: float) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.dropout = nn.Dropout(dropout)

    def branch_input(self, x_BTD: Tensor, norm: nn.Module) -> Tensor:
        """Return what a branch sees of x."""
        return norm(x_BTD) if self.norm_first else x_BTD

    def add_branch(self, x_BTD: Tensor, branch_BTD: Tensor, norm: nn.Module) -> Tensor:
        """Return x with the output of a branch added to it."""
        x_BTD = x_BTD + self.dropout(branch_BTD)
        return x_BTD if self.norm_first else norm(x_BTD)


class EncoderBlock(Block):
    """One layer of the encoder."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, norm_first: bool = True
    ) -> None:
        super().__init__(norm_first, dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width, hidden, nn.ReLU())

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor) -> Tensor:
        """x_BSD -> x_BSD."""
        input_BSD = self.branch_input(x_BSD, self.attention_norm)
        keys_BHSK, values_BHSK = self.attention.keys_and_values(input_BSD)
        attended_BSD = self.attention(input_BSD, keys_BHSK, values_BHSK, mask_B11S)
        x_BSD = self.add_branch(x_BSD, attended_BSD, self.attention_norm)
        processed_BSD = self.mlp(self.branch_input(x_BSD, self.mlp_norm))
        return self.add_branch(x_BSD, processed_BSD, self.mlp_norm)

    def attention_weights(self, x_BSD: Tensor, mask_B11S: Tensor) -> Tensor:
        """Return weights_BHSS of the attention in `forward` with the same arguments."""
        input_BSD = self.branch_input(x_BSD, self.attention_norm)
        keys_BHSK, _ = self.attention.keys_and_values(input_BSD)
        return self.attention.attention_weights(input_BSD, keys_BHSK, mask_B11S)


class DecoderBlock(Block):
    """One layer of the decoder."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, norm_first: bool = True
    ) -> None:
        super().__init__(norm_first, dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width, hidden, nn.ReLU())

    def cross_keys_and_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys_BHSK and values_BHSK of the encoder's output.

        A method of the block, because sharded training gathers a block's parameters only in its
        own methods (`apply_fsdp`).
        """
        return self.cross.keys_and_values(x_BSD)

    def forward(
        self,
        x_BTD: Tensor,
        positions: Positions,
        cache: KVCache | None,
        keys_BHSK: Tensor,
        values_BHSK: Tensor,
        mask_B11S: Tensor,
    ) -> Tensor:
        """x_BTD -> x_BTD; keys, values and mask are those of the source."""
        input_BTD = self.branch_input(x_BTD, self.attention_norm)
        attended_BTD = self.attention(input_BTD, positions, cache)
        x_BTD = self.add_branch(x_BTD, attended_BTD, self.attention_norm)
        input_BTD = self.branch_input(x_BTD, self.cross_norm)
        attended_BTD = self.cross(input_BTD, keys_BHSK, values_BHSK, mask_B11S)
        x_BTD = self.add_branch(x_BTD, attended_BTD, self.cross_norm)
        processed_BTD = self.mlp(self.branch_input(x_BTD, self.mlp_norm))
        return self.add_branch(x_BTD, processed_BTD, self.mlp_norm)

    def attention_weights(
        self, x_BTD: Tensor, positions: Positions, keys_BHSK: Tensor, mask_B11S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return weights_BHTT of the self-attention and weights_BHTS of the cross-attention."""
        input_BTD = self.branch_input(x_BTD, self.attention_norm)
        self_BHTT = self.attention.attention_weights(input_BTD, positions)
        attended_BTD = self.attention(input_BTD, positions)
        x_BTD = self.add_branch(x_BTD, attended_BTD, self.attention_norm)
        input_BTD = self.branch_input(x_BTD, self.cross_norm)
        return self_BHTT, self.cross.attention_weights(input_BTD, keys_BHSK, mask_B11S)


def sinusoids(length: int, width: int) -> Tensor:
    """Return positions_SD: sines and cosines of increasing wavelengths for each position."""
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(length).double(), frequencies)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width].float()


class Transformer(EncoderDecoder):
    """The encoder-decoder transformer.

    Args:
        context_length: Maximum number of tokens of a source, and of a target.
        width: Width of the residual stream, D.
        depth: Number of blocks of the encoder, and of the decoder, L.
        heads: Attention heads of each block, H.
        hidden: Width of the feed-forward layers, F; 0 means 4 times the width.
        dropout: Fraction of embeddings and branch outputs that training drops; the paper's is 0.1.
        norm_first: Normalize the input of each branch (pre-norm); otherwise each sum (post-norm).
    """

    chapter = 13
    year = 2017
    paper = "Vaswani et al., Attention Is All You Need"
    idea = "attention without recurrence"
    equation = "A = softmax(Q K^T / sqrt(d)) V"

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
        norm_first: bool = True,
    ) -> None:
        super().__init__(vocab_size, context_length)
        check_sizes(width, depth, heads, hidden)
        hidden = hidden or 4 * width
        self.width, self.depth, self.heads = width, depth, heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(
            EncoderBlock(width, heads, hidden, dropout, norm_first) for _ in range(depth)
        )
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(
            DecoderBlock(width, heads, hidden, dropout, norm_first) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.unembedding = nn.Linear(width, vocab_size, bias=False)
        self.positions_SD: Tensor
        self.register_buffer("positions_SD", sinusoids(context_length, width), persistent=False)

    def encode(self, source_BS: Tensor, lengths_B: Tensor) -> State:
        """Return source_length_B, source_keys_BLHSK and source_values_BLHSK by decoder layer."""
        length = source_BS.shape[1]
        self._check_length(length)
        mask_BS = source_mask(lengths_B, length)
        x_BSD = self.dropout(self.embedding(source_BS) + self.positions_SD[:length])
        for block in self.encoder:
            x_BSD = block(x_BSD, mask_BS[:, None, None])
        x_BSD = self.encoder_norm(x_BSD)
        decoder = cast(Iterable[DecoderBlock], self.decoder)
        keys, values = zip(*(block.cross_keys_and_values(x_BSD) for block in decoder), strict=True)
        padding_BS = torch.arange(length, device=lengths_B.device) >= lengths_B.unsqueeze(1)
        padding_B11S1 = padding_BS[:, None, None, :, None]
        return {
            "source_length": lengths_B,
            "source_keys": torch.stack(keys, dim=1).masked_fill(padding_B11S1, 0.0),
            "source_values": torch.stack(values, dim=1).masked_fill(padding_B11S1, 0.0),
        }

    def decode(self, tokens_BT: Tensor, encoded: State, state: State | None = None) -> Tensor:
        """Return features_BTD of target tokens. With a state, the new ones follow those in it."""
        length = tokens_BT.shape[1]
        self._check_length(length)
        positions = Positions(tokens_BT, state)
        keys_BLHSK, values_BLHSK = encoded["source_keys"], encoded["source_values"]
        mask_BS = source_mask(encoded["source_length"], keys_BLHSK.shape[-2])
        x_BTD = self.dropout(self.embedding(tokens_BT) + self.positions_SD[positions.positions_BT])
        for layer, block in enumerate(self.decoder):
            cache = None if state is None else KVCache(state, layer)
            source = keys_BLHSK[:, layer], values_BLHSK[:, layer], mask_BS[:, None, None]
            x_BTD = block(x_BTD, positions, cache, *source)
        if state is not None:
            state["position"] += length
        return self.norm(x_BTD)

    @property
    def max_length(self) -> int:
        """The context length: the table of positions ends there."""
        return self.context_length

    def init_state(self, batch_size: int, length: int) -> State:
        """Return position_B, keys_BLHSK and values_BLHSK of the target, source_* of the source."""
        weight, head_width = self.embedding.weight, self.width // self.heads

        def cache(length: int) -> State:
            shape_BLHSK = (batch_size, self.depth, self.heads, length, head_width)
            return init_cache(weight, shape_BLHSK, self.cache_dtype)

        target, source = cache(min(length, self.context_length)), cache(self.context_length)
        return target | {
            "source_length": source["position"],
            "source_keys": source["keys"],
            "source_values": source["values"],
        }

    def prefix_view(self, state: State, length: int) -> State:
        """Return a view of the first `length` positions of the target and of the whole source."""
        return state | cache_prefix(state, length)

    def flops_per_token(self, length: int) -> float:
        """Add attention: of each half of a window to itself, and of the second to the first."""
        return super().flops_per_token(length) + 12.0 * self.depth * self.width * length * 3 / 4

    def pair_activation_maps(
        self, source_BS: Tensor, lengths_B: Tensor, tokens_BT: Tensor
    ) -> list[ActivationMap]:
        """Return `encoder attention`, `decoder attention` and `cross-attention`, by layer and head.

        Rows sum to one. Weights are exactly zero for padding and, in the decoder, for the future.
        """
        encoded = self.encode(source_BS, lengths_B)
        mask_B11S = source_mask(lengths_B, source_BS.shape[1])[:, None, None]
        x_BSD = self.embedding(source_BS) + self.positions_SD[: source_BS.shape[1]]
        encoder_maps = []
        for encoder_block in cast(Iterable[EncoderBlock], self.encoder):
            encoder_maps.append(encoder_block.attention_weights(x_BSD, mask_B11S))
            x_BSD = encoder_block(x_BSD, mask_B11S)

        self._check_length(tokens_BT.shape[1])
        positions = Positions(tokens_BT, None)
        y_BTD = self.embedding(tokens_BT) + self.positions_SD[positions.positions_BT]
        decoder_maps, cross_maps = [], []
        for block, keys_BHSK, values_BHSK in zip(
            cast(Iterable[DecoderBlock], self.decoder),
            encoded["source_keys"].unbind(1),
            encoded["source_values"].unbind(1),
            strict=True,
        ):
            self_BHTT, cross_BHTS = block.attention_weights(y_BTD, positions, keys_BHSK, mask_B11S)
            decoder_maps.append(self_BHTT)
            cross_maps.append(cross_BHTS)
            y_BTD = block(y_BTD, positions, None, keys_BHSK, values_BHSK, mask_B11S)
        return [
            ActivationMap("encoder attention", torch.stack(encoder_maps, 1), source_BS, source_BS),
            ActivationMap("decoder attention", torch.stack(decoder_maps, 1), tokens_BT, tokens_BT),
            ActivationMap("cross-attention", torch.stack(cross_maps, 1), tokens_BT, source_BS),
        ]
