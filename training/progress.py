"""What a run reports while it trains: a progress line, metrics.jsonl and TensorBoard events."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from gpt.checkpoint import write_atomically


def format_duration(seconds: float) -> str:
    """90061 -> '25:01:01', 75 -> '1:15'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """Progress on standard output: one updating line on a terminal, else a line every 5 seconds."""

    validation_loss: float | None = None
    """The last one, shown until the next."""

    def __init__(self, steps: int, peak_flops: float | None, unit: str) -> None:
        self.steps, self.peak_flops, self.unit = steps, peak_flops, unit
        self.is_terminal = sys.stdout.isatty()
        self.next_update = 0.0

    def update(
        self, step: int, loss: float, speed: float, flops: float, seconds_left: float
    ) -> None:
        """Show the progress, if the last update is long enough ago.

        Speed is in units per second, `flops` in operations per second: shown as MFU, the share of
        the device's peak, if that is known.
        """
        now = time.monotonic()
        if now < self.next_update and step < self.steps:
            return
        self.next_update = now + (0.1 if self.is_terminal else 5.0)
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}", f"loss {loss:.4f}"]
        if self.validation_loss is not None:
            parts.append(f"validation {self.validation_loss:.4f}")
        parts.append(f"{speed:,.0f} {self.unit}/s")
        if self.peak_flops:
            parts.append(f"MFU {flops / self.peak_flops:.0%}")
        line = "   ".join([*parts, f"{format_duration(seconds_left)} left"])
        if self.is_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="", flush=True)
        else:
            print(line, flush=True)

    def print(self, text: str) -> None:
        """Print lines above the progress line."""
        if self.is_terminal:
            print("\r" + " " * (shutil.get_terminal_size().columns - 1), end="\r")
        print(text, flush=True)


class MetricsLogger:
    """Appends JSON objects to metrics.jsonl, one per line, and optionally TensorBoard events.

    When training continues from step `resume_step`, later lines and the final score are removed:
    they will be logged again. A ValueError if `tensorboard` needs a package that is missing.
    """

    def __init__(self, directory: Path, tensorboard: bool, resume_step: int) -> None:
        self.path = directory / "metrics.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        valid = [line for line in lines if _is_valid(line, resume_step)]
        write_atomically(self.path, "".join(f"{line}\n" for line in valid))
        self.writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
            self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, **values: Any) -> None:  # noqa: ANN401 (JSON values)
        """Append a line with the step and these values."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        if self.writer:
            for name, value in values.items():
                if isinstance(value, str):
                    self.writer.add_text(name, value, step)
                elif isinstance(value, int | float):
                    self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the TensorBoard events."""
        if self.writer:
            self.writer.close()


def _is_valid(line: str, resume_step: int) -> bool:
    """Return whether a line is complete, from a step up to `resume_step`, and not the final score."""
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return bool(values["step"] <= resume_step and "final_loss" not in values)
