"""Chapter 5: layers of regressions with a nonlinearity between."""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.linear import Linear, Softmax, gradient_step
from gpt.models.mlp import (
    ACTIVATIONS,
    MLP,
    Activation,
    Layers,
    MLPClassifier,
    backpropagate,
    backpropagate_layers,
)
from training.chapters.fitting import ModelT, fit, predict
from training.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, LinePlot, Panel, Series
from training.tasks.tables import (
    CLASSIFICATION_TABLES,
    CUPS,
    CURVES,
    GRAINS,
    REGRESSION_TABLES,
    Rows,
    digit_rows,
    grain_rows,
)

DIGIT_BATCH = 64
"""Images in a batch of digits."""

NAMES: dict[Activation, str] = {"sigmoid": "sigmoids", "relu": "ReLUs"}
"""Activations that are compared in deep networks, and what their units are called."""

REVIEWS = {"good": (0, 1, 0), "not good": (1, 1, 0), "bad": (0, 0, 1), "not bad": (1, 0, 1)}
"""Reviews, and which of the words not, good, bad each has."""


def two_linear_layers() -> MLP:
    """Return a line on a line, with nothing between: 3 (2x + 1) + 4."""
    model = MLP(1, (1,), "none").double()
    for weight, value in zip(model.parameters(), (2, 1, 3, 4), strict=True):
        nn.init.constant_(weight, value)
    return model


@cache
def reviews() -> dict[str, Tensor]:
    """Return the probabilities that the reviews are positive, without a hidden layer and with one."""
    rows = torch.tensor(list(REVIEWS.values())).float(), torch.tensor([1, 0, 0, 1])
    models = (
        fit(lambda: Softmax(3, 2), rows, 50),
        fit(lambda: MLPClassifier(3, 2, (2,)), rows, 50, 8),
    )
    with torch.no_grad():
        without, hidden = (model(rows[0].double())[:, 1] for model in models)
    return {"without a hidden layer": without, "with two hidden units": hidden}


def chain_gradients() -> tuple[Tensor, Tensor]:
    """Return C and dC/dw_L of four sigmoid neurons in a chain: w = 1, b = 0, x = 1 and target 0."""
    ones_L = torch.ones(4, dtype=torch.float64)
    cost, gradients_L, _ = backpropagate(ones_L, 0 * ones_L, ones_L[0], 0 * ones_L[0])
    return cost, gradients_L


def he_init(layers: Layers) -> None:
    """Draw the weights so that ReLUs keep the size of activations and gradients (He et al. 2015)."""
    for layer in layers.layers:
        linear = cast(nn.Linear, layer)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)


@cache
def gradients_by_layer(activation: Activation, depth: int) -> Tensor:
    """Return the norm of each layer's gradient in a network of 64 neurons a layer, the last as 1.

    All networks of a depth have the same first weights.
    """
    torch.manual_seed(0)
    layers = Layers([64] * (depth + 1), activation).double()
    he_init(layers)
    output_BF = layers(torch.randn(100, 64, dtype=torch.float64))
    (output_BF * torch.randn_like(output_BF)).sum().backward()
    norms_L = torch.stack(
        [cast(Tensor, cast(nn.Linear, layer).weight.grad).norm() for layer in layers.layers]
    )
    return norms_L / norms_L[-1]


def digits(split: str) -> Rows:
    """Return pixels in float64, and classes."""
    x_BD, class_B = digit_rows()[split]
    return x_BD.double(), class_B


def digit_batches(steps: int) -> Iterator[Rows]:
    """Yield batches of random training digits."""
    x_BD, class_B = digits("train")
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x_BD), (DIGIT_BATCH,), generator=generator)
        yield x_BD[rows], class_B[rows]


def accuracy(model: nn.Module) -> float:
    """Return the share of validation digits whose largest output is that of their class."""
    x_BD, class_B = digits("validation")
    with torch.no_grad():
        return (model(x_BD).argmax(-1) == class_B).double().mean().item()


