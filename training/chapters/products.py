"""Chapter 2: products of inputs, and rice."""

from collections.abc import Iterator, Sequence

import torch

from gpt.models.base import Model
from gpt.models.linear import SigmaPi
from gpt.models.mlp import MLP
from training.chapters.fitting import fit, predict
from training.plots.panels import BLUE, GREEN, GREY, ORANGE, LinePlot, Panel, Series
from training.tasks.tables import (
    BROWN,
    CUPS,
    FRANKEN,
    WHITE,
    Grain,
    grain_rows,
)

GRAIN_COLORS = {WHITE: BLUE, BROWN: ORANGE, FRANKEN: GREEN}


WIDE_CUPS = torch.linspace(0, 10, 81)
"""Cups of grain, twice the range of CUPS."""


def rice() -> Sequence[Panel]:
    """Chapter 2: a product fits two kinds of rice and extrapolates; a ReLU network fits its points only."""
    rows = grain_rows(CUPS, WHITE, BROWN)
    product, network = fit(SigmaPi, rows), fit(lambda: MLP(2, (2,)), rows, restarts=8)
    return [
        rice_panel("3 weights: y = (pz + q) x + b", product, [WHITE, BROWN]),
        rice_panel("9 weights: two ReLUs", network, [WHITE, BROWN]),
    ]


def rice_panel(title: str, model: Model, kinds: Sequence[Grain]) -> LinePlot:
    """Plot the water that a model predicts for each kind of grain, and the water that it needs."""
    series = []
    for kind in kinds:
        color, darkness = GRAIN_COLORS[kind], torch.tensor(kind.darkness)
        x_BD, water_B = grain_rows(CUPS, kind)
        series += [
            Series(WIDE_CUPS, kind.water * WIDE_CUPS, GREY, style="dashed"),
            Series(WIDE_CUPS, predict(model, WIDE_CUPS, darkness), color, kind.name),
            Series(x_BD[:, 0], water_B, color, style="dots"),
        ]
    return LinePlot(
        "cups of grain", "cups of water", series, title, training_range=(1, 5), y_limits=(0, 31)
    )


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = (rice,)
