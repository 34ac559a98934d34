"""The server around the application: deadlines for slow clients, loading, an orderly end.

uvicorn waits for a request's head and body for ever, so its protocol is given deadlines
here. Models are loaded while it already listens, and answers that it is loading. SIGTERM or
Ctrl-C lets the texts end, for a while, before it leaves.
"""

import asyncio
import functools
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.http.app import EarlyRefusal, ModelRegistry
from serving.http.completions import ApiError
from serving.http.limits import Timeouts

logger = logging.getLogger(__name__)

FLUSH = 5
"""Seconds that a stopping server gives slow clients to take what was already written for them."""


@functools.lru_cache(maxsize=1)
def _plain(error: ApiError) -> bytes:
    """A whole answer, where the application is not asked."""
    status, data = HTTPStatus(error.status), error.body()
    fields = {
        "content-type": "application/json",
        "connection": "close",
        "content-length": str(len(data)),
        **(error.headers or {}),
    }
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *map(": ".join, fields.items()), "", ""]
    return "\r\n".join(lines).encode() + data


def make_protocol(deadlines: Timeouts, door: EarlyRefusal) -> type[H11Protocol]:
    """The protocol of uvicorn, which closes a connection that takes too long to ask, or is one too many."""

    class Protocol(H11Protocol):
        deadline: asyncio.TimerHandle | None = None
        told: ApiError | None = None
        """The refusal that was logged last: a crowd is told the same, and metrics count it."""
        unread = 0
        """Bytes of a request that is answered already: closed before them, a client might lose the answer."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > deadlines.max_connections:
                message = "too many connections: try again later"
                self.refuse(ApiError(503, message, headers={"retry-after": "1"}))
            else:
                self.expect("head", deadlines.header_timeout)

        def connection_lost(self, exc: Exception | None) -> None:
            self.relax()
            door.coming.discard(self)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self.unread:
                self.unread -= len(data)
                if self.unread <= 0:
                    self.transport.close()
                return
            before = self.conn.their_state
            if before is h11.IDLE:
                if refusal := door(self, data):
                    self.refuse(*refusal)
                    return
                if self.deadline is None:
                    self.expect("head", deadlines.header_timeout)
            super().data_received(data)
            if self in door.coming and self.scope:
                self.scope["state"]["looked_at"] = functools.partial(door.coming.discard, self)
            now = self.conn.their_state
            if now is h11.SEND_BODY and before is not h11.SEND_BODY:
                self.expect("body", deadlines.body_timeout)
            elif now is not h11.SEND_BODY and now is not h11.IDLE:
                self.relax()

        def on_response_complete(self) -> None:
            self.relax()
            door.coming.discard(self)
            super().on_response_complete()

        def expect(self, what: str, seconds: float) -> None:
            self.relax()
            message = f"the {what} of the request did not end within {seconds:g} s"
            self.deadline = self.loop.call_later(seconds, self.refuse, ApiError(408, message))

        def relax(self) -> None:
            if self.deadline:
                self.deadline.cancel()
                self.deadline = None

        def refuse(self, error: ApiError, unread: int = 0) -> None:
            """Say why, unless an answer has begun, and close, once the rest of the request has come."""
            self.relax()
            door.coming.discard(self)
            if (
                self.cycle is None
                or self.cycle.response_complete
                or not self.cycle.response_started
            ):
                self.transport.write(_plain(error))
                if self.client and error is not Protocol.told:
                    self.access_logger.info("%s:%d - refused: %s", *self.client, error)
                    Protocol.told = error
            self.unread = unread
            if unread:
                self.deadline = self.loop.call_later(deadlines.body_timeout, self.transport.close)
            else:
                self.transport.close()

        def send_400_response(self, msg: str) -> None:
            self.refuse(ApiError(400, msg))

    return Protocol


class Server(uvicorn.Server):
    """uvicorn, with what it serves loaded behind it and brought to an end before it.

    Args:
        app: The application of `create_app`.
        catalog: What it serves.
        load: Fills the catalog, and may go on doing so; runs while the server answers.
        deadlines: For clients, and for texts when it ends.
        key: What the application asks for, if anything.
    """

    def __init__(
        self,
        app: ASGIApp,
        catalog: ModelRegistry,
        load: Callable[[], Awaitable[None]],
        deadlines: Timeouts | None = None,
        key: str | None = None,
    ) -> None:
        self.deadlines = deadlines or Timeouts()
        config = uvicorn.Config(
            app,
            http=make_protocol(self.deadlines, EarlyRefusal(catalog, key)),
            log_config=None,
            ws="none",
            server_header=False,
            timeout_keep_alive=round(self.deadlines.idle_timeout),
            timeout_graceful_shutdown=FLUSH,
        )
        super().__init__(config)
        self.catalog, self.load = catalog, load
        self.failure: BaseException | None = None
        """What loading has failed with."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to load once clients can connect."""
        await super().startup(sockets)
        self.loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            await self.load()
        except Exception as error:
            self.failure, self.should_exit = error, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the texts end, then end them, before uvicorn waits for the answers that wait for them."""
        self.loading.cancel()
        await asyncio.wait({self.loading})
        services = [served.engine for served in self.catalog.entries.values()]
        drains = [asyncio.create_task(s.drain(self.deadlines.shutdown_timeout)) for s in services]
        while drains and not self.force_exit:
            _, waiting = await asyncio.wait(drains, timeout=0.05)
            drains = list(waiting)
        for drain in drains:
            drain.cancel()
        for service in services:
            await service.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Leave with exit code 0: a server that was told to stop has done what it was told."""
        # SIGTERM may well come twice: make hands on what the terminal or a supervisor sent to both.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
