"""The asyncio front of an engine. One thread owns the engine, and the event loop never waits for it.

Calls from the event loop go through a queue of functions, which the engine's thread runs between
two steps. The outputs of a step wake the event loop once, all together; those of a stream that
got some a moment ago are buffered for a while, so that tokens that come faster than anybody reads
cost less to send. Requests beyond the slots and the waiting queue are refused at once, with the
time after which to retry.
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
from functools import partial
from typing import Any, TypeVar

import torch

from serving.engine.engine import Engine
from serving.engine.sequence import STREAM_INTERVAL, Request, SequenceOutput
from serving.metrics import Metrics

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

NUM_FINISH_TIMES = 32
"""Finished sequences from which the rate at which capacity becomes free is estimated."""
MAX_RETRY_AFTER = 60
"""Seconds after which a refused client is asked to retry, at most."""
ENGINE_NICENESS = 5
"""Niceness of the engine's thread above the event loop's: with all cores busy, clients come first."""


class UnavailableError(Exception):
    """The engine takes no requests: the server is starting or shutting down, or the engine failed."""


class QueueFullError(Exception):
    """The waiting queue is full; there may be capacity in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestStream:
    """The outputs of some requests, as lists of all that came since the last, until all have ended."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.unfinished = {request: set(range(request.n)) for request in requests}
        """The choices of each request that have not ended."""
        self.arrival_time = time.perf_counter()
        self.last_token_times: dict[tuple[Request, int], float] = {}
        self.buffered: list[tuple[SequenceOutput, float]] = []
        """Outputs to be sent later, and their times. Only the engine's thread changes this."""
        self.last_sent = -math.inf
        """When the event loop was last sent an output."""
        self._outputs: list[SequenceOutput] = []
        self._has_outputs = asyncio.Event()

    @property
    def num_unfinished(self) -> int:
        """Number of sequences that have not ended."""
        return sum(map(len, self.unfinished.values()))

    def put(self, output: SequenceOutput) -> None:
        """Add an output, on the event loop."""
        self._outputs.append(output)
        self._has_outputs.set()

    def discard(self, request: Request, choice: int | None = None) -> None:
        """Wait no longer for a sequence, or for all sequences of a request."""
        if choice is None:
            self.unfinished.pop(request, None)
        elif request in self.unfinished:
            self.unfinished[request].discard(choice)
            if not self.unfinished[request]:
                del self.unfinished[request]

    async def __aiter__(self) -> AsyncIterator[list[SequenceOutput]]:
        while self.unfinished or self._outputs:
            await self._has_outputs.wait()
            self._has_outputs.clear()
            outputs, self._outputs = self._outputs, []
            yield outputs


