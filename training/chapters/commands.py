"""The commands of the chapters: `chapter` and `figures`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from gpt import CHAPTERS as MODELS
from gpt.checkpoint import lookup
from training.chapters import CHAPTERS, FIGURES


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
    """Draw the figures of docs/chapters/, each a small experiment with the models."""

    name: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[NAME …]", help_behavior_hint="")
    ] = ()
    """Names of figures. Default: all."""
    output: Path = Path("docs/figures")
    """Folder to write NAME.svg to."""

    def __call__(self) -> None:
        """Compute, draw, and print each file's name."""
        from training.plots.drawing import draw_figure

        for name in self.name:
            lookup("figure", name, FIGURES)
        for name, make_panels in FIGURES.items():
            if name in self.name or not self.name:
                path = self.output / f"{name}.svg"
                draw_figure(make_panels(), path)
                print(path, flush=True)
