"""Every rung that speaks on one corpus, with one tokenizer, under one budget; then one table.

All are scored on the same target tokens with the same tokens to their left: windows of the
context's length, each scoring its second half, because that is all that an encoder-decoder
can predict of one. What is done is not done again, and what was stopped is gone on with.
"""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gpt import LanguageModel
from gpt.checkpoint import did_you_mean, read_json, write_atomically
from gpt.device import device_name, resolve_device
from gpt.summary import count_parameters
from training.config import TrainingConfig
from training.presets import LADDER_PRESETS, PRESETS
from training.progress import format_duration
from training.run_directory import create_run, resume_run
from training.tasks import open_task
from training.tasks.text import Text
from training.trainer import Objective, Trainer

SAMPLE = 60
"""Tokens of each rung's sample."""
PRESET_OF = {**{name: PRESETS[name] for name in LADDER_PRESETS}, "gpt": PRESETS["gpt-nano"]}
"""The rungs, in the order of history."""

PROBE = 5
"""Steps by which a rung's speed is measured, where the budget is a time."""

Row = dict[str, Any]


def rungs(names: Sequence[str]) -> dict[str, TrainingConfig]:
    """The presets of the rungs that were named, in the order of history; all where none was."""
    for name in names:
        if name not in PRESET_OF:
            raise ValueError(
                f"no rung is named {name!r}{did_you_mean(name, PRESET_OF)}; "
                f"there are {', '.join(PRESET_OF)}"
            )
    return {name: run for name, run in PRESET_OF.items() if not names or name in names}


def run_ladder(
    directory: Path,
    names: Sequence[str],
    common: dict[str, Any],
    tokens: int,
    seconds: float | None,
    train: Callable[[Trainer], None],
) -> list[Row]:
    """Train what is not yet trained of the rungs, and score it.

    Args:
        directory: Where the rungs' runs are, and the table.
        names: Which rungs; none for all.
        common: Fields of every rung's run, such as `data`.
        tokens: Budget of each rung.
        seconds: Budget in training time instead.
        train: Trains to the end, or leaves.

    Returns:
        A row for each rung that is done, in the order of history.
    """
    chosen = rungs(names)
    told = {**common, **({"seconds": seconds} if seconds else {"tokens": tokens})}
    settings = directory / "settings.json"
    if settings.exists() and read_json(settings) != told:
        raise ValueError(
            f"{directory} holds a ladder with other settings ({settings.read_text().strip()}): "
            "choose another --output, or the same settings"
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(settings, json.dumps(told) + "\n")
    for number, (name, preset) in enumerate(chosen.items(), 1):
        place = directory / name
        if (place / "rung.json").exists():
            print(f"[{number}/{len(chosen)}] {name}: done before", flush=True)
            continue
        run = dataclasses.replace(preset, preset=name, **common)
        if (place / "run.json").exists():
            trainer = resume_run(place, run.device)
        else:
            steps = tokens / (run.batch_size * run.context_length)
            if seconds is not None:
                steps = seconds / seconds_per_step(run)
            steps = max(1, round(steps))
            # Validated at its end alone: all of the budget goes into training.
            budget: dict[str, Any] = {
                "steps": steps,
                "eval_interval": steps,
                "sample_tokens": 0,
            }
            trainer = create_run(dataclasses.replace(run, **budget), place)
        print(
            f"[{number}/{len(chosen)}] {name}: {count_parameters(trainer.model):,} parameters, "
            f"{trainer.config.steps:,} steps from step {trainer.step}",
            flush=True,
        )
        train(trainer)
        row = score_rung(name, trainer)
        write_atomically(place / "rung.json", json.dumps(row, indent=2) + "\n")
        print(f"  {row['bits_per_byte']:.4f} bits per byte", flush=True)
    return [
        read_json(directory / name / "rung.json")
        for name in PRESET_OF
        if (directory / name / "rung.json").exists()
    ]


def seconds_per_step(run: TrainingConfig) -> float:
    """Of the run's model here and now: the median of a few steps, after two that warm up."""
    trainer = Trainer(run, Path(), open_task(run), resolve_device(run.device))
    times = []
    for _ in range(2 + PROBE):
        begun = time.perf_counter()
        trainer.train_step(Objective(trainer.model)).item()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def score_rung(name: str, trainer: Trainer) -> Row:
    """A rung's row: its size, its cost, its score on the whole validation split, a sample."""
    score = trainer.score(stride=max(1, trainer.config.context_length // 2)).to_json()
    model, task = trainer.eval_model, trainer.task
    assert isinstance(model, LanguageModel)
    assert isinstance(task, Text)
    return {
        "rung": name,
        "chapter": model.chapter,
        "year": model.year,
        "parameters": count_parameters(model),
        "steps": trainer.config.steps,
        "tokens": trainer.config.steps * trainer.config.batch_size * trainer.config.context_length,
        "seconds": trainer.seconds,
        "loss": score["loss"],
        "perplexity": score["perplexity"],
        "bits_per_byte": score["bits_per_byte"],
        "scored": score["tokens"],
        "context_length": score["context_length"],
        "stride": score["stride"],
        "data": task.description,
        "sample": task.sample(model, SAMPLE),
        "device": device_name(trainer.device),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, and under it what each rung writes."""
    first = rows[0]
    lines = [
        "| chapter | rung | year | parameters | training | tokens/s | loss | bits per byte |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['chapter']} | {row['rung']} | {row['year']} | {row['parameters']:,} "
        f"| {format_duration(row['seconds'])} | {row['tokens'] / row['seconds']:,.0f} "
        f"| {row['loss']:.4f} | {row['bits_per_byte']:.4f} |"
        for row in rows
    ]
    lines += [
        "",
        f"{first['data']}; {first['tokens']:,} tokens of training each, windows of "
        f"{first['context']}; {first['scored']:,} tokens scored, each with the "
        f"{first['context'] - first['stride']} to {first['context'] - 1} before it in its window. "
        f"{first['device']}, torch {first['versions']['torch']}, {first['date']}.",
        "",
        "What each writes at temperature 0.8 when nothing is given:",
    ]
    for row in rows:
        lines += ["", f"{row['rung']}", "", "```text", row["sample"].replace("```", "` ` `"), "```"]
    return "\n".join(lines) + "\n"
