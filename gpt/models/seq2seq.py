"""Recurrent encoder-decoders: source and target may differ in length.

`Seq2Seq` (Cho et al. 2014; Sutskever et al. 2014):

    context = h_n of the encoder                    after the last source token
    decoder: h_0 = context, h_t = GRU(embedding(y_t), h_{t-1})

Unlike a single recurrent network it processes the whole source before it generates the first token.
It has a bottleneck: one vector represents a sentence of any length.

`Seq2SeqAttention` (Bahdanau et al. 2014) attends to every encoder state instead:

    e_i     = v · tanh(W1 h_dec + W2 h_enc,i)       scores: how well they match
    weights = softmax(e)                            over the source tokens
    context = sum_i weights_i h_enc,i               computed for each target token
    h_t     = GRU([embedding(y_t), context_t], h_{t-1}),  context_t from h_{t-1}

W1 and W2 project the states of two networks into one space, where they can be compared. The encoder
is bidirectional, so that each state contains what precedes and what follows its token.
Limitation: the states are still computed one after the other.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from gpt.models.attention import source_mask
from gpt.models.base import ActivationMap, State
from gpt.models.encoder_decoder import EncoderDecoder
from gpt.models.recurrent import Cell, GRUCell, trace, trace_maps


class Seq2Seq(EncoderDecoder):
    """A GRU encoder and a GRU decoder, whose initial state is the encoder's last.

    Args:
        context_length: Tokens of a window: half of them are the source, half the target.
        width: Width of embeddings and states, D.
        depth: Layers of the encoder, and of the decoder, L.
        dropout: Fraction of the inputs and outputs of each layer that training drops.
        reverse: Encode the source from its end, so that the first words of both are close.
    """

    chapter = 11
    year = 2014
    paper = "Sutskever et al., Sequence to Sequence Learning with Neural Networks"
    idea = "one network encodes the source, another decodes the target"
    equation = "h_0 of the decoder = h_n of the encoder"

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        width: int = 192,
        depth: int = 2,
        dropout: float = 0.0,
        reverse: bool = False,
    ) -> None:
        super().__init__(vocab_size, context_length)
        if min(width, depth) < 1:
            raise ValueError(f"width and depth must be at least 1, not {width} and {depth}")
        self.width, self.depth = width, depth
        self.reverse = reverse  # as Sutskever et al. did
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(GRUCell(width, width) for _ in range(depth))
        self.decoder = nn.ModuleList(GRUCell(width, width) for _ in range(depth))
        self.unembedding = nn.Linear(width, vocab_size, bias=False)

    def init_state(self, batch_size: int, length: int) -> State:  # noqa: ARG002 (constant size)
        """Return hidden_BLD of the decoder, all zeros."""
        return {"hidden": self.embedding.weight.new_zeros(batch_size, self.depth, self.width)}

    def encode(self, source_BS: Tensor, lengths_B: Tensor) -> State:
        """Return hidden_BLD, the state of each encoder layer at the last token of each source."""
        if self.reverse:
            source_BS = source_BS.gather(1, reversed_indices(lengths_B, source_BS.shape[1]))
        x_SBD = self.dropout(self.embedding(source_BS.t()))
        last_states_BD = []
        for cell in self.encoder:
            x_SBD, _ = cell(x_SBD, (torch.zeros_like(x_SBD[0]),))
            last_states_BD.append(at_last_token(x_SBD, lengths_B))
            x_SBD = self.dropout(x_SBD)
        return {"hidden": torch.stack(last_states_BD, dim=1)}

    def decode(self, tokens_BT: Tensor, encoded: State, state: State | None = None) -> Tensor:
        """Return features_BTD of target tokens."""
        x_TBD = self.dropout(self.embedding(tokens_BT.t()))
        for layer, cell in enumerate(self.decoder):
            x_TBD, (hidden_BD,) = cell(x_TBD, (encoded["hidden"][:, layer],))
            if state is not None:
                state["hidden"][:, layer] = hidden_BD
            x_TBD = self.dropout(x_TBD)
        return x_TBD.transpose(0, 1)

    def pair_activation_maps(
        self, source_BS: Tensor, lengths_B: Tensor, tokens_BT: Tensor
    ) -> list[ActivationMap]:
        """Return every gate and state of `encoder` and `decoder`, by layer, in processing order."""
        initial_BLD = self.init_state(len(source_BS), 0)["hidden"]
        context_BLD = self.encode(source_BS, lengths_B)["hidden"]
        if self.reverse:
            source_BS = source_BS.gather(1, reversed_indices(lengths_B, source_BS.shape[1]))
        maps = []
        for network, cells, hidden_BLD, ids_BT in (
            ("encoder", self.encoder, initial_BLD, source_BS),
            ("decoder", self.decoder, context_BLD, tokens_BT),
        ):
            states = ((hidden_BD,) for hidden_BD in hidden_BLD.unbind(1))
            stack = zip(cast(Iterable[Cell], cells), states, strict=True)
            maps += trace_maps(ids_BT, trace(stack, self.embedding(ids_BT.t())), network)
        return maps


def reversed_indices(lengths_B: Tensor, length: int) -> Tensor:
    """Return indices_BS for `gather` that reverse each sequence and leave its padding in place."""
    positions_S = torch.arange(length, device=lengths_B.device)
    reversed_BS = lengths_B.unsqueeze(1) - 1 - positions_S
    return torch.where(reversed_BS < 0, positions_S, reversed_BS)


def at_last_token(x_SBD: Tensor, lengths_B: Tensor) -> Tensor:
    """Return x_BD at the last token of each sequence, zeros for an empty one."""
    batch_B = torch.arange(len(lengths_B), device=lengths_B.device)
    x_BD = x_SBD[(lengths_B - 1).clamp(min=0), batch_B]
    return x_BD.masked_fill((lengths_B == 0).unsqueeze(1), 0.0)


class AdditiveAttention(nn.Module):
    """Attention whose scores are computed by a small network: v · tanh(W1 h_dec + W2 h_enc).

    `width`, D, is that of the decoder's state and of the space for comparison, `memory_width` that
    of the encoder's states.
    """

    def __init__(self, width: int, memory_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width, width, bias=False)
        # Large enough to pass gradients on, small enough that tanh does not saturate.
        self.score = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, hidden_BD: Tensor, keys_BSD: Tensor, padding_BS: Tensor) -> Tensor:
        """Return weights_BS, exactly zero at padding, from the keys W2 h_enc. They sum to one."""
        scores_BS = torch.tanh(self.query(hidden_BD).unsqueeze(1) + keys_BSD) @ self.score
        return scores_BS.masked_fill(padding_BS, -torch.inf).softmax(dim=-1)


class Seq2SeqAttention(EncoderDecoder):
    """A bidirectional GRU encoder, and a GRU decoder that attends to all encoder states.

    Args:
        context_length: Tokens of a window, half source, half target; also the longest source.
        width: Width of embeddings and states, D; an encoder state has twice that width.
        dropout: Fraction of embeddings and features that training drops.
    """

    chapter = 12
    year = 2014
    paper = "Bahdanau et al., Neural Machine Translation by Jointly Learning to Align and Translate"
    idea = "the decoder attends to every encoder state"
    equation = "context = sum_i softmax(e)_i h_i"

    def __init__(
        self, vocab_size: int, context_length: int, *, width: int = 192, dropout: float = 0.0
    ) -> None:
        super().__init__(vocab_size, context_length)
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        self.width = width
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.forward_encoder = GRUCell(width, width)
        self.backward_encoder = GRUCell(width, width)
        # No bias, so that an empty source gives an initial state of zeros.
        self.bridge = nn.Linear(width, width, bias=False)
        self.attention = AdditiveAttention(width, 2 * width)
        self.decoder = GRUCell(width, width)
        # The context's part of the input projection, which has to be computed step by step.
        self.context = nn.Linear(2 * width, 3 * width, bias=False)
        self.readout = nn.Linear(4 * width, width)
        self.unembedding = nn.Linear(width, vocab_size, bias=False)

    def init_state(self, batch_size: int, length: int) -> State:  # noqa: ARG002 (constant size)
        """Return hidden_BD, source_length_B, memory_BSD (encoder states) and keys_BSD (W2 memory)."""
        weight, source_length = self.embedding.weight, self.context_length
        return {
            "hidden": weight.new_zeros(batch_size, self.width),
            "source_length": torch.zeros(batch_size, dtype=torch.long, device=weight.device),
            "memory": weight.new_zeros(batch_size, source_length, 2 * self.width),
            "keys": weight.new_zeros(batch_size, source_length, self.width),
        }

    def encode(self, source_BS: Tensor, lengths_B: Tensor) -> State:
        """Return all of `init_state`; `hidden` is from the backward encoder at the first token."""
        x_SBD = self.dropout(self.embedding(source_BS.t()))
        initial_BD = torch.zeros_like(x_SBD[0])
        indices_SBD = reversed_indices(lengths_B, len(x_SBD)).t().unsqueeze(-1).expand_as(x_SBD)
        forward_SBD, _ = self.forward_encoder(x_SBD, (initial_BD,))
        backward_SBD, _ = self.backward_encoder(x_SBD.gather(0, indices_SBD), (initial_BD,))
        memory_SBD = torch.cat([forward_SBD, backward_SBD.gather(0, indices_SBD)], dim=-1)
        padding_BS = torch.arange(len(x_SBD), device=lengths_B.device) >= lengths_B.unsqueeze(1)
        memory_BSD = memory_SBD.transpose(0, 1).contiguous()
        memory_BSD = memory_BSD.masked_fill(padding_BS.unsqueeze(-1), 0.0)
        return {
            "hidden": torch.tanh(self.bridge(at_last_token(backward_SBD, lengths_B))),
            "source_length": lengths_B,
            "memory": memory_BSD,
            "keys": self.attention.key(memory_BSD),
        }

    def decode(self, tokens_BT: Tensor, encoded: State, state: State | None = None) -> Tensor:
        """Return features_BTD of target tokens."""
        x_BTD = self.dropout(self.embedding(tokens_BT))
        hidden_BTD, context_BTD, _ = self._decode_steps(x_BTD, encoded)
        if state is not None:
            state["hidden"].copy_(hidden_BTD[:, -1])
        concatenated_BTD = torch.cat([hidden_BTD, context_BTD, x_BTD], dim=-1)
        return self.dropout(torch.tanh(self.readout(concatenated_BTD)))

    def _decode_steps(self, x_BTD: Tensor, encoded: State) -> tuple[Tensor, Tensor, Tensor]:
        """Return the decoder's hidden_BTD, context_BTD and attention weights_BTS at each token."""
        hidden_BD = encoded["hidden"]
        padding_BS = ~source_mask(encoded["source_length"], encoded["keys"].shape[1])
        steps = []
        for input_BF in self.decoder.input(x_BTD.transpose(0, 1)):
            weights_BS = self.attention(hidden_BD, encoded["keys"], padding_BS)
            context_BD = (weights_BS.unsqueeze(1) @ encoded["memory"]).squeeze(1)
            (hidden_BD,) = self.decoder.step(input_BF + self.context(context_BD), hidden_BD)
            steps.append((hidden_BD, context_BD, weights_BS))
        hidden, context, weights = zip(*steps, strict=True)
        return torch.stack(hidden, 1), torch.stack(context, 1), torch.stack(weights, 1)

    def logits(self, features_BTD: Tensor) -> Tensor:
        """Return logits_BTV."""
        return self.unembedding(features_BTD)

    def pair_activation_maps(
        self, source_BS: Tensor, lengths_B: Tensor, tokens_BT: Tensor
    ) -> list[ActivationMap]:
        """Return `alignment`, then gates and states.

        The alignment is the attention weights with which each token is written: its rows are the
        tokens after the first, and at last the model's prediction. Gates and states are of
        `forward encoder`, `backward encoder` and `decoder`, in processing order.
        """
        encoded = self.encode(source_BS, lengths_B)
        x_BTD = self.embedding(tokens_BT)
        _, context_BTD, weights_BTS = self._decode_steps(x_BTD, encoded)
        predicted_BT = self.logits(self.decode(tokens_BT, encoded)[:, -1:]).argmax(-1)
        written_BT = torch.cat([tokens_BT[:, 1:], predicted_BT], dim=1)
        maps = [ActivationMap("alignment", weights_BTS[:, None, None], written_BT, source_BS)]
        reversed_BS = source_BS.gather(1, reversed_indices(lengths_B, source_BS.shape[1]))
        initial_BD = torch.zeros_like(encoded["hidden"])
        for network, cell, ids_BS in (
            ("forward encoder", self.forward_encoder, source_BS),
            ("backward encoder", self.backward_encoder, reversed_BS),
        ):
            layers = trace([(cell, (initial_BD,))], self.embedding(ids_BS.t()))
            maps += trace_maps(ids_BS, layers, network)
        inputs_TBF = self.decoder.input(x_BTD.transpose(0, 1))
        inputs_TBF = inputs_TBF + self.context(context_BTD.transpose(0, 1))
        decoder_trace = self.decoder.trace(inputs_TBF, (encoded["hidden"],))
        return maps + trace_maps(tokens_BT, [decoder_trace], "decoder")
