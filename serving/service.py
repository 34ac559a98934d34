"""Between the event loop and the engine: one thread owns the engine, and the loop never waits for it.

Whatever asyncio wants of the engine goes through a queue as a function to call between
two steps; whatever a step brings wakes the event loop once, with all of it.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from serving.engine import Engine, Event, Request

logger = logging.getLogger(__name__)


class UnavailableError(Exception):
    """The service takes no requests: it is closed, or its engine has failed."""


class Inbox:
    """The events of some requests, as lists of all that came since the last look, until all have ended."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.open = set(requests)
        self._events: list[Event] = []
        self._filled = asyncio.Event()

    def put(self, event: Event) -> None:
        """Take an event in, on the event loop."""
        self._events.append(event)
        self._filled.set()

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        while self.open:
            await self._filled.wait()
            self._filled.clear()
            events, self._events = self._events, []
            self.open.difference_update(event.request for event in events if event.finish)
            yield events


class Service:
    """Runs an engine for the event loop that `start` is called on."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._inboxes: dict[Request, Inbox] = {}
        self._refusal = "the server is starting"

    @property
    def ready(self) -> bool:
        """True while requests are taken."""
        return not self._refusal

    async def start(self) -> None:
        """Begin to take requests."""
        self._loop = asyncio.get_running_loop()
        self._refusal = ""
        self._thread.start()

    async def close(self) -> None:
        """End every request with an error event and the thread with its current step."""
        if self.ready:
            self._end("the server is shutting down")
            self._calls.put(None)
            await asyncio.to_thread(self._thread.join)

    def check(self, requests: Sequence[Request]) -> None:
        """A ValueError says why one can never be served, UnavailableError why none can be now."""
        if not self.ready:
            raise UnavailableError(self._refusal)
        for request in requests:
            self.engine.check(request)

    @contextlib.asynccontextmanager
    async def submit(self, requests: Sequence[Request]) -> AsyncIterator[Inbox]:
        """Queue some requests; on leaving, for whatever reason, cancel those that have not ended."""
        self.check(requests)
        inbox = Inbox(requests)
        self._inboxes.update(dict.fromkeys(requests, inbox))
        self._calls.put(lambda: self._add(requests))
        try:
            yield inbox
        finally:
            for request in requests:
                self.cancel(request)

    def cancel(self, request: Request) -> None:
        """Let the engine drop a request before its next step; no event of it follows."""
        if inbox := self._inboxes.pop(request, None):
            inbox.open.discard(request)
            self._calls.put(lambda: self.engine.cancel(request))

    # On the event loop.

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            # One that was cancelled while the step ran has no inbox any more.
            inbox = self._inboxes.get(event.request)
            if event.finish:
                self._inboxes.pop(event.request, None)
            if inbox:
                inbox.put(event)

    def _end(self, refusal: str) -> None:
        self._refusal = refusal
        self._deliver([Event(request, None, "error", refusal) for request in self._inboxes])

    # On the engine's thread.

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.engine.add(request)

    def _run(self) -> None:
        try:
            while True:
                while self.engine.idle or not self._calls.empty():
                    call = self._calls.get()
                    if call is None:
                        return
                    call()
                events = self.engine.step()
                self._loop.call_soon_threadsafe(self._deliver, events)
        except Exception:
            logger.exception("the engine has failed")
            self._loop.call_soon_threadsafe(self._end, "the engine has failed: see the log")
