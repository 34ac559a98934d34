"""The HTTP face: OpenAI's completions, streamed or not, from the runs that are served; what the page asks.

Every error has OpenAI's shape, {"error": {"message", "type", "param", "code"}}.
"""

import asyncio
import functools
import hmac
import logging
from collections.abc import Coroutine, Hashable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt import CHAPTERS
from gpt.summary import count_parameters
from serving.engine.async_engine import QueueFullError, UnavailableError
from serving.http.completions import (
    ApiError,
    CompletionRequest,
    CompletionStream,
    ModelEntry,
    StrictModel,
    api_error,
    encode_prompts,
    to_json,
)
from serving.http.introspection import (
    NextTokenRequest,
    XrayRequest,
    next_tokens_response,
    xray_response,
)
from serving.http.limits import Limits
from serving.http.runs import RunBrowser
from serving.http.static import is_page, page_routes
from serving.metrics import exposition
from tokenizer import END_OF_TEXT

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

SHORT = 4096
"""Characters or ids of prompts below which to read them takes no longer than to ask a thread to."""


class ModelRegistry:
    """The runs that are served, by name; the first is the default. More may come while it serves."""

    def __init__(self) -> None:
        self.entries: dict[str, ModelEntry] = {}
        self.missing = "the server is loading its models"
        """Why there are not all yet; empty when there are."""

    async def add(self, served: ModelEntry) -> None:
        """Serve one more, from now on."""
        await served.engine.start()
        self.entries[served.name] = served

    def find(self, name: str | None) -> ModelEntry:
        """The one of that name; an ApiError if there is none."""
        if name is None and self.entries:
            return next(iter(self.entries.values()))
        if name in self.entries:
            return self.entries[name]
        if self.missing:
            raise UnavailableError(self.missing)
        known = ", ".join(self.entries)
        raise ApiError(
            404,
            f"no model {(name or '')[:80]!r} here; there is {known}",
            "model",
            "model_not_found",
        )

    @property
    def ready(self) -> bool:
        """True when all are there and take requests."""
        return not self.missing and all(s.engine.is_ready for s in self.entries.values())

    @property
    def healthy(self) -> bool:
        """True while no engine hangs or has failed."""
        return not any(s.engine.is_stalled or s.engine.has_failed for s in self.entries.values())


class TokenizeRequest(StrictModel):
    """A text to be made tokens."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = Field(True, description="begin with end-of-text, as a prompt does")


class DetokenizeRequest(StrictModel):
    """Tokens to be made a text."""

    model: str | None = None
    tokens: list[int]


class EventStream(StreamingResponse):
    """An answer as server-sent events; it is closed as soon as the client is gone."""

    media_type = "text/event-stream"

    def __init__(self, answer: CompletionStream, *, include_usage: bool) -> None:
        super().__init__(answer.stream(include_usage), headers={"cache-control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send events until there are no more or the client leaves, maybe before the first."""
        try:
            await _until_left(receive, self.stream_response(send))
        finally:
            self.answer.close()


