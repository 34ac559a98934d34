"""What a run says while it trains: one live line on a terminal, plain lines elsewhere."""

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
    """The line about how far the training is."""

    steps: int
    peak_flops: float | None = None
    """The device's peak in operations a second, where it is known."""
    unit: str = "tokens"
    """What its speed is counted in."""
    every: float = 5.0
    """Seconds between plain lines."""

    validation: float | None = None
    """The last validation loss, shown until the next."""

    def __post_init__(self) -> None:
        self.live = sys.stdout.isatty()
        self._next = 0.0

    def update(self, step: int, loss: float, speed: float, flops: float, left: float) -> None:
        """Show step, mean loss, units/s, MFU where the card is known and the seconds left."""
        now = time.monotonic()
        if now < self._next and step < self.steps:
            return
        self._next = now + (0.1 if self.live else self.every)
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}", f"loss {loss:.4f}"]
        if self.validation is not None:
            parts.append(f"validation {self.validation:.4f}")
        parts.append(f"{speed:,.0f} {self.unit}/s")
        if self.peak_flops:
            parts.append(f"MFU {flops / self.peak_flops:.0%}")
        parts.append(f"{format_duration(left)} left")
        line = "   ".join(parts)
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="", flush=True)
        else:
            print(line, flush=True)

    def print(self, text: str) -> None:
        """Print lines of their own; the live line goes on below them."""
        if self.live:
            print("\r" + " " * (shutil.get_terminal_size().columns - 1), end="\r")
        print(text, flush=True)
