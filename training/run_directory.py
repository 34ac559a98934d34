"""Create run directories, and resume training from them."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from gpt import LanguageModel, checkpoint
from gpt.checkpoint import RUNS, find_run, load_tensors, read_json, read_run_json, run_argument
from gpt.device import device_name
from gpt.summary import count_parameters
from tokenizer import Tokenizer
from training.autotune import choose_precision, choose_threads
from training.checkpointing import list_checkpoints, read_checkpoint
from training.config import TrainingConfig, model_arguments, new_model
from training.distributed import SINGLE_PROCESS, World, shard_like
from training.progress import final_metrics, read_metrics
from training.tasks import TASKS, check_task, open_task
from training.tracking import check_installed, new_tracking_id
from training.trainer import Trainer

LOCK = ".lock"
"""File in a run directory that the process which trains the run has locked."""


@contextlib.contextmanager
def new_run_directory(
    directory: Path | None, preset: str, world: World = SINGLE_PROCESS
) -> Iterator[Path]:
    """Create and lock a run directory: runs/<preset>-<time> if None; remove it if it stays empty."""
    if world.is_main_process:
        if directory is None:
            directory = _create_unused(RUNS / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}")
        directory.mkdir(parents=True, exist_ok=True)
    directory = world.broadcast(directory)
    assert directory
    try:
        with run_lock(directory, world):
            yield directory
    finally:
        if world.is_main_process:
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()


def _create_unused(directory: Path) -> Path:
    """Create a directory; if another process has, one with a number behind its name."""
    numbered = (directory.with_name(f"{directory.name}-{number}") for number in itertools.count(2))
    for path in itertools.chain([directory], numbered):
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            break
    return path


@contextlib.contextmanager
def run_lock(directory: Path, world: World = SINGLE_PROCESS) -> Iterator[None]:
    """Lock a run directory for the main process; ValueError if another process has locked it.

    The kernel frees the lock of a process that dies.
    """
    if not world.is_main_process:
        yield
        return
    with _locked_file(directory / LOCK) as file:
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        try:
            yield
        finally:
            (directory / LOCK).unlink(missing_ok=True)


def _locked_file(path: Path) -> TextIO:
    """Open and lock a file; a ValueError names who has locked it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read().strip() or "another process"
            raise ValueError(
                f"{path.parent} is being trained by {holder}: wait until it has ended, or stop it"
            ) from None
        except OSError:  # a file system without locks
            return file
        # Unless the file was removed before it was locked.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def create_run(config: TrainingConfig, directory: Path, world: World = SINGLE_PROCESS) -> Trainer:
    """Prepare the data, write a new run directory and return a trainer at step 0.

    Raises ValueError if model, task, data, processes and directory do not fit together.
    """
    check_task(config)
    check_installed(config)
    check_batch_size(config, world)
    if config.fsdp and world.size == 1:
        raise ValueError(
            "--fsdp shards a model over several processes: start it with "
            "torchrun --nproc-per-node N -m training train …"
        )
    device = world.device(config.device)
    task_args = TASKS[config.task].expected_model_args(config)
    with torch.device("meta"):  # reports invalid model options before the data is read
        model = new_model(config, task_args)
    if config.stateful and (not isinstance(model, LanguageModel) or model.max_length is not None):
        raise ValueError(
            f"--stateful needs a recurrent model: {config.model} has no state of unlimited length"
        )
    if world.broadcast((directory / "run.json").exists()):
        raise ValueError(
            f"{directory} already holds a run: continue it with "
            f"--resume {run_argument(directory)}, or choose another --run"
        )
    exists = directory.exists()
    if world.broadcast(exists and any(path.name != LOCK for path in directory.iterdir())):
        raise ValueError(
            f"{directory} already holds files and is no run: choose another --run, or remove it"
        )
    with world.local_main_process_first():
        task = open_task(config)
    if world.is_main_process:
        config, reason = choose_threads(config, task, device)
        if reason:
            print(f"threads: {reason}")
        config, reason = choose_precision(config, task, device)
        if reason:
            print(f"precision: {reason}")
    task.config = config = world.broadcast(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    trainer = Trainer(config, directory, task, device, world)
    load_init_embedding(trainer)
    load_parent(trainer)
    # This compiles: if that is impossible, no directory is left behind.
    facts = environment_info(trainer) | parent_facts(config) | new_tracking_id(config)
    if not world.is_main_process:
        return trainer
    (directory / "checkpoints").mkdir(parents=True)  # a run without it has lost its checkpoints
    if task.tokenizer:
        task.tokenizer.save(directory / "tokenizer.json")
    if task.calibration_tokens is not None:
        tokens = torch.from_numpy(task.calibration_tokens.astype("int32"))
        checkpoint.save_tensors(directory / "validation.safetensors", {"tokens": tokens})
    checkpoint.save_config(directory, config.model, model_arguments(config, task.model_args))
    save_training_config(config, directory, facts)
    return trainer


def resume_run(directory: Path, device: str, world: World = SINGLE_PROCESS) -> Trainer:
    """Return a trainer in the state of the run's newest checkpoint that is not damaged.

    A run that has not come to its first checkpoint starts at step 0.
    """
    config = dataclasses.replace(load_training_config(directory), device=device)
    if not config.data:
        raise ValueError(
            f"{directory} was imported: there is no training to resume; to continue from its "
            f"weights: tinygpt train --from {run_argument(directory)} --data …"
        )
    check_installed(config)
    check_batch_size(config, world)
    checkpoints = list_checkpoints(directory)
    if not checkpoints:
        _check_never_saved(directory, config)
    with world.local_main_process_first():
        task = open_task(config, load_run_tokenizer(directory))
    if 0 < config.threads <= (os.cpu_count() or 1):  # else the run comes from a larger machine
        torch.set_num_threads(config.threads)
    trainer = Trainer(config, directory, task, world.device(device), world)
    if checkpoints:
        _restore_newest(trainer, checkpoints)
    else:
        load_init_embedding(trainer)
        load_parent(trainer)
    weights = directory / "model.safetensors"
    if not weights.exists():
        trainer.best_validation_loss = None  # the next validation writes it
    elif world.is_main_process:
        try:
            load_tensors(weights)
        except ValueError as error:  # which the final score would end with
            raise ValueError(f"{error}; if it is removed, the next validation writes it") from error
    return trainer


def _check_never_saved(directory: Path, config: TrainingConfig) -> None:
    """Raise ValueError if the run has no checkpoint, but must have had one."""
    folder, metrics = directory / "checkpoints", read_metrics(directory)
    was_saved = any(
        "final_loss" in line or line["step"] > config.checkpoint_interval for line in metrics
    )
    if was_saved or not folder.is_dir():
        raise ValueError(
            f"{folder}: the run's checkpoints are gone, so it cannot continue where it was: "
            "restore them from a copy, or train a new run with another --run"
        )


def _restore_newest(trainer: Trainer, checkpoints: list[Path]) -> None:
    """Restore the newest checkpoint that every process can read; damaged ones are set aside."""
    world = trainer.world
    damaged: dict[Path, ValueError | None] = {}
    for path in reversed(checkpoints):
        problem = None
        try:
            contents = read_checkpoint(path)
        except ValueError as error:
            problem = error
        if not world.all_reduce_max(int(problem is not None)):
            break
        damaged[path] = problem
    else:
        raise ValueError(
            f"{path.parent}: every checkpoint is damaged ({problem}): restore one from a copy, "
            "or train a new run with another --run"
        )
    trainer.restore(path, *contents)
    if world.is_main_process:
        for damaged_path, problem in damaged.items():
            reason = problem or f"{damaged_path}: damaged for another process"
            print(f"{reason}; continuing from {path.name} instead", file=sys.stderr)
            damaged_path.rename(damaged_path.with_name(f"{damaged_path.name}.damaged"))


def is_same_run(config: TrainingConfig, directory: Path) -> bool:
    """Whether the directory contains a run of this config."""
    if not (directory / "run.json").exists():
        return False
    existing = load_training_config(directory)
    if config.precision == "auto":  # `create_run` has chosen one, and the threads
        config = dataclasses.replace(config, precision=existing.precision)
    config = dataclasses.replace(config, threads=config.threads or existing.threads)
    as_json = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return bool(dataclasses.asdict(existing) == as_json)


def check_batch_size(config: TrainingConfig, world: World) -> None:
    """Raise ValueError unless every micro-batch has the same number of rows on each process."""
    divisor = world.size * config.gradient_accumulation_steps
    if config.batch_size % divisor:
        raise ValueError(
            f"--batch-size {config.batch_size} cannot be divided among {world.size} processes, in "
            f"--gradient-accumulation-steps {config.gradient_accumulation_steps} equal parts each: "
            f"choose a multiple of {divisor}, or another --nproc-per-node"
        )


def load_init_embedding(trainer: Trainer) -> None:
    """Copy the embedding of `--init-embedding` to the model; ValueError if tokenizers or shapes differ."""
    if trainer.config.init_embedding is None:
        return
    source = find_run(trainer.config.init_embedding)
    weights = load_tensors(source / "model.safetensors")
    source_embedding = weights.get("embedding.weight")
    embedding = trainer.model.get_parameter("embedding.weight")
    assert trainer.task.tokenizer
    if Tokenizer.load(source).fingerprint != trainer.task.tokenizer.fingerprint:
        raise ValueError(
            f"--init-embedding {source} has another tokenizer: give it to this run too, "
            f"with --tokenizer {run_argument(source)}"
        )
    if source_embedding is None or source_embedding.shape != embedding.shape:
        shape = "none" if source_embedding is None else list(source_embedding.shape)
        raise ValueError(
            f"--init-embedding {source}: its embedding has the shape {shape}, this model's "
            f"{list(embedding.shape)}: choose the same width"
        )
    with torch.no_grad():
        embedding.copy_(shard_like(source_embedding, embedding))


def load_parent(trainer: Trainer) -> None:
    """Copy the weights of `--from` to the model; ValueError if tokenizers or sizes differ."""
    if trainer.config.init_from is None:
        return
    parent, tokenizer = find_run(trainer.config.init_from), trainer.task.tokenizer
    if tokenizer and tokenizer.fingerprint != Tokenizer.load(parent).fingerprint:
        raise ValueError(
            f"--from {parent} has another tokenizer: its weights only fit its own; "
            "leave out --tokenizer"
        )
    source = parent / "model.safetensors"
    tensors = load_tensors(source)
    try:
        trainer.load_weights(tensors, source)
    except ValueError as error:
        raise ValueError(
            f"the weights of --from {parent} do not fit the model: {error}. Leave out the options "
            "that change its sizes"
        ) from error


def parent_facts(config: TrainingConfig) -> dict[str, Any]:
    """Return what run.json records of the parent of `--from`: its name, data and final figures."""
    if config.init_from is None:
        return {}
    run = find_run(config.init_from)
    data = read_run_json(run).get("data")
    return {"parent": {"run": str(run), "data": data, "final": final_metrics(run)}}


def save_training_config(config: TrainingConfig, directory: Path, facts: dict[str, Any]) -> None:
    """Write run.json: the config, and facts such as versions. With this file a run exists."""
    content = {"format": checkpoint.FORMAT, "config": dataclasses.asdict(config), **facts}
    checkpoint.write_atomically(directory / "run.json", json.dumps(content, indent=2) + "\n")


def load_training_config(directory: Path) -> TrainingConfig:
    """Read the config from run.json. Raises ValueError if it is missing or invalid."""
    path = directory / "run.json"
    if not path.is_file():
        raise ValueError(f"{directory}: not a training run: it has no run.json")
    content = read_json(path)
    checkpoint.check_format(path, content)
    try:
        fields = content["config"]
        if isinstance(fields["compile"], bool):  # as it was before `auto`
            fields["compile"] = "on" if fields["compile"] else "off"
        return TrainingConfig(**fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: written by another version of tinygpt ({error})") from error


def load_run_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the tokenizer of a run, or None if its task has none."""
    path = directory / "tokenizer.json"
    return Tokenizer.load(path) if path.exists() else None


def environment_info(trainer: Trainer) -> dict[str, Any]:
    """Return what run.json records besides the config: data, device, versions, commit."""
    task = trainer.task
    versions: dict[str, str | None] = {}
    for package in ("tinygpt", "torch", "tokenizers", "datasets"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        commit = result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # outside a checkout
        commit = None
    return {
        "data": {"fingerprint": task.fingerprint, "description": task.description},
        "parameters": count_parameters(trainer.model),
        "device": device_name(trainer.device),
        "compile": {
            "enabled": trainer.compilation.enabled,
            "reason": trainer.compilation.reason,
        },
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }
