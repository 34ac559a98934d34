"""The commands of the chapters: `chapter` and `figures`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from gpt import CHAPTERS as MODELS
from gpt.checkpoint import lookup
from training.chapters import CHAPTERS, FIGURES

RECORDS = Path(__file__).parents[2] / "docs" / "figures"
"""Folder of the recorded results, which are too long to be measured again for a drawing."""


def chapter_output(number: int) -> Iterator[str]:
    """Yield what `tinygpt chapter` prints, line by line."""
    model = list(MODELS.values())[number - 1]
    yield f"Chapter {number}: {model.idea} ({model.year})"
    yield from CHAPTERS[number - 1].examples()


@dataclass(frozen=True)
class Chapter:
    """Print the worked examples of a chapter of docs/chapters/, computed live."""

    number: Annotated[Positional[int], arg(metavar="N")]
    """Number of the chapter, 1 to 15. `tinygpt chapters` lists them."""

    def __call__(self) -> None:
        """Print each line as soon as it is computed."""
        if not 1 <= self.number <= len(CHAPTERS):
            raise ValueError(f"there is no chapter {self.number}: expected 1 to {len(CHAPTERS)}")
        for line in chapter_output(self.number):
            print(line, flush=True)


@dataclass(frozen=True)
class Figures:
    """Draw the figures of docs/chapters/: small experiments with the models, and recorded results."""

    name: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[NAME …]", help_behavior_hint="")
    ] = ()
    """Names of figures. Default: all."""
    output: Path = Path("docs/figures")
    """Folder to write NAME.svg to."""

    def __call__(self) -> None:
        """Compute, draw, and print each file's name."""
        from training.plots.curves import plot_bleu, plot_ladder
        from training.plots.drawing import draw_figure

        recorded = {"bleu": plot_bleu, "ladder": plot_ladder}
        for name in self.name:
            lookup("figure", name, {**FIGURES, **recorded})
        for name in [*FIGURES, *recorded]:
            if name in self.name or not self.name:
                path = self.output / f"{name}.svg"
                if name in recorded:
                    recorded[name](json.loads((RECORDS / f"{name}.json").read_text("utf-8")), path)
                else:
                    draw_figure(FIGURES[name](), path)
                print(path, flush=True)
