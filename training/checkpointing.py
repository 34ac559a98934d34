"""Write and read the checkpoints of a run; each is complete or absent.

checkpoints/step-N/
model.safetensors           weights
optimizer.safetensors       state of the optimizers
rng_state.safetensors       random number generators of every process
sequence_state.safetensors  the model's state of every batch row (--stateful)
trainer_state.json          counters, and losses that are not logged yet

Each file holds a hash of its contents, which is checked when it is read.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.checkpoint import load_tensors, read_json, save_tensors, write_atomically

MAX_CHECKPOINTS = 2
"""Older ones are deleted. The second one is for the case that the newest is damaged."""
TENSOR_FILES = ("model", "optimizer", "rng_state", "sequence_state")
"""Names of the safetensors files."""

Tensors = dict[str, dict[str, Tensor]]
"""Tensors by safetensors file and name."""


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    paths = (directory / "checkpoints").glob("step-*")
    steps = {path.name.removeprefix("step-"): path for path in paths}
    return [steps[step] for step in sorted(filter(str.isdigit, steps), key=int)]


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    return next(reversed(list_checkpoints(directory)), None)


def _sha256(trainer_state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(trainer_state).encode()).hexdigest()


def read_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of a checkpoint and its trainer state; ValueError if it is damaged."""
    try:
        tensors = {name: load_tensors(path / f"{name}.safetensors") for name in TENSOR_FILES}
        trainer_state = read_json(path / "trainer_state.json")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    expected = trainer_state.pop("sha256", None)
    if expected is not None and _sha256(trainer_state) != expected:
        raise ValueError(f"{path / 'trainer_state.json'}: damaged (its SHA-256 differs)")
    return tensors, trainer_state


def write_checkpoint(directory: Path, tensors: Tensors, trainer_state: dict[str, Any]) -> None:
    """Write a checkpoint of a run and delete old ones.

    It is written under a temporary name, flushed and renamed, so that an interrupted write leaves
    the previous checkpoint intact. Names with a suffix are incomplete or being deleted. `tensors`
    are the contents of the safetensors files, `trainer_state` (with the key `step`) of the JSON.
    """
    path = directory / "checkpoints" / f"step-{trainer_state['step']}"
    for leftover in path.parent.glob("step-*.*"):
        shutil.rmtree(leftover)
    if path.exists():
        return
    temporary = path.with_name(path.name + ".part")
    temporary.mkdir(parents=True)
    try:
        for name, contents in tensors.items():
            save_tensors(temporary / f"{name}.safetensors", contents)
        content = trainer_state | {"sha256": _sha256(trainer_state)}
        write_atomically(temporary / "trainer_state.json", json.dumps(content))
        _fsync(temporary)
        temporary.rename(path)
        _fsync(path.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(directory)[:-MAX_CHECKPOINTS]:
        shutil.rmtree(old.rename(old.with_name(old.name + ".old")))


def rng_state(device: torch.device, rank: int) -> dict[str, Tensor]:
    """Return the states of this process's random number generators.

    Rank 0's are named `cpu` and, on a GPU, by its type, such as `cuda`; rank 1's `cpu.1` and
    `cuda.1`, and so on.
    """
    suffix = f".{rank}" if rank else ""
    states = {f"cpu{suffix}": torch.get_rng_state()}
    if device.type != "cpu":
        state = torch.get_device_module(device).get_rng_state(device)
        states[f"{device.type}{suffix}"] = state
    return states


def restore_rng_state(states: dict[str, Tensor], device: torch.device, rank: int) -> bool:
    """Restore what `rng_state` returned for this rank; return False if the rank is not in it."""
    suffix = f".{rank}" if rank else ""
    if device.type != "cpu" and (name := f"{device.type}{suffix}") in states:
        torch.get_device_module(device).set_rng_state(states[name], device)
    if is_known := f"cpu{suffix}" in states:
        torch.set_rng_state(states[f"cpu{suffix}"])
    return is_known


def _fsync(directory: Path) -> None:
    """Flush a directory's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
