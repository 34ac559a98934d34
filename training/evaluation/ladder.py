"""Train every language model of the chapters on one corpus under one budget, and compare them.

All are scored on the same target tokens with the same preceding tokens: windows of the context
length, each scoring its second half, because an encoder-decoder predicts only that half. Finished
rungs are not trained again, and an interrupted one is resumed.
"""

import dataclasses
import json
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gpt import LanguageModel
from gpt.checkpoint import lookup, read_json, write_atomically
from gpt.device import device_name, resolve_device
from gpt.summary import count_parameters
from training.autotune import choose_precision, choose_threads, seconds_per_step
from training.config import TrainingConfig, scale_learning_rates
from training.data.known_truth import LEAK_NATS
from training.presets import LADDER_PRESETS, PRESETS
from training.progress import format_duration
from training.run_directory import create_run, resume_run, run_lock
from training.tasks import open_task
from training.tasks.text import Text
from training.trainer import Trainer

SAMPLE_TOKENS = 60
RUNG_PRESETS = {
    **{name: PRESETS[name] for name in LADDER_PRESETS},
    # The batch of the other rungs: their budget is small.
    "gpt": scale_learning_rates(
        dataclasses.replace(PRESETS["gpt-nano"], batch_size=16), PRESETS["gpt-nano"]
    ),
}
"""Preset of each rung, in the order of the chapters."""

Row = dict[str, Any]


def select_rungs(names: Sequence[str]) -> dict[str, TrainingConfig]:
    """Return the presets of the named rungs, or all, in the order of the chapters."""
    for name in names:
        lookup("rung", name, RUNG_PRESETS)
    return {name: preset for name, preset in RUNG_PRESETS.items() if not names or name in names}


