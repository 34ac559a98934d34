"""Progress of a training run on standard output: one updating line on a terminal, else plain lines."""

import shutil
import sys
import time
from dataclasses import dataclass


def format_duration(seconds: float) -> str:
    """90061 -> '25:01:01', 75 -> '1:15'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


@dataclass
class Progress:
    """The progress line."""

    steps: int
    peak_flops: float | None = None
    """Peak of the device in operations per second, if known."""
    unit: str = "tokens"
    """Unit of the training speed."""
    interval: float = 5.0
    """Minimum seconds between plain lines."""
    validation_loss: float | None = None
    """The last one, shown until the next."""

    def __post_init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self._next_update = 0.0

    def update(
        self, step: int, loss: float, speed: float, flops: float, seconds_left: float
    ) -> None:
        """Show the step, loss, speed and time left, if the last update is long enough ago.

        Args:
            step: Steps done.
            loss: Mean training loss.
            speed: Units per second.
            flops: Operations per second, shown as MFU (a fraction of the peak) if the peak is known.
            seconds_left: Estimated.
        """
        now = time.monotonic()
        if now < self._next_update and step < self.steps:
            return
        self._next_update = now + (0.1 if self.is_terminal else self.interval)
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}", f"loss {loss:.4f}"]
        if self.validation_loss is not None:
            parts.append(f"validation {self.validation_loss:.4f}")
        parts.append(f"{speed:,.0f} {self.unit}/s")
        if self.peak_flops:
            parts.append(f"MFU {flops / self.peak_flops:.0%}")
        parts.append(f"{format_duration(seconds_left)} left")
        line = "   ".join(parts)
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
