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
from gpt.device import device_name
from gpt.summary import count_parameters
from tokenizer import Tokenizer
from training.config import TrainingConfig
from training.distributed import SINGLE_PROCESS, World
from training.tasks import TASKS, check, open_task
from training.trainer import (
    Trainer,
    load_training_config,
    model_arguments,
    new_model,
    newest_checkpoint,
    save_training_config,
)


def create_run(run: TrainingConfig, directory: Path, world: World = SINGLE_PROCESS) -> Trainer:
    """Prepare the data and write a new run's directory, up to its first step.

    A ValueError says what of the model, the task, the data and the directory does not fit.
    """
    check(run)
    check_world(run, world)
    if run.fsdp and world.size == 1:
        raise ValueError(
            "--fsdp divides a model among several processes: start it with "
            "torchrun --nproc-per-node N -m training train …"
        )
    device = world.device(run.device)
    expected = TASKS[run.task].expected_model_args(run)
    with torch.device("meta"):  # what does not fit together is said before the data is read
        model = new_model(run, expected)
    if run.stateful and (not isinstance(model, LanguageModel) or model.max_length is not None):
        raise ValueError(f"--stateful: the state of the model {run.model} cannot go on for ever")
    if world.broadcast((directory / "run.json").exists()):
        raise ValueError(
            f"{directory} already holds a run: continue it with --resume {directory}, "
            "or choose another --run"
        )
    with world.local_main_process_first():
        task = open_task(run)
    trainer = Trainer(run, directory, task, device, world=world)
    trainer.load_init_embedding()
    if not world.is_main_process:
        return trainer
    directory.mkdir(parents=True, exist_ok=True)
    if task.tokenizer:
        task.tokenizer.save(directory / "tokenizer.json")
    if task.calibration_tokens is not None:
        tokens = torch.from_numpy(task.calibration_tokens.astype("int32"))
        save_tensors(directory / "validation.safetensors", {"tokens": tokens})
    save_config(directory, run.model, model_arguments(run, task.model_args))
    save_training_config(run, directory, environment_info(trainer))
    return trainer


def is_same_run(run: TrainingConfig, directory: Path) -> bool:
    """Whether the directory holds this very run."""
    if not (directory / "run.json").exists():
        return False
    as_written = json.loads(json.dumps(dataclasses.asdict(run)))
    return bool(dataclasses.asdict(load_training_config(directory)) == as_written)


def resume_run(directory: Path, device: str, world: World = SINGLE_PROCESS) -> Trainer:
    """A run as its newest checkpoint has it."""
    run = dataclasses.replace(load_training_config(directory), device=device)
    check_world(run, world)
    with world.local_main_process_first():
        task = open_task(run, load_run_tokenizer(directory))
    trainer = Trainer(run, directory, task, world.device(device), world=world)
    checkpoint = newest_checkpoint(directory)
    if checkpoint:
        trainer.resume(checkpoint)
    else:
        trainer.load_init_embedding()
    return trainer


def check_world(run: TrainingConfig, world: World) -> None:
    """A ValueError if a batch has not the same number of rows for each process in each of its parts."""
    parts = world.size * run.gradient_accumulation_steps
    if run.batch_size % parts:
        raise ValueError(
            f"--batch-size {run.batch_size} cannot be divided among {world.size} processes, in "
            f"--gradient-accumulation-steps {run.gradient_accumulation_steps} equal parts each: choose a multiple of {parts}, "
            "or another --nproc-per-node"
        )


def load_run_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a run, if it has one."""
    path = directory / "tokenizer.json"
    return Tokenizer.load(path) if path.exists() else None


def environment_info(trainer: Trainer) -> dict[str, Any]:
    """What run.json says beside the configuration."""
    task = trainer.task
    packages = ("tinygpt", "torch", "tokenizers", "datasets")
    return {
        "data": {"fingerprint": task.fingerprint, "description": task.description},
        "parameters": count_parameters(trainer.model),
        "device": device_name(trainer.device),
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