def layer_weights(layers: Layers) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights and the biases of the layers, from the first to the last."""
    linears = [cast(nn.Linear, layer) for layer in layers.layers]
    return [linear.weight.data for linear in linears], [linear.bias.data for linear in linears]


def sigmoid_network() -> Layers:
    """Return a new network of sigmoids: 64 pixels, two hidden layers of 32, ten classes."""
    torch.manual_seed(0)
    return Layers([64, 32, 32, 10], "sigmoid").double()


@cache
def digits_by_hand() -> Layers:
    """Train the sigmoids on the squared error, with gradients by hand and no other tool."""
    layers = sigmoid_network()
    weights, biases = layer_weights(layers)
    for x_BD, class_B in digit_batches(steps=2000):
        target_BV = F.one_hot(class_B, 10).double()
        _, weight_gradients, bias_gradients = backpropagate_layers(weights, biases, x_BD, target_BV)
        for weight, gradient in zip(
            weights + biases, weight_gradients + bias_gradients, strict=True
        ):
            weight -= 2 * gradient
    return layers


def train_on_digits(model: ModelT, steps: int, rate: float) -> ModelT:
    """Train with autograd and plain gradient descent; return the model."""
    for batch in digit_batches(steps):
        gradient_step(model, rate, *batch)
    return model


@cache
def softmax_of_pixels() -> Softmax:
    """Train a softmax regression on the digits."""
    torch.manual_seed(0)
    return train_on_digits(Softmax(64, 10).double(), 1000, 0.5)


@cache
def digit_classifier() -> MLPClassifier:
    """Train 64 ReLUs below a softmax on the digits."""
    torch.manual_seed(0)
    return train_on_digits(MLPClassifier(64, 10, (64,)).double(), 1000, 0.5)


@cache
def deep_classifier(activation: Activation) -> MLPClassifier:
    """Train ten hidden layers of 32 below a softmax on the digits."""
    torch.manual_seed(0)
    model = MLPClassifier(64, 10, (32,) * 10, activation).double()
    for module in model.modules():
        if isinstance(module, Layers):
            he_init(module)
    return train_on_digits(model, 400, 0.1)


def batch_agreement(batch_size: int, batches: int = 20) -> float:
    """Return the mean cosine between the gradient of a batch and that of all rows, before training."""
    weights, biases = layer_weights(sigmoid_network())
    x_BD, class_B = digits("train")

    def gradient(rows: Tensor | slice) -> Tensor:
        target_BV = F.one_hot(class_B[rows], 10).double()
        _, gradients, _ = backpropagate_layers(weights, biases, x_BD[rows], target_BV)
        return torch.cat([gradient.flatten() for gradient in gradients])

    everything = gradient(slice(None))
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randint(len(x_BD), (batch_size,), generator=generator) for _ in range(batches))
    cosines = [F.cosine_similarity(gradient(rows), everything, 0) for rows in draws]
    return torch.stack(cosines).mean().item()


@cache
def grain_pipeline() -> tuple[Softmax, list[Linear]]:
    """Return a classifier of grains by darkness, and a line for the water of each grain."""
    classifier = fit(Softmax, CLASSIFICATION_TABLES["which-grain"](0).splits["train"])
    lines = []
    for grain in GRAINS:
        x_BD, water_B = grain_rows(CUPS, grain)
        lines.append(fit(Linear, (x_BD[:, :1], water_B)))
    return classifier, lines


def water_by_rule(cups: float, darkness: float) -> float:
    """Classify the grain, then apply the line of its class: two models and a rule."""
    classifier, lines = grain_pipeline()
    grain = int(classifier(torch.tensor([[darkness]]).double()).argmax())
    return lines[grain](torch.tensor([[cups]]).double()).item()


@torch.no_grad()
def relu_switch() -> MLP:
    """Return three ReLUs that take turns, weights set by hand: sum_i relu(water_i x - 100 p(not i)).

    The inputs are the cups x and the probability of each grain.
    """
    model = MLP(1 + len(GRAINS), (len(GRAINS),)).double()
    [weights], [biases] = layer_weights(model.hidden)
    weights[:, 0] = torch.tensor([grain.water for grain in GRAINS])
    weights[:, 1:] = -100 * (1 - torch.eye(len(GRAINS)))
    biases.zero_()
    nn.init.ones_(model.output.weight)
    nn.init.zeros_(model.output.bias)
    return model


@torch.no_grad()
def water_by_switch(cups: float, darkness: float) -> float:
    """Feed the classifier's probabilities to the ReLUs: one network, no rule."""
    classifier, _ = grain_pipeline()
    p_V = classifier(torch.tensor([[darkness]]).double())[0]
    return predict(relu_switch(), torch.tensor(cups), *p_V).item()


def white_relu(cups_B: Tensor, p_other: float) -> Tensor:
    """Return the output of the white rice's ReLU: relu(2x - 100 p(other))."""
    p_V = torch.tensor([1 - p_other, p_other, 0.0])
    columns = torch.broadcast_tensors(cups_B, *p_V)
    return relu_switch().hidden(torch.stack(columns, -1).double())[..., 0].detach()


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield f"Two linear layers are one: 3 (2x + 1) + 4 = 6x + 7 = {predict(two_linear_layers(), torch.tensor(10)):g} at x = 10."
    yield "Is the review positive? " + ", ".join(REVIEWS)
    for name, p_B in reviews().items():
        yield f"  {name:<24}" + "  ".join(f"{p:.2f}" for p in p_B.tolist())
    cost, gradients_L = chain_gradients()
    yield f"A chain of four sigmoids, each with w = 1 and b = 0, from x = 1 to a target of 0: C = {cost:.3f}"
    yield "  -dC/dw, first to last   " + "  ".join(f"{-g:.5f}" for g in gradients_L.tolist())
    yield "Gradient of the first of many layers, that of the last being 1:"
    for activation, name in NAMES.items():
        first = [gradients_by_layer(activation, depth)[0].item() for depth in (10, 20)]
        yield f"  {name:<10}10 layers: {first[0]:<10.2g}20 layers: {first[1]:.2g}"
    yield "Handwritten digits. Cosine of a batch's gradient with that of all 1,437 images:"
    agreement = [f"{size} {batch_agreement(size):.3f}" for size in (1, 8, 64)]
    yield f"  images in the batch     {'   '.join(agreement)}"
    yield "Digits of other writers that are read correctly, of 360:"
    yield f"  softmax of the pixels                          {accuracy(softmax_of_pixels()):.0%}"
    yield f"  64 ReLUs, then a softmax                       {accuracy(digit_classifier()):.0%}"
    yield f"  32 + 32 + 10 sigmoids, backpropagated by hand  {accuracy(digits_by_hand()):.0%}"
    for activation, name in NAMES.items():
        tenths = 10 * accuracy(deep_classifier(activation))
        yield f"  ten hidden layers of {name:<26}{tenths:.0f} in 10"
    yield "Cups of water for 4 cups of white rice, brown rice, franken-grain (8, 12, 4):"
    for name, water in (
        ("classify, then a rule", water_by_rule),
        ("classify, then ReLUs", water_by_switch),
    ):
        yield f"  {name:<24}" + "  ".join(f"{water(4, grain.darkness):.2f}" for grain in GRAINS)
    yield "The white rice's ReLU, 2x - 100 p(other), at 4, 50, 60 cups:"
    for p_other in (0, 0.05, 1):
        outputs = white_relu(torch.tensor([4.0, 50.0, 60.0]), p_other).tolist()
        yield f"  p(other) = {p_other:<12g} " + "  ".join(f"{output:g}" for output in outputs)


