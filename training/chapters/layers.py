"""Chapter 5: layers of regressions with a nonlinearity between."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from gpt.models.mlp import MLP
from training.chapters.fitting import fit, predict
from training.plots.panels import BLUE, GREEN, GREY, ORANGE, LinePlot, Panel, Series
from training.tasks.tables import (
    CURVES,
    REGRESSION_TABLES,
)


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


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = (curves,)
