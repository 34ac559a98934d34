"""Chapters 5 and 6: layers with nonlinear activations, and gated experts.

    5 mlp       a' = f(W a + b), layer on layer           Rumelhart, Hinton & Williams 1986
    6 experts   y = sum_i f(u)_i softmax(g(v))_i          Jacobs, Jordan, Nowlan & Hinton 1991

The models of `linear` bend only where we choose. A layer with a nonlinear activation learns where:
three ReLUs make up to three kinks, and enough of them fit any curve. Backpropagation computes the
gradient of each weight, from the last layer to the first. Such a network spreads what it learns
over all its units and does not extrapolate. Gated experts separate two questions, which law holds
and when: multiplying by a gate switches an expert off, as no sum can. Gates that do not see the
experts' input mix lines into a line, which extrapolates.

Each has a language model over a window of embeddings (Bengio, Ducharme, Vincent & Jauvin 2003). It
has separate weights for each of the last W tokens, so a longer window costs more weights. The
recurrent networks avoid that.
"""

import string
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.base import ActivationMap, State
from gpt.models.linear import Regression, Softmax, WindowLM, layer_sums, softmax


def step(x: Tensor) -> Tensor:
    """Return 1 where x > 0, else 0. Its gradient is 0, so the layers below it are not trained."""
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
    """Fully connected layers: a' = f(W a + b), one after the other; f is in ACTIVATIONS.

    `widths` are those of the input, then of each layer's output.
    """

    def __init__(self, widths: Sequence[int], activation: Activation) -> None:
        super().__init__()
        if min(widths) < 1:
            raise ValueError(f"every layer must be at least 1 wide, not {list(widths)}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"there is no activation {activation!r}; there are {', '.join(ACTIVATIONS)}"
            )
        self.activation_name = activation
        self.activation = ACTIVATIONS[activation]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, a_BF: Tensor) -> Tensor:
        """Return a_BF of the last layer. Any number of leading axes is allowed."""
        for layer in self.layers:
            a_BF = self.activation(layer(a_BF))
        return a_BF

    def formulas(self, inputs: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the names of the last layer's units, and each unit as an equation, layer by layer."""
        lines, names = [], list(inputs)
        for letter, layer in zip(string.ascii_lowercase, self.layers, strict=False):
            sums = layer_sums(cast(nn.Linear, layer), names)
            names = [f"{letter}{i}" for i in range(1, len(sums) + 1)]
            lines += [
                f"{unit} = {self.activation_name}({total})"
                for unit, total in zip(names, sums, strict=True)
            ]
        return names, lines


class MLP(Regression):
    """A multilayer perceptron: hidden layers with a nonlinear activation, then a linear output.

    Args:
        hidden: Units of each hidden layer.
        activation: Activation of the hidden layers: step, sigmoid, tanh, relu or none.
    """

    chapter: ClassVar[int] = 5
    year: ClassVar[int] = 1986
    paper: ClassVar[str] = (
        "Rumelhart, Hinton & Williams, Learning Representations by Back-Propagating Errors"
    )
    idea: ClassVar[str] = "layers with nonlinear activations"
    equation: ClassVar[str] = "a' = f(W a + b), layer on layer"

    def __init__(
        self, inputs: int = 1, hidden: tuple[int, ...] = (8,), activation: Activation = "relu"
    ) -> None:
        super().__init__()
        self.hidden = Layers([inputs, *hidden], activation)
        self.output = nn.Linear([inputs, *hidden][-1], 1)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return y_B."""
        return self.output(self.hidden(x_BD)).squeeze(-1)

    def formulas(self, inputs: Sequence[str], classes: Sequence[str]) -> list[str]:  # noqa: ARG002
        """Return the output, then each unit, layer by layer."""
        names, lines = self.hidden.formulas(inputs)
        return [f"y = {layer_sums(self.output, names)[0]}", *lines]


class MLPClassifier(Softmax):
    """Many classes: hidden layers with a nonlinear activation, then a softmax regression on their output.

    Args:
        classes: Number of classes, V.
        hidden: Units of each hidden layer.
        activation: Activation of the hidden layers: step, sigmoid, tanh, relu or none.
    """

    chapter: ClassVar[int] = 5
    year: ClassVar[int] = MLP.year
    paper: ClassVar[str] = MLP.paper
    idea: ClassVar[str] = MLP.idea

    def __init__(
        self,
        inputs: int = 1,
        classes: int = 3,
        hidden: tuple[int, ...] = (32,),
        activation: Activation = "relu",
    ) -> None:
        super().__init__([inputs, *hidden][-1], classes)
        self.scores = nn.Sequential(Layers([inputs, *hidden], activation), self.scores)

    def formulas(self, inputs: Sequence[str], classes: Sequence[str]) -> list[str]:
        """Return the score of each class, then each unit, layer by layer."""
        layers, output = cast(Iterable[nn.Module], self.scores)
        names, lines = cast(Layers, layers).formulas(inputs)
        scores = zip(classes, layer_sums(cast(nn.Linear, output), names), strict=True)
        return ["p = softmax(score)", *(f"score({k}) = {z}" for k, z in scores), *lines]


def backpropagate(
    weights_L: Tensor, biases_L: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of a chain of L layers of one sigmoid neuron each by hand.

        z_l = w_l a_(l-1) + b_l,   a_l = sigmoid(z_l),   a_0 = x,   C = (a_L - y)^2

    Returns C, dC/dw_L and dC/db_L.
    """
    activations = [x]
    for weight, bias in zip(weights_L, biases_L, strict=True):
        activations.append(torch.sigmoid(weight * activations[-1] + bias))
    weight_gradients_L, bias_gradients_L = torch.empty_like(weights_L), torch.empty_like(biases_L)
    gradient = 2 * (activations[-1] - y)  # dC/da of the last layer
    for layer in reversed(range(len(weights_L))):
        a = activations[layer + 1]
        gradient = gradient * a * (1 - a)  # dC/dz: sigmoid' = a (1 - a)
        weight_gradients_L[layer] = gradient * activations[layer]
        bias_gradients_L[layer] = gradient
        gradient = gradient * weights_L[layer]  # dC/da of the layer below
    return (activations[-1] - y) ** 2, weight_gradients_L, bias_gradients_L


def backpropagate_layers(
    weights: Sequence[Tensor], biases: Sequence[Tensor], x_BF: Tensor, y_BF: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute the gradients of layers of many sigmoid neurons by hand: `backpropagate` with matrices.

        z_l = W_l a_(l-1) + b_l,   a_l = sigmoid(z_l),   a_0 = x,   C = sum_j (a_Lj - y_j)^2

    A neuron influences every neuron of the layer above, so its gradient is a sum over all of them:
    the product with W_l. Returns C, dC/dW_l and dC/db_l of each layer, means over the batch.
    """
    activations = [x_BF]
    for weight_GF, bias_G in zip(weights, biases, strict=True):
        activations.append(torch.sigmoid(activations[-1] @ weight_GF.t() + bias_G))
    error_BF = activations[-1] - y_BF
    weight_gradients, bias_gradients = [], []
    gradient_BF = 2 * error_BF / len(x_BF)  # dC/da of the last layer
    for layer in reversed(range(len(weights))):
        a_BF = activations[layer + 1]
        gradient_BF = gradient_BF * a_BF * (1 - a_BF)  # dC/dz
        weight_gradients.append(gradient_BF.t() @ activations[layer])
        bias_gradients.append(gradient_BF.sum(0))
        gradient_BF = gradient_BF @ weights[layer]  # dC/da of the layer below
    cost = (error_BF**2).sum(-1).mean()
    return cost, weight_gradients[::-1], bias_gradients[::-1]


class GatedExperts(nn.Module):
    """A mixture of experts: y = sum_i f(u)_i softmax(g(v))_i, f and g linear.

    It is attention in its simplest form: a weighted average whose weights are computed. `u` and `v`
    are the widths of the inputs of experts and gates, `outputs` that of an expert's output, D. Any
    other module with as many outputs may replace `experts` or `gates`.
    """

    def __init__(self, u: int, v: int, experts: int, outputs: int) -> None:
        super().__init__()
        if experts < 1:
            raise ValueError(f"experts must be at least 1, not {experts}")
        self.experts: nn.Module = nn.Linear(u, experts * outputs)
        self.gates: nn.Module = nn.Linear(v, experts)

    def gate_weights(self, v_BF: Tensor) -> Tensor:
        """Return gates_BE, the weight of each expert. Any number of leading axes is allowed."""
        return softmax(self.gates(v_BF))

    def forward(self, u_BF: Tensor, v_BF: Tensor) -> Tensor:
        """Return y_BD. Any number of leading axes is allowed."""
        gates_BE = self.gate_weights(v_BF)
        outputs_BED = self.experts(u_BF).unflatten(-1, (gates_BE.shape[-1], -1))
        return (gates_BE.unsqueeze(-2) @ outputs_BED).squeeze(-2)


class Experts(Regression):
    """Linear experts, averaged by softmax gates: y = sum_i f(u)_i softmax(g(v))_i.

    Args:
        experts: Number of experts, E.
        u: Indices of the inputs that the experts see, counted from 0; all by default.
        v: Indices of the inputs that the gates see; all by default.
    """

    chapter: ClassVar[int] = 6
    year: ClassVar[int] = 1991
    paper: ClassVar[str] = "Jacobs, Jordan, Nowlan & Hinton, Adaptive Mixtures of Local Experts"
    idea: ClassVar[str] = "softmax gates choose among experts"
    equation: ClassVar[str] = "y = sum_i g_i f_i(u), g = softmax(W v + b)"

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
        if not (self.u and self.v) or not all(0 <= i < inputs for i in (*self.u, *self.v)):
            raise ValueError(
                f"u and v must be indices of the {inputs} inputs, counted from 0, "
                f"not {self.u} and {self.v}"
            )
        self.mixture = GatedExperts(len(self.u), len(self.v), experts, 1)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return y_B."""
        return self.mixture(x_BD[:, self.u], x_BD[:, self.v]).squeeze(-1)

    def gate_weights(self, x_BD: Tensor) -> Tensor:
        """Return gates_BE, the weight of each expert."""
        return self.mixture.gate_weights(x_BD[:, self.v])

    def formulas(self, inputs: Sequence[str], classes: Sequence[str]) -> list[str]:  # noqa: ARG002
        """Return the mixture, then each expert with the score of its gate."""
        experts = layer_sums(cast(nn.Linear, self.mixture.experts), [inputs[i] for i in self.u])
        gates = layer_sums(cast(nn.Linear, self.mixture.gates), [inputs[i] for i in self.v])
        width = max(map(len, experts))
        lines = [
            f"f{i} = {expert:<{width}}   s{i} = {gate}"
            for i, (expert, gate) in enumerate(zip(experts, gates, strict=True), 1)
        ]
        return ["y = sum_i g_i f_i, g = softmax(s)", *lines]


class MLPLM(WindowLM):
    """An MLP over the concatenated embeddings of a window.

        features = norm(mlp(embedding(token), embedding(token before), ...))
        logits   = W features

    Args:
        hidden: Width of a hidden layer, F.
        depth: Number of hidden layers.
        activation: Activation of the hidden layers: step, sigmoid, tanh, relu or none.
    """

    chapter: ClassVar[int] = 5
    year: ClassVar[int] = 2003
    paper: ClassVar[str] = (
        "Bengio, Ducharme, Vincent & Jauvin, A Neural Probabilistic Language Model"
    )
    idea: ClassVar[str] = MLP.idea
    equation: ClassVar[str] = MLP.equation

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
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

    def contributions(self, embeddings_BSD: Tensor) -> Tensor:
        """Return contributions_BSWF to the sums of the first hidden layer."""
        first = cast(nn.Linear, self.layers.layers[0])
        weight_FDW = first.weight.unflatten(1, (-1, self.window))
        return torch.einsum("bsd,fdw->bswf", embeddings_BSD, weight_FDW)

    def hidden(self, tokens_BT: Tensor, state: State | None) -> Tensor:
        """Return hidden_BTF, the output of the last hidden layer."""
        embeddings_BSD = self.embed(tokens_BT, state)
        # All windows at once: unfold puts the W tokens last, so inputs are ordered by D, then W.
        windows_BTF = embeddings_BSD.unfold(1, self.window, 1).flatten(2)
        return self.layers(windows_BTF)

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """Return features_BTF."""
        hidden_BTF = self.hidden(tokens_BT, state)
        return F.rms_norm(hidden_BTF, hidden_BTF.shape[-1:])


class ExpertsLM(MLPLM):
    """An MLP over a window, whose last layer is gated experts, all with the same input.

    Args:
        hidden: Width of a hidden layer and of an expert's output, F.
        experts: Number of experts, E.
    """

    chapter: ClassVar[int] = 6
    year: ClassVar[int] = 1991
    paper: ClassVar[str] = Experts.paper
    idea: ClassVar[str] = Experts.idea
    equation: ClassVar[str] = Experts.equation

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
        super().__init__(vocab_size, context_length, window, width, hidden, depth, activation)
        self.mixture = GatedExperts(hidden, hidden, experts, hidden)

    def activation_maps(self, tokens_BT: Tensor) -> list[ActivationMap]:
        """Return `experts`, the weight of each expert, and `token contribution`."""
        gates_BTE = self.mixture.gate_weights(self.hidden(tokens_BT, None))
        experts = ActivationMap("experts", gates_BTE[:, None, None], tokens_BT, "experts")
        return [experts, *super().activation_maps(tokens_BT)]

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """Return features_BTF."""
        hidden_BTF = self.hidden(tokens_BT, state)
        mixed_BTF = self.mixture(hidden_BTF, hidden_BTF)
        return F.rms_norm(mixed_BTF, mixed_BTF.shape[-1:])
