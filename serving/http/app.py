"""The FastAPI application: its routes, from request to response."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from serving.engine.async_engine import QueueFullError, UnavailableError
from serving.http import introspection, schemas
from serving.http.completions import CompletionStream, EventStreamResponse, encode_prompt
from serving.http.introspection import NearestRequest, NextTokenRequest, XrayRequest
from serving.http.limits import Limits
from serving.http.middleware import APIKeyMiddleware, BodySizeLimitMiddleware
from serving.http.protocol import (
    APIError,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    bad_request,
    invalid_field_error,
    json_response,
    to_api_error,
    to_json,
)
from serving.http.registry import ModelRegistry
from serving.http.runs import RunBrowser
from serving.http.static import page_routes
from serving.metrics import render_metrics
from serving.tokenization import PromptTokens

TOKENIZE_INLINE = 4096
"""Characters or token ids of prompts below which tokenizing takes no longer than passing it to a thread."""


def create_app(
    registry: ModelRegistry,
    limits: Limits | None = None,
    *,
    key: str | None = None,
    allowed_origins: Sequence[str] = (),
    runs: RunBrowser | None = None,
    all_metrics: Callable[[], Awaitable[bytes]] | None = None,
) -> FastAPI:
    """Return the application.

    Every route but `/health` and the page's files requires the API key `key`, if there is one. Other
    web pages may send requests if their origins are in `allowed_origins` (CORS). `all_metrics`
    returns what `/metrics` responds, if that is more than the metrics of this process.
    """
    limits, runs = limits or Limits(), runs or RunBrowser()

    async def handle_error(_: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            error = invalid_field_error(error.errors()[0])
        return to_api_error(error).response()

    # Every error gets OpenAI's shape, those of the frameworks too.
    errors = APIError, QueueFullError, UnavailableError, RequestValidationError, HTTPException
    app = FastAPI(
        title="tinygpt",
        description="OpenAI's completions API for trained runs, and what the web page needs. "
        f"Limits of a request:\n\n{limits.to_markdown()}",
        routes=page_routes(),
        exception_handlers=dict.fromkeys((*errors, Exception), handle_error),
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodySizeLimitMiddleware, max_body_bytes=limits.max_body_bytes)
    if key:
        app.add_middleware(APIKeyMiddleware, key=key)
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )

    on_model = schemas.errors(400, 404, 413, 503)
    on_engine = schemas.errors(400, 404, 413, 429, 503)

    @app.post(
        "/v1/completions",
        response_model=schemas.CompletionResponse,
        responses=schemas.STREAM | on_engine,
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Generate text after one or several prompts; with a translation model, translate them."""
        entry = registry.get(body.model)
        body.check_limits(limits)

        def encode() -> list[PromptTokens]:
            return [encode_prompt(entry, prompt, limits, body) for prompt in body.prompt]

        with bad_request("n" if body.n > 1 else "prompt"):
            entry.engine.check_capacity(len(body.prompt) * body.n)
        with bad_request("prompt"):
            # Megabytes of text would block the event loop, and so the other streams.
            is_short = sum(map(len, body.prompt)) < TOKENIZE_INLINE
            prompts = encode() if is_short else await asyncio.to_thread(encode)
            completion = CompletionStream(entry, body, prompts)
        if body.stream:
            return EventStreamResponse(completion)
        try:
            return await _respond_unless_disconnected(request, completion.response())
        finally:
            completion.close()

    @app.post("/v1/chat/completions", include_in_schema=False)
    async def create_chat_completion() -> Response:
        """Say what to use instead."""
        raise APIError(
            404,
            "there is no chat here: these are base models, which continue text and have no chat "
            "template; send the text as `prompt` to /v1/completions",
        )

    @app.post("/v1/next", response_model=schemas.NextTokenResponse, responses=on_engine)
    async def next_tokens(body: NextTokenRequest, request: Request) -> Response:
        """Return the likeliest next tokens, with the probabilities before and after all sampling parameters."""
        entry = registry.get(body.model)
        work = introspection.next_tokens_response(entry, body, limits)
        return await _respond_unless_disconnected(request, work)

    @app.post("/v1/xray", response_model=schemas.XrayResponse, responses=on_engine)
    async def xray(body: XrayRequest, request: Request) -> Response:
        """Return activation maps of the model on a text: attention, alignments, gates, experts."""
        entry = registry.get(body.model)
        work = introspection.xray_response(entry, body, limits)
        return await _respond_unless_disconnected(request, work)

    @app.post("/v1/nearest", response_model=schemas.NearestResponse, responses=on_engine)
    async def nearest(body: NearestRequest, request: Request) -> Response:
        """Return the tokens whose vectors in the model's embedding are most similar to that of a word."""
        work = introspection.nearest_response(registry.get(body.model), body)
        return await _respond_unless_disconnected(request, work)

    @app.get("/v1/runs", response_model=schemas.RunList, responses=schemas.errors())
    async def list_runs() -> Response:
        """List the runs in the runs folder with their latest metrics, the newest first."""
        return await _respond_in_thread(lambda: {"object": "list", "data": runs.summaries()})

    @app.get(
        "/v1/runs/{name:path}",
        response_model=schemas.RunDetails,
        responses=schemas.errors(400, 404),
    )
    async def get_run(name: str, after: Annotated[int, Query(ge=0)] = 0) -> Response:
        """Return a run's configuration and metrics; with `after` = the last response's `next`, only new ones."""

        def read_run() -> dict[str, Any]:
            if details := runs.details(name, after):
                return details
            raise APIError(404, f"no readable run {name[:80]!r}; /v1/runs lists the runs", "name")

        return await _respond_in_thread(read_run)

    @app.get("/v1/ladder", response_model=schemas.Ladder, responses=schemas.errors())
    async def get_ladder() -> Response:
        """Return every rung of the ladder, and the results of the newest ladder that was trained."""
        return await _respond_in_thread(runs.ladder)

    @app.get(
        "/tokenizer_info",
        response_model=schemas.TokenizerInfo,
        responses=schemas.errors(404, 503),
    )
    async def tokenizer_info(model: str | None = None) -> Response:
        """Return the names of the special tokens, as evaluation harnesses expect them: all of them EOS."""
        tokenizer = registry.get(model).tokenizer
        eos_name = tokenizer.token_name(tokenizer.eos_token)
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), eos_name)
        return json_response({**names, "vocab_size": tokenizer.vocab_size})

    @app.post("/tokenize", response_model=schemas.TokenizeResponse, responses=on_model)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Tokenize text; `<|endoftext|>` is the EOS token only if it is the whole text."""
        entry = registry.get(body.model)
        eos_token = entry.tokenizer.eos_token
        is_eos = body.prompt == entry.tokenizer.token_name(eos_token)
        with bad_request("prompt"):
            ids = await asyncio.to_thread(entry.tokenizer.encode, body.prompt)
        prepend_eos = body.add_special_tokens and not entry.is_translation
        ids = [eos_token] * prepend_eos + ([eos_token] if is_eos else ids)
        max_model_len = entry.max_model_len
        return json_response({"count": len(ids), "max_model_len": max_model_len, "tokens": ids})

    @app.post("/detokenize", response_model=schemas.DetokenizeResponse, responses=on_model)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Decode token ids."""
        with bad_request("tokens"):
            text = await asyncio.to_thread(registry.get(body.model).tokenizer.decode, body.tokens)
        return json_response({"prompt": text})

    @app.get("/v1/models", response_model=schemas.ModelList, responses=schemas.errors())
    async def list_models() -> Response:
        """List the served models: the values of the request field `model`."""
        models = [entry.describe() for entry in registry.entries.values()]
        return json_response({"object": "list", "data": models})

    @app.get(
        "/v1/models/{name}", response_model=schemas.ModelInfo, responses=schemas.errors(404, 503)
    )
    async def get_model(name: str) -> Response:
        """Return one served model."""
        return json_response(registry.get(name).describe())

    @app.get("/version", response_model=schemas.Version, responses=schemas.errors())
    async def get_version() -> Response:
        """Return the server's version, as vLLM does."""
        return json_response({"version": version("tinygpt")})

    @app.get("/health", response_model=schemas.Status, responses=schemas.UNAVAILABLE)
    async def health() -> Response:
        """Return 200 while every engine works; 503 means that the server should be restarted."""
        return _status_response(registry.is_healthy, "an engine has stalled or failed; see the log")

    @app.get(
        "/ready", response_model=schemas.Status, responses=schemas.errors() | schemas.UNAVAILABLE
    )
    async def ready() -> Response:
        """Return 200 while requests are accepted; 503 while loading and while shutting down."""
        ready = all(entry.engine.is_ready for entry in registry.entries.values())
        reason = registry.loading_message or "the server is shutting down"
        return _status_response(ready and not registry.loading_message, reason)

    @app.get("/metrics", response_class=Response, responses=schemas.errors() | schemas.METRICS)
    async def metrics() -> Response:
        """Return metrics in Prometheus' text format."""
        text = await all_metrics() if all_metrics else render_metrics()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _respond_in_thread(read: Callable[[], dict[str, Any]]) -> Response:
    """Read files and encode them in a thread: megabytes would block the event loop."""
    return json_response(await asyncio.to_thread(lambda: to_json(read())))


def _status_response(ok: bool, reason: str) -> Response:
    status = {"status": "ok"} if ok else {"status": "unavailable", "reason": reason}
    return json_response(status, 200 if ok else 503)


async def _respond_unless_disconnected(
    request: Request, work: Coroutine[Any, Any, bytes]
) -> Response:
    """Return the JSON that `work` makes, or cancel it; status 499, for the access log, after a disconnect."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return json_response(task.result()) if task.done() else Response(status_code=499)
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.wait({task, watch})
