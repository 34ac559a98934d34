"""Chapter 8: a state that is fed back."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from gpt.models.base import Model
from gpt.models.linear import Linear, Logistic, Softmax
from gpt.models.recurrent import ManyToOne, RNNCell, gradient_by_distance
from training.chapters.fitting import fit, train
from training.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, LinePlot, Panel, Series

UNITS = 8
SLOPE = 0.25
"""The fourth day's change below which it counts as steady."""


def scalar_cell(recurrent_weight: float, input_weight: float = 0.0) -> RNNCell:
    """Return a cell of one unit with these weights and no bias."""
    cell = RNNCell(1, 1).double()
    nn.init.zeros_(cell.input.bias)
    nn.init.constant_(cell.input.weight, input_weight)
    nn.init.constant_(cell.hidden.weight, recurrent_weight)
    return cell


@torch.no_grad()
def three_days_by_hand(*prices: float) -> list[float]:
    """Return the state after each day, with an input weight of 1 and a recurrent weight of 0.5."""
    x_TBD = torch.tensor(prices, dtype=torch.float64).view(-1, 1, 1)
    cell = scalar_cell(0.5, input_weight=1.0)
    output_TBD, _ = cell(x_TBD, cell.zero_states(x_TBD))
    return output_TBD.flatten().tolist()