def activations() -> Sequence[Panel]:
    """Chapter 5: four activations, and what three units of each make of a line."""
    x = torch.linspace(-3, 3, 241, dtype=torch.float64)
    colors: dict[Activation, str] = {"step": GREY, "sigmoid": GREEN, "tanh": ORANGE, "relu": BLUE}
    labels: dict[Activation, tuple[int, tuple[float, float]]] = {
        "step": (120, (-32, 38)),
        "sigmoid": (40, (-20, 14)),
        "tanh": (80, (8, -8)),
        "relu": (185, (-30, 4)),
    }
    functions = [
        Series(x, ACTIVATIONS[name](x), color, name, "solid", *labels[name])
        for name, color in colors.items()
    ]
    units = []
    offsets: dict[Activation, float] = {"sigmoid": -8, "tanh": 8, "relu": 0}
    for name, offset in offsets.items():
        activate = ACTIVATIONS[name]
        y = activate(2 * (x + 2)) - 2 * activate(2 * x) + 1.5 * activate(2 * (x - 1.5))
        units.append(Series(x, y, colors[name], name, label_offset=(5, offset)))
    return [
        LinePlot("z", "f(z)", functions, "four activations", y_limits=(-1.2, 2.2)),
        LinePlot("x", "y", units, "f(2x + 4) - 2 f(2x) + 1.5 f(2x - 3)"),
    ]


def curves() -> Sequence[Panel]:
    """Chapter 5: three curves fitted with 2, 8 and 32 ReLUs, each of which adds a kink."""
    x = torch.linspace(-1.5, 2.5, 161)
    colors = {"square": BLUE, "cubic": GREEN, "sine": ORANGE}
    panels = []
    for units, restarts in {2: 4, 8: 4, 32: 1}.items():
        series = []
        for name, (formula, curve) in CURVES.items():
            rows = REGRESSION_TABLES[name](0).splits["train"]
            model = fit(partial(MLP, 1, (units,)), rows, 120, restarts)
            series.append(Series(x, curve(x), GREY, style="dashed"))
            label = formula.replace("^2", "²").replace("^3", "³")
            series.append(Series(x, predict(model, x), colors[name], label))
        panels.append(LinePlot("x", "y", series, f"{units} units"))
    return panels


def depth() -> Sequence[Panel]:
    """Chapter 5: the gradient of each of twenty layers, with sigmoids and with ReLUs."""
    layer = torch.arange(1, 21)
    colors: dict[Activation, str] = {"sigmoid": GREEN, "relu": BLUE}
    series = [
        Series(layer, gradients_by_layer(name, 20), color, NAMES[name], "solid", 8, (-40, y))
        for (name, color), y in zip(colors.items(), (12, -12), strict=True)
    ]
    bound = 0.25 ** (20 - layer.double())
    series.append(Series(layer, bound, GREY, "¼ a layer", "dashed", 8, (8, -8)))
    return [LinePlot("layer, of 20", "gradient, that of the last = 1", series, log_y=True)]


def switch() -> Sequence[Panel]:
    """Chapter 5: a ReLU that is to be shut by the probability of other grains, and opens again."""
    cups = torch.linspace(0, 80, 161)
    series = [
        Series(cups, white_relu(cups, p), color, f"p(other) = {p:g}", "solid", index, offset)
        for p, color, index, offset in (
            (0.0, BLUE, 110, (-88, 6)),
            (0.05, PURPLE, 110, (8, -8)),
            (1.0, ORANGE, 120, (6, -10)),
        )
    ]
    return [LinePlot("cups of grain", "max(0, 2x - 100 p(other))", series)]


FIGURES = (activations, curves, depth, switch)
