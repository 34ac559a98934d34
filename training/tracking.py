"""Experiment trackers: TensorBoard, Trackio and W&B get the metrics of a run beside metrics.jsonl.

A tracker is imported only if a run asks for it. Trackio and W&B know a run by the `tracking_id` in
its run.json, so that a resumed run continues the tracked one.
"""

import dataclasses
import importlib
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from gpt.checkpoint import read_run_json, run_argument
from training.config import TrainingConfig

PROJECT = "tinygpt"
"""Project of the runs in Trackio, and in W&B unless WANDB_PROJECT names another."""

Scalars = Mapping[str, str | float]
"""Values of one line of metrics.jsonl, without lists and dictionaries."""


class Tracker(Protocol):
    """Where metrics go. Every method may raise whatever its library raises."""

    def log(self, step: int, values: Scalars) -> None:
        """Record the values of a step. A step may come several times, also after a resume."""

    def close(self, exit_code: int) -> None:
        """Send what is not sent yet, and end the tracked run."""


class TensorBoard:
    """Event files in the run directory. Events after `resume_step` are replaced."""

    def __init__(self, library: Any, directory: Path, resume_step: int) -> None:  # noqa: ANN401
        self.writer = library.SummaryWriter(
            str(directory / "tensorboard"), purge_step=resume_step + 1
        )

    def log(self, step: int, values: Scalars) -> None:
        """Write the values."""
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            else:
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, exit_code: int) -> None:  # noqa: ARG002 (TensorBoard knows no failed runs)
        """Close the event file."""
        self.writer.close()


class Trackio:
    """A run of Trackio: local, or in a Space that TRACKIO_SPACE_ID names."""

    def __init__(self, library: Any, config: TrainingConfig, directory: Path) -> None:  # noqa: ANN401
        self.library = library
        self.run = library.init(
            project=PROJECT,
            # Trackio finds a run again by its name.
            name=f"{directory.name}-{tracking_id(directory)}",
            config=dataclasses.asdict(config),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, values: Scalars) -> None:
        """Queue the values for Trackio's thread."""
        self.run.log(dict(values), step=step)

    def close(self, exit_code: int) -> None:  # noqa: ARG002 (Trackio knows no failed runs)
        """Wait until all is written."""
        self.library.finish()


class Wandb:
    """A run of Weights & Biases. Its files are in the run directory."""

    def __init__(self, library: Any, config: TrainingConfig, directory: Path) -> None:  # noqa: ANN401
        self.run = library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=directory.name,
            id=tracking_id(directory),
            dir=str(directory),
            config=dataclasses.asdict(config),
            resume="allow",
            allow_val_change=True,  # --resume may choose another device
        )
        # W&B's own step refuses to go back to that of a checkpoint.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Scalars) -> None:
        """Queue the values for W&B's process."""
        self.run.log({"step": step, **values})

    def close(self, exit_code: int) -> None:
        """Wait until all is sent; the run is marked as failed unless the exit code is 0."""
        self.run.finish(exit_code=exit_code)


LIBRARIES = {
    "tensorboard": ("torch.utils.tensorboard", "SummaryWriter"),
    "trackio": ("trackio", "init"),
    "wandb": ("wandb", "init"),
}
"""The module of each tracker and a name in it. A folder `wandb`, as W&B makes, is a module without any."""
HINTS = {"wandb": " (WANDB_MODE=offline tracks without a network or an account)"}
"""What else may help a tracker to start."""


def _options(config: TrainingConfig) -> dict[str, str]:
    """Return the trackers that a config asks for, and the option that does."""
    options = {"tensorboard": "--tensorboard"} if config.tensorboard else {}
    return options if config.track == "off" else options | {config.track: f"--track {config.track}"}


def _import(name: str, option: str) -> Any:  # noqa: ANN401 (a module)
    module_name, attribute = LIBRARIES[name]
    try:
        module = importlib.import_module(module_name)
        getattr(module, attribute)
    except (ImportError, AttributeError):
        raise ValueError(f"{option} needs a package: pip install {name}") from None
    return module


def check_installed(config: TrainingConfig) -> None:
    """Raise ValueError if a tracker that the config asks for is not installed."""
    for name, option in _options(config).items():
        _import(name, option)


def _start(
    name: str,
    library: Any,  # noqa: ANN401 (a module)
    config: TrainingConfig,
    directory: Path,
    resume_step: int,
) -> Tracker:
    if name == "tensorboard":
        return TensorBoard(library, directory, resume_step)
    if name == "trackio":
        return Trackio(library, config, directory)
    return Wandb(library, config, directory)


def new_tracking_id(config: TrainingConfig) -> dict[str, str]:
    """Return what run.json records of a run that will be tracked; nothing for any other."""
    return {} if config.track == "off" else {"tracking_id": secrets.token_hex(4)}


def tracking_id(directory: Path) -> str:
    """Return the name of a run in its tracker."""
    return str(read_run_json(directory)["tracking_id"])


class Trackers:
    """The trackers of a run, started. One that fails later is dropped with a message: training goes on.

    Raises ValueError if one cannot start.
    """

    def __init__(self, config: TrainingConfig, directory: Path, resume_step: int) -> None:
        self.trackers: dict[str, Tracker] = {}
        """By option."""
        for name, option in _options(config).items():
            library = _import(name, option)
            try:
                self.trackers[option] = _start(name, library, config, directory, resume_step)
            except Exception as error:  # of many kinds: no network, no account, no space, ...
                raise ValueError(
                    f"{option} could not start: {_describe(error)}{HINTS.get(name, '')}; then "
                    f"continue with: tinygpt train --resume {run_argument(directory)}"
                ) from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record those of a step's values that are numbers or texts."""
        scalars = {name: it for name, it in values.items() if isinstance(it, str | int | float)}
        self._for_each(lambda tracker: tracker.log(step, scalars))

    def close(self, exit_code: int = 0) -> None:
        """End the tracked run; what is logged from now on goes nowhere."""
        self._for_each(lambda tracker: tracker.close(exit_code))
        self.trackers.clear()

    def _for_each(self, action: Callable[[Tracker], None]) -> None:
        for option, tracker in list(self.trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # of many kinds: see above
                del self.trackers[option]
                print(
                    f"\n{option} failed: {_describe(error)}; the run goes on without it, and "
                    "metrics.jsonl has its metrics",
                    file=sys.stderr,
                )


def _describe(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
