"""Chapter 3: a score becomes a probability."""

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


def border() -> Sequence[Panel]:
    """Chapter 3: the score of a logistic regression separates two kinds of rice; its sigmoid is a probability."""
    x_BD, class_B = BINARY_CLASSIFICATION_TABLES["white-or-brown"](0).splits["train"]
    model = fit(lambda: Logistic(2), (x_BD, class_B))
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
    yield from ()


FIGURES = (border,)
