"""Recurrent networks: the output is fed back as an input of the next step.

Three cells, each with one idea more than the one before, and one language model for all of them.
x_t is the token's vector, h_t the hidden state, which is also the output; * is elementwise.

RNN (Elman 1990; as a language model Mikolov et al. 2010):

    h_t = tanh(W x_t + U h_{t-1} + b)

It has no fixed window: sequences can have any length, and every token costs the same. Its gradient
is the problem: each step back multiplies it by U and by tanh' <= 1, so it vanishes, or explodes,
exponentially with distance.

LSTM (Hochreiter & Schmidhuber 1997; its forget gate Gers et al. 2000):

    i, f, o = sigmoid(W x_t + U h_{t-1} + b)          write, keep, show: one (W, U, b) each
    g       = tanh(W x_t + U h_{t-1} + b)             the candidate to write
    C_t     = f * C_{t-1} + i * g                     the cell state, changed by addition
    h_t     = o * tanh(C_t)

Where f is 1, C and its gradient pass a step unchanged. It has four gates and two states.

GRU (Cho et al. 2014):

    r, z = sigmoid(W x_t + U h_{t-1} + b)             reset (for the candidate), carry
    n    = tanh(W x_t + b + r * (U h_{t-1} + b'))     the candidate
    h_t  = z * h_{t-1} + (1 - z) * n

Two gates and one state achieve the same with a quarter less computation. Conventions differ for
both gates. Here z = 1 carries everything forward, as in torch; some write (1 - z) h + z n. Here r
multiplies the product U h + b', as in torch and cuDNN, so that all gates share one product; Cho's
own form is U (r h). In either, r = 0 ignores the past and r = 1 uses all of it.

Limitations of all three: each step waits for the one before it, so the tokens of a text cannot be
processed in parallel, and the whole past must fit in one vector.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from gpt.models.base import ActivationMap, LanguageModel, Model, State


class _GradientOfAllSteps(torch.autograd.Function):
    """The identity of input_TBF, whose backward pass is also that of the product U h.

    Each preactivation is W x + b + U h, so its gradient is that of W x + b. The gradient of U, the
    sum over steps of this times h, is one large product here; autograd would add T small ones.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's own)
        input_TBF: Tensor,
        weight_FD: Tensor,
        hidden: list[Tensor],
    ) -> Tensor:
        """`hidden` is filled later, with h before all steps, one after another."""
        ctx.hidden, ctx.dtype = hidden, weight_FD.dtype
        return input_TBF.view_as(input_TBF)

    @staticmethod
    def backward(ctx: Any, gradient_TBF: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        hidden_TBD = torch.cat(ctx.hidden).to(gradient_TBF.dtype)
        weight_gradient_FD = gradient_TBF.flatten(0, 1).t() @ hidden_TBD.flatten(0, 1)
        return gradient_TBF, weight_gradient_FD.to(ctx.dtype), None


class Cell(nn.Module):
    """The weights of one layer, and one step of it. `inputs` is the width of x.

    The matrices of all gates are stored as one: F is `num_gates` times D, in torch's order.
    """

    num_gates: ClassVar[int]
    """Gates, counting the candidate."""
    gate_names: ClassVar[tuple[str, ...]] = ()
    """Names of the results of `gates`."""
    state_names: ClassVar[tuple[str, ...]] = ("hidden",)
    """Names of the states passed from step to step; the first is also the output."""
    has_hidden_bias: ClassVar[bool] = False
    """Whether U h has a bias of its own. It is redundant unless a gate multiplies U h."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight_DF: Tensor | None = None
        """U, transposed, while `forward` computes its gradient for all steps together."""
        self.input = nn.Linear(inputs, self.num_gates * width)
        self.hidden = nn.Linear(width, self.num_gates * width, bias=self.has_hidden_bias)

    def preactivation(self, input_BF: Tensor, hidden_BD: Tensor) -> Tensor:
        """Return W x + b + U h, for cells without a hidden bias."""
        if self.weight_DF is not None:
            return torch.addmm(input_BF, hidden_BD, self.weight_DF)
        if isinstance(self.hidden, nn.Linear):  # one kernel per step instead of two
            return torch.addmm(input_BF, hidden_BD, self.hidden.weight.t())
        return input_BF + self.hidden(hidden_BD)

    def gates(self, input_BF: Tensor, hidden_BD: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Return the gates and the candidate, each of shape BD; none for a cell without gates."""
        return ()

    def step(self, input_BF: Tensor, *states_BD: Tensor) -> tuple[Tensor, ...]:
        """Return the states after a token from its projected input and the states before it."""
        raise NotImplementedError

    def zero_states(self, x_TBD: Tensor) -> tuple[Tensor, ...]:
        """Return the states_BD before the first step: nothing is remembered."""
        return tuple(x_TBD.new_zeros(x_TBD.shape[1], self.width) for _ in self.state_names)

    def forward(
        self, x_TBD: Tensor, states_BD: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return output_TBD of every step and the last states.

        Time is the first axis, so that the slice of a step is contiguous. All inputs are projected
        at once; only the product with the hidden state has to wait for the step before.
        """
        input_TBF, first_BD, outputs = self.input(x_TBD), states_BD[0], []
        hidden: list[Tensor] = []
        # A compiler would need to know what `hidden` will be.
        joins_steps = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if joins_steps and not self.has_hidden_bias and isinstance(self.hidden, nn.Linear):
            weight_FD = self.hidden.weight
            input_TBF = _GradientOfAllSteps.apply(input_TBF, weight_FD, hidden)  # type: ignore[no-untyped-call]
            self.weight_DF = weight_FD.detach().to(input_TBF.dtype).t()
        try:
            for input_BF in input_TBF:
                states_BD = self.step(input_BF, *states_BD)
                outputs.append(states_BD[0])
        finally:
            self.weight_DF = None
        output_TBD = torch.stack(outputs)
        # Detached: with its graph, which leads to `hidden`, it would keep itself alive.
        hidden += [first_BD.detach().unsqueeze(0), output_TBD[:-1].detach()]
        return output_TBD, states_BD

    def trace(self, input_TBF: Tensor, states_BD: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return the gates_BTD and states_BTD of every step by name, from projected inputs."""
        steps = []
        for input_BF in input_TBF:
            gates_BD = self.gates(input_BF, states_BD[0])
            states_BD = self.step(input_BF, *states_BD)
            steps.append((*gates_BD, *states_BD))
        stacked = (torch.stack(tensors, dim=1) for tensors in zip(*steps, strict=True))
        return dict(zip((*self.gate_names, *self.state_names), stacked, strict=True))


class RNNCell(Cell):
    """h = tanh(W x + U h + b)."""

    num_gates = 1

    def step(self, input_BF: Tensor, *states_BD: Tensor) -> tuple[Tensor, ...]:
        """hidden_BD -> hidden_BD."""
        (hidden_BD,) = states_BD
        return (self.preactivation(input_BF, hidden_BD).tanh(),)


class LSTMCell(Cell):
    """C = f C + i g; h = o tanh(C)."""

    num_gates = 4
    gate_names = ("input gate", "forget gate", "candidate", "output gate")
    state_names = ("hidden", "cell")

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        # The forget gate starts open: with a bias of 0 every step would lose half of the cell state
        # (Gers et al. 2000, Jozefowicz et al. 2015).
        nn.init.ones_(self.input.bias[width : 2 * width])

    def gates(self, input_BF: Tensor, hidden_BD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return i_BD, f_BD, g_BD and o_BD."""
        i_BD, f_BD, g_BD, o_BD = self.preactivation(input_BF, hidden_BD).chunk(4, dim=-1)
        return i_BD.sigmoid(), f_BD.sigmoid(), g_BD.tanh(), o_BD.sigmoid()

    def step(self, input_BF: Tensor, *states_BD: Tensor) -> tuple[Tensor, ...]:
        """hidden_BD, cell_BD -> hidden_BD, cell_BD."""
        hidden_BD, cell_BD = states_BD
        i_BD, f_BD, g_BD, o_BD = self.gates(input_BF, hidden_BD)
        cell_BD = f_BD * cell_BD + i_BD * g_BD
        return o_BD * cell_BD.tanh(), cell_BD


class GRUCell(Cell):
    """h = z h + (1 - z) n."""

    num_gates = 3
    gate_names = ("reset gate", "carry gate", "candidate")
    has_hidden_bias = True

    def gates(self, input_BF: Tensor, hidden_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return r_BD, z_BD and the candidate n_BD."""
        r_BD, z_BD, n_BD = input_BF.chunk(3, dim=-1)
        hidden_r_BD, hidden_z_BD, hidden_n_BD = self.hidden(hidden_BD).chunk(3, dim=-1)
        r_BD = (r_BD + hidden_r_BD).sigmoid()
        return r_BD, (z_BD + hidden_z_BD).sigmoid(), (n_BD + r_BD * hidden_n_BD).tanh()

    def step(self, input_BF: Tensor, *states_BD: Tensor) -> tuple[Tensor, ...]:
        """hidden_BD -> hidden_BD."""
        (hidden_BD,) = states_BD
        _, z_BD, n_BD = self.gates(input_BF, hidden_BD)
        return (n_BD + z_BD * (hidden_BD - n_BD),)


def gradient_by_distance(cell: Cell, x_TBD: Tensor) -> Tensor:
    """Return norms_T of dL/dh, 0, 1, 2 … steps before the last output, whose sum is L.

    The norms are averaged over the batch. They include every path from h to the output: for an
    LSTM also the one through the cell state.
    """
    states_BD = cell.zero_states(x_TBD)
    outputs = []
    for input_BF in cell.input(x_TBD):
        states_BD = cell.step(input_BF, *states_BD)
        outputs.append(states_BD[0])
    gradients = torch.autograd.grad(outputs[-1].sum(), outputs)
    return torch.stack(gradients).norm(dim=-1).mean(dim=-1).flip(0)


class ManyToOne(Model):
    """A cell that reads a sequence of vectors, and a head that predicts from its last output.

    The head is a model of chapters 1 to 4 and brings its own loss: `Linear` predicts a number,
    `Logistic` a probability, `Softmax` the probabilities of classes. Its inputs are the cell's width.
    """

    def __init__(self, cell: Cell, head: Model) -> None:
        super().__init__()
        self.cell, self.head = cell, head

    def last_output(self, x_BTD: Tensor) -> Tensor:
        """Return output_BD of the cell after the whole sequence."""
        x_TBD = x_BTD.transpose(0, 1)
        output_TBD, _ = self.cell(x_TBD, self.cell.zero_states(x_TBD))
        return output_TBD[-1]

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the head's prediction."""
        return self.head(self.last_output(x_BTD))

    def loss(self, *batch: Tensor) -> Tensor:
        """Return the head's loss of y_B given x_BTD."""
        x_BTD, y_B = batch
        return self.head.loss(self.last_output(x_BTD), y_B)

    @torch.no_grad()
    def trace(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Return `Cell.trace` of sequences from their start."""
        x_TBD = x_BTD.transpose(0, 1)
        return self.cell.trace(self.cell.input(x_TBD), self.cell.zero_states(x_TBD))


class RecurrentLM(LanguageModel):
    """A stack of recurrent layers between an embedding and an unembedding.

    Dropout applies to the input of every layer and the output of the last, never between steps
    (Zaremba et al. 2014, who also introduced `init_range`), so that states are kept.

    Args:
        width: Width of every state, D.
        depth: Number of layers, L.
        embedding_width: Width of an embedding; 0 means `width`.
        tied: Whether the embedding is also the unembedding.
        dropout: Fraction of the values between layers that training drops.
        init_range: Draw initial weights from [-init_range, init_range]; 0 for torch's defaults.
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
                f"a tied embedding must be as wide as the state: embedding_width "
                f"{embedding_width} is not {width}"
            )
        self.embedding = nn.Embedding(vocab_size, embedding_width)
        self.dropout = nn.Dropout(dropout)
        self.cells = nn.ModuleList(
            self.cell(width if layer else embedding_width, width) for layer in range(depth)
        )
        self.unembedding = nn.Linear(width, vocab_size)
        if tied:
            # With the usual initial scale of an embedding the logits would be extreme.
            nn.init.normal_(self.embedding.weight, std=width**-0.5)
            self.unembedding.weight = self.embedding.weight
        if init_range:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -init_range, init_range)

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """Return features_BTD. With a state, the new tokens follow those in it.

        No gradient flows into or out of a state: training that passes it from window to window is
        truncated backpropagation through time.
        """
        state = self.init_state(len(tokens_BT), 0) if state is None else state
        x_TBD = self.embedding(tokens_BT.t())
        for layer, cell in enumerate(self.cells):
            # Cloned, because the backward pass needs the values after the state is overwritten.
            states_BD = tuple(state[name][:, layer].clone() for name in self.cell.state_names)
            x_TBD, states_BD = cell(self.dropout(x_TBD), states_BD)
            for name, last_BD in zip(self.cell.state_names, states_BD, strict=True):
                state[name][:, layer] = last_BD.detach()
        return self.dropout(x_TBD).transpose(0, 1)

    def init_state(self, batch_size: int, length: int) -> State:  # noqa: ARG002 (constant size)
        """Return hidden_BLD, and cell_BLD for an LSTM, all zeros."""
        shape = (batch_size, len(self.cells), self.unembedding.in_features)
        return {name: self.embedding.weight.new_zeros(shape) for name in self.cell.state_names}

    def activation_maps(self, tokens_BT: Tensor) -> list[ActivationMap]:
        """Return every gate and state of the cell by its name, by layer, over time."""
        initial_BLD = self.init_state(len(tokens_BT), 0).values()
        states = zip(*(state_BLD.unbind(1) for state_BLD in initial_BLD), strict=True)
        stack = zip(cast(Iterable[Cell], self.cells), states, strict=True)
        return trace_maps(tokens_BT, trace(stack, self.embedding(tokens_BT.t())))


def trace(
    cells: Iterable[tuple[Cell, tuple[Tensor, ...]]], x_TBD: Tensor
) -> list[dict[str, Tensor]]:
    """Return `Cell.trace` of each layer of a stack of cells, given with their initial states."""
    layers = []
    for cell, states_BD in cells:
        layers.append(cell.trace(cell.input(x_TBD), states_BD))
        x_TBD = layers[-1]["hidden"].transpose(0, 1)
    return layers


def trace_maps(
    tokens_BT: Tensor, layers: list[dict[str, Tensor]], network: str = ""
) -> list[ActivationMap]:
    """Return a map for each name in the traces of a network's layers, prefixed by its name."""
    return [
        ActivationMap(
            f"{network} {name}".strip(),
            torch.stack([layer[name] for layer in layers], dim=1).unsqueeze(2),
            tokens_BT,
            "units",
        )
        for name in layers[0]
    ]


class RNN(RecurrentLM):
    """The language model of RNN cells."""

    chapter: ClassVar[int] = 8
    year: ClassVar[int] = 1990
    paper: ClassVar[str] = "Elman, Finding structure in time"
    idea: ClassVar[str] = "the output is fed back as an input"
    equation: ClassVar[str] = "h' = tanh(W x + U h + b)"
    cell = RNNCell


class LSTM(RecurrentLM):
    """The language model of LSTM cells."""

    chapter: ClassVar[int] = 9
    year: ClassVar[int] = 1997
    paper: ClassVar[str] = "Hochreiter & Schmidhuber, Long short-term memory"
    idea: ClassVar[str] = "four gates, and a cell state that keeps its gradient"
    equation: ClassVar[str] = "C' = f * C + i * g, h' = o * tanh(C')"
    cell = LSTMCell


class GRU(RecurrentLM):
    """The language model of GRU cells."""

    chapter: ClassVar[int] = 10
    year: ClassVar[int] = 2014
    paper: ClassVar[str] = "Cho et al., Learning phrase representations using RNN encoder-decoder"
    idea: ClassVar[str] = "two gates, one state"
    equation: ClassVar[str] = "h' = z * h + (1 - z) * n"
    cell = GRUCell
