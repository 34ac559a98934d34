"""Between the event loop and the engine: one thread owns the engine, and the loop never waits for it.

Whatever asyncio wants of the engine goes through a queue as a function to call between
two steps; whatever a step brings wakes the event loop once, with all of it. What a stream
was told of a moment ago waits for a while, so that tokens that come faster than anybody
reads cost less to tell. More texts than there are rows and places to wait in are refused
at once, with the time after which to ask again.
"""

import asyncio
import contextlib
import logging
import math
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from serving.engine.engine import Engine, Request, SequenceOutput
from serving.http.limits import STREAM_INTERVAL
from serving.metrics import Metrics

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

RECENT = 32
"""Texts whose ends say how fast places become free."""
LONGEST_WAIT = 60
"""Seconds after which a refused client is asked to come again, at most."""
ENGINE_NICENESS = 5
"""How much nicer the engine's thread is than the event loop's: where all cores compute, who asks is heard first."""


class UnavailableError(Exception):
    """The service takes no requests: it is starting or closing, or its engine has failed."""


class QueueFullError(Exception):
    """There is no place to wait in; there may be in `seconds`."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.retry_after = seconds


class RequestStream:
    """The events of some requests, as lists of all that came since the last look, until all have ended."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.unfinished = {request: set(range(request.n)) for request in requests}
        self.arrived = time.perf_counter()
        self.last_token_times: dict[tuple[Request, int], float] = {}
        """When each text got its last token."""
        self.buffered: list[tuple[SequenceOutput, float]] = []
        """Events and their times, not told yet; the engine's thread alone changes this."""
        self.last_emitted = -math.inf
        """When the event loop was told of the last."""
        self._events: list[SequenceOutput] = []
        self._filled = asyncio.Event()

    @property
    def num_unfinished(self) -> int:
        """How many have not ended."""
        return sum(map(len, self.unfinished.values()))

    def put(self, event: SequenceOutput) -> None:
        """Take an event in, on the event loop."""
        self._events.append(event)
        self._filled.set()

    def drop(self, request: Request, choice: int | None = None) -> None:
        """Wait no longer for a text, or for all of a request's."""
        if choice is None:
            self.unfinished.pop(request, None)
        elif request in self.unfinished:
            self.unfinished[request].discard(choice)
            if not self.unfinished[request]:
                del self.unfinished[request]

    async def __aiter__(self) -> AsyncIterator[list[SequenceOutput]]:
        while self.unfinished or self._events:
            await self._filled.wait()
            self._filled.clear()
            events, self._events = self._events, []
            yield events


