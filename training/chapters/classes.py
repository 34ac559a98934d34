"""Chapter 4: scores of many classes become probabilities."""

from collections.abc import Iterator, Sequence

import torch

from gpt.models.linear import softmax
from training.plots.panels import BarChart, Panel


def temperature() -> Sequence[Panel]:
    """Chapter 4: the softmax of the same scores at three temperatures."""
    scores = torch.tensor([3.0, 2.0, 1.0])
    names = [f"score {score:g}" for score in scores]
    panels = []
    for T in (0.25, 1.0, 4.0):
        p = softmax(scores, T).tolist()
        labels = [f"{share:.3f}" for share in p]
        panels.append(BarChart("probability", names, p, labels, f"T = {T:g}", 1.0))
    return panels


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = (temperature,)
