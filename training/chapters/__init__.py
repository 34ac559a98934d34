"""The worked examples of docs/chapters/: small seeded experiments with the models of `gpt`.

A module per chapter. `tinygpt chapter N` prints its `examples`, `tinygpt figures` draws its `FIGURES`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from training.chapters import (
    attention,
    classes,
    encoder_decoder,
    experts,
    gpt,
    gpt2,
    gru,
    layers,
    line,
    lstm,
    probability,
    products,
    rnn,
    transformer,
    word_vectors,
)
from training.plots.panels import Panel


class Chapter(Protocol):
    """What a chapter's module provides."""

    @property
    def FIGURES(self) -> Sequence[Callable[[], Sequence[Panel]]]:
        """Functions that compute a figure's panels. A figure is named like its function."""

    def examples(self) -> Iterator[str]:
        """Yield the worked examples, line by line, each as soon as it is computed."""


CHAPTERS: Sequence[Chapter] = (
    line,
    products,
    probability,
    classes,
    layers,
    experts,
    word_vectors,
    rnn,
    lstm,
    gru,
    encoder_decoder,
    attention,
    transformer,
    gpt2,
    gpt,
)
"""The modules, in the order of the chapters."""

FIGURES = {figure.__name__: figure for chapter in CHAPTERS for figure in chapter.FIGURES}
"""Functions that compute a figure's panels by name, in the order of the chapters."""