class AsyncEngine:
    """Runs an engine in a thread, for the event loop on which `start` is called.

    Args:
        engine: The engine; from `start` on it must not be used elsewhere.
        max_queue: Sequences that may wait for a slot.
        stall_timeout: Seconds without a step, while there is work, after which the engine counts
            as stalled.
        metrics: Where to record metrics.
        threads: Threads of the engine's computations; torch's default if None.
        stream_interval: Seconds for which a stream buffers tokens after it was sent some; the end
            of a sequence is sent at once.
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
            raise ValueError(f"max_queue must be at least 0, not {max_queue}")
        self.engine, self.max_queue, self.stall_timeout = engine, max_queue, stall_timeout
        self.threads, self.stream_interval = threads, stream_interval
        self.metrics = metrics or Metrics("")
        self.has_failed = False
        """True once the engine has raised an error that is not of one request."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """Functions for the engine's thread; None ends it."""
        self._streams: dict[Request, RequestStream] = {}
        self._drained = asyncio.Event()
        self._drained.set()
        self._call_lock = asyncio.Lock()
        """Lets one `run_on_engine` call run between two steps: many would delay the sequences."""
        self._num_calls = 0
        """Number of `run_on_engine` calls that wait or run."""
        self._current_call: Future[Any] | None = None
        self._unavailable = "the server is starting"
        """Why requests are not taken; empty while they are."""
        self._last_step_time = time.monotonic()
        self._finish_times: deque[float] = deque(maxlen=NUM_FINISH_TIMES)
        self.metrics.num_running.set_function(lambda: self.num_running)
        self.metrics.num_waiting.set_function(lambda: self.num_waiting)
        self.metrics.num_compiled_steps.set_function(lambda: self.engine.num_compiled_steps)

    @property
    def is_ready(self) -> bool:
        """True while requests are taken."""
        return not self._unavailable

    @property
    def is_stalled(self) -> bool:
        """True when there is work, but no step has ended for `stall_timeout` seconds."""
        has_work = bool(self._streams or self._num_calls)
        return has_work and time.monotonic() - self._last_step_time > self.stall_timeout

    @property
    def num_unfinished(self) -> int:
        """Number of sequences that wait or run."""
        return sum(stream.num_unfinished for stream in set(self._streams.values()))

    @property
    def num_running(self) -> int:
        """Number of sequences that have a slot."""
        return len(self.engine.running)

    @property
    def num_waiting(self) -> int:
        """Number of sequences that wait for a slot."""
        return max(0, self.num_unfinished - self.num_running)

    async def start(self) -> None:
        """Start the engine's thread and take requests."""
        self._loop = asyncio.get_running_loop()
        self._unavailable = ""
        self._thread.start()

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait up to `seconds` for the others to end."""
        if self.is_ready:
            self._unavailable = "the server is shutting down"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._drained.wait()
                    async with self._call_lock:
                        pass

    async def close(self) -> None:
        """End all requests with an error, and the engine's thread after its current step."""
        if self._thread.is_alive():
            self._end_all("the server is shutting down")
            self._calls.put(None)
            await asyncio.to_thread(self._thread.join)

    def check_capacity(self, num_sequences: int) -> None:
        """Check that sequences could be added now; to be called before their prompts are tokenized.

        Raises:
            ValueError: There will never be capacity for so many.
            UnavailableError: No requests are taken.
            QueueFullError: There is no capacity now.
        """
        if not self.is_ready:
            raise UnavailableError(self._unavailable)
        capacity = self.engine.max_num_seqs + self.max_queue
        if num_sequences > capacity:
            raise ValueError(
                f"the request needs {num_sequences} sequences, this server has capacity for {capacity}"
            )
        if self.num_unfinished + num_sequences > capacity:
            self.metrics.refused.inc()
            raise QueueFullError(
                f"{self.num_running} sequences are running and {self.num_waiting} are waiting: "
                f"there is no capacity for {num_sequences} more",
                self._retry_after(),
            )

    def _retry_after(self) -> int:
        """Estimate the seconds until half of a full queue has got a slot, from recent finish times."""
        if len(self._finish_times) < 2:
            return 1
        pace = (self._finish_times[-1] - self._finish_times[0]) / (len(self._finish_times) - 1)
        return min(MAX_RETRY_AFTER, max(1, math.ceil(pace * self.max_queue / 2)))

    def add_requests(self, requests: Sequence[Request]) -> RequestStream:
        """Add requests, and return the stream of their outputs; `abort_stream` it in any case.

        Raises:
            ValueError: A request can never be served.
            UnavailableError, QueueFullError: As `check_capacity`.
        """
        for request in requests:
            self.engine.validate(request)
        self.check_capacity(sum(request.n for request in requests))
        self._restart_stall_timer()
        self._drained.clear()
        stream = RequestStream(requests)
        self._streams.update(dict.fromkeys(requests, stream))
        for request in requests:
            self.metrics.prompt_tokens.inc(len(request.prompt))
            self._calls.put(partial(self.engine.add_request, request))
        return stream

    def abort_stream(self, stream: RequestStream) -> None:
        """Abort all requests of a stream that have not ended."""
        for request in list(stream.unfinished):
            self.abort(request)

    def abort(self, request: Request, choice: int | None = None) -> None:
        """Abort a request, or one of its sequences, before the next step. It has no further output."""
        stream = self._streams.get(request)
        if stream:
            stream.discard(request, choice)
            self._calls.put(partial(self.engine.abort, request, choice))
            self._remove_if_ended(request, stream)

    async def run_on_engine(self, function: Callable[[], Result]) -> Result:
        """Call a function on the engine's thread between two steps, and return its result.

        Raises:
            UnavailableError: The engine is not running, or stops before the call.
            QueueFullError: Too many calls are waiting.
            Exception: Whatever the function raises.
        """
        if self._num_calls >= self.engine.max_num_seqs + self.max_queue:
            self.metrics.refused.inc()
            raise QueueFullError(
                f"{self._num_calls} requests are waiting: there is no capacity for another", 1
            )
        self._restart_stall_timer()
        self._num_calls += 1
        try:
            async with self._call_lock:
                if not self.is_ready:
                    raise UnavailableError(self._unavailable)
                call: Future[Result] = Future()
                self._current_call = call
                self._calls.put(partial(self._run_call, function, call))
                return await asyncio.wrap_future(call)
        finally:
            self._num_calls -= 1

    # On the event loop.

    def _restart_stall_timer(self) -> None:
        """Let the stall timeout start now, if there was no work before."""
        if not (self._streams or self._num_calls):
            self._last_step_time = time.monotonic()

    def _remove_if_ended(self, request: Request, stream: RequestStream) -> None:
        if request not in stream.unfinished:
            self._streams.pop(request, None)
        if not self._streams:
            self._drained.set()

    def _deliver(self, outputs: Sequence[tuple[SequenceOutput, float]]) -> None:
        """Put outputs with their times into their streams."""
        for output, now in outputs:
            request, choice = key = output.request, output.choice
            stream = self._streams.get(request)
            if stream is None or choice not in stream.unfinished[request]:
                continue  # aborted during the step
            arrival = stream.arrival_time
            if output.token is not None:
                self.metrics.token_generated(arrival, stream.last_token_times.get(key), now)
                stream.last_token_times[key] = now
            if output.finish_reason:
                started = request.prefill_started or now
                self.metrics.sequence_finished(output.finish_reason, arrival, started, now)
                self._finish_times.append(now)
                stream.discard(request, choice)
            stream.put(output)
            self._remove_if_ended(request, stream)

    def _end_all(self, reason: str) -> None:
        """Take no more requests, and end all that there are with an error."""
        self._unavailable = reason
        call = self._current_call
        if self.has_failed and call and not call.done():  # otherwise the thread still runs it
            call.set_exception(UnavailableError(reason))
        now = time.perf_counter()
        buffered = [pair for stream in set(self._streams.values()) for pair in stream.buffered]
        errors = [
            (SequenceOutput(request, choice, None, "error", error=reason), now)
            for request, stream in self._streams.items()
            for choice in sorted(stream.unfinished[request])
        ]
        self._deliver(buffered + errors)

    # On the engine's thread.

    def _buffer(self, outputs: Sequence[SequenceOutput]) -> list[tuple[SequenceOutput, float]]:
        """Buffer outputs in their streams; return all of those streams that are to be sent now."""
        now, due_streams = time.perf_counter(), dict[RequestStream, None]()
        for output in outputs:
            if stream := self._streams.get(output.request):  # None if aborted during the step
                stream.buffered.append((output, now))
                if output.finish_reason or now - stream.last_sent >= self.stream_interval:
                    due_streams[stream] = None
        due = []
        for stream in due_streams:
            due += stream.buffered
            stream.buffered, stream.last_sent = [], now
        return due

    @torch.inference_mode()
    def _run_call(self, function: Callable[[], Result], call: Future[Result]) -> None:
        if call.set_running_or_notify_cancel():  # False if the caller has gone
            try:
                call.set_result(function())
            except Exception as error:  # the sequences are not affected
                call.set_exception(error)
        self._last_step_time = time.monotonic()

    def _run(self) -> None:
        if sys.platform == "linux":  # where niceness is a thread's, inherited by OpenMP workers
            niceness = os.getpriority(os.PRIO_PROCESS, 0) + ENGINE_NICENESS
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        if self.threads:
            torch.set_num_threads(self.threads)  # of this thread: other engines have their own
        try:
            while True:
                while self.engine.is_idle or not self._calls.empty():
                    call = self._calls.get()
                    if call is None:
                        return
                    call()
                outputs = self.engine.step()
                self._last_step_time = time.monotonic()
                if due := self._buffer(outputs):
                    self._loop.call_soon_threadsafe(self._deliver, due)
        except Exception:
            logger.exception("the engine has failed")
            self.has_failed = True
            self._loop.call_soon_threadsafe(self._end_all, "the engine has failed: see the log")
