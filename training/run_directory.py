"""A run's directory: begun, and gone on with."""

import dataclasses
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gpt import LanguageModel
from gpt.checkpoint import save_config, save_tensors
from gpt.device import describe
from gpt.summary import parameters
from tokenizer import Tokenizer
from training.distributed import ALONE, World
from training.presets import Run
from training.tasks import TASKS, check, open_task
from training.trainer import (
    Trainer,
    configuration,
    new_model,
    newest_checkpoint,
    read_run,
    save_run,
)


def begin(run: Run, directory: Path, world: World = ALONE) -> Trainer:
    """Prepare the data and write a new run's directory, up to its first step.

    A ValueError says what of the model, the task, the data and the directory does not fit.
    """
    check(run)
    check_world(run, world)
    if run.shard and world.size == 1:
        raise ValueError(
            "--shard divides a model among several processes: start it with "
            "torchrun --nproc-per-node N -m training train …"
        )
    device = world.device(run.device)
    expected = TASKS[run.task].expects(run)
    with torch.device("meta"):  # what does not fit together is said before the data is read
        model = new_model(run, expected)
    if run.carry and (not isinstance(model, LanguageModel) or model.limit is not None):
        raise ValueError(f"--carry: the state of the model {run.model} cannot go on for ever")
    if world.broadcast((directory / "run.json").exists()):
        raise ValueError(
            f"{directory} already holds a run: continue it with --resume {directory}, "
            "or choose another --run"
        )
    with world.first_of_machine_first():
        task = open_task(run)
    trainer = Trainer(run, directory, task, device, world=world)
    trainer.begin()
    if not world.first:
        return trainer
    directory.mkdir(parents=True, exist_ok=True)
    if task.tokenizer:
        task.tokenizer.save(directory / "tokenizer.json")
    if task.held_out is not None:
        tokens = torch.from_numpy(task.held_out.astype("int32"))
        save_tensors(directory / "validation.safetensors", {"tokens": tokens})
    save_config(directory, run.model, configuration(run, task.given))
    save_run(run, directory, facts(trainer))
    return trainer


def is_begun(run: Run, directory: Path) -> bool:
    """Whether the directory holds this very run."""
    if not (directory / "run.json").exists():
        return False
    as_written = json.loads(json.dumps(dataclasses.asdict(run)))
    return bool(dataclasses.asdict(read_run(directory)) == as_written)


def resume(directory: Path, device: str, world: World = ALONE) -> Trainer:
    """A run as its newest checkpoint has it."""
    run = dataclasses.replace(read_run(directory), device=device)
    check_world(run, world)
    with world.first_of_machine_first():
        task = open_task(run, tokenizer_of(directory))
    trainer = Trainer(run, directory, task, world.device(device), world=world)
    checkpoint = newest_checkpoint(directory)
    if checkpoint:
        trainer.resume(checkpoint)
    else:
        trainer.begin()
    return trainer


def check_world(run: Run, world: World) -> None:
    """A ValueError if a batch has not the same number of rows for each process in each of its parts."""
    parts = world.size * run.accumulation
    if run.batch % parts:
        raise ValueError(
            f"--batch {run.batch} cannot be divided among {world.size} processes, in "
            f"--accumulation {run.accumulation} equal parts each: choose a multiple of {parts}, "
            "or another --nproc-per-node"
        )


def tokenizer_of(directory: Path) -> Tokenizer | None:
    """The tokenizer of a run, if it has one."""
    path = directory / "tokenizer.json"
    return Tokenizer.open(path) if path.exists() else None


def facts(trainer: Trainer) -> dict[str, Any]:
    """What run.json says beside the configuration."""
    task = trainer.task
    packages = ("tinygpt", "torch", "tokenizers", "datasets")
    return {
        "data": {"fingerprint": task.fingerprint, "description": task.description},
        "parameters": parameters(trainer.model),
        "device": describe(trainer.device),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in packages},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the code that runs, where it is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
