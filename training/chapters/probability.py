"""Chapter 3: a score becomes a probability."""

import functools
import math
from collections.abc import Iterator, Sequence

import torch

from gpt.models.linear import Logistic
from training.chapters.fitting import fit
from training.plots.panels import (
    BLUE,
    GREY,
    ORANGE,
    LinePlot,
    LineStyle,
    Panel,
    Series,
)
from training.tasks.tables import (
    BINARY_CLASSIFICATION_TABLES,
    BROWN,
    WHITE,
)

RICES = BINARY_CLASSIFICATION_TABLES["white-or-brown"](0).splits
"""Cups of rice and water, and whether the rice was white (0) or brown (1)."""


def switch(weight: float, bias: float) -> Logistic:
    """Return a logistic regression of one input with this weight and bias."""
    model = Logistic(1)
    with torch.no_grad():
        model.score.weight.fill_(weight)
        model.score.bias.fill_(bias)
    return model


@torch.no_grad()
def probabilities(model: Logistic, *x: float) -> list[float]:
    """Return the probability of class 1 for each value of the one input."""
    return model(torch.tensor(x, dtype=torch.float32).unsqueeze(-1)).tolist()


def gradient_by_chain_rule(weight: float, bias: float, x: float, y: float) -> tuple[float, ...]:
    """Return p, and dL/dp, dp/dz and dz/dw, whose product is the gradient of the loss by w."""
    [p] = probabilities(switch(weight, bias), x)
    return p, (p - y) / (p * (1 - p)), p * (1 - p), x


def gradient_by_autograd(weight: float, bias: float, x: float, y: float) -> float:
    """Return the gradient of the loss by w."""
    model = switch(weight, bias)
    model.loss(torch.tensor([[float(x)]]), torch.tensor([float(y)])).backward()
    gradient = model.score.weight.grad
    assert gradient is not None
    return gradient.item()


@functools.cache
def white_or_brown() -> Logistic:
    """Return a logistic regression that tells white rice from brown by cups of it and of water."""
    return fit(lambda: Logistic(2), RICES["train"])


@torch.no_grad()
def accuracy(model: Logistic, split: str) -> float:
    """Return the share of the rows of a split that the model classifies correctly."""
    x_BD, class_B = RICES[split]
    return (model.classify(x_BD.double()) == class_B).double().mean().item()


def border() -> Sequence[Panel]:
    """Chapter 3: the score of a logistic regression separates two kinds of rice; its sigmoid is a probability."""
    x_BD, class_B = RICES["train"]
    model = white_or_brown()
    (cups, water), bias = model.score.weight.tolist(), model.score.bias.item()
    ends = torch.tensor([1.0, 5.0])
    plane = []
    for label, color in enumerate([BLUE, ORANGE]):
        x_N, y_N = x_BD[class_B == label].T
        plane.append(Series(x_N, y_N, color, style="dots"))
    for p in (0.1, 0.5, 0.9):
        y = (math.log(p / (1 - p)) - bias - cups * ends) / water
        style: LineStyle = "solid" if p == 0.5 else "dashed"
        plane.append(Series(ends, y, GREY, f"p = {p:g}", style, label_offset=(5, 30 * p - 15)))
    z = torch.linspace(-30, 30, 241)
    sigmoid = [Series(z, torch.sigmoid(z), GREY)]
    for label, (kind, color) in enumerate([(WHITE, BLUE), (BROWN, ORANGE)]):
        with torch.no_grad():
            z_N = model.score(x_BD[class_B == label].double())
        name = f"{kind.name}, y = {label}"
        median, offset = int(z_N.median(0).indices), (-30, 14 - 28 * label)
        sigmoid.append(Series(z_N, z_N * 0 + label, color, name, "dots", median, offset))
    return [
        LinePlot("cups of rice", "cups of water", plane),
        LinePlot("score z = w·x + b", "probability that it is brown", sigmoid),
    ]


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield "The sigmoid of a score z, and what is left for the other answer:"
    for z in (-10, -2, 0, 2, 10):
        [p] = probabilities(switch(1, 0), z)
        yield f"  z = {z:3}   P(yes) = {p:.5f}   P(no) = {1 - p:.5f}"
    yield "The bias is a threshold. sigmoid(a - 10) is active above 10:"
    inputs = (8, 9, 10, 11, 12)
    for a, p in zip(inputs, probabilities(switch(1, -10), *inputs), strict=True):
        yield f"  a = {a:2}   p = {p:.3f}"
    yield "The loss is the surprise -ln p at the true answer:"
    for p in (0.99, 0.9, 0.5, 0.1, 0.01):
        yield f"  p = {p:<5g}  {-math.log(p):.3f} nats"
    yield "Three answers with probabilities of 0.9, 0.8 and 0.7 for what was true:"
    likelihood = math.prod((0.9, 0.8, 0.7))
    yield f"  likelihood {likelihood:.3f}, its -ln / 3 = {-math.log(likelihood) / 3:.3f} nats, the mean loss"
    yield "The gradient by the chain rule, for w = 0, b = 0, x = 3 and y = 1:"
    p, by_p, by_score, by_weight = gradient_by_chain_rule(0, 0, 3, 1)
    yield f"  dL/dp {by_p:g}  times  dp/dz {by_score:g}  times  dz/dw {by_weight:g}"
    yield f"  = (p - y) x = ({p:g} - 1) 3 = {(p - 1) * 3:g}; autograd: {gradient_by_autograd(0, 0, 3, 1):g}"
    model = white_or_brown()
    (cups, water), bias = model.score.weight.tolist(), model.score.bias.item()
    yield "White or brown, from cups of rice and of water (p = 0.5 on the border):"
    yield f"  border     water = {-cups / water:.2f} cups {-bias / water:+.2f}"
    yield f"  accuracy   {accuracy(model, 'validation'):.1%} of rice it has not seen"


FIGURES = (border,)
