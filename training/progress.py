"""What a run reports while it trains: a progress line, and metrics.jsonl."""

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from gpt.checkpoint import write_atomically
from training.tracking import Trackers


def format_duration(seconds: float) -> str:
    """90061 -> '25:01:01', 75 -> '1:15'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_loss(loss: float) -> str:
    """1.23456 -> '1.2346'; very small and very large ones with an exponent: '1.23e-05'."""
    return f"{loss:.4f}" if 0.001 <= loss < 1e6 else f"{loss:.3g}"


def printable(text: str) -> str:
    """Return a generated text for a terminal: control characters and line separators are escaped.

    Line feeds and tabs stay, and so does a carriage return before a line feed.
    """

    def escape(match: re.Match[str]) -> str:
        return match[0].encode("unicode_escape").decode()

    return re.sub(r"\r(?!\n)|[\0-\b\v\f\x0e-\x1f\x7f-\x9f\u2028\u2029]", escape, text)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's metrics.jsonl; an empty list if there is none."""
    path = run / "metrics.jsonl"
    # In JSON only a line feed ends a line, while `splitlines` also splits at U+2028 in a sample.
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [values for line in lines if (values := _parse(line))]


def final_metrics(run: Path) -> dict[str, Any]:
    """Return the line of metrics.jsonl with the final figures; empty if training has not finished."""
    finished = [line for line in read_metrics(run) if "final_loss" in line]
    return finished[-1] if finished else {}


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the values of a line, or None if it is not complete."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


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
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}", f"loss {format_loss(loss)}"]
        if self.validation_loss is not None:
            parts.append(f"validation {format_loss(self.validation_loss)}")
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
    """Appends JSON objects to metrics.jsonl, one per line, and gives them to the trackers.

    When training continues from step `resume_step`, later lines and the final score are removed:
    they will be logged again.
    """

    def __init__(self, directory: Path, resume_step: int, trackers: Trackers) -> None:
        self.path = directory / "metrics.jsonl"
        lines = [
            json.dumps(values, ensure_ascii=False) + "\n"
            for values in read_metrics(directory)
            if values["step"] <= resume_step and "final_loss" not in values
        ]
        write_atomically(self.path, "".join(lines))
        self.trackers = trackers

    def log(self, step: int, **values: Any) -> None:  # noqa: ANN401 (JSON values)
        """Append a line with the step and these values."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        self.trackers.log(step, values)
