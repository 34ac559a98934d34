"""Encoder and decoder: one network reads, one writes, and so in and out differ in length.

`Seq2Seq` (Cho et al. 2014; Sutskever et al. 2014):

    context = h_n of the encoder                    after the last word of the source
    decoder: h_0 = context, h_t = GRU(embedding(y_t), h_{t-1})

It mends what a single recurrent network cannot do: read all before the first word is
written. It leaves a bottleneck: one vector carries a sentence, however long.

`Seq2SeqAttention` (Bahdanau et al. 2014) looks back at every encoder state instead:

    e_i     = v . tanh(W1 h_dec + W2 h_enc,i)       how well they fit
    weights = softmax(e)                            over the words of the source
    context = sum_i weights_i h_enc,i               a fresh one for each word written
    h_t     = GRU([embedding(y_t), context_t], h_{t-1}),  context_t from h_{t-1}

W1 and W2 bring two networks' states into one space, where they can be compared. Its encoder
reads in both directions, so that each state knows what comes before its word and after. It
leaves the chain: the states are still computed one after the other.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from gpt.models.attention import source_mask
from gpt.models.base import ActivationMap, EncoderDecoder, State
from gpt.models.recurrent import Cell, GRUCell, over_time, watch


def _check_sizes(width: int, depth: int) -> None:
    if min(width, depth) < 1:
        raise ValueError(f"width and depth must be at least 1, not {width} and {depth}")


class Seq2Seq(EncoderDecoder):
    """An encoder and a decoder of gated recurrent units, joined by one state per layer.

    Args:
        vocab_size: Number of token ids, V, of source and target alike.
        context_length: Tokens of a window: half of them are read, half written.
        width: Width of embeddings and states, D.
        depth: Recurrent layers of the encoder, and of the decoder, L.
        dropout: Share of what enters and leaves each layer that training drops.
        reverse: Read the source from its end: its first word is then nearest to the target's
            first (Sutskever et al. 2014).
    """

    chapter = 11
    year = 2014
    paper = "Sutskever et al., Sequence to Sequence Learning with Neural Networks"
    idea = "one network reads, one writes"

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
        _check_sizes(width, depth)
        self.width, self.depth, self.reverse = width, depth, reverse
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(GRUCell(width, width) for _ in range(depth))
        self.decoder = nn.ModuleList(GRUCell(width, width) for _ in range(depth))
        self.unembedding = nn.Linear(width, vocab_size, bias=False)

    def init_state(self, rows: int, length: int) -> State:  # noqa: ARG002 (the same for all)
        """hidden_BLD: the decoder's state, which begins as the encoder's last."""
        return {"hidden": self.embedding.weight.new_zeros(rows, self.depth, self.width)}

    def encode(self, source_BS: Tensor, lengths_B: Tensor) -> State:
        """hidden_BLD, each layer's state after the last token of each row."""
        if self.reverse:
            source_BS = source_BS.gather(1, reversal(lengths_B, source_BS.shape[1]))
        x_SBD = self.dropout(self.embedding(source_BS.t()))
        lasts_BD = []
        for cell in self.encoder:
            x_SBD, _ = cell(x_SBD, (torch.zeros_like(x_SBD[0]),))
            lasts_BD.append(last(x_SBD, lengths_B))
            x_SBD = self.dropout(x_SBD)
        return {"hidden": torch.stack(lasts_BD, dim=1)}

    def decode(self, tokens_BT: Tensor, encoded: State, state: State | None = None) -> Tensor:
        """features_BTD of the tokens written so far."""
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
        """Every gate and memory of `encoder` and `decoder`, in each layer, over time as it is read."""
        first_BLD = self.init_state(len(source_BS), 0)["hidden"]
        hidden_BLD = self.encode(source_BS, lengths_B)["hidden"]
        if self.reverse:
            source_BS = source_BS.gather(1, reversal(lengths_B, source_BS.shape[1]))
        found = []
        for name, cells, memory_BLD, ids_BT in (
            ("encoder", self.encoder, first_BLD, source_BS),
            ("decoder", self.decoder, hidden_BLD, tokens_BT),
        ):
            memories = ((memory_BD,) for memory_BD in memory_BLD.unbind(1))
            stack = zip(cast(Iterable[Cell], cells), memories, strict=True)
            found += over_time(ids_BT, watch(stack, self.embedding(ids_BT.t())), name)
        return found


