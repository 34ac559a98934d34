"""Start or resume a training run from the command line, and report its result."""

import dataclasses
import os
import sys
import time
from pathlib import Path

from gpt.checkpoint import run_argument
from gpt.device import device_name
from gpt.summary import count_parameters
from training import distributed
from training.config import TrainingConfig, model_options, resolve_config
from training.finetuning import describe_parent, parent_preset
from training.presets import ABOUT, chapter_of, describe_preset, get_preset
from training.progress import format_duration, printable
from training.run_directory import (
    create_run,
    is_same_run,
    new_run_directory,
    resume_run,
    run_lock,
)
from training.tasks import check_task
from training.tasks.tables import TABULAR_TASKS
from training.trainer import Diverged, Stopped, Trainer


def start_run(config: TrainingConfig, directory: Path | None) -> None:
    """Create a run, train it and report; after a torchrun restart, resume the same run.

    The directory is runs/<preset>-<time> if None.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0  # after a process is lost
    if directory is None and restarts:
        raise ValueError(
            "--max-restarts needs --run DIR, so that restarted workers find the run: torchrun … "
            "-m -- training train … --run DIR (without -- torchrun parses --run as its own option)"
        )
    world = distributed.init_process_group(config.device)
    with new_run_directory(directory, config.preset, world) as directory:
        if restarts and world.broadcast(is_same_run(config, directory)):
            _resume(directory, config.device, world)
            return
        processes = f", {world.size} processes" if world.size > 1 else ""
        device = device_name(world.device(config.device))
        print(f"preset {config.preset}: {config.model} on {device}{processes}")
        check_task(config)
        print(f"  {describe_parent(config) or describe_preset(config)}")
        for name, change in changed_settings(config).items():
            print(f"  {name} = {change}")
        trainer = create_run(config, directory, world)
        print(f"data: {trainer.task.description}")
        for line in trainer.task.sizes:
            print(f"  {line}")
        _print_compilation(trainer)
        if warning := warmup_warning(config):
            print(warning)
        size = count_parameters(trainer.model)
        print(f"run: {directory}, {size:,} parameters; run.json has all settings", flush=True)
        _train_and_report(trainer)


def changed_settings(config: TrainingConfig) -> dict[str, str]:
    """Return the values of the settings that differ from the preset's, each with the preset's."""
    preset = parent_preset(config) or get_preset(config.preset)
    preset = resolve_config(preset, model_options(preset)(), preset)  # with all model arguments
    before, after = (dataclasses.asdict(it) | it.model_args for it in (preset, config))
    return {
        name: f"{value} (preset: {before[name]})"
        for name, value in after.items()
        if name != "model_args" and value != before[name]
    }


def _print_compilation(trainer: Trainer) -> None:
    """Print whether train steps are compiled, and why; nothing on a CPU, where `auto` never does."""
    if trainer.device.type != "cpu" or trainer.config.compile != "auto":
        print(f"compile: {trainer.compilation}")


def warmup_warning(config: TrainingConfig) -> str:
    """Return what to say of a run that ends before its learning rate has reached the peak, or ""."""
    if config.steps > config.warmup_steps:
        return ""
    return (
        f"WARNING: the {config.steps} steps end inside the warmup of {config.warmup_steps}, before "
        "the learning rate reaches its peak: choose more --steps or fewer --warmup-steps"
    )


def resume(directory: Path, device: str, world: distributed.World) -> None:
    """Continue a run from its newest checkpoint, and report."""
    with run_lock(directory, world):
        _resume(directory, device, world)


def _resume(directory: Path, device: str, world: distributed.World) -> None:
    trainer = resume_run(directory, device, world)
    _print_compilation(trainer)
    print(f"{directory}: continues at step {trainer.step} of {trainer.config.steps}", flush=True)
    _train_and_report(trainer)


def train_or_exit(trainer: Trainer, advice: str = "continue with the same command") -> None:
    """Train to the last step; after a signal or divergence, exit with its code.

    The message about a signal ends with the advice: how to continue.
    """
    try:
        trainer.train()
    except (Stopped, Diverged) as stop:
        if trainer.world.is_main_process:
            message = f"\n{stop}; {advice}" if isinstance(stop, Stopped) else f"\n{stop}"
            print(message, file=sys.stderr)
        sys.exit(stop.exit_code)


def _train_and_report(trainer: Trainer) -> None:
    """Train; print the best weights' score, a sample if it is a new one, and the next commands."""
    task, directory = trainer.task, run_argument(trainer.directory)
    started = time.monotonic()
    train_or_exit(trainer, f"continue with: tinygpt train --resume {directory}")
    print(f"\ntrained in {format_duration(time.monotonic() - started)}")
    if not trainer.world.is_main_process:
        return
    score = trainer.score()
    if task.sample_in_report:
        print(f"with the best weights:\n{score.table()}")
    else:
        print(f"the whole validation split, with the best weights:\n{score.table()}")
        sample = task.sample(trainer.eval_model, min(200, trainer.config.context_length - 1))
        if sample != trainer.shown_sample:
            print(f"a sample:\n\n{printable(sample)}")
    if expectation := _expected_result(trainer.config):
        print(f"\n{expectation}")
    print(f"\nthe run is in {trainer.directory}; next:\n  make eval RUN={directory}")
    if task.kind == "text":
        print(f'  make sample RUN={directory} PROMPT="..."\n  make serve RUN={directory}')
    if task.kind == "translation":
        print(f'  tinygpt xray {directory} "a sentence to translate"')


def _expected_result(config: TrainingConfig) -> str | None:
    """Return what the chapter says of a table's preset; None where a setting is not the preset's.

    Threads and precision do not count: a run's config has those that were chosen at its start.
    """
    changed = changed_settings(config).keys() - {"threads", "precision"}
    if config.task not in TABULAR_TASKS or changed:
        return None
    return f"chapter {chapter_of(config)} says: {ABOUT[config.preset].learns}"
