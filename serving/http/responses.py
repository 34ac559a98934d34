"""JSON and server-sent-event responses whose work is cancelled when the client disconnects."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.http.completions import CompletionStream
from serving.http.protocol import APIError

Result = TypeVar("Result")


def json_response(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a response with a body that is JSON already."""
    return Response(body, status, headers, media_type="application/json")


def error_response(error: APIError) -> Response:
    """Return OpenAI's error object with the error's status and headers."""
    return json_response(error.body(), error.status, error.headers)


async def run_until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, Result]
) -> Result | None:
    """Return the result of `work`; cancel it and return None if the client disconnects first."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.wait({task, watch})


async def respond_unless_disconnected(
    request: Request, work: Coroutine[Any, Any, bytes]
) -> Response:
    """Return the JSON that `work` makes; status 499, for the access log, after a disconnect."""
    body = await run_until_disconnect(request.receive, work)
    return Response(status_code=499) if body is None else json_response(body)


class CompletionEventStream(StreamingResponse):
    """A completion as server-sent events; its sequences are aborted when the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, completion: CompletionStream, *, include_usage: bool) -> None:
        super().__init__(completion.events(include_usage), headers={"cache-control": "no-cache"})
        self.completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send events until the last one or a disconnect, which may precede the first."""
        try:
            await run_until_disconnect(receive, self.stream_response(send))
        finally:
            self.completion.close()
