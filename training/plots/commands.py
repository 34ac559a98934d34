"""The command `xray`: draw what a model attends to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from gpt import cli
from gpt.beam_search import translate
from gpt.checkpoint import find_run, is_translation_run, load_language_model
from tokenizer import Tokenizer

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
        from training.plots.plot import check_output, draw_xray

        check_output(self.output)
        run = find_run(self.run)
        model, tokenizer = load_language_model(run), Tokenizer.load(run)
        if model.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"{run}: the model has {model.vocab_size} tokens and its tokenizer.json "
                f"{tokenizer.vocab_size}: they are not of the same run"
            )
        ids, end = tokenizer.encode(self.text), tokenizer.eos_token
        fed = None
        if not ids or len(ids) > MOST:
            raise ValueError(f"TEXT is {len(ids)} tokens long: expected 1 to {MOST}")
        if self.translation is not None:
            fed = [end, *tokenizer.encode(self.translation)]
        elif is_translation_run(run):
            [written] = translate(
                model,
                [ids],
                decoder_start_token=end,
                eos_token=end,
                max_tokens=model.context_length,
            )
            print(tokenizer.decode(written).strip())
            # Where there was no room for more, the last token was written but never fed.
            fed = [end, *written][: model.max_target_length(len(ids))]
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
