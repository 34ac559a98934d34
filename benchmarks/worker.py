"""Worker processes: each measurement has a process of its own, and with it its memory and threads."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Concatenate


class Worker:
    """A spawned process that runs `target(connection, *arguments)`.

    Args:
        name: For the error message when the process dies.
        target: A module-level function; it gets the child's end of a pipe first.
        arguments: The rest of its arguments; they must be picklable.
    """

    def __init__(
        self,
        name: str,
        target: Callable[Concatenate[Connection, ...], None],
        *arguments: Any,  # noqa: ANN401 (the target's own)
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        self.process = context.Process(target=target, args=(child, *arguments), daemon=True)
        self.process.start()
        child.close()

    def receive(self) -> Any:  # noqa: ANN401 (whatever the target sends)
        """Wait for the next message; a ValueError if the process has died."""
        try:
            return self.connection.recv()
        except EOFError:
            raise ValueError(f"{self.name}: the worker process died; its error is above") from None

    def request(self, message: object) -> Any:  # noqa: ANN401 (whatever the target sends)
        """Send a message and wait for the reply."""
        self.connection.send(message)
        return self.receive()

    def close(self) -> None:
        """Send None, which ends a worker's loop, and wait for the process to exit."""
        self.connection.send(None)
        self.process.join()
