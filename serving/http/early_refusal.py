"""Refusal of completions while the queue is full, before the application parses their requests.

Optional: the application refuses the same requests, but takes far longer for each. It is used in
three places: `serving/cli.py` and the tests pass `early_refusal_protocol` to `Server`, and the route
of completions calls `early_admission_done`.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import h11

from serving.engine.async_engine import QueueFullError, UnavailableError
from serving.http.middleware import authorized
from serving.http.protocol import APIError, to_api_error
from serving.http.registry import ModelRegistry
from serving.http.server import TimeoutProtocol


@functools.lru_cache(maxsize=1)
def _queue_full(message: str, retry_after: int) -> APIError:
    """One error object for a burst of equal refusals, so that it is encoded and logged once."""
    return to_api_error(QueueFullError(message, retry_after))


class EarlyRefusal:
    """Decides from the first bytes of a request whether to refuse it.

    Args:
        registry: The served models; nothing is refused early unless there is exactly one.
        key: The application's API key, if it has one.
    """

    def __init__(self, registry: ModelRegistry, key: str | None = None) -> None:
        self.registry, self.key = registry, key
        self.admitted: set[Hashable] = set()
        """Connections whose request was let through and is not in the engine's queue yet."""

    def __call__(self, connection: Hashable, data: bytes) -> tuple[APIError, int] | None:
        """Return the error and the bytes of the body still to come, or None to ask the application.

        Requests that were let through count against the queue until `admitted` drops them, as a
        burst arrives before the application has seen the first of it.
        """
        entries = [*self.registry.entries.values()]
        head, separator, body = data.partition(b"\r\n\r\n")
        request_line, *lines = head.split(b"\r\n")
        if len(entries) != 1 or not separator or request_line != b"POST /v1/completions HTTP/1.1":
            return None
        fields = (line.partition(b":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        length = headers.get(b"content-length", b"")
        # Web pages of other origins need the CORS headers of the application's response.
        if (
            (self.key and not authorized(headers, self.key))
            or not (length.isdigit() and len(length) < 6)
            or b"origin" in headers
        ):
            return None
        try:
            entries[0].engine.check_capacity(1, len(self.admitted))
            self.admitted.add(connection)
        except QueueFullError as error:
            return _queue_full(str(error), error.retry_after), max(0, int(length) - len(body))
        except UnavailableError:
            pass  # the application says why
        return None


class EarlyRefusalProtocol(TimeoutProtocol):
    """A connection that refuses a request early, and closes once the rest of its body has come.

    If it closed before, the client might lose the response.
    """

    last_logged: APIError | None = None
    """Refusals of a burst are logged once; metrics count them all."""

    def __init__(self, *, early_refusal: EarlyRefusal, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.early_refusal = early_refusal
        self.unread = 0
        """Bytes of a refused request still to come."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the admitted request."""
        self._release()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Refuse a request early or pass the data on."""
        if self.transport.is_closing():
            return
        if self.unread:
            self.unread -= len(data)
            if self.unread <= 0:
                self.transport.close()
            return
        if self.conn.their_state is h11.IDLE and (refusal := self.early_refusal(self, data)):
            self._refuse_early(*refusal)
            return
        super().data_received(data)
        if self in self.early_refusal.admitted and self.scope:
            self.scope["state"]["early_admission_done"] = self._release

    def on_response_complete(self) -> None:
        """Forget the admitted request."""
        self._release()
        super().on_response_complete()

    def _refuse_early(self, error: APIError, unread: int) -> None:
        self.write_error(error, log=error is not EarlyRefusalProtocol.last_logged)
        EarlyRefusalProtocol.last_logged = error
        self.unread = unread
        if unread:
            self.deadline = self.loop.call_later(self.timeouts.body_timeout, self.transport.close)
        else:
            self.transport.close()

    def _release(self) -> None:
        self.early_refusal.admitted.discard(self)


def early_refusal_protocol(
    registry: ModelRegistry, key: str | None = None
) -> Callable[..., EarlyRefusalProtocol]:
    """Return the `protocol` of a `Server` that refuses requests early."""
    return functools.partial(EarlyRefusalProtocol, early_refusal=EarlyRefusal(registry, key))
