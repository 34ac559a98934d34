"""Chapter 1: a line, fitted by gradient descent."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from gpt.models.linear import Linear, gradient_step
from training.chapters.fitting import fit
from training.plots.panels import BLUE, ORANGE, LinePlot, Panel, Series
from training.tasks.tables import BROWN, CUPS, REGRESSION_TABLES, WHITE, grain_rows

THROW = torch.tensor([[10.0]]), torch.tensor([50.0])
"""A throw from ten meters, and the power it needs."""


def first_throw() -> Linear:
    """Return the line before any training: a slope of 4 and a base strength of 5."""
    model = Linear(1)
    with torch.no_grad():
        model.weight.fill_(4)
        model.bias.fill_(5)
    return model


def gradient_without_reset() -> tuple[float, float]:
    """Return d loss / dw of the first throw, after one and after two backward passes without a reset."""
    model, gradients = first_throw(), []
    for _ in range(2):
        model.loss(*THROW).backward()
        assert model.weight.grad is not None
        gradients.append(model.weight.grad.item())
    return gradients[0], gradients[1]


@functools.cache
def white_rice() -> Linear:
    """Return the line that gradient descent finds for white rice, from weights of 0."""
    x_BD, y_B = grain_rows(CUPS, WHITE)
    model = Linear(1)
    nn.init.zeros_(model.weight)
    for _ in range(1000):
        gradient_step(model, 0.05, x_BD[:, :1], y_B)
    return model


@functools.cache
def both_rices() -> tuple[float, Linear]:
    """Return the slope of the best line through the origin for both rices, and the best line."""
    x_BD, y_B = grain_rows(CUPS, WHITE, BROWN)
    x_B = x_BD[:, 0]
    slope = (x_B * y_B).sum() / (x_B * x_B).sum()  # where the gradient of the squared error is 0
    return slope.item(), fit(Linear, (x_BD[:, :1], y_B))


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    model = first_throw()
    power_B, loss, weight_gradient_D, bias_gradient = model.gradient_step_by_hand(0.001, *THROW)
    yield "A throw from 10 meters with w = 4, b = 5; it needs a power of 50."
    yield f"  1 predict    w x + b = {power_B.item():g}"
    yield f"  2 loss       (prediction - 50)^2 = ({power_B.item() - 50:g})^2 = {loss:g}"
    yield f"  3 gradient   by w: {weight_gradient_D.item():g}, by b: {bias_gradient:g}"
    yield f"  4 update     at a rate of 0.001: w = {model.weight.item():g}, b = {model.bias.item():g}"
    once, twice = gradient_without_reset()
    yield f"  5 reset      without it, a second backward pass adds up: {once:g} becomes {twice:g}"
    yield f"The next throw has a power of {model(THROW[0]).item():g}."
    yield f"White rice, by gradient descent: y = {_formula(white_rice())}"
    yield "Brown rice needs 3x. One line for both:"
    slope, affine = both_rices()
    yield f"  linear       y = {slope:.2f} x"
    yield f"  affine       y = {_formula(affine)}"
    yield f"For 4 cups it says {4 * slope:.0f}: white rice needs 8 and brown rice 12."


def _formula(model: Linear) -> str:
    """Format a line."""
    return f"{model.weight.item():.2f} x + {model.bias.item():z.2f}"


def line() -> Sequence[Panel]:
    """Chapter 1: a fitted line after 0 to 3,000 steps of gradient descent."""
    meters_BD, power_B = REGRESSION_TABLES["basketball"](0).splits["train"]
    model = Linear(1)
    nn.init.zeros_(model.weight)
    ends = torch.tensor([0.0, 9.0])
    labels = {0: "before", 1: "1 step", 2: "2 steps", 4: "4 steps", 3000: "3,000 steps"}
    series: list[Series] = []
    for step in range(max(labels) + 1):
        if step in labels:
            power = model(ends.unsqueeze(-1)).detach()
            alpha = 0.3 + 0.7 * len(series) / (len(labels) - 1)
            series.append(Series(ends, power, BLUE, labels[step], alpha=alpha))
        gradient_step(model, 0.005, meters_BD, power_B)
    shots = Series(meters_BD[:, 0], power_B, ORANGE, "shots that went in", "dots", 5, (-105, 8))
    return [LinePlot("distance (meters)", "power (units)", [*series, shots])]


FIGURES = (line,)
