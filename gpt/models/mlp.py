"""Chapters 5 and 6: layers that bend, and gates that choose among experts.

    5 mlp       a' = f(W a + b), layer on layer           Rumelhart, Hinton & Williams 1986
    6 experts   y = sum_i f(u)_i softmax(g(v))_i          Jacobs, Jordan, Nowlan & Hinton 1991

The models of `linear` bend only where we say. A layer whose every unit is squashed learns
where: three ReLUs make up to three kinks, enough of them any curve. Backpropagation finds the
blame of each weight, from the last layer to the first. Such a network spreads what it knows over
all its units, and is lost beyond its data. Experts behind gates part the two questions, what
holds and when: a product switches an expert off as no sum can, and each law stays whole.

Beside each stands a language model over a window of embeddings (Bengio, Ducharme, Vincent &
Jauvin 2003). Both see the last W tokens, each place with weights of its own: a longer memory
costs more weights. The recurrent networks mend that.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.base import ActivationMap, Model, State
from gpt.models.linear import Windowed, softmax, squared_error


def step(x: Tensor) -> Tensor:
    """1 where x is above 0, else 0. Flat, so no blame goes through it: what is below stays as it is."""
    return (x > 0).to(x.dtype)


Activation = Literal["step", "sigmoid", "tanh", "relu", "none"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "step": step,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "none": lambda x: x,
}


class Layers(nn.Module):
    """a' = f(W a + b), layer on layer.

    Args:
        widths: Of the input, and of each layer's output.
        activation: The name of f, one of ACTIVATIONS.
    """

    def __init__(self, widths: Sequence[int], activation: Activation) -> None:
        super().__init__()
        if min(widths) < 1:
            raise ValueError(f"every layer must be at least 1 wide, not {list(widths)}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"there is no activation {activation!r}; there are {', '.join(ACTIVATIONS)}"
            )
        self.bend = ACTIVATIONS[activation]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, a_BF: Tensor) -> Tensor:
        """a_BF of the last layer. Any leading axes will do."""
        for layer in self.layers:
            a_BF = self.bend(layer(a_BF))
        return a_BF


class MLP(Model):
    """A multilayer perceptron: hidden layers that bend, and a line on top.

    Args:
        inputs: Numbers in a row, D.
        hidden: Units of each hidden layer.
        activation: What bends them: step, sigmoid, tanh, relu; or none.
    """

    chapter: ClassVar[int] = 5
    year: ClassVar[int] = 1986
    paper: ClassVar[str] = (
        "Rumelhart, Hinton & Williams, Learning Representations by Back-Propagating Errors"
    )
    idea: ClassVar[str] = "stack it; bend it"
    supported_tasks: ClassVar[tuple[str, ...]] = ("regression",)

    def __init__(
        self, inputs: int = 1, hidden: tuple[int, ...] = (8,), activation: Activation = "relu"
    ) -> None:
        super().__init__()
        self.hidden = Layers([inputs, *hidden], activation)
        self.output = nn.Linear([inputs, *hidden][-1], 1)

    def forward(self, x_BD: Tensor) -> Tensor:
        """y_B."""
        return self.output(self.hidden(x_BD)).squeeze(-1)

    def loss(self, *batch: Tensor) -> Tensor:
        """The mean squared error of y_B given x_BD."""
        x_BD, y_B = batch
        return squared_error(self(x_BD), y_B)


def backpropagate(
    weights_L: Tensor, biases_L: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a chain of L layers of one sigmoid neuron each, by hand.

        z_l = w_l a_(l-1) + b_l,   a_l = sigmoid(z_l),   a_0 = x,   C = (a_L - y)^2

    Returns C, dC/dw_L and dC/db_L.
    """
    activations = [x]
    for weight, bias in zip(weights_L, biases_L, strict=True):
        activations.append(torch.sigmoid(weight * activations[-1] + bias))
    weight_gradients_L, bias_gradients_L = torch.empty_like(weights_L), torch.empty_like(biases_L)
    blame = 2 * (activations[-1] - y)  # dC/da of the last layer
    for layer in reversed(range(len(weights_L))):
        a = activations[layer + 1]
        blame = blame * a * (1 - a)  # dC/dz: sigmoid' = a (1 - a)
        weight_gradients_L[layer] = blame * activations[layer]
        bias_gradients_L[layer] = blame
        blame = blame * weights_L[layer]  # dC/da of the layer below
    return (activations[-1] - y) ** 2, weight_gradients_L, bias_gradients_L


class Gated(nn.Module):
    """The attention layer in its simplest form: y = sum_i f(u)_i softmax(g(v))_i, f and g linear.

    Args:
        u: Width of what the experts see.
        v: Width of what the gates see.
        experts: Number of experts, E.
        outputs: Width of what each expert says, D.
    """

    def __init__(self, u: int, v: int, experts: int, outputs: int) -> None:
        super().__init__()
        if experts < 1:
            raise ValueError(f"experts must be at least 1, not {experts}")
        self.experts = nn.Linear(u, experts * outputs)
        self.gates = nn.Linear(v, experts)

    def weights(self, v_BF: Tensor) -> Tensor:
        """gates_BE: how much each expert is listened to. Any leading axes will do."""
        return softmax(self.gates(v_BF))

    def forward(self, u_BF: Tensor, v_BF: Tensor) -> Tensor:
        """y_BD. Any leading axes will do."""
        gates_BE = self.weights(v_BF)
        said_BED = self.experts(u_BF).unflatten(-1, (gates_BE.shape[-1], -1))
        return (gates_BE.unsqueeze(-2) @ said_BED).squeeze(-2)


