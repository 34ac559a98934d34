"""The HTTP face: OpenAI's completions, streamed or not, from the runs that are served.

Nothing that a client sends is ignored: what is unknown or not built yet is refused by its
name. Every error has OpenAI's shape, {"error": {"message", "type", "param", "code"}}.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import secrets
import signal
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from types import FrameType
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator
from starlette.exceptions import HTTPException
from starlette.types import Send

from gpt.sampling import Sampling
from serving import engine
from serving.service import Service, UnavailableError
from serving.text import PromptTokens, Text, read_prompt
from tokenizer import Tokenizer

MAX_CHOICES = 128
"""Texts that one request may ask for: prompts times n."""

MAX_STOPS, MAX_STOP_LENGTH = 4, 256

GRACE = 5.0
"""Seconds that a stopping server gives slow clients to take what was already written for them."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Served:
    """A run behind the API, under the name that clients give as `model`."""

    name: str
    service: Service
    tokenizer: Tokenizer
    created: int


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> bytes:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return _json(
            {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
        )


# The request.


def _prompts(value: object) -> list[str] | list[list[int]]:
    """A list of texts or a list of ids, whichever of the four forms came."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, list) and all(type(i) is int for i in item) for item in value):
            return value
    raise ValueError("expected a text, a list of texts, token ids or a list of token ids")


def _stops(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("expected a text or a list of texts")
    if len(stops) > MAX_STOPS or not all(1 <= len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ValueError(
            f"expected at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters each"
        )
    return stops


def _not_built(value: object) -> None:
    if value is not False and value != {}:
        raise ValueError("not supported by this server yet: leave it out")


Prompt = str | list[str] | list[int] | list[list[int]]
NotBuilt = Annotated[None, PlainValidator(_not_built, json_schema_input_type=None)]


class Strict(BaseModel):
    """No unknown fields, no NaN, no text where a number belongs; null is the default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        if isinstance(value, dict):
            return {name: item for name, item in value.items() if item is not None}
        return value


class StreamOptions(Strict):
    """What a stream tells besides the text."""

    include_usage: bool = Field(False, description="end with a chunk that counts the tokens")


class Completion(Strict):
    """OpenAI's completion request, with top_k, min_p and repetition_penalty beside its own fields."""

    model: str | None = Field(None, description="a name from /v1/models; default: the first")
    prompt: Annotated[Any, PlainValidator(_prompts, json_schema_input_type=Prompt)] = Field(
        description="a text begins a document; ids are taken as they are"
    )
    max_tokens: int = Field(
        16, ge=1, le=2**31, description="a text also ends where the model's context is full"
    )
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = Field(None, description="the same seed gives the same text; default: random")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="texts for each prompt")
    stop: Annotated[Any, PlainValidator(_stops, json_schema_input_type=str | list[str])] = Field(
        (), description="the text ends before the first of these"
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="of no effect, as in OpenAI's API")
    logprobs: NotBuilt = None
    echo: NotBuilt = None
    best_of: NotBuilt = None
    suffix: NotBuilt = None
    logit_bias: NotBuilt = None

    @model_validator(mode="after")
    def _fits(self) -> "Completion":
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise ValueError(
                f"{len(self.prompt)} prompts with n = {self.n} are more than {MAX_CHOICES} texts"
            )
        if self.stream_options and not self.stream:
            raise ValueError("stream_options has no meaning without stream: true")
        self.sampling(0)
        return self

    def sampling(self, seed: int) -> Sampling:
        """Its sampling parameters; `seed` where it has none."""
        names = [field.name for field in dataclasses.fields(Sampling) if field.name != "seed"]
        values = {name: getattr(self, name) for name in names}
        return Sampling(**values, seed=seed if self.seed is None else self.seed)


# The answer.


@dataclasses.dataclass
class Choice:
    """One of the texts that a request asked for, as far as it has come."""

    index: int
    text: Text
    tokens: int = 0
    finish: str | None = None


