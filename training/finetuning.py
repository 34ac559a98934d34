"""Training that begins with the weights and the tokenizer of another run: `train --from RUN`."""

import dataclasses
from pathlib import Path
from typing import Any

from gpt.checkpoint import (
    find_run,
    load_tensors,
    load_weights,
    read_config,
    read_json,
)
from tokenizer import Tokenizer
from training.config import LEARNING_RATES, TASK_ARGS, TrainingConfig
from training.distributed import shard_like
from training.progress import read_metrics
from training.trainer import Trainer

RATE_FRACTION = 0.5
"""Learning rates of fine-tuning, relative to those that train from the beginning; docs/training.md has trials."""


def finetune_config(run: Path) -> TrainingConfig:
    """Return the defaults of a run that begins with another's weights.

    Its model, task, tokenizer, batch and optimizer are the parent's, its rates lower and its steps fewer.
    """
    name, model_args = read_config(run)
    content = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    fields = {field.name: field for field in dataclasses.fields(TrainingConfig)}
    known = {key: value for key, value in content.get("config", {}).items() if key in fields}
    own = {
        "preset": "finetune",
        "model": name,
        "model_args": {k: v for k, v in model_args.items() if k not in TASK_ARGS},
        "data": TrainingConfig.data,
        "init_from": str(run),
        "init_embedding": None,
        "tokenizer": str(run),
        "vocab_size": model_args.get("vocab_size", TrainingConfig.vocab_size),
        "context_length": known.get("context_length") or model_args["context_length"],
        "steps": 200,
        "warmup_steps": 20,
        "cooldown_fraction": 0.8,
        "eval_interval": 50,
        "checkpoint_interval": 50,
        "precision": "auto",
        "threads": 0,
        "device": "auto",
    }
    parent = TrainingConfig(**{**known, **own})
    rates: dict[str, Any] = {
        rate: float(f"{value * RATE_FRACTION:.4g}")
        for rate in LEARNING_RATES
        if (value := getattr(parent, rate)) is not None
    }
    return dataclasses.replace(parent, **rates)


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


def load_parent(trainer: Trainer) -> None:
    """Copy the weights of `--from`; a ValueError says what does not fit."""
    if trainer.config.init_from is None:
        return
    parent, model = find_run(trainer.config.init_from), trainer.model
    tokenizer = trainer.task.tokenizer
    if tokenizer and tokenizer.fingerprint != Tokenizer.load(parent).fingerprint:
        raise ValueError(
            f"--from {parent} has another tokenizer: its weights only fit its own; "
            "leave out --tokenizer"
        )
    source = parent / "model.safetensors"
    weights = load_tensors(source)
    if trainer.config.fsdp:
        own = model.state_dict()
        weights = {name: shard_like(value, own.get(name, value)) for name, value in weights.items()}
    try:
        load_weights(model, weights, source)
    except ValueError as error:
        raise ValueError(
            f"the weights of --from {parent} do not fit the model: {error}. Leave out the options "
            "that change its sizes"
        ) from error


def parent_facts(config: TrainingConfig) -> dict[str, Any]:
    """Return what run.json records of the parent: its name, data and final figures."""
    if config.init_from is None:
        return {}
    run = find_run(config.init_from)
    content = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    final: dict[str, Any] = {}
    for line in read_metrics(run):
        final = line if "final_loss" in line else final
    return {"parent": {"run": str(run), "data": content.get("data"), "final": final}}