def waves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return three days of prices, x_BTD, and the fourth, y_B.

    Prices go up and down in waves of 5 to 12 days. One day tells neither the speed nor the
    direction; two do not tell the speed; from three the fourth follows.
    """
    generator = torch.Generator().manual_seed(seed)
    phase_B, days_B = torch.rand(2, count, generator=generator, dtype=torch.float64)
    angle_B = 2 * math.pi / (5 + 7 * days_B)
    prices_BT = torch.sin(
        2 * math.pi * phase_B.unsqueeze(1) + torch.outer(angle_B, torch.arange(4))
    )
    return prices_BT[:, :3].unsqueeze(-1), prices_BT[:, 3]


def targets(x_BTD: Tensor, y_B: Tensor) -> dict[str, Tensor]:
    """Return what each head learns: the price, whether it rises, and falls, stays or rises."""
    change_B = y_B - x_BTD[:, -1, 0]
    classes_B = 1 + (change_B > SLOPE).long() - (change_B < -SLOPE).long()
    return {"number": y_B, "probability": (change_B > 0).double(), "classes": classes_B}


HEADS: dict[str, Callable[[], Model]] = {
    "number": lambda: Linear(UNITS),
    "probability": lambda: Logistic(UNITS),
    "classes": lambda: Softmax(UNITS, 3),
}
"""The regressions of chapters 1, 3 and 4, as heads of one cell."""


@functools.cache
def forecaster(head: str) -> ManyToOne:
    """Return a cell with one of HEADS, trained on 300 stretches of three days."""
    torch.manual_seed(0)
    x_BTD, y_B = waves(300, seed=0)
    model = ManyToOne(RNNCell(1, UNITS), HEADS[head]()).double()
    rows = x_BTD, targets(x_BTD, y_B)[head]
    return train(model, itertools.repeat(rows, 400), rate=0.02)


def forecast_errors() -> dict[str, float]:
    """Return root mean squared errors of the fourth day, on unseen days, by what predicts it."""
    seen_BTD, seen_B = waves(300, seed=0)
    plane = fit(lambda: Linear(3), (seen_BTD.squeeze(-1), seen_B))
    x_BTD, y_B = waves(1000, seed=1)
    predictions = {
        "the same as today": x_BTD[:, -1, 0],
        "a weighted sum of the three days": plane(x_BTD.squeeze(-1)),
        "the RNN": forecaster("number")(x_BTD),
    }
    return {
        name: (prediction_B - y_B).square().mean().sqrt().item()
        for name, prediction_B in predictions.items()
    }


def accuracies() -> dict[str, float]:
    """Return the accuracy of the two heads that classify, on unseen days."""
    x_BTD, y_B = waves(1000, seed=1)
    wanted = targets(x_BTD, y_B)
    rises_B = (forecaster("probability")(x_BTD) >= 0.5).double()
    classes_B = forecaster("classes")(x_BTD).argmax(-1)
    return {
        "probability": (rises_B == wanted["probability"]).double().mean().item(),
        "classes": (classes_B == wanted["classes"]).double().mean().item(),
    }


def scalar_gradients(weight: float, steps: int) -> Tensor:
    """Return the gradients 0 to `steps` steps back through a recurrence of one weight.

    At h = 0 the slope of tanh is 1, so that only the weight is multiplied.
    """
    x_TBD = torch.zeros(steps + 1, 1, 1, dtype=torch.float64)
    return gradient_by_distance(scalar_cell(weight), x_TBD)


def matrix_gradients(radius: float, steps: int) -> Tensor:
    """Return the gradients 0 to `steps` steps back through a random matrix W, relative to the first.

    `radius` is W's spectral radius, the absolute value of its largest eigenvalue.
    """
    width = 16
    torch.manual_seed(0)
    weight_DD = torch.randn(width, width, dtype=torch.float64)
    cell = RNNCell(width, width).double()
    nn.init.zeros_(cell.input.bias)
    with torch.no_grad():
        cell.hidden.weight.copy_(weight_DD * radius / torch.linalg.eigvals(weight_DD).abs().max())
    norms_T = gradient_by_distance(cell, torch.zeros(steps + 1, 1, width, dtype=torch.float64))
    return norms_T / norms_T[0]


def clipped_gradient(max_norm: float) -> tuple[float, float]:
    """Return the norm of an exploding gradient, before and after clipping to `max_norm`."""
    torch.manual_seed(0)
    model = ManyToOne(RNNCell(1, 32), Linear(32)).double()
    nn.init.normal_(model.cell.hidden.weight, std=2 / 32**0.5)
    model.loss(torch.randn(4, 30, 1, dtype=torch.float64), torch.zeros(4).double()).backward()
    before = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return before.item(), nn.utils.get_total_norm(gradients).item()


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    prices = (0.1, 0.2, 0.3)
    yield "Three days of prices through one cell, h = tanh(1 x + 0.5 h):"
    before = 0.0
    for price, state in zip(prices, three_days_by_hand(*prices), strict=True):
        yield f"  tanh({price:g} + 0.5 * {before:.3f}) = {state:.3f}"
        before = state
    yield "The fourth day of a wave, from three; root mean squared error on 1,000 unseen stretches:"
    for name, error in forecast_errors().items():
        yield f"  {name:<34}{error:.2f}"
    right = accuracies()
    yield "Other heads on the same cell:"
    yield f"  will it rise? (a sigmoid)               {right['probability']:.0%} right"
    yield f"  falls, steady or rises? (a softmax)     {right['classes']:.0%} right"
    yield "The gradient that is left, through a recurrence of one weight w:"
    for weight, steps in ((0.2, 5), (0.5, 100), (2.0, 100)):
        yield f"  w = {weight:<4g} {steps:>3} steps back: {scalar_gradients(weight, steps)[-1].item():.2g}"
    yield "Through a random 16 x 16 matrix W, 100 steps back:"
    for radius in (0.9, 1.0, 1.1):
        left = matrix_gradients(radius, 100)[-1].item()
        yield (
            f"  largest eigenvalue {radius:<4g} {left:.2g} = {left / radius**100:.2f} * {radius:g}^100"
        )
    exploded, clipped = clipped_gradient(1.0)
    yield f"An exploded gradient has a norm of {exploded:.2g}; clipped, of {clipped:.2g}."


def powers() -> Sequence[Panel]:
    """Chapter 8: what is left of a gradient through one weight, and through a matrix."""
    steps = 100
    distances = torch.arange(steps + 1)
    weights = {2.0: ORANGE, 1.0: GREY, 0.9: BLUE, 0.5: PURPLE, 0.2: GREEN}
    scalar = [
        Series(
            distances,
            scalar_gradients(weight, steps),
            color,
            f"w = {weight:g}",
            label_offset=(5, {1.0: 4, 0.9: -4}.get(weight, 0)),
        )
        for weight, color in weights.items()
    ]
    matrix = [
        Series(distances, matrix_gradients(radius, steps), color, f"{radius:g}")
        for radius, color in {1.1: ORANGE, 1.0: GREY, 0.9: BLUE}.items()
    ]
    return [
        LinePlot("steps back", "gradient that is left", scalar, "one weight w", log_y=True),
        LinePlot(
            "steps back",
            "gradient that is left",
            matrix,
            "a 16 x 16 matrix, by its largest eigenvalue",
            log_y=True,
        ),
    ]


FIGURES = (powers,)
