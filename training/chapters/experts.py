"""Chapter 6: experts chosen by a gate."""

from collections.abc import Iterator, Sequence

import torch

from gpt.models.mlp import MLP, Experts
from training.chapters.fitting import fit
from training.chapters.products import rice_panel
from training.plots.panels import PURPLE, LinePlot, Panel, Series
from training.tasks.tables import (
    BROWN,
    CUPS,
    FRANKEN,
    WHITE,
    grain_rows,
)


def experts() -> Sequence[Panel]:
    """Chapter 6: gated experts switch between linear laws and extrapolate each; a ReLU network bends."""
    kinds = [WHITE, BROWN, FRANKEN]
    rows = grain_rows(CUPS, *kinds)
    model = fit(lambda: Experts(2, 3, u=(0,), v=(1,)), rows, restarts=8)
    network = fit(lambda: MLP(2, (7,)), rows, restarts=4)
    darkness = torch.linspace(0, 1, 81)
    with torch.no_grad():
        gates_BE = model.gate_weights(torch.stack([darkness * 0, darkness], -1).double())
    peaks_E, order_E = gates_BE.argmax(0).sort()
    series = [
        Series(darkness, gates_BE[:, expert], PURPLE, f"{number}", "solid", int(peak), (-3, 9))
        for number, (peak, expert) in enumerate(zip(peaks_E, order_E, strict=True), 1)
    ]
    title = "the gates of experts 1, 2 and 3"
    return [
        rice_panel("three experts, gated", model, kinds),
        rice_panel("seven ReLUs", network, kinds),
        LinePlot("darkness of the grain", "weight", series, title, y_limits=(0, 1.1)),
    ]


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = (experts,)
