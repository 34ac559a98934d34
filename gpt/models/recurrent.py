"""Recurrent networks: feed the output back, so that what was read is remembered.

Three cells, each the one before it plus one idea, and one language model around them.
x_t is the token's vector, h_t the memory that is also the output; * is elementwise.

RNN (Elman 1990; as a language model Mikolov et al. 2010):

    h_t = tanh(W x_t + U h_{t-1} + b)

It mends the fixed window: a row can go on for ever, and a token costs the same however many
came before it. It leaves the gradient broken: each step back multiplies it by U and by
tanh' <= 1, so that it vanishes, or explodes, exponentially with distance.

LSTM (Hochreiter & Schmidhuber 1997; its forget gate Gers et al. 2000):

    i, f, o = sigmoid(W x_t + U h_{t-1} + b)          write, keep, show: one (W, U, b) each
    g       = tanh(W x_t + U h_{t-1} + b)             what to write
    C_t     = f * C_{t-1} + i * g                     a second memory, changed by adding
    h_t     = o * tanh(C_t)

Where f is 1, C and its gradient pass a step unchanged. Four gates, two memories.

GRU (Cho et al. 2014):

    r, z = sigmoid(W x_t + U h_{t-1} + b)             forget for the candidate, carry
    n    = tanh(W x_t + b + r * (U h_{t-1} + b'))     the candidate
    h_t  = z * h_{t-1} + (1 - z) * n

Two gates and one memory do the same with a quarter less to compute. Papers and courses disagree
on both gates. Here z = 1 carries everything forward, as in torch; some write (1 - z) h + z n.
Here r multiplies the product U h + b', as in torch and cuDNN, so that all gates share one
product; Cho's own form is U (r h). r = 0 ignores the past and r = 1 reads it in either.

What all three leave broken: a step waits for the one before it, so that a text cannot be
read in parallel, and the whole past must fit in one vector.
"""

from collections.abc import Iterable
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from gpt.models.base import ActivationMap, LanguageModel, State


