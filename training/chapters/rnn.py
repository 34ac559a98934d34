"""Chapter 8: a state that is fed back."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from gpt.models.recurrent import RNNCell, gradient_by_distance
from training.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, LinePlot, Panel, Series


def powers() -> Sequence[Panel]:
    """Chapter 8: the gradient through a scalar recurrence is its weight to the power of the distance."""
    series = []
    weights = {1.5: ORANGE, 1.0: GREY, 0.9: BLUE, 0.5: PURPLE, 0.2: GREEN}
    for weight, color in weights.items():
        cell = RNNCell(1, 1).double()
        for parameter in cell.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(cell.hidden.weight, weight)
        norms = gradient_by_distance(cell, torch.zeros(41, 1, 1, dtype=torch.float64))
        series.append(Series(torch.arange(41), norms, color, f"w = {weight:g}"))
    return [LinePlot("steps back", "gradient that is left", series, log_y=True)]


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = (powers,)