async def _until_left(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`, which is cancelled if the client leaves first: None then."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.wait({task, watch})


async def _unless_left(request: Request, work: Coroutine[Any, Any, bytes]) -> Response:
    """The result of `work`; 499, for the log, if the client leaves first."""
    found = await _until_left(request.receive, work)
    return Response(status_code=499) if found is None else _response(found)


class APIKeyMiddleware:
    """Lets through who says the key, and anybody to `/health` and the page, which asks for the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, _bearer(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 to the others."""
        free = scope["type"] != "http" or scope["path"] == "/health" or is_page(scope["path"])
        if not free:
            given = dict(scope["headers"]).get(b"authorization", b"")
            # In constant time: how long it takes tells nothing about the key.
            if not hmac.compare_digest(given, self.key):
                error = ApiError(
                    401,
                    "expected the server's key: Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await _refusal(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodySizeLimitMiddleware:
    """Refuses what is too large, with 413: at once where its size is said, else as it comes."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most
        self.refusal = f"the body is larger than {most:,} bytes, which is all this server takes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count as it comes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if int(said) > self.most:  # the protocol has seen that it is a number
            error = ApiError(413, self.refusal, headers={"connection": "close"})
            await _refusal(error)(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most:
                raise HTTPException(413, self.refusal, {"connection": "close"})
            return message

        await self.app(scope, counted, send)


class EarlyRefusal:
    """Refuses texts for which there is no place before the application is asked, which takes far longer.

    Args:
        catalog: What is served.
        key: What the application asks for, if anything.
    """

    def __init__(self, catalog: ModelRegistry, key: str | None = None) -> None:
        self.catalog, self.key = catalog, _bearer(key)
        self.coming: set[Hashable] = set()
        """Whose requests were let in, until the application has given them a place, or anything else."""

    def __call__(self, client: Hashable, data: bytes) -> tuple[ApiError, int] | None:
        """The refusal of a request that begins so, and how much of it is still to come.

        None where the application must look. A crowd is let in before it has looked at the first.
        """
        served = [*self.catalog.entries.values()]
        head, ended, body = data.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        if len(served) != 1 or not ended or first != b"POST /v1/completions HTTP/1.1":
            return None
        parts = (line.partition(b":") for line in lines)
        fields = {name.lower(): value.strip() for name, _, value in parts}
        length = fields.get(b"content-length", b"")
        known = not self.key or hmac.compare_digest(fields.get(b"authorization", b""), self.key)
        # A page from elsewhere must be told that it may read the answer.
        if not (known and length.isdigit() and len(length) < 6) or b"origin" in fields:
            return None
        try:
            served[0].engine.check_capacity(1, len(self.coming))
            self.coming.add(client)
        except QueueFullError as error:
            return _shaped(error), max(0, int(length) - len(body))
        except UnavailableError:
            pass  # why, the application says
        return None


def _bearer(key: str | None) -> bytes:
    return f"Bearer {key}".encode() if key else b""


def create_app(
    catalog: ModelRegistry,
    limits: Limits | None = None,
    *,
    key: str | None = None,
    origins: Sequence[str] = (),
    runs: RunBrowser | None = None,
) -> FastAPI:
    """The application.

    Args:
        catalog: What is served.
        limits: Of a request.
        key: What every route but `/health` and the page's files asks for.
        origins: Web pages of these addresses may ask too.
        runs: Those whose curves are told.
    """
    limits, runs = limits or Limits(), runs or RunBrowser()
    about = f"Texts from trained runs, as OpenAI's API has it. Limits:\n\n{limits.described()}"
    app = FastAPI(
        title="tinygpt", description=about, routes=page_routes(), docs_url=None, redoc_url=None
    )
    _shape_errors(app)
    app.add_middleware(BodySizeLimitMiddleware, most=limits.max_body_bytes)
    if key:
        app.add_middleware(APIKeyMiddleware, key=key)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )

    @app.post("/v1/completions", response_class=Response)
    async def completions(completion: CompletionRequest, request: Request) -> Response:
        """Continue a text, or several; with a translator, translate."""
        served = catalog.find(completion.model)
        completion.check(limits)
        try:
            served.engine.check_capacity(len(completion.prompt) * completion.n)
            # A text of megabytes would hold up the other streams.
            if sum(map(len, completion.prompt)) < SHORT:
                prompts = encode_prompts(served, completion, limits)
            else:
                prompts = await asyncio.to_thread(encode_prompts, served, completion, limits)
            answer = CompletionStream(served, completion, prompts)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from error
        finally:
            if looked_at := getattr(request.state, "looked_at", None):
                looked_at()
        if completion.stream:
            options = completion.stream_options
            usage = options is not None and options.include_usage
            return EventStream(answer, include_usage=usage)
        try:
            return await _unless_left(request, answer.whole())
        finally:
            answer.close()

    @app.post("/v1/next", response_class=Response)
    async def what_follows(asked: NextTokenRequest, request: Request) -> Response:
        """The likeliest next tokens, by the model alone and after all that sampling does."""
        return await _unless_left(
            request, next_tokens_response(catalog.find(asked.model), asked, limits)
        )

    @app.post("/v1/xray", response_class=Response)
    async def xray(asked: XrayRequest, request: Request) -> Response:
        """What the model listens to in a text: maps of attention, alignments, gates, experts."""
        return await _unless_left(request, xray_response(catalog.find(asked.model), asked, limits))

    @app.get("/v1/runs", response_class=Response)
    async def list_runs() -> Response:
        """The runs in the folder, the newest first, as far as they have come."""
        return await asyncio.to_thread(
            lambda: _response(to_json({"object": "list", "data": runs.overview()}))
        )

    @app.get("/v1/runs/{name:path}", response_class=Response)
    async def one_run(name: str, after: Annotated[int, Query(ge=0)] = 0) -> Response:
        """A run's configuration and its metrics; with `after`, the `next` of an answer, what is new since."""

        def told() -> Response:
            found = runs.one(name, after)
            if found is None:
                message = f"no run {name[:80]!r} that can be read; /v1/runs lists those there are"
                raise ApiError(404, message, "name")
            return _response(to_json(found))

        return await asyncio.to_thread(told)

    @app.get("/v1/ladder", response_class=Response)
    async def ladder() -> Response:
        """Every rung, and the rows of the newest ladder that was trained."""
        return await asyncio.to_thread(lambda: _response(to_json(runs.ladder())))

    @app.get("/tokenizer_info", response_class=Response)
    async def tokenizer_info(model: str | None = None) -> Response:
        """The special tokens, as evaluation harnesses ask for them: there is one."""
        vocabulary = catalog.find(model).tokenizer.vocab_size
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
        return _response(to_json({**names, "vocab_size": vocabulary}))

    @app.post("/tokenize", response_class=Response)
    async def tokenize(body: TokenizeRequest) -> Response:
        """The tokens of a text; `<|endoftext|>` means its token where it stands alone."""
        served = catalog.find(body.model)
        end = served.tokenizer.eos_token
        try:
            ids = await asyncio.to_thread(served.tokenizer.encode, body.prompt)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from error
        begins = body.add_special_tokens and not served.is_translation
        ids = [end] * begins + ([end] if body.prompt == END_OF_TEXT else ids)
        length = served.engine.engine.max_model_len
        return _response(to_json({"count": len(ids), "max_model_len": length, "tokens": ids}))

    @app.post("/detokenize", response_class=Response)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        served = catalog.find(body.model)
        try:
            text = await asyncio.to_thread(served.tokenizer.decode, body.tokens)
        except ValueError as error:
            raise ApiError(400, str(error), "tokens") from error
        return _response(to_json({"prompt": text}))

    def describe(served: ModelEntry) -> dict[str, Any]:
        model = served.engine.engine.model
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "tinygpt",
            "max_model_len": served.engine.engine.max_model_len,
            "rung": next(name for name, kind in CHAPTERS.items() if kind is type(model)),
            "chapter": model.chapter,
            "year": model.year,
            "paper": model.paper,
            "idea": model.idea,
            "parameters": served.num_parameters or count_parameters(model),
            "vocab_size": model.vocab_size,
            "eos_token_id": served.tokenizer.eos_token,
            "dtype": served.dtype,
            "translates": served.is_translation,
            "bits_per_byte": served.bits_per_byte,
            "run": served.run,
        }

    @app.get("/v1/models", response_class=Response)
    async def list_models() -> Response:
        """The names that `model` may be."""
        models = [describe(served) for served in catalog.entries.values()]
        return _response(to_json({"object": "list", "data": models}))

    @app.get("/v1/models/{name}", response_class=Response)
    async def one_model(name: str) -> Response:
        """One of them."""
        return _response(to_json(describe(catalog.find(name))))

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while every engine works, else 503: then the server should be started again."""
        return _status(catalog.healthy, "an engine hangs or has failed: the log says more")

    @app.get("/ready", response_class=Response)
    async def ready() -> Response:
        """200 while requests are taken; 503 while loading and while shutting down."""
        return _status(catalog.ready, catalog.missing or "the server is shutting down")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """What has happened, for Prometheus."""
        return Response(exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _status(good: bool, why: str) -> Response:
    body = {"status": "ok"} if good else {"status": "unavailable", "reason": why}
    return _response(to_json(body), 200 if good else 503)


def _shape_errors(app: FastAPI) -> None:
    """Give every error OpenAI's shape, also those of the framework."""

    async def any_error(_: Request, error: Exception) -> Response:
        return _refusal(_shaped(error))

    for kind in (
        ApiError,
        QueueFullError,
        UnavailableError,
        RequestValidationError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, any_error)


def _shaped(error: Exception) -> ApiError:
    match error:
        case ApiError() | UnavailableError():
            return api_error(error)
        case QueueFullError():
            return _busy(str(error), error.retry_after)
        case RequestValidationError():
            return _wrong_field(error.errors()[0])
        case HTTPException(status_code=404 | 405):
            message = f"{error.detail}: /docs lists the routes"
            return ApiError(error.status_code, message, headers=dict(error.headers or {}))
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=dict(error.headers or {}))
    return ApiError(500, "an error in the server; its log says more")


@functools.lru_cache(maxsize=1)
def _busy(message: str, seconds: int) -> ApiError:
    """The same for all of a crowd."""
    return ApiError(429, message, headers={"retry-after": str(seconds)})


def _wrong_field(error: Mapping[str, Any]) -> ApiError:
    """One of pydantic's errors, without the input that it came from: that may be megabytes."""
    place = [str(part)[:80] for part in error["loc"][1:]]
    reason = str(error["msg"]).removeprefix("Value error, ")[:500]
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {error['ctx']['error']} at {place[0]}")
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {'.'.join(place)!r}", ".".join(place))
    if not place:
        if error["type"] in ("missing", "model_attributes_type", "model_type"):
            reason = "expected a JSON object, sent with Content-Type: application/json"
        return ApiError(400, reason)
    return ApiError(400, f"{'.'.join(place)}: {reason}", place[0])


def _refusal(error: ApiError) -> Response:
    return _response(error.body(), error.status, error.headers)


def _response(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")
