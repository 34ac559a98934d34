"""One completion: what a client may ask for, and the answer as its tokens come.

Nothing that a client sends is ignored: what is unknown, or cannot be, is refused by its name.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import random
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from gpt.kernels.quantization import DType
from gpt.sampling import SamplingParams
from serving.engine.async_engine import AsyncEngine, UnavailableError
from serving.engine.logprobs import TokenLogprobs
from serving.engine.sequence import Request, SequenceOutput
from serving.http.limits import Limits
from serving.tokenization import (
    IncrementalDetokenizer,
    PromptTokens,
    token_text,
    tokenize_prompt,
    tokenize_source,
)
from tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SERVER, NUMBERS = secrets.token_hex(8), itertools.count(1)
"""An answer's name: the system's own random numbers can take half a millisecond."""
MAX_PROMPT_TOKENS = 65_536
"""Tokens of a prompt for a model whose context has no end."""


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A run behind the API, under the name that clients give as `model`."""

    name: str
    engine: AsyncEngine
    tokenizer: Tokenizer
    created: int
    is_translation: bool = False
    """Whether a prompt is a source sentence."""
    dtype: DType = "float32"
    """What its model computes with."""
    num_parameters: int | None = None
    """Numbers that training moved, where its model does not say: rounded to 8 bits they are counted no more."""
    bits_per_byte: float | None = None
    """The run's own final score."""
    run: str | None = None
    """Its name in the runs folder, where it is there."""

    @property
    def decoder_start_token(self) -> int | None:
        """The token after which a translation is written; None for models that write on."""
        return self.tokenizer.eos_token if self.is_translation else None


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> bytes:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = kinds.get(self.status, kind)
        return to_json(
            {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
        )


_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def to_json(value: object) -> bytes:
    """JSON without a needless byte."""
    # A lone surrogate can only come back in a complaint about it.
    return _encoder.encode(value).encode(errors="replace")


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
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("expected a text or a list of texts, none of them empty")
    return stops


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise ValueError("expected an object of token ids and numbers between -100 and 100")
    found = []
    for token, bias in value.items():
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (isinstance(token, str) and token.isascii() and token.isdecimal() and number):
            raise ValueError("expected token ids, each with a number between -100 and 100")
        found.append((int(token[:12]), float(bias)))
    return tuple(found)


Prompt = str | list[str] | list[int] | list[list[int]]


class StrictModel(BaseModel):
    """No unknown fields, no NaN, no text where a number belongs; null is the default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        if isinstance(value, dict):
            return {name: item for name, item in value.items() if item is not None}
        return value


class SamplingFields(StrictModel):
    """How tokens are chosen."""

    temperature: float = Field(
        1.0, description="divides the logits, 0 to 100; 0 always takes the likeliest token"
    )
    top_p: float = Field(
        1.0,
        description="0 to 1: only the fewest likely tokens that reach this probability together",
    )
    top_k: int = Field(0, description="only so many of the likeliest tokens; 0: all")
    min_p: float = Field(
        0.0, description="0 to 1: only tokens at least this share as likely as the likeliest"
    )
    repetition_penalty: float = Field(
        1.0, description="0.01 to 100: above 1, tokens of prompt and text become less likely"
    )
    presence_penalty: float = Field(
        0.0, description="-2 to 2: taken from the logits of tokens that are in the text"
    )
    frequency_penalty: float = Field(
        0.0, description="-2 to 2: the same, once for each time that they are there"
    )
    logit_bias: Annotated[Any, PlainValidator(_biases, json_schema_input_type=dict[str, float])] = (
        Field((), description="token ids, and what is added to their logits: -100 to 100")
    )

    @model_validator(mode="after")
    def _draws(self) -> Self:
        self.sampling(0)
        return self

    def sampling(self, seed: int) -> SamplingParams:
        """Its sampling parameters."""
        names = [field.name for field in dataclasses.fields(SamplingParams) if field.name != "seed"]
        return SamplingParams(**{name: getattr(self, name) for name in names}, seed=seed)


class StreamOptions(StrictModel):
    """What a stream tells besides the text."""

    include_usage: bool = Field(False, description="end with a chunk that counts the tokens")


class CompletionRequest(SamplingFields):
    """OpenAI's completion request, with top_k, min_p, repetition_penalty and beams beside its own fields."""

    model: str | None = Field(None, description="a name from /v1/models; default: the first")
    prompt: Annotated[Any, PlainValidator(_prompts, json_schema_input_type=Prompt)] = Field(
        description="a text begins a document, or is what a translator translates; ids are taken as they are"
    )
    max_tokens: int = Field(
        16, ge=0, description="a text also ends where the model's context is full"
    )
    seed: int | None = Field(None, description="the same seed gives the same text; default: random")
    n: int = Field(1, ge=1, description="texts for each prompt")
    best_of: int | None = Field(None, description="nothing but n")
    num_beams: int = Field(
        1, ge=1, description="of a translator: search among so many; greedy if 1"
    )
    stop: Annotated[Any, PlainValidator(_stops, json_schema_input_type=str | list[str])] = Field(
        (), description="the text ends before the first of these"
    )
    logprobs: int | None = Field(None, ge=0, description="so many of the likeliest tokens, too")
    echo: bool = Field(False, description="begin with the prompt")
    return_token_ids: bool = Field(False, description="tell the tokens of text and prompt, too")
    stream: bool = Field(False, description="tell the text as it is made, as server-sent events")
    stream_options: StreamOptions | None = Field(None, description="only with `stream`")
    user: str | None = Field(None, description="of no effect, as in OpenAI's API")
    suffix: str | None = Field(None, description="refused: a model that writes on cannot fill in")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options has no meaning without stream: true")
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of must be n, {self.n}, or left out, not {self.best_of}")
        if self.suffix:
            raise ValueError("suffix is not possible: these models only write on; leave it out")
        return self

    def sampling(self, seed: int) -> SamplingParams:
        """Its sampling parameters; `seed` where it has none."""
        sampling = super().sampling(seed if self.seed is None else self.seed)
        if self.num_beams > 1 and "temperature" not in self.model_fields_set:
            return dataclasses.replace(sampling, temperature=0.0)  # a search draws nothing
        return sampling

    def check(self, limits: Limits) -> None:
        """An ApiError says which limit it does not keep."""
        for name, asked, most in (
            ("max_tokens", self.max_tokens, limits.max_tokens),
            ("n", len(self.prompt) * self.n, limits.max_sequences),
            ("stop", len(self.stop), limits.max_stop_strings),
            ("stop", max(map(len, self.stop), default=0), limits.max_stop_length),
            ("logprobs", self.logprobs or 0, limits.max_logprobs),
            ("num_beams", self.num_beams, limits.max_num_beams),
        ):
            if asked > most:
                what = {
                    "n": f"{len(self.prompt)} prompts with n = {self.n} are {asked} texts",
                    "stop": f"{asked} stop strings or characters of one",
                }.get(name, f"{name} = {asked}")
                raise ApiError(400, f"{what}: this server allows {most}", name)


# The answer.


class Token(dict[str, Any]):
    """A token with its logprobs, as OpenAI's four lists have it; and its id, None where it ended the text."""


@dataclasses.dataclass
class Choice:
    """One of the texts that a request asked for, as far as it has come."""

    index: int
    text: IncrementalDetokenizer
    prompt: PromptTokens
    before: str
    """What is echoed in front of the text."""
    begun: bool = False
    tokens: int = 0
    finish_reason: str | None = None
    waiting: list[Token] = dataclasses.field(default_factory=list)
    """Tokens whose text is not certain yet."""


@dataclasses.dataclass
class ChoiceDelta:
    """What one chunk tells of one choice."""

    choice: Choice
    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    begins: bool = False
    """Whether it is the first of that choice."""

    @property
    def ids(self) -> list[int]:
        """Of the tokens."""
        return [token["id"] for token in self.tokens if token["id"] is not None]

    def to_json(self, logprobs: bool, ids: bool) -> bytes:
        """One of the `choices` of a chunk or an answer."""
        more = b',"token_ids":' + to_json(self.ids) if ids else b""
        if ids and self.begins:
            more += b',"prompt_token_ids":' + to_json(self.choice.prompt.ids)
        return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b}' % (
            self.choice.index,
            to_json(self.text),
            to_json(_lists(self.tokens)) if logprobs else b"null",
            to_json(self.choice.finish_reason),
            more,
        )