def reversal(lengths_B: Tensor, length: int) -> Tensor:
    """places_BS: gathered by them, each row's own tokens are read from its end, the padding stays."""
    places_S = torch.arange(length, device=lengths_B.device)
    mirrored_BS = lengths_B.unsqueeze(1) - 1 - places_S
    return torch.where(mirrored_BS < 0, places_S, mirrored_BS)


def last(x_SBD: Tensor, lengths_B: Tensor) -> Tensor:
    """x_BD at the last token of each row, zero for a row that has none."""
    rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
    x_BD = x_SBD[(lengths_B - 1).clamp(min=0), rows_B]
    return x_BD.masked_fill((lengths_B == 0).unsqueeze(1), 0.0)


class AdditiveAttention(nn.Module):
    """How much each encoder state matters to a decoder state: a small network that learns it.

    Args:
        width: Width of the decoder's state, and of the space where the two meet, D.
        memory: Width of the encoder's states.
    """

    def __init__(self, width: int, memory: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory, width, bias=False)
        # A vector that is not too small to send gradients on, nor so large that tanh saturates.
        self.score = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, hidden_BD: Tensor, keys_BSD: Tensor, absent_BS: Tensor) -> Tensor:
        """weights_BS, which sum to one and are exactly zero where absent; the keys are W2 h_enc."""
        scores_BS = torch.tanh(self.query(hidden_BD).unsqueeze(1) + keys_BSD) @ self.score
        return scores_BS.masked_fill(absent_BS, -torch.inf).softmax(dim=-1)


