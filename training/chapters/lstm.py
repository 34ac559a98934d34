"""Chapter 9: gates, and a memory that is changed by addition."""

from collections.abc import Iterator, Sequence

import torch

from gpt.models.recurrent import Cell, GRUCell, LSTMCell, RNNCell, gradient_by_distance
from training.plots.panels import BLUE, GREEN, ORANGE, LinePlot, Panel, Series


def memory() -> Sequence[Panel]:
    """Chapters 8 to 10: norm of the gradient at a state, by its distance from the last state."""
    steps, width, seeds = 61, 64, 5
    cells: dict[str, type[Cell]] = {"LSTM": LSTMCell, "GRU": GRUCell, "RNN": RNNCell}
    series = []
    for (name, cell), color in zip(cells.items(), (BLUE, GREEN, ORANGE), strict=True):
        mean_log = torch.zeros(steps, dtype=torch.float64)
        for seed in range(seeds):
            torch.manual_seed(seed)
            x_TBD = torch.randn(steps, 4, width).double()
            norms = gradient_by_distance(cell(width, width).double(), x_TBD)
            mean_log += (norms / norms[0]).log() / seeds
        series.append(Series(torch.arange(steps), mean_log.exp(), color, name))
    title = f"{width} units, first weights, mean of {seeds} seeds"
    return [LinePlot("steps back", "gradient that is left", series, title, log_y=True)]


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = (memory,)