def _lists(tokens: Sequence[Token]) -> dict[str, list[Any]]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [token[name] for token in tokens] for name in names}


class CompletionStream:
    """The texts for one completion request, which are made from now on until `close`.

    What `Service.admit` raises says why there are none.
    """

    def __init__(
        self, served: ModelEntry, completion: CompletionRequest, prompts: Sequence[PromptTokens]
    ) -> None:
        self.served, self.completion = served, completion
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self.choices: dict[tuple[Request, int], Choice] = {}
        self.requests: list[Request] = []
        self.told = completion.logprobs is not None, completion.return_token_ids
        """Whether logprobs are told, and whether ids are."""
        end = served.tokenizer.eos_token
        for prompt in prompts:
            # Drawn for each prompt: the same prompt twice without a seed is two different texts.
            request = Request(
                prompt.ids,
                completion.max_tokens,
                completion.sampling(random.getrandbits(63)),
                {end},
                completion.n,
                prompt.allowed_first_tokens,
                decoder_start_token=served.decoder_start_token,
                num_beams=completion.num_beams,
                logprobs=completion.logprobs,
                prompt_logprobs=completion.echo and completion.logprobs is not None,
            )
            self.requests.append(request)
            for number in range(completion.n):
                text = IncrementalDetokenizer(served.tokenizer, completion.stop, prompt.space)
                before = prompt.text if completion.echo else ""
                choice = Choice(len(self.choices), text, prompt, before)
                self.choices[request, number] = choice
        self.inbox = served.engine.add_requests(self.requests)
        self.head = {
            "id": f"cmpl-{SERVER}-{next(NUMBERS)}",
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

    def close(self) -> None:
        """Give up what has not ended."""
        self.served.engine.abort_stream(self.inbox)

    async def parts(self) -> AsyncGenerator[list[ChoiceDelta]]:
        """What is new about the choices, as often as there is news."""
        service = self.served.engine
        scores: dict[Request, Sequence[TokenLogprobs]] = {}
        async for events in self.inbox:
            news: dict[int, ChoiceDelta] = {}
            failed: SequenceOutput | None = None
            for event in events:
                choice = self.choices[event.request, event.choice]
                if choice.finish_reason:  # by a stop string, while the engine went on
                    continue
                if event.finish_reason == "error":
                    failed = event
                    break
                if event.choice == 0 and not choice.begun:
                    scores[event.request] = event.prompt_logprobs
                part = news.setdefault(choice.index, ChoiceDelta(choice))
                self._read(part, event, scores.get(event.request, ()))
                if choice.text.stopped:
                    service.abort(event.request, event.choice)
            ids = self.completion.return_token_ids
            yield [
                part
                for part in news.values()
                if part.text or part.tokens or part.choice.finish_reason or (ids and part.begins)
            ]
            if failed and not service.is_ready:
                raise UnavailableError(failed.error)
            if failed:
                logger.error("a request has failed: %s", failed.error)
                raise ApiError(500, "the model failed on this request")

    def _read(
        self, news: ChoiceDelta, event: SequenceOutput, scores: Sequence[TokenLogprobs]
    ) -> None:
        """Add what an event tells to what is new about its choice."""
        choice = news.choice
        if not choice.begun:
            choice.begun = news.begins = True
            news.text += choice.before
            if self.completion.echo and any(self.told):
                news.tokens += self._prompt_tokens(choice.prompt, scores)
        seen = choice.text.seen
        if event.token is not None:
            choice.tokens += 1
            news.text += choice.text.push(event.token)
        token = event.logprobs.token if event.logprobs else event.token
        if token is not None and any(self.told):
            place = len(choice.before) + seen, len(choice.before) + choice.text.seen
            ends = event.token is None
            choice.waiting.append(self._token(token, event.logprobs, place, ends=ends))
        if event.finish_reason:
            news.text += choice.text.flush()
        choice.finish_reason = "stop" if choice.text.stopped else event.finish_reason
        sure = len(choice.before) + choice.text.sure
        whole = bool(choice.finish_reason) and not choice.text.stopped
        while choice.waiting and (whole or choice.waiting[0]["text_offset"] < sure):
            news.tokens.append(choice.waiting.pop(0))

    def _prompt_tokens(self, prompt: PromptTokens, scores: Sequence[TokenLogprobs]) -> list[Token]:
        """The tokens of the prompt; the very first was predicted by nothing, and all where there are no scores."""
        found, stream, seen = [], self.served.tokenizer.stream(), 0
        for token, score in itertools.zip_longest(prompt.ids, (None, *scores)):
            end = seen + len(stream.push(token))
            found.append(self._token(token, score, (seen, end)))
            seen = end
        return found[1:] if prompt.begins else found

    def _token(
        self, token: int, score: TokenLogprobs | None, place: tuple[int, int], *, ends: bool = False
    ) -> Token:
        """How likely a token and its rivals were, in words; `place` is the text's length before it and after.

        One that ends the text is no part of it.
        """
        tokenizer = self.served.tokenizer
        text, (before, after) = token_text(tokenizer, token), place
        # A token that is text stands at the end, behind what it shows of the bytes before it.
        whole = tokenizer.token_bytes(token) == text.encode()
        likeliest = None
        if score:
            likeliest = {token_text(tokenizer, one): logprob for one, logprob in score.top_logprobs}
        return Token(
            id=None if ends else token,
            tokens=text,
            token_logprobs=score.logprob if score else None,
            top_logprobs=likeliest,
            text_offset=max(0, after - len(text)) if whole else before,
        )

    async def whole(self) -> bytes:
        """The answer that is not streamed."""
        all_news = [ChoiceDelta(choice, begins=True) for choice in self.choices.values()]
        async with contextlib.aclosing(self.parts()) as parts:
            async for some in parts:
                for news in some:
                    all_news[news.choice.index].text += news.text
                    all_news[news.choice.index].tokens += news.tokens
        choices = b",".join(news.to_json(*self.told) for news in all_news)
        head, usage = to_json(self.head)[:-1], to_json(self.usage)
        return head + b',"choices":[' + choices + b'],"usage":' + usage + b"}"

    async def stream(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events. A fault is an event too, and the stream ends as it should."""
        # All that the chunks have in common is written once.
        head = b"data: " + to_json(self.head)[:-1] + b',"choices":['
        end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        told = b""
        try:
            async with contextlib.aclosing(self.parts()) as parts:
                async for some in parts:
                    told += b"".join(head + news.to_json(*self.told) + end for news in some)
                    if told and self.inbox.unfinished:  # the last goes with what ends the stream
                        yield told
                        told = b""
            if include_usage:
                told += head + b'],"usage":' + to_json(self.usage) + b"}\n\n"
        except (ApiError, UnavailableError) as error:
            told += b"data: " + api_error(error).body() + b"\n\n"
        yield told + b"data: [DONE]\n\n"


def api_error(error: ApiError | UnavailableError) -> ApiError:
    """As OpenAI would say it."""
    if isinstance(error, ApiError):
        return error
    return ApiError(503, str(error), headers={"retry-after": "1"})


def encode_prompt(
    served: ModelEntry, prompt: str | list[int], limits: Limits, *, echo: bool = False
) -> PromptTokens:
    """The tokens of a prompt; a ValueError says what is wrong with it.

    Args:
        served: Who reads it.
        prompt: A text, or token ids.
        limits: How long it may be.
        echo: Whether the text of ids will be asked for.
    """
    tokenizer = served.tokenizer
    if isinstance(prompt, str):
        found = (tokenize_source if served.is_translation else tokenize_prompt)(tokenizer, prompt)
    else:
        check_token_ids(tokenizer, prompt, "the prompt")
        found = PromptTokens(prompt, text=tokenizer.decode(prompt) if echo else "")
    ends = served.engine.engine.max_model_len is not None  # then the engine says it better
    most = limits.max_prompt_tokens or (math.inf if ends else MAX_PROMPT_TOKENS)
    if len(found.ids) > most:
        raise ValueError(
            f"the prompt is {len(found.ids)} tokens long, this server takes {most}: "
            f"shorten it by {len(found.ids) - most}"
        )
    return found


def check_token_ids(tokenizer: Tokenizer, ids: Sequence[int], what: str) -> None:
    """A ValueError names the first that is no token."""
    wrong = next((token for token in ids if not 0 <= token < tokenizer.vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f"{what} has token {wrong}, the model knows 0 to {tokenizer.vocab_size - 1}"
        )


def encode_prompts(
    served: ModelEntry, completion: CompletionRequest, limits: Limits
) -> list[PromptTokens]:
    """The tokens of each prompt; a ValueError says what is wrong with one."""
    return [
        encode_prompt(served, prompt, limits, echo=completion.echo) for prompt in completion.prompt
    ]