class Seq2SeqAttention(EncoderDecoder):
    """A recurrent encoder in both directions, and a decoder that looks back at all of its states.

    Args:
        vocab_size: Number of token ids, V, of source and target alike.
        context_length: The most tokens that it can look back at; of a window, half are read, half written.
        width: Width of embeddings and states, D; an encoder state is two of them.
        dropout: Share of embeddings and features that training drops.
    """

    chapter = 12
    year = 2014
    paper = "Bahdanau et al., Neural Machine Translation by Jointly Learning to Align and Translate"
    idea = "look back at every encoder state"

    def __init__(
        self, vocab_size: int, context_length: int, *, width: int = 192, dropout: float = 0.0
    ) -> None:
        super().__init__(vocab_size, context_length)
        _check_sizes(width, 1)
        self.width = width
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.ahead = GRUCell(width, width)
        self.back = GRUCell(width, width)
        # Without a bias, an empty source is a state of zeros.
        self.bridge = nn.Linear(width, width, bias=False)
        self.attention = AdditiveAttention(width, 2 * width)
        self.decoder = GRUCell(width, width)
        # The context's share of the input, which cannot be projected before the loop.
        self.summary = nn.Linear(2 * width, 3 * width, bias=False)
        self.readout = nn.Linear(4 * width, width)
        self.unembedding = nn.Linear(width, vocab_size, bias=False)

    def init_state(self, rows: int, length: int) -> State:  # noqa: ARG002 (the same for all)
        """hidden_BD, the decoder's; source_length_B, memory_BSD, the encoder's states, and keys_BSD, W2 times them."""
        weight, room = self.embedding.weight, self.context_length
        return {
            "hidden": weight.new_zeros(rows, self.width),
            "source_length": torch.zeros(rows, dtype=torch.long, device=weight.device),
            "memory": weight.new_zeros(rows, room, 2 * self.width),
            "keys": weight.new_zeros(rows, room, self.width),
        }

    def encode(self, source_BS: Tensor, lengths_B: Tensor) -> State:
        """All of `init_state`; the decoder begins from what the encoder knows at the first word."""
        x_SBD = self.dropout(self.embedding(source_BS.t()))
        first_BD = torch.zeros_like(x_SBD[0])
        places_SB1 = reversal(lengths_B, len(x_SBD)).t().unsqueeze(-1).expand_as(x_SBD)
        ahead_SBD, _ = self.ahead(x_SBD, (first_BD,))
        back_SBD, _ = self.back(x_SBD.gather(0, places_SB1), (first_BD,))
        memory_SBD = torch.cat([ahead_SBD, back_SBD.gather(0, places_SB1)], dim=-1)
        absent_BS = torch.arange(len(x_SBD), device=lengths_B.device) >= lengths_B.unsqueeze(1)
        memory_BSD = memory_SBD.transpose(0, 1).contiguous()
        memory_BSD = memory_BSD.masked_fill(absent_BS.unsqueeze(-1), 0.0)
        return {
            "hidden": torch.tanh(self.bridge(last(back_SBD, lengths_B))),
            "source_length": lengths_B,
            "memory": memory_BSD,
            "keys": self.attention.key(memory_BSD),
        }

    def decode(self, tokens_BT: Tensor, encoded: State, state: State | None = None) -> Tensor:
        """features_BTD of the tokens written so far."""
        x_BTD = self.dropout(self.embedding(tokens_BT))
        hidden_BTD, contexts_BTD, _ = self._write(x_BTD, encoded)
        if state is not None:
            state["hidden"].copy_(hidden_BTD[:, -1])
        all_BTD = torch.cat([hidden_BTD, contexts_BTD, x_BTD], dim=-1)
        return self.dropout(torch.tanh(self.readout(all_BTD)))

    def pair_activation_maps(
        self, source_BS: Tensor, lengths_B: Tensor, tokens_BT: Tensor
    ) -> list[ActivationMap]:
        """`alignment of the next token`: how much each source token matters to it; then the gates.

        They are those of the encoder `ahead` and `back`, over time as it reads, and the `decoder`.
        """
        encoded = self.encode(source_BS, lengths_B)
        x_BTD = self.embedding(tokens_BT)
        _, contexts_BTD, weights_BTS = self._write(x_BTD, encoded)
        found = [
            ActivationMap(
                "alignment of the next token", weights_BTS[:, None, None], tokens_BT, source_BS
            )
        ]
        backwards_BS = source_BS.gather(1, reversal(lengths_B, source_BS.shape[1]))
        inputs_TBF = self.decoder.input(x_BTD.transpose(0, 1))
        inputs_TBF = inputs_TBF + self.summary(contexts_BTD.transpose(0, 1))
        first_BD = torch.zeros_like(encoded["hidden"])
        for name, cell, ids_BS in (
            ("ahead", self.ahead, source_BS),
            ("back", self.back, backwards_BS),
        ):
            found += over_time(
                ids_BS, watch([(cell, (first_BD,))], self.embedding(ids_BS.t())), name
            )
        written = self.decoder.watch(inputs_TBF, (encoded["hidden"],))
        return found + over_time(tokens_BT, [written], "decoder")

    def _write(self, x_BTD: Tensor, encoded: State) -> tuple[Tensor, Tensor, Tensor]:
        """At each token the decoder's hidden_BTD, its context_BTD and the weights_BTS that made it."""
        hidden_BD = encoded["hidden"]
        absent_BS = ~source_mask(encoded["source_length"], encoded["keys"].shape[1])
        steps = []
        for input_BF in self.decoder.input(x_BTD.transpose(0, 1)):
            weights_BS = self.attention(hidden_BD, encoded["keys"], absent_BS)
            context_BD = (weights_BS.unsqueeze(1) @ encoded["memory"]).squeeze(1)
            (hidden_BD,) = self.decoder.step(input_BF + self.summary(context_BD), hidden_BD)
            steps.append((hidden_BD, context_BD, weights_BS))
        hidden_BTD, contexts_BTD, weights_BTS = (
            torch.stack(each, dim=1) for each in zip(*steps, strict=True)
        )
        return hidden_BTD, contexts_BTD, weights_BTS

    def logits(self, features_BTD: Tensor) -> Tensor:
        """logits_BTV."""
        return self.unembedding(features_BTD)
