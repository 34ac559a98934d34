"""`python -m gpt`: the models, without training or running one.

A front door: inside a command it may open `tokenizer` and `training`, which the package never does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from gpt import CHAPTERS, Model, cli, describe
from gpt.checkpoint import (
    BY_NAME,
    build,
    find_run,
    near,
    open_language_model,
    read_json,
    translates,
)
from gpt.search import translate


@dataclass(frozen=True)
class Chapters:
    """List every model in the order of the chapters."""

    def __call__(self) -> None:
        """Print the table."""
        print(describe.chapters())


@dataclass(frozen=True)
class Describe:
    """Count a model's weights by kind, from its shapes, with no memory spent."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|PRESET|RUN|gpt3")]
    """A model's name (at nano size), a preset of `python -m training train`, a run directory, or gpt3."""

    def __call__(self) -> None:
        """Print the table."""
        print(describe.describe(self.shapes()))

    def shapes(self) -> Model:
        """What was named, without its weights; a ValueError says what can be."""
        from training.loop import new_model
        from training.presets import PRESETS
        from training.tasks import TASKS

        config = Path(self.model) / "config.json"
        if self.model == "gpt3":
            return describe.gpt3()
        if self.model in BY_NAME:
            return describe.shapes(BY_NAME[self.model])
        if self.model in PRESETS:
            run = PRESETS[self.model]
            expected = TASKS[run.task].expects(run)
            with torch.device("meta"):
                return new_model(run, expected)
        if config.is_file():
            given = read_json(config)
            with torch.device("meta"):
                return build(given["model"], given["arguments"])
        presets = [name for name in PRESETS if name not in BY_NAME]
        raise ValueError(
            f"{self.model!r} is neither a model nor a preset"
            f"{near(self.model, [*BY_NAME, *PRESETS])} nor a run directory; "
            f"the models are {', '.join(CHAPTERS)}, gpt3; further presets {', '.join(presets)}"
        )


MOST = 1000
"""Tokens of a text that can be drawn."""


@dataclass(frozen=True)
class Xray:
    """Draw what a model listens to in a text: attention, alignment, gates, experts."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")]
    """What it reads; for a run that translates, the sentence to be translated."""
    translation: cli.MaybeText = None
    """What it then writes; without one, a run that translates finds its own."""
    only: cli.MaybeText = None
    """Draw only what has this in its name: alignment, forget gate, …"""
    output: Path = Path("xray.png")
    """Where to: .png, .svg or .pdf."""

    def __call__(self) -> None:
        """Draw, and say what and where."""
        from tokenizer import Tokenizer

        try:
            from training.plot import check_output, draw_xray
        except ImportError:
            raise ValueError("plots need one more package: pip install matplotlib") from None
        check_output(self.output)
        run = find_run(self.run)
        model, tokenizer = open_language_model(run), Tokenizer.open(run)
        if model.vocabulary != tokenizer.vocabulary:
            raise ValueError(
                f"{run}: the model has {model.vocabulary} tokens and its tokenizer.json "
                f"{tokenizer.vocabulary}: they are not of the same run"
            )
        ids, end = tokenizer.encode(self.text), tokenizer.end_of_text
        fed = None
        if not ids or len(ids) > MOST:
            raise ValueError(f"TEXT is {len(ids)} tokens long: expected 1 to {MOST}")
        if self.translation is not None:
            fed = [end, *tokenizer.encode(self.translation)]
        elif translates(run):
            [written] = translate(model, [ids], begin=end, end=end, most=model.context)
            print(tokenizer.decode(written).strip())
            # Where there was no room for more, the last token was written but never fed.
            fed = [end, *written][: model.target_room(len(ids))]
        everything = model.xray(*batch(ids, fed))
        found = [one for one in everything if (self.only or "") in one.name]
        if not found:
            names = ", ".join(one.name for one in everything)
            raise ValueError(f"--only {self.only}: no such name; there are {names}")
        draw_xray(found, tokenizer, self.output)
        for one in found:
            _, layers, heads, rows, columns = one.weights.shape
            of = "tokens" if isinstance(one.columns, Tensor) else one.columns
            maps = [f"{layers} layers"] * (layers > 1) + [f"{heads} heads"] * (heads > 1)
            sizes = [*maps, f"{rows} tokens", f"{columns} {of}"]
            print(f"{one.name}: {' x '.join(sizes)}")
        print(self.output)


def batch(ids: list[int], fed: list[int] | None) -> tuple[Tensor, ...]:
    """What `LanguageModel.xray` takes: a text, or a source and what the writer was fed after it."""
    text_BT = torch.tensor([ids])
    return (text_BT,) if fed is None else (text_BT, torch.tensor([len(ids)]), torch.tensor([fed]))


if __name__ == "__main__":
    cli.main(
        "python -m gpt",
        "The models.",
        {"chapters": Chapters, "describe": Describe, "xray": Xray},
    )