class Experts(Model):
    """Softmax gates choose among lines: y = sum_i f(u)_i softmax(g(v))_i.

    Args:
        inputs: Numbers in a row, D.
        experts: Number of experts, E.
        u: Places of the inputs that the experts see, counted from 0; all when not given.
        v: Places of the inputs that the gates see; all when not given.
    """

    chapter: ClassVar[int] = 6
    year: ClassVar[int] = 1991
    paper: ClassVar[str] = "Jacobs, Jordan, Nowlan & Hinton, Adaptive Mixtures of Local Experts"
    idea: ClassVar[str] = "softmax gates choose among experts"
    supported_tasks: ClassVar[tuple[str, ...]] = ("regression",)

    def __init__(
        self,
        inputs: int = 2,
        experts: int = 5,
        u: tuple[int, ...] | None = None,
        v: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.u = list(range(inputs)) if u is None else list(u)
        self.v = list(range(inputs)) if v is None else list(v)
        if not (self.u and self.v) or not all(0 <= place < inputs for place in (*self.u, *self.v)):
            raise ValueError(
                f"u and v must be places of the {inputs} inputs, counted from 0, "
                f"not {self.u} and {self.v}"
            )
        self.gated = Gated(len(self.u), len(self.v), experts, 1)

    def forward(self, x_BD: Tensor) -> Tensor:
        """y_B."""
        return self.gated(x_BD[:, self.u], x_BD[:, self.v]).squeeze(-1)

    def gates(self, x_BD: Tensor) -> Tensor:
        """gates_BE: how much each expert is listened to."""
        return self.gated.weights(x_BD[:, self.v])

    def loss(self, *batch: Tensor) -> Tensor:
        """The mean squared error of y_B given x_BD."""
        x_BD, y_B = batch
        return squared_error(self(x_BD), y_B)


class WindowLM(Windowed):
    """A window of embeddings through layers that bend.

        features = norm(mlp(embedding(token), embedding(token before), ...))
        logits   = W features

    Args:
        vocab_size: Number of token ids, V.
        context_length: Tokens of a row that it is trained on at once.
        window: Tokens that it sees, W: the window.
        width: Width of an embedding, D.
        hidden: Width of a hidden layer, F.
        depth: Number of hidden layers.
        activation: What bends them: sigmoid, tanh, relu, step; or none.
    """

    chapter: ClassVar[int] = 5
    year: ClassVar[int] = 2003
    paper: ClassVar[str] = (
        "Bengio, Ducharme, Vincent & Jauvin, A Neural Probabilistic Language Model"
    )
    idea: ClassVar[str] = MLP.idea

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        window: int = 8,
        width: int = 128,
        hidden: int = 256,
        depth: int = 1,
        activation: Activation = "tanh",
    ) -> None:
        super().__init__(vocab_size, context_length, window, width, hidden)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        self.layers = Layers([window * width, *[hidden] * depth], activation)

    def effects(self, embeddings_BSD: Tensor) -> Tensor:
        """effects_BSWF: what each embedding adds to the sums of the first hidden layer."""
        first = cast(nn.Linear, self.layers.layers[0])
        weight_FDW = first.weight.unflatten(1, (-1, self.window))
        return torch.einsum("bsd,fdw->bswf", embeddings_BSD, weight_FDW)

    def hidden(self, tokens_BT: Tensor, state: State | None) -> Tensor:
        """hidden_BTF: the last hidden layer."""
        embeddings_BSD = self.embed(tokens_BT, state)
        # Every window at once: unfold puts its W tokens last, so F counts D, then W.
        windows_BTF = embeddings_BSD.unfold(1, self.window, 1).flatten(2)
        return self.layers(windows_BTF)

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """features_BTF."""
        hidden_BTF = self.hidden(tokens_BT, state)
        return F.rms_norm(hidden_BTF, hidden_BTF.shape[-1:])


class ExpertsLM(WindowLM):
    """The window's last layer is gated experts, who see what the gates see.

    Args:
        vocab_size: Number of token ids, V.
        context_length: Tokens of a row that it is trained on at once.
        window: Tokens that it sees, W: the window.
        width: Width of an embedding, D.
        hidden: Width of a hidden layer and of what an expert says, F.
        depth: Number of hidden layers.
        activation: What bends them: sigmoid, tanh, relu, step; or none.
        experts: Number of experts, E.
    """

    chapter: ClassVar[int] = 6
    year: ClassVar[int] = 1991
    paper: ClassVar[str] = Experts.paper
    idea: ClassVar[str] = Experts.idea

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        window: int = 8,
        width: int = 128,
        hidden: int = 256,
        depth: int = 1,
        activation: Activation = "tanh",
        experts: int = 8,
    ) -> None:
        super().__init__(
            vocab_size,
            context_length,
            window=window,
            width=width,
            hidden=hidden,
            depth=depth,
            activation=activation,
        )
        self.gated = Gated(hidden, hidden, experts, hidden)

    def activation_maps(self, tokens_BT: Tensor) -> list[ActivationMap]:
        """`experts`, how much each is listened to; and the `effect in the window`."""
        gates_BTE = self.gated.weights(self.hidden(tokens_BT, None))
        chosen = ActivationMap("experts", gates_BTE[:, None, None], tokens_BT, "experts")
        return [chosen, *super().activation_maps(tokens_BT)]

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """features_BTF."""
        hidden_BTF = self.hidden(tokens_BT, state)
        said_BTF = self.gated(hidden_BTF, hidden_BTF)
        return F.rms_norm(said_BTF, said_BTF.shape[-1:])