class Cell(nn.Module):
    """One layer's weights, and one step of it.

    All gates are one matrix: F is the cell's `gates` times its width, in torch's order.

    Args:
        inputs: Width of x.
        width: Width of the memory, D.
    """

    gates: ClassVar[int]
    memories: ClassVar[tuple[str, ...]] = ("hidden",)
    """What is passed from step to step, by name; the first is also the output."""
    gate_names: ClassVar[tuple[str, ...]] = ()
    """Of what `gate` gives."""
    hidden_bias: ClassVar[bool] = False
    """A second bias says nothing that the first cannot, unless a gate stands between."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.input = nn.Linear(inputs, self.gates * width)
        self.hidden = nn.Linear(width, self.gates * width, bias=self.hidden_bias)

    def total(self, input_BF: Tensor, hidden_BD: Tensor) -> Tensor:
        """W x + b + U h, of a cell whose product with the memory has no bias."""
        if isinstance(self.hidden, nn.Linear):  # one kernel at every step instead of two
            return torch.addmm(input_BF, hidden_BD, self.hidden.weight.t())
        return input_BF + self.hidden(hidden_BD)

    def gate(self, input_BF: Tensor, hidden_BD: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        """All that decides a step, each of shape BD; nothing in a cell without gates."""
        return ()

    def step(self, input_BF: Tensor, *memory_BD: Tensor) -> tuple[Tensor, ...]:
        """The memories after a token, from its projected input and the memories before it."""
        raise NotImplementedError

    def forward(
        self, x_TBD: Tensor, memory_BD: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """output_TBD of every step and the last memories.

        Time comes first, so that a step's slice is contiguous. Nothing but the product with
        the memory waits for the step before: all inputs are projected at once.
        """
        outputs = []
        for input_BF in self.input(x_TBD):
            memory_BD = self.step(input_BF, *memory_BD)
            outputs.append(memory_BD[0])
        return torch.stack(outputs), memory_BD

    def watch(self, input_TBF: Tensor, memory_BD: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """By name, the gates_BTD and memories_BTD of every step, from the projected inputs."""
        steps = []
        for input_BF in input_TBF:
            gates_BD = self.gate(input_BF, memory_BD[0])
            memory_BD = self.step(input_BF, *memory_BD)
            steps.append((*gates_BD, *memory_BD))
        stacked = (torch.stack(each, dim=1) for each in zip(*steps, strict=True))
        return dict(zip((*self.gate_names, *self.memories), stacked, strict=True))


def watch(
    cells: Iterable[tuple[Cell, tuple[Tensor, ...]]], x_TBD: Tensor
) -> list[dict[str, Tensor]]:
    """What `Cell.watch` sees in each layer of a stack of cells, each with its first memory_BD."""
    layers = []
    for cell, memory_BD in cells:
        layers.append(cell.watch(cell.input(x_TBD), memory_BD))
        x_TBD = layers[-1]["hidden"].transpose(0, 1)
    return layers


def over_time(
    tokens_BT: Tensor, layers: list[dict[str, Tensor]], network: str = ""
) -> list[ActivationMap]:
    """What was watched in each layer as `network` went over the tokens, whose name goes before it."""
    return [
        ActivationMap(
            f"{network} {name}".strip(),
            torch.stack([layer[name] for layer in layers], dim=1).unsqueeze(2),
            tokens_BT,
            "units",
        )
        for name in layers[0]
    ]


class RNNCell(Cell):
    """h = tanh(W x + U h + b)."""

    gates = 1

    def step(self, input_BF: Tensor, *memory_BD: Tensor) -> tuple[Tensor, ...]:
        """hidden_BD -> hidden_BD."""
        (hidden_BD,) = memory_BD
        return (self.total(input_BF, hidden_BD).tanh(),)


class LSTMCell(Cell):
    """C = f C + i g; h = o tanh(C)."""

    gates = 4
    memories = ("hidden", "cell")
    gate_names = ("input gate", "forget gate", "candidate", "output gate")

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        # Begin by remembering: at 0 half of the memory would be lost at every step
        # (Gers et al. 2000, Jozefowicz et al. 2015).
        nn.init.ones_(self.input.bias[width : 2 * width])

    def gate(self, input_BF: Tensor, hidden_BD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """i_BD, f_BD, g_BD and o_BD."""
        all_BF = self.total(input_BF, hidden_BD)
        i_BD, f_BD, g_BD, o_BD = all_BF.chunk(4, dim=-1)
        return i_BD.sigmoid(), f_BD.sigmoid(), g_BD.tanh(), o_BD.sigmoid()

    def step(self, input_BF: Tensor, *memory_BD: Tensor) -> tuple[Tensor, ...]:
        """hidden_BD, cell_BD -> hidden_BD, cell_BD."""
        hidden_BD, cell_BD = memory_BD
        i_BD, f_BD, g_BD, o_BD = self.gate(input_BF, hidden_BD)
        cell_BD = f_BD * cell_BD + i_BD * g_BD
        return o_BD * cell_BD.tanh(), cell_BD


class GRUCell(Cell):
    """h = z h + (1 - z) n."""

    gates = 3
    gate_names = ("reset gate", "carry gate", "candidate")
    hidden_bias = True

    def gate(self, input_BF: Tensor, hidden_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r_BD, z_BD and the candidate n_BD."""
        r_BD, z_BD, n_BD = input_BF.chunk(3, dim=-1)
        past_r_BD, past_z_BD, past_n_BD = self.hidden(hidden_BD).chunk(3, dim=-1)
        r_BD = (r_BD + past_r_BD).sigmoid()
        return r_BD, (z_BD + past_z_BD).sigmoid(), (n_BD + r_BD * past_n_BD).tanh()

    def step(self, input_BF: Tensor, *memory_BD: Tensor) -> tuple[Tensor, ...]:
        """hidden_BD -> hidden_BD."""
        (hidden_BD,) = memory_BD
        _, z_BD, n_BD = self.gate(input_BF, hidden_BD)
        return (n_BD + z_BD * (hidden_BD - n_BD),)


def gradient_by_distance(cell: Cell, x_TBD: Tensor) -> Tensor:
    """norms_T: how long dL/dh is, 0, 1, 2 … steps before the last output, whose sum is L.

    A mean over rows, of what reaches each h by every way from there on: for an LSTM,
    through the cell that it helped to write too.
    """
    memory_BD = tuple(x_TBD.new_zeros(x_TBD.shape[1], cell.width) for _ in cell.memories)
    outputs = []
    for input_BF in cell.input(x_TBD):
        memory_BD = cell.step(input_BF, *memory_BD)
        outputs.append(memory_BD[0])
    gradients = torch.autograd.grad(outputs[-1].sum(), outputs)
    return torch.stack(gradients).norm(dim=-1).mean(dim=-1).flip(0)


