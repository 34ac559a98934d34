"""SIGINT and SIGTERM, deferred until the training loop can save a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class SignalHandler:
    """Records SIGINT and SIGTERM instead of ending the process; a second SIGINT interrupts at once."""

    received: int | None = None
    """Number of the last signal."""

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the two signals within this context."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous_handlers = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, previous_handlers, strict=True):
                signal.signal(number, handler)