class AsyncEngine:
    """Runs an engine for the event loop that `start` is called on.

    Args:
        engine: Nobody else may touch it from `start` on.
        max_queue: Texts that may wait for a row.
        stall_timeout: Seconds without a step, while there is work, after which it counts as hung.
        metrics: Where to count.
        threads: Cores for the engine's products; torch's own choice when None.
        stream_interval: Seconds that an inbox waits for more after it was told of a token; ends do not wait.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queue: int = 64,
        stall_timeout: float = 60.0,
        metrics: Metrics | None = None,
        threads: int | None = None,
        stream_interval: float = STREAM_INTERVAL,
    ) -> None:
        if max_queue < 0:
            raise ValueError(f"the places to wait in must be at least 0, not {max_queue}")
        self.engine, self.max_queue, self.stall_timeout = engine, max_queue, stall_timeout
        self.threads, self.stream_interval = threads, stream_interval
        self.metrics = metrics or Metrics("")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._inboxes: dict[Request, RequestStream] = {}
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._turn = asyncio.Lock()
        """Of who asks the engine: one between two steps, or many would hold up the texts."""
        self._asking = 0
        self._asked: Future[Any] | None = None
        self._refusal = "the server is starting"
        self.failed = False
        """True when the engine has raised what no request is to blame for."""
        self._stepped = time.monotonic()
        self._ends: deque[float] = deque(maxlen=RECENT)
        self.metrics.watch(
            lambda: self.num_running,
            lambda: self.num_waiting,
            lambda: self.engine.num_compiled_steps,
        )

    @property
    def ready(self) -> bool:
        """True while requests are taken."""
        return not self._refusal

    @property
    def stalled(self) -> bool:
        """True when the engine has not finished a step for too long, though there is work."""
        work = self._inboxes or self._asking
        return bool(work) and time.monotonic() - self._stepped > self.stall_timeout

    @property
    def num_unfinished(self) -> int:
        """How many are queued or live."""
        return sum(inbox.num_unfinished for inbox in set(self._inboxes.values()))

    @property
    def num_running(self) -> int:
        """How many have a row."""
        return len(self.engine.running)

    @property
    def num_waiting(self) -> int:
        """How many wait for one."""
        return max(0, self.num_unfinished - self.num_running)

    async def start(self) -> None:
        """Begin to take requests."""
        self._loop = asyncio.get_running_loop()
        self._refusal = ""
        self._thread.start()

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait so long for the others to end."""
        if self.ready:
            self._refusal = "the server is shutting down"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._quiet.wait()
                    async with self._turn:
                        pass

    async def close(self) -> None:
        """End every request with an error event and the thread with its current step."""
        if self._thread.is_alive():
            self._end("the server is shutting down")
            self._calls.put(None)
            await asyncio.to_thread(self._thread.join)

    def check_capacity(self, wanted: int, coming: int = 0) -> None:
        """Whether so many texts could be taken now: to be asked before their prompts are looked at.

        `coming` are others that were told so, and have not been taken yet.

        A ValueError says that they never can be, UnavailableError why none can be now, BusyError
        that there is no place.
        """
        if not self.ready:
            raise UnavailableError(self._refusal)
        most = self.engine.max_num_seqs + self.max_queue
        if wanted > most:
            raise ValueError(f"{wanted} texts are asked for, and there is room for {most}")
        if self.num_unfinished + coming + wanted > most:
            self.metrics.refused.inc()
            raise QueueFullError(
                f"{self.num_running} texts are being made and {self.num_waiting} wait: "
                f"there is no room for {wanted} more",
                self._retry_after(),
            )

    def _retry_after(self) -> int:
        """Seconds until about half of those that wait have been let in, as fast as texts end now."""
        if len(self._ends) < 2:
            return 1
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return min(LONGEST_WAIT, max(1, math.ceil(pace * self.max_queue / 2)))

    def add_requests(self, requests: Sequence[Request]) -> RequestStream:
        """Queue some requests, for whose events to wait in the inbox; `release` it in any case.

        A ValueError says why one can never be served; what `find_room` raises, this does too.
        """
        for request in requests:
            self.engine.validate(request)
        self.check_capacity(sum(request.n for request in requests))
        self._wake()
        self._quiet.clear()
        inbox = RequestStream(requests)
        self._inboxes.update(dict.fromkeys(requests, inbox))
        for request in requests:
            self.metrics.arrived(len(request.prompt))
        self._calls.put(lambda: self._add(requests))
        return inbox

    def abort_stream(self, inbox: RequestStream) -> None:
        """Cancel what has not ended."""
        for request in list(inbox.unfinished):
            self.abort(request)

    def abort(self, request: Request, choice: int | None = None) -> None:
        """Let the engine drop a request or one of its texts before its next step; no event of it follows."""
        inbox = self._inboxes.get(request)
        if inbox:
            inbox.drop(request, choice)
            self._calls.put(lambda: self.engine.abort(request, choice))
            self._tidy(request, inbox)

    async def run_on_engine(self, function: Callable[[], Result]) -> Result:
        """What a function returns or raises, called on the engine's thread between two steps.

        What `find_room` raises, this does too.
        """
        if self._asking >= self.engine.max_num_seqs + self.max_queue:
            self.metrics.refused.inc()
            raise QueueFullError(f"{self._asking} questions wait: there is no room for another", 1)
        self._wake()
        self._asking += 1
        try:
            async with self._turn:
                if not self.ready:
                    raise UnavailableError(self._refusal)
                asked: Future[Result] = Future()
                self._asked = asked
                self._calls.put(lambda: self._answer(function, asked))
                return await asyncio.wrap_future(asked)
        finally:
            self._asking -= 1

    # On the event loop.

    def _wake(self) -> None:
        """Note that there is work from now on."""
        if not (self._inboxes or self._asking):
            self._stepped = time.monotonic()

    def _tidy(self, request: Request, inbox: RequestStream) -> None:
        """Forget a request of which nothing more will come."""
        if request not in inbox.unfinished:
            self._inboxes.pop(request, None)
        if not self._inboxes:
            self._quiet.set()

    def _deliver(self, events: list[tuple[SequenceOutput, float]]) -> None:
        for event, now in events:
            # One that was cancelled while the step ran has no inbox any more, or no place in it.
            inbox = self._inboxes.get(event.request)
            if inbox is None or event.choice not in inbox.unfinished[event.request]:
                continue
            self._measure(event, inbox, now)
            if event.finish_reason:
                self._ends.append(now)
                inbox.drop(event.request, event.choice)
            inbox.put(event)
            self._tidy(event.request, inbox)

    def _measure(self, event: SequenceOutput, inbox: RequestStream, now: float) -> None:
        key = event.request, event.choice
        if event.token is not None:
            self.metrics.token(inbox.arrived, inbox.last_token_times.get(key), now)
            inbox.last_token_times[key] = now
        if event.finish_reason:
            began = event.request.prefill_started
            self.metrics.ended(event.finish_reason, inbox.arrived, began or now, now)

    def _end(self, refusal: str) -> None:
        self._refusal = refusal
        if self.failed and self._asked and not self._asked.done():  # else its turn still comes
            self._asked.set_exception(UnavailableError(refusal))
        now = time.perf_counter()
        held = [event for inbox in set(self._inboxes.values()) for event in inbox.buffered]
        ends = [
            (SequenceOutput(request, choice, None, "error", error=refusal), now)
            for request, inbox in self._inboxes.items()
            for choice in sorted(inbox.unfinished[request])
        ]
        self._deliver(held + ends)

    # On the engine's thread.

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.engine.add_request(request)

    def _due(self, events: list[SequenceOutput]) -> list[tuple[SequenceOutput, float]]:
        """What the event loop is to be told now, with the time of each; the rest is held."""
        now, ready = time.perf_counter(), dict[RequestStream, None]()
        for event in events:
            # One that was cancelled while the step ran has no inbox any more.
            if inbox := self._inboxes.get(event.request):
                inbox.buffered.append((event, now))
                if event.finish_reason or now - inbox.last_emitted >= self.stream_interval:
                    ready[inbox] = None
        due = []
        for inbox in ready:
            due += inbox.buffered
            inbox.buffered, inbox.last_emitted = [], now
        return due

    @torch.inference_mode()
    def _answer(self, function: Callable[[], Result], asked: Future[Result]) -> None:
        if asked.set_running_or_notify_cancel():  # else who asked has left
            try:
                asked.set_result(function())
            except Exception as error:  # the texts live on
                asked.set_exception(error)
        self._stepped = time.monotonic()

    def _run(self) -> None:
        if sys.platform == "linux":  # there a thread has its own, which its OpenMP workers inherit
            niceness = os.getpriority(os.PRIO_PROCESS, 0) + ENGINE_NICENESS
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        if self.threads:
            torch.set_num_threads(self.threads)  # of this thread: other engines have their own
        try:
            while True:
                while self.engine.idle or not self._calls.empty():
                    call = self._calls.get()
                    if call is None:
                        return
                    call()
                events = self.engine.step()
                self._stepped = time.monotonic()
                if due := self._due(events):
                    self._loop.call_soon_threadsafe(self._deliver, due)
        except Exception:
            logger.exception("the engine has failed")
            self.failed = True
            self._loop.call_soon_threadsafe(self._end, "the engine has failed: see the log")
