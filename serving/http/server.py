"""The uvicorn server: timeouts for slow clients, loading in the background, graceful shutdown.

uvicorn waits without limit for a request's head and body, so its protocol gets timeouts here.
The server listens while models load and responds that it is loading. On SIGTERM or Ctrl-C it
lets running sequences finish within a timeout.
"""

import asyncio
import functools
import signal
import socket
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.http.limits import Timeouts
from serving.http.protocol import APIError
from serving.http.registry import ModelRegistry

FLUSH_TIMEOUT = 5
"""Seconds that a server shutting down gives slow clients to receive what was already sent."""


def _raw_response(error: APIError) -> bytes:
    """Return the bytes of an HTTP response that bypasses the application."""
    status, body = HTTPStatus(error.status), error.body()
    headers = {"content-type": "application/json", "connection": "close"}
    headers |= {"content-length": str(len(body)), **(error.headers or {})}
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *map(": ".join, headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


class TimeoutProtocol(H11Protocol):
    """uvicorn's protocol, with timeouts and a limit of the number of connections."""

    def __init__(self, *, timeouts: Timeouts, **uvicorn_kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**uvicorn_kwargs)
        self.timeouts = timeouts
        self.deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the head, or refuse a connection above the limit."""
        super().connection_made(transport)
        if len(self.connections) > self.timeouts.max_connections:
            message = "too many connections: try again later"
            self.refuse(APIError(503, message, headers={"retry-after": "1"}))
        else:
            self._set_deadline("head", self.timeouts.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timeout."""
        self._clear_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse data; start or cancel the timeouts of head and body."""
        if self.transport.is_closing():
            return
        before = self.conn.their_state
        if before is h11.IDLE and self.deadline is None:
            self._set_deadline("head", self.timeouts.header_timeout)
        super().data_received(data)
        after = self.conn.their_state
        if after is h11.SEND_BODY and before is not h11.SEND_BODY:
            self._set_deadline("body", self.timeouts.body_timeout)
        elif after is not h11.SEND_BODY and after is not h11.IDLE:
            self._clear_deadline()

    def on_response_complete(self) -> None:
        """Cancel the timeout; uvicorn starts that of an idle connection."""
        self._clear_deadline()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Respond to invalid HTTP in OpenAI's error shape."""
        self.refuse(APIError(400, msg))

    def refuse(self, error: APIError) -> None:
        """Send an error, unless a response has started, and close the connection."""
        self._clear_deadline()
        if not (self.cycle and self.cycle.response_started and not self.cycle.response_complete):
            self.transport.write(_raw_response(error))
            if self.client:
                self.access_logger.info("%s:%d - refused: %s", *self.client, error)
        self.transport.close()

    def _set_deadline(self, part: str, seconds: float) -> None:
        self._clear_deadline()
        message = f"the {part} of the request was not complete within {seconds:g} s"
        self.deadline = self.loop.call_later(seconds, self.refuse, APIError(408, message))

    def _clear_deadline(self) -> None:
        if self.deadline:
            self.deadline.cancel()
            self.deadline = None


class Server(uvicorn.Server):
    """uvicorn's server, which also loads the models and shuts down their engines.

    `load` fills the registry while the server already responds, for ever with `--watch`.
    """

    def __init__(
        self,
        app: ASGIApp,
        registry: ModelRegistry,
        load: Callable[[], Awaitable[None]],
        timeouts: Timeouts,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=functools.partial(TimeoutProtocol, timeouts=timeouts),  # type: ignore[arg-type]
            log_config=None,
            ws="none",
            server_header=False,
            timeout_keep_alive=round(timeouts.idle_timeout),
            timeout_graceful_shutdown=FLUSH_TIMEOUT,
        )
        super().__init__(config)
        self.registry, self.load, self.timeouts = registry, load, timeouts
        self.load_error: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start loading once clients can connect."""
        await super().startup(sockets)
        self.load_task = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            await self.load()
        except Exception as error:
            self.load_error, self.should_exit = error, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain and close the engines before uvicorn waits for the responses that depend on them."""
        self.load_task.cancel()
        await asyncio.wait({self.load_task})
        engines = [entry.engine for entry in self.registry.entries.values()]
        drains = asyncio.gather(*(e.drain(self.timeouts.shutdown_timeout) for e in engines))
        while not (drains.done() or self.force_exit):
            await asyncio.wait({drains}, timeout=0.05)
        drains.cancel()
        await self.registry.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Shut down, and exit with code 0: stopping on a signal is no failure."""
        # SIGTERM may come twice, as make forwards what a supervisor also sends to the server
        # itself; only a second Ctrl-C forces the exit.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