class Answer:
    """The texts for one completion request."""

    def __init__(
        self, served: Served, completion: Completion, prompts: Sequence[PromptTokens]
    ) -> None:
        self.served = served
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self.choices: dict[engine.Request, Choice] = {}
        end = {served.tokenizer.end_of_text}
        for ids, space, first in prompts:
            # Drawn for each prompt: the same prompt twice without a seed is two different texts.
            sampling = completion.sampling(secrets.randbits(63))
            for number in range(completion.n):
                request = engine.Request(ids, completion.max_tokens, sampling, end, number, first)
                text = Text(served.tokenizer, completion.stop, space)
                self.choices[request] = Choice(len(self.choices), text)
        served.service.check(list(self.choices))
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }

    @property
    def usage(self) -> dict[str, int]:
        """Tokens that the model read and made, end-of-text in front of a prompt counted, at the end not."""
        made = sum(choice.tokens for choice in self.choices.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    async def parts(self) -> AsyncGenerator[list[tuple[Choice, str]]]:
        """New text of the choices that have some or that end, as often as there is news."""
        service = self.served.service
        async with service.submit(list(self.choices)) as inbox:
            async for events in inbox:
                news: dict[int, tuple[Choice, str]] = {}
                for event in events:
                    choice = self.choices[event.request]
                    if choice.finish:  # by a stop string, while the engine went on
                        continue
                    if event.finish == "error":
                        if not service.ready:
                            raise UnavailableError(event.error)
                        logger.error("a request has failed: %s", event.error)
                        raise ApiError(500, "the model failed on this request")
                    delta = self._read(choice, event)
                    if choice.text.stopped:
                        service.cancel(event.request)
                    if delta or choice.finish:
                        before = news[choice.index][1] if choice.index in news else ""
                        news[choice.index] = choice, before + delta
                yield list(news.values())

    def _read(self, choice: Choice, event: engine.Event) -> str:
        delta = ""
        if event.token is not None:
            choice.tokens += 1
            delta = choice.text.push(event.token)
        if event.finish:
            delta += choice.text.flush()
        choice.finish = "stop" if choice.text.stopped else event.finish
        return delta

    async def whole(self) -> bytes:
        """The answer that is not streamed."""
        texts = [""] * len(self.choices)
        async with contextlib.aclosing(self.parts()) as parts:
            async for news in parts:
                for choice, delta in news:
                    texts[choice.index] += delta
        choices = [
            {
                "index": choice.index,
                "text": texts[choice.index],
                "logprobs": None,
                "finish_reason": choice.finish,
            }
            for choice in self.choices.values()
        ]
        return _json({**self.head, "choices": choices, "usage": self.usage})

    async def stream(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events. A fault is an event too, and the stream ends as it should."""
        # All that the chunks have in common is written once.
        head = b"data: " + _json(self.head)[:-1] + b',"choices":'
        end = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        chunk = head + b'[{"index":%d,"text":%b,"logprobs":null,"finish_reason":%b}]' + end
        try:
            async with contextlib.aclosing(self.parts()) as parts:
                async for news in parts:
                    if news:
                        yield b"".join(
                            chunk % (choice.index, _json(delta), _json(choice.finish))
                            for choice, delta in news
                        )
            if include_usage:
                yield head + b'[],"usage":' + _json(self.usage) + b"}\n\n"
        except (ApiError, UnavailableError) as error:
            yield b"data: " + _api_error(error).body() + b"\n\n"
        yield b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; what makes them is closed as soon as the client is gone."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        """Starlette cancels this when the client leaves, maybe while the generator is at rest."""
        async with contextlib.aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


async def _unless_left(request: Request, work: Coroutine[Any, Any, bytes]) -> Response:
    """The result of `work`, which is cancelled if the client leaves first: 499, for the log."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return _response(task.result()) if task.done() else Response(status_code=499)
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.wait({task, watch})


# The routes.


def create_app(models: Sequence[Served]) -> FastAPI:
    """The application; it starts the services and closes them."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for served in models:
            await served.service.start()
        yield
        for served in models:
            await served.service.close()

    by_name = {served.name: served for served in models}
    app = FastAPI(title="tinygpt", lifespan=lifespan)
    _shape_errors(app)

    def find(name: str | None) -> Served:
        if name is None:
            return models[0]
        if name not in by_name:
            known = ", ".join(by_name)
            raise ApiError(
                404, f"no model {name[:80]!r} here; there is {known}", "model", "model_not_found"
            )
        return by_name[name]

    @app.post("/v1/completions", response_class=Response)
    async def completions(completion: Completion, request: Request) -> Response:
        """Continue a text, or several."""
        served = find(completion.model)
        try:
            prompts = [
                # In a thread: a text of megabytes would hold up the other streams.
                await asyncio.to_thread(read_prompt, served.tokenizer, prompt)
                if isinstance(prompt, str)
                else PromptTokens(prompt)
                for prompt in completion.prompt
            ]
            answer = Answer(served, completion, prompts)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from error
        if not completion.stream:
            return await _unless_left(request, answer.whole())
        options = completion.stream_options
        return EventStream(
            answer.stream(include_usage=options is not None and options.include_usage),
            headers={"cache-control": "no-cache"},
        )

    def describe(served: Served) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "tinygpt",
        }

    @app.get("/v1/models", response_class=Response)
    async def list_models() -> Response:
        """The names that `model` may be."""
        return _response(_json({"object": "list", "data": [describe(s) for s in models]}))

    @app.get("/v1/models/{name}", response_class=Response)
    async def one_model(name: str) -> Response:
        """One of them."""
        return _response(_json(describe(find(name))))

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while every model takes requests, else 503."""
        ready = all(served.service.ready for served in models)
        return _response(_json({"status": "ok" if ready else "unavailable"}), 200 if ready else 503)

    return app


def _shape_errors(app: FastAPI) -> None:
    """Give every error OpenAI's shape, also those of the framework."""

    async def any_error(_: Request, error: Exception) -> Response:
        shaped = _api_error(error)
        headers = error.headers if isinstance(error, HTTPException) else None
        return _response(shaped.body(), shaped.status, headers)

    for kind in (ApiError, UnavailableError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, any_error)


def _api_error(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case UnavailableError():
            return ApiError(503, str(error))
        case RequestValidationError():
            return _wrong_field(error.errors()[0])
        case HTTPException(status_code=404 | 405):
            return ApiError(error.status_code, f"{error.detail}: /docs lists the routes")
        case HTTPException():
            return ApiError(error.status_code, error.detail)
    return ApiError(500, "an error in the server; its log says more")


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


def _json(value: object) -> bytes:
    # A lone surrogate can only come back in a complaint about it.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _response(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


# The server.


class Server(uvicorn.Server):
    """uvicorn, ended by SIGTERM or Ctrl-C with open streams brought to their end first."""

    def __init__(self, models: Sequence[Served], ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            create_app(models),
            log_config=None,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=round(GRACE),
        )
        super().__init__(config)
        self.models, self.ready = models, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so once clients can connect."""
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the texts before uvicorn waits for the answers that wait for them."""
        for served in self.models:
            await served.service.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Leave with exit code 0: a server that was told to stop has done what it was told."""
        # SIGTERM may well come twice: make hands on what the terminal or a supervisor sent to both.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