class RecurrentLM(LanguageModel):
    """A stack of cells between an embedding and an unembedding.

    Dropout is on what goes into a layer and out of the last, never on what goes from step to
    step (Zaremba et al. 2014): a memory survives it.

    Args:
        vocab_size: Number of token ids, V.
        context_length: Tokens of a row that it is trained on at once.
        width: Width of every memory, D.
        depth: Number of layers, L.
        embedding_width: Width of a token's vector; 0 means `width`.
        tied: Use the embedding as the unembedding too.
        dropout: Share of what goes between layers that training drops.
        init_range: Draw every first weight evenly from [-init_range, init_range], as
            Zaremba et al. did; 0 leaves each layer its own way.
    """

    cell: ClassVar[type[Cell]]

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        width: int = 256,
        depth: int = 1,
        embedding_width: int = 0,
        tied: bool = False,
        dropout: float = 0.0,
        init_range: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, context_length)
        if min(width, depth) < 1 or min(embedding_width, init_range) < 0:
            raise ValueError(
                f"width and depth must be at least 1, embedding_width and init_range at least 0, "
                f"not {width}, {depth}, {embedding_width} and {init_range}"
            )
        embedding_width = embedding_width or width
        if tied and embedding_width != width:
            raise ValueError(
                f"a tied embedding must be as wide as the memory: embedding_width "
                f"{embedding_width} is not {width}"
            )
        self.tied = tied
        self.embedding = nn.Embedding(vocab_size, embedding_width)
        self.dropout = nn.Dropout(dropout)
        self.cells = nn.ModuleList(
            self.cell(width if layer else embedding_width, width) for layer in range(depth)
        )
        self.unembedding = nn.Linear(width, vocab_size)
        if tied:
            # An unembedding as large as an embedding's first values would be sure of anything.
            nn.init.normal_(self.embedding.weight, std=width**-0.5)
            self.unembedding.weight = self.embedding.weight
        if init_range:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -init_range, init_range)

    def flops_per_token(self, length: int) -> float:
        """Adds the unembedding where it is the embedding's matrix."""
        unembedding = 6.0 * self.embedding.weight.numel() if self.tied else 0.0
        return super().flops_per_token(length) + unembedding

    def init_state(self, rows: int, length: int) -> State:  # noqa: ARG002 (any length is one vector)
        """hidden_BLD, and cell_BLD for an LSTM, in the dtype and on the device of the weights."""
        shape = (rows, len(self.cells), self.unembedding.in_features)
        return {name: self.embedding.weight.new_zeros(shape) for name in self.cell.memories}

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """features_BTD; with a state, the new tokens follow those that it has read.

        No gradient flows into or out of a state: training that carries one from window to
        window is truncated backpropagation through time.
        """
        before = self.init_state(len(tokens_BT), 0) if state is None else state
        x_TBD = self.embedding(tokens_BT.t())
        for layer, cell in enumerate(self.cells):
            # A copy, because the backward pass needs it when the state has long gone on.
            memory_BD = tuple(before[name][:, layer].clone() for name in self.cell.memories)
            x_TBD, memory_BD = cell(self.dropout(x_TBD), memory_BD)
            for name, last_BD in zip(self.cell.memories, memory_BD, strict=True):
                before[name][:, layer] = last_BD.detach()
        return self.dropout(x_TBD).transpose(0, 1)

    def activation_maps(self, tokens_BT: Tensor) -> list[ActivationMap]:
        """Every gate and memory of the cell by its name, in each layer, over time."""
        empty = self.init_state(len(tokens_BT), 0)
        firsts = [
            tuple(empty[name][:, layer] for name in self.cell.memories)
            for layer in range(len(self.cells))
        ]
        cells = cast(Iterable[Cell], self.cells)
        layers = watch(zip(cells, firsts, strict=True), self.embedding(tokens_BT.t()))
        return over_time(tokens_BT, layers)


class RNN(RecurrentLM):
    """The language model of RNN cells."""

    chapter: ClassVar[int] = 8
    year: ClassVar[int] = 1990
    paper: ClassVar[str] = "Elman, Finding structure in time"
    idea: ClassVar[str] = "feed the output back"
    cell = RNNCell


class LSTM(RecurrentLM):
    """The language model of LSTM cells."""

    chapter: ClassVar[int] = 9
    year: ClassVar[int] = 1997
    paper: ClassVar[str] = "Hochreiter & Schmidhuber, Long short-term memory"
    idea: ClassVar[str] = "four gates, two memories"
    cell = LSTMCell


class GRU(RecurrentLM):
    """The language model of GRU cells."""

    chapter: ClassVar[int] = 10
    year: ClassVar[int] = 2014
    paper: ClassVar[str] = "Cho et al., Learning phrase representations using RNN encoder-decoder"
    idea: ClassVar[str] = "two gates, one memory"
    cell = GRUCell