def run_ladder(
    directory: Path,
    names: Sequence[str],
    config_fields: dict[str, Any],
    tokens: int,
    seconds: float | None,
    train: Callable[[Trainer], None],
) -> list[Row]:
    """Train the named rungs, or all, that are not finished yet; return a row for each finished one.

    Their runs are in `directory`, and the rows are in the order of the chapters. The fields of every
    rung's config include `config_fields`, such as `data`. The budget of each rung is `tokens` or, if
    given, `seconds` of training. `train` trains to the end, or exits.
    """
    presets = select_rungs(names)
    settings = {**config_fields, **({"seconds": seconds} if seconds else {"tokens": tokens})}
    settings_path = directory / "settings.json"
    if settings_path.exists() and read_json(settings_path) != settings:
        raise ValueError(
            f"{directory} holds a ladder with other settings ({settings_path.read_text('utf-8').strip()}): "
            "choose another --output, or the same settings"
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(settings_path, json.dumps(settings) + "\n")
    for number, (name, preset) in enumerate(presets.items(), 1):
        prefix, run = f"[{number}/{len(presets)}] {name}", directory / name
        if (run / "rung.json").exists():
            print(f"{prefix}: already finished", flush=True)
            continue
        run.mkdir(exist_ok=True)
        with run_lock(run):
            config = dataclasses.replace(preset, preset=name, **config_fields)
            if (run / "run.json").exists():
                trainer = resume_run(run, config.device)
            else:
                steps = tokens / (config.batch_size * config.context_length)
                if seconds is not None:
                    config = dataclasses.replace(config, compile="off")  # as it is measured
                    task, device = open_task(config), resolve_device(config.device)
                    config, _ = choose_threads(config, task, device)
                    config, _ = choose_precision(config, task, device)
                    steps = seconds / seconds_per_step(config, task, device)
                steps = max(1, round(steps))
                # Validated only at the end: the whole budget goes into training.
                config = dataclasses.replace(
                    config, steps=steps, eval_interval=steps, sample_tokens=0
                )
                trainer = create_run(config, run)
            size, steps = count_parameters(trainer.model), trainer.config.steps
            print(
                f"{prefix}: {size:,} parameters, {steps:,} steps from step {trainer.step}",
                flush=True,
            )
            train(trainer)
            row = score_rung(name, trainer)
            write_atomically(run / "rung.json", json.dumps(row, indent=2) + "\n")
        bits = row["bits_per_byte"]
        shown = f"loss {row['loss']:.4f}" if bits is None else f"{bits:.4f} bits per byte"
        print(f"  {shown}", flush=True)
    results = (directory / name / "rung.json" for name in RUNG_PRESETS)
    return [read_json(path) for path in results if path.exists()]


def score_rung(name: str, trainer: Trainer) -> Row:
    """Return a rung's size, cost, score on the whole validation split and sample."""
    config, model, task = trainer.config, trainer.eval_model, trainer.task
    score = trainer.score(stride=max(1, config.context_length // 2)).to_json()
    assert isinstance(model, LanguageModel)
    assert isinstance(task, Text)
    truth = task.entropy("validation")
    return {
        "rung": name,
        "chapter": model.chapter,
        "year": model.year,
        "parameters": count_parameters(model),
        "steps": config.steps,
        "tokens": config.steps * config.batch_size * config.context_length,
        "seconds": trainer.seconds,
        **{name: score.get(name) for name in ("loss", "perplexity", "bits_per_byte")},
        "lost": score.get("lost", ""),
        "tokens_scored": score["tokens"],
        "truth": truth and truth.nats_per_token,
        "truth_error": truth and truth.standard_error,
        **{name: score[name] for name in ("context_length", "stride")},
        "data": task.description,
        "sample": task.sample(model, SAMPLE_TOKENS),
        "device": device_name(trainer.device),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def find_leaks(rows: Sequence[Row]) -> list[str]:
    """Return the rungs that are further below the known truth than chance explains.

    For any model, the expected ratio of its probability of the text and the source's is at most 1.
    So by Markov's inequality it is `n` nats below the truth with a probability of at most exp(-n).
    """
    return [
        row["rung"]
        for row in rows
        if row.get("truth") is not None
        and (row["truth"] - row["loss"]) * row["tokens_scored"] > LEAK_NATS
    ]


def score_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a Markdown table of the rows."""
    has_truth = rows[0].get("truth") is not None
    return [
        "| chapter | rung | year | parameters | training | tokens/s | loss | bits per byte |"
        + " above the truth |" * has_truth,
        "|---:|---|---:|---:|---:|---:|---:|---:|" + "---:|" * has_truth,
        *(
            f"| {row['chapter']} | {row['rung']} | {row['year']} | {row['parameters']:,} "
            f"| {format_duration(row['seconds'])} | {row['tokens'] / row['seconds']:,.0f} "
            f"| {row['loss']:.4f} | {_bits(row)} |{_gap(row)}"
            for row in rows
        ),
    ]


def format_table(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table, followed by each rung's sample."""
    first = rows[0]
    context_length, stride = first["context_length"], first["stride"]
    lost = f"No bits per byte: the tokenizer loses text: {first['lost']}. "
    note = lost if first["bits_per_byte"] is None else ""
    if first.get("truth") is not None:
        note += (
            f"The truth is {first['truth']:.4f} nats per token: the exact -log p of this text under "
            f"its source, whose entropy per token it estimates to ±{first['truth_error']:.4f}. "
        )
    lines = [
        *score_table(rows),
        "",
        f"{first['data']}; {first['tokens']:,} training tokens each, windows of {context_length}; "
        f"{first['tokens_scored']:,} tokens scored, each given the {context_length - stride} to "
        f"{context_length - 1} preceding tokens of its window. {note}"
        f"{first['device']}, torch {first['versions']['torch']}, {first['date']}.",
        "",
        "Samples without a prompt at temperature 0.8:",
    ]
    for row in rows:
        lines += ["", row["rung"], "", "```text", row["sample"].replace("```", "` ` `"), "```"]
    return "\n".join(lines) + "\n"


def _gap(row: Row) -> str:
    if row.get("truth") is None:
        return ""
    gap = row["loss"] - row["truth"]
    return f" {gap:+.4f} ({gap / row['truth']:+.1%}) |"


def _bits(row: Row) -> str:
    return "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
