"""Chapter 14: only the decoder."""

from collections.abc import Iterator, Sequence

from gpt import summary
from training.plots.panels import BarChart, Panel


def gpt3() -> Sequence[Panel]:
    """Chapter 14: the parameters of GPT-3 by kind."""
    kinds = summary.count_by_kind(summary.build_gpt3())
    total = sum(weights for _, weights in kinds.values())
    billions = [weights / 1e9 for _, weights in kinds.values()]
    labels = [f"{count:.2f} ({count * 1e9 / total:.1%})" for count in billions]
    return [BarChart("billion weights", list(kinds), billions, labels, f"GPT-3: {total:,} weights")]


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = (gpt3,)
