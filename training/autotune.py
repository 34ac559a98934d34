"""Measurements of a train step at the start of a run: its speed, and the threads and precision that are fastest."""

import dataclasses
import statistics
import time
from pathlib import Path

import torch

from gpt.device import matmul_dtype
from training.config import TrainingConfig
from training.tasks.base import Task
from training.trainer import Trainer

WARMUP_STEPS = 2
MIN_STEPS = 200
"""A shorter run ends before a comparison has paid."""
MIN_SPEEDUP = 1.15
"""Fewer threads, and bfloat16, must be this many times as fast: near a tie, equal commands should choose the same."""


def seconds_per_step(
    config: TrainingConfig, task: Task, device: torch.device, num_steps: int = 5
) -> float:
    """Measure a config's train step: the median of a few steps after warmup."""
    trainer = Trainer(config, Path(), task, device)
    times = []
    for _ in range(WARMUP_STEPS + num_steps):
        started = time.perf_counter()
        trainer.train_step(trainer.objective).item()
        times.append(time.perf_counter() - started)
    trainer.prefetcher.close()
    return statistics.median(times[WARMUP_STEPS:])


def choose_threads(
    config: TrainingConfig, task: Task, device: torch.device
) -> tuple[TrainingConfig, str]:
    """Return the config with `--threads 0` resolved on a CPU, and why if that was measured; torch uses that number from now on.

    The steps of small models can be faster on few threads than on all cores. The number is halved
    for as long as that makes steps faster.
    """
    count = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
        return config, ""
    if device.type != "cpu" or config.steps < MIN_STEPS:
        return config, ""
    precision = "float32" if config.precision == "auto" else config.precision
    trial = dataclasses.replace(config, precision=precision)
    all_seconds = seconds = seconds_per_step(trial, task, device, 3)
    while count > 1:
        torch.set_num_threads(count // 2)
        fewer = seconds_per_step(trial, task, device, 3)
        if fewer * MIN_SPEEDUP > seconds:
            break
        count, seconds = count // 2, fewer
    torch.set_num_threads(count)
    return dataclasses.replace(config, threads=count), (
        f"{count} (auto: steps are {all_seconds / seconds:.2f} times as fast as on all)"
        if seconds < all_seconds
        else f"{count} (auto: fewer are not faster)"
    )


def choose_precision(
    config: TrainingConfig, task: Task, device: torch.device
) -> tuple[TrainingConfig, str]:
    """Return the config with `--precision auto` resolved on a CPU, and why; nothing if it is not auto.

    Processors with bfloat16 instructions gain from them at different widths, and some lose.
    """
    if config.precision != "auto":
        return config, ""
    if device.type != "cpu":
        return config, f"{str(matmul_dtype(device, 'auto')).removeprefix('torch.')} (auto)"
    in_float32 = dataclasses.replace(config, precision="float32")
    if config.steps < MIN_STEPS:
        return in_float32, "float32 (auto: too few steps to compare it with bfloat16)"
    in_bfloat16 = dataclasses.replace(config, precision="bfloat16")
    seconds = [seconds_per_step(trial, task, device, 3) for trial in (in_float32, in_bfloat16)]
    speedup = seconds[0] / seconds[1]
    chosen = in_bfloat16 if speedup >= MIN_SPEEDUP else in_float32
    return chosen, (
        f"{chosen.precision} (auto: steps in bfloat16 are {speedup:.2f} times as fast as in float32)"
    )
