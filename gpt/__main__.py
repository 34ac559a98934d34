"""`python -m gpt`: the models, without training or running one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from gpt import CHAPTERS, cli, describe
from gpt.checkpoint import build, near, read_json


@dataclass(frozen=True)
class Chapters:
    """List every model in the order of the chapters."""

    def __call__(self) -> None:
        """Print the table."""
        print(describe.chapters())


@dataclass(frozen=True)
class Describe:
    """Count a model's weights by kind, from its shapes, with no memory spent."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|RUN|gpt3")]
    """A model's name (at nano size), a run directory, or gpt3."""

    def __call__(self) -> None:
        """Print the table."""
        config = Path(self.model) / "config.json"
        if self.model == "gpt3":
            model = describe.gpt3()
        elif self.model in CHAPTERS:
            model = describe.shapes(CHAPTERS[self.model])
        elif config.is_file():
            given = read_json(config)
            with torch.device("meta"):
                model = build(given["model"], given["arguments"])
        else:
            raise ValueError(
                f"{self.model!r} is neither a model{near(self.model, CHAPTERS)} nor a run "
                f"directory; the models are {', '.join(CHAPTERS)}, gpt3"
            )
        print(describe.describe(model))


if __name__ == "__main__":
    cli.main("python -m gpt", "The models.", {"chapters": Chapters, "describe": Describe})
