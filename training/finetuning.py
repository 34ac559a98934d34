"""Training that begins with the weights and the tokenizer of another run: `train --from RUN`."""

import dataclasses
from pathlib import Path
from typing import Any

from gpt.checkpoint import find_run, read_config
from training.config import LEARNING_RATES, TASK_ARGS, TrainingConfig
from training.run_directory import load_training_config, parent_facts

RATE_FRACTION = 0.5
"""Learning rates of fine-tuning, relative to those that train from the beginning; docs/experiments.md has trials."""
RESET = [
    "data",
    "data_config",
    "data_revision",
    "data_split",
    "text_column",
    "streaming",
    "shuffle_buffer",
    "data_limit",
    "drop_duplicates",
    "end_of_text",  # which the tokenizer of the parent knows
    "init_embedding",
    "device",
    "threads",
    "precision",
]
"""Options that are not the parent's: they are of its data, or were chosen for its machine."""


def finetune_config(run: Path) -> TrainingConfig:
    """Return the defaults of a run that begins with another's weights.

    Its model, task, tokenizer, batch and optimizer are the parent's, its rates lower and its steps fewer.
    """
    name, model_args = read_config(run)
    parent = load_training_config(run) if (run / "run.json").is_file() else TrainingConfig()
    rates = {rate: getattr(parent, rate) for rate in LEARNING_RATES}
    changes: dict[str, Any] = {
        rate: float(f"{value * RATE_FRACTION:.4g}")
        for rate, value in rates.items()
        if value is not None
    }
    changes |= {name: getattr(TrainingConfig, name) for name in RESET}
    return dataclasses.replace(
        parent,
        **changes,
        preset="finetune",
        model=name,
        model_args={k: v for k, v in model_args.items() if k not in TASK_ARGS},
        init_from=str(run),
        tokenizer=str(run) if (run / "tokenizer.json").is_file() else parent.tokenizer,
        vocab_size=model_args.get("vocab_size", parent.vocab_size),
        context_length=model_args.get("context_length", parent.context_length),
        steps=200,
        warmup_steps=20,
        cooldown_fraction=0.8,
        eval_interval=50,
        checkpoint_interval=50,
    )


def parent_preset(config: TrainingConfig) -> TrainingConfig | None:
    """Return the defaults of a run that begins with another's weights; None for any other run."""
    return None if config.init_from is None else finetune_config(find_run(config.init_from))


def describe_parent(config: TrainingConfig) -> str:
    """Return what is known of the parent: its name, and its figures on its own data; "" without one."""
    parent = parent_facts(config).get("parent")
    if parent is None:
        return ""
    figures = {
        "loss": parent["final"].get("final_loss"),
        "bits per byte": parent["final"].get("final_bits_per_byte"),
    }
    shown = [f"{name} {value:.4f}" for name, value in figures.items() if value is not None]
    own = f", on its own data {', '.join(shown)}" if shown else ""
    return f"begins with the weights of {parent['run']}{own}"
