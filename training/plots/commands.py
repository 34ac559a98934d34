"""The commands that draw: `plot` and `xray`. matplotlib is imported only when one runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from tyro.conf import Positional, arg

from gpt import cli
from gpt.beam_search import translate
from gpt.checkpoint import find_run, is_translation_run, load_language_model
from tokenizer import Tokenizer

MAX_XRAY_TOKENS = 1000
"""Longest text that `xray` draws."""


@dataclass(frozen=True)
class Plot:
    """Plot the loss curves of one or several runs."""

    run: Annotated[Positional[tuple[str, ...]], arg(metavar="[RUN …]", help_behavior_hint="")] = ()
    """Runs: names in runs/, or paths. Default: the newest under runs/."""
    output: Path = Path("loss.svg")
    """File to write: .svg, .png or .pdf."""

    def __call__(self) -> None:
        """Draw, and print the file's name."""
        from training.plots.curves import plot_losses

        plot_losses([find_run(run) for run in self.run or (None,)], self.output)
        print(self.output)


@dataclass(frozen=True)
class Xray:
    """Draw a model's activation maps over a text: attention, alignments, gates, experts."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run: a name in runs/, or a path."""
    text: Annotated[Positional[str], arg(metavar="TEXT")]
    """Text to read; for a translation run, the source sentence."""
    translation: cli.OptionalText = None
    """Target sentence. Default: for a translation run, the model's own translation."""
    only: cli.OptionalText = None
    """Draw only maps whose name contains this: alignment, forget gate, …"""
    output: Path = Path("xray.png")
    """File to write: .png, .svg or .pdf."""

    def __call__(self) -> None:
        """Draw, and print each map's shape and the file's name."""
        from training.plots.style import check_output
        from training.plots.xray import draw_xray

        check_output(self.output)
        run = find_run(self.run)
        model, tokenizer = load_language_model(run), Tokenizer.load(run)
        if model.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"{run}: the model has {model.vocab_size} tokens and its tokenizer.json "
                f"{tokenizer.vocab_size}: they are not of the same run"
            )
        ids, eos_token = tokenizer.encode(self.text), tokenizer.eos_token
        if not ids or len(ids) > MAX_XRAY_TOKENS:
            raise ValueError(f"TEXT is {len(ids)} tokens long: expected 1 to {MAX_XRAY_TOKENS}")
        target = None
        if self.translation is not None:
            target = [eos_token, *tokenizer.encode(self.translation)]
        elif is_translation_run(run):
            [translation] = translate(
                model,
                [ids],
                decoder_start_token=eos_token,
                eos_token=eos_token,
                max_tokens=model.context_length,
            )
            print(tokenizer.decode(translation).strip())
            # A translation that fills the context ends with a token that was never fed back.
            target = [eos_token, *translation][: model.max_target_length(len(ids))]
        batch = [torch.tensor([ids])]
        if target:
            batch += torch.tensor([len(ids)]), torch.tensor([target])
        all_maps = model.xray(*batch)
        maps = [activation for activation in all_maps if (self.only or "") in activation.name]
        if not maps:
            names = ", ".join(activation.name for activation in all_maps)
            raise ValueError(f"--only {self.only}: no such name; there are {names}")
        draw_xray(maps, tokenizer, self.output)
        for activation in maps:
            _, layers, heads, rows, columns = activation.weights.shape
            unit = "tokens" if isinstance(activation.columns, Tensor) else activation.columns
            counts = [f"{layers} layers"] * (layers > 1) + [f"{heads} heads"] * (heads > 1)
            shape = [*counts, f"{rows} tokens", f"{columns} {unit}"]
            print(f"{activation.name}: {' x '.join(shape)}")
        print(self.output)
