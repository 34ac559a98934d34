"""Create run directories, and resume training from them."""

import dataclasses
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gpt import LanguageModel, checkpoint
from gpt.checkpoint import find_run, load_tensors, read_json
from gpt.device import device_name
from gpt.summary import count_parameters
from tokenizer import Tokenizer
from training.checkpointing import newest_checkpoint
from training.config import TrainingConfig, model_arguments, new_model
from training.distributed import SINGLE_PROCESS, World, shard_like
from training.tasks import TASKS, check_task, open_task
from training.trainer import Trainer


def create_run(config: TrainingConfig, directory: Path, world: World = SINGLE_PROCESS) -> Trainer:
    """Prepare the data, write a new run directory and return a trainer at step 0.

    Raises ValueError if model, task, data, processes and directory do not fit together.
    """
    check_task(config)
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
            f"{directory} already holds a run: continue it with --resume {directory}, "
            "or choose another --run"
        )
    with world.local_main_process_first():
        task = open_task(config)
    trainer = Trainer(config, directory, task, device, world)
    load_init_embedding(trainer)
    if not world.is_main_process:
        return trainer
    directory.mkdir(parents=True, exist_ok=True)
    if task.tokenizer:
        task.tokenizer.save(directory / "tokenizer.json")
    if task.calibration_tokens is not None:
        tokens = torch.from_numpy(task.calibration_tokens.astype("int32"))
        checkpoint.save_tensors(directory / "validation.safetensors", {"tokens": tokens})
    checkpoint.save_config(directory, config.model, model_arguments(config, task.model_args))
    save_training_config(config, directory, environment_info(trainer))
    return trainer


def resume_run(directory: Path, device: str, world: World = SINGLE_PROCESS) -> Trainer:
    """Return a trainer in the state of the run's newest checkpoint, or at step 0 if it has none."""
    config = dataclasses.replace(load_training_config(directory), device=device)
    check_batch_size(config, world)
    with world.local_main_process_first():
        task = open_task(config, load_run_tokenizer(directory))
    trainer = Trainer(config, directory, task, world.device(device), world)
    if newest := newest_checkpoint(directory):
        trainer.load_checkpoint(newest)
    else:
        load_init_embedding(trainer)
    return trainer


def is_same_run(config: TrainingConfig, directory: Path) -> bool:
    """Whether the directory contains a run of this config."""
    exists = (directory / "run.json").exists()
    as_json = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return exists and dataclasses.asdict(load_training_config(directory)) == as_json


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
    source = Path(trainer.config.init_embedding)
    weights = load_tensors(find_run(source) / "model.safetensors", trainer.device)
    source_embedding = weights.get("embedding.weight")
    embedding = trainer.model.get_parameter("embedding.weight")
    assert trainer.task.tokenizer
    if Tokenizer.load(source).fingerprint != trainer.task.tokenizer.fingerprint:
        raise ValueError(
            f"--init-embedding {source} has another tokenizer: give it to this run too, "
            f"with --tokenizer {source}"
        )
    if source_embedding is None or source_embedding.shape != embedding.shape:
        shape = "none" if source_embedding is None else list(source_embedding.shape)
        raise ValueError(
            f"--init-embedding {source}: its embedding has the shape {shape}, this model's "
            f"{list(embedding.shape)}: choose the same width"
        )
    with torch.no_grad():
        embedding.copy_(shard_like(source_embedding, embedding))


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
        return TrainingConfig(**content["config"])
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
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }
