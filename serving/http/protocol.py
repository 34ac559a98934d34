"""OpenAI's completion protocol: request fields, their validation, API errors and JSON encoding.

Every error has OpenAI's shape: {"error": {"message", "type", "param", "code"}}. Fields that are
unknown or out of range are rejected by name; none is silently ignored.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gpt.sampling import SamplingParams
from serving.engine.async_engine import QueueFullError, UnavailableError
from serving.engine.sequence import InvalidRequestError
from serving.http.limits import Limits

_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def to_json(value: object) -> bytes:
    """Encode a value as compact JSON, one line by any definition: also of `str.splitlines`."""
    text = _encoder.encode(value)
    # JSON lets these line ends stand; clients that split a stream into lines there would break.
    # All others are control characters, which JSON escapes.
    text = text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    # Lone surrogates only occur in error messages that quote the client; they become "?".
    return text.encode(errors="replace")


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a JSON response; bytes are JSON already."""
    body = content if isinstance(content, bytes) else to_json(content)
    return Response(body, status, headers, media_type="application/json")


# Errors.


@dataclasses.dataclass(eq=False)
class APIError(Exception):
    """An error response."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return self.message

    def body(self) -> bytes:
        """Return OpenAI's error object as JSON."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, default)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return to_json({"error": error})

    def response(self) -> Response:
        """Return the response, with the error's status and headers."""
        return json_response(self.body(), self.status, self.headers)


@contextlib.contextmanager
def bad_request(param: str) -> Iterator[None]:
    """Convert a ValueError to a 400 response about a field, the error's own or else `param`."""
    try:
        yield
    except InvalidRequestError as error:
        raise APIError(400, str(error), error.param) from error
    except ValueError as error:
        raise APIError(400, str(error), param) from error


def to_api_error(error: Exception) -> APIError:
    """Convert an error of the engine, of starlette or of the server itself."""
    match error:
        case APIError():
            return error
        case QueueFullError():
            return APIError(429, str(error), headers={"retry-after": str(error.retry_after)})
        case UnavailableError():
            return APIError(503, str(error), headers={"retry-after": "1"})
        case HTTPException():
            hint = ": /docs lists the routes" if error.status_code in (404, 405) else ""
            return APIError(error.status_code, error.detail + hint, headers=error.headers)
    return APIError(500, "internal server error; see the server's log")


def invalid_field_error(error: Mapping[str, Any]) -> APIError:
    """Convert one of pydantic's validation errors, without its input, which may be megabytes."""
    path = [str(part)[:80] for part in error["loc"][1:]]
    field = ".".join(path)
    reason = str(error["msg"]).removeprefix("Value error, ")[:500]
    if error["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {error['ctx']['error']} at {path[0]}")
    if error["type"] == "extra_forbidden":
        return APIError(400, f"unknown field {field!r}", field)
    if not path:
        if error["type"] in ("missing", "model_attributes_type", "model_type"):
            reason = "expected a JSON object, sent with Content-Type: application/json"
        return APIError(400, reason)
    if reason.startswith(f"{path[0]} "):  # it names the field already
        return APIError(400, reason, path[0])
    return APIError(400, f"{field}: {reason}", path[0])


# Requests.


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_prompts(value: object) -> object:
    """Normalize the four forms of `prompt` to a list of strings or a list of token id lists."""
    if isinstance(value, str) or (value and _is_ids(value)):
        return [value]
    all_strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if value and (all_strings or (isinstance(value, list) and all(map(_is_ids, value)))):
        return value
    raise ValueError("expected a string, a list of strings, token ids or a list of token id lists")


def _check_prompt(value: object) -> object:
    if isinstance(value, str) or _is_ids(value):
        return value
    raise ValueError("expected a string or token ids")


def _check_stop(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("expected a string or a list of strings, none of them empty")
    return stops


def _check_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise ValueError("expected an object that maps token ids to numbers from -100 to 100")
    biases = []
    for token, bias in value.items():
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (isinstance(token, str) and token.isascii() and token.isdecimal() and is_number):
            raise ValueError("expected token ids as keys and numbers from -100 to 100 as values")
        biases.append((int(token[:12]), float(bias)))
    return tuple(biases)


PromptField = Annotated[Any, PlainValidator(_check_prompt, json_schema_input_type=str | list[int])]
PromptForms = str | list[str] | list[int] | list[list[int]]
PromptsField = Annotated[Any, PlainValidator(_check_prompts, json_schema_input_type=PromptForms)]
StopField = Annotated[Any, PlainValidator(_check_stop, json_schema_input_type=str | list[str])]
LogitBiasField = Annotated[
    Any, PlainValidator(_check_logit_bias, json_schema_input_type=dict[str, float])
]

ModelName = Annotated[
    str | None, Field(description="model name from /v1/models; default: the first")
]


SAMPLING_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}


class StrictModel(BaseModel):
    """Rejects unknown fields, NaN and strings in place of numbers; null means the default."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        if isinstance(value, dict):
            return {name: item for name, item in value.items() if item is not None}
        return value


class SamplingFields(StrictModel):
    """Sampling parameters of a request."""

    temperature: float = 1.0
    """divides the logits, 0 to 100; 0: greedy decoding, the likeliest token"""
    top_p: float = 1.0
    """0 to 1: sample from the fewest likeliest tokens whose probabilities reach this sum"""
    top_k: int = 0
    """sample from this many likeliest tokens; 0 or -1: all"""
    min_p: float = 0.0
    """0 to 1: sample from tokens at least this fraction as likely as the likeliest"""
    repetition_penalty: float = 1.0
    """0.01 to 100: above 1, tokens of prompt and output become less likely"""
    presence_penalty: float = 0.0
    """-2 to 2: subtracted from the logits of tokens that are in the output"""
    frequency_penalty: float = 0.0
    """-2 to 2: subtracted once for each occurrence of a token in the output"""
    logit_bias: LogitBiasField = ()
    """maps token ids to biases, -100 to 100, that are added to their logits"""

    @field_validator("top_k")
    @classmethod
    def _accept_minus_one(cls, top_k: int) -> int:
        return 0 if top_k == -1 else top_k

    @field_validator("*")
    @classmethod
    def _check_range(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 (any field)
        if value is not None and info.field_name in SAMPLING_FIELDS:
            SamplingParams(**{info.field_name: value})
        return value

    def sampling_params(self, seed: int) -> SamplingParams:
        """Return the engine's sampling parameters."""
        names = SAMPLING_FIELDS & type(self).model_fields.keys()
        return SamplingParams(**{**{name: getattr(self, name) for name in names}, "seed": seed})


class StreamOptions(StrictModel):
    """Options of a streamed completion."""

    include_usage: bool = False
    """send a last chunk with the token counts of all choices"""
    continuous_usage_stats: bool = False
    """with include_usage: send token counts with every chunk, those of its own choice so far"""
    include_obfuscation: bool = False
    """pad each chunk to a multiple of 64 bytes with a random `obfuscation`, which hides the lengths of tokens from whoever sees encrypted traffic"""

    @field_validator("continuous_usage_stats")
    @classmethod
    def _check_usage(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("include_usage"):
            raise ValueError("needs include_usage: true")
        return value


class PromptFields(StrictModel):
    """The prompts of a completion; a base class, so that they are its first fields."""

    prompt: PromptsField = Field([""])
    """text or token ids, or a list of either; a translation model translates it. Text starts a document, after an EOS token; token ids are used unchanged. Default: the empty text"""
    model: ModelName = None


class CompletionRequest(SamplingFields, PromptFields):
    """OpenAI's completion request, with further fields that have vLLM's names, and num_beams."""

    add_special_tokens: bool = True
    """start a text prompt with an EOS token, as every document in training does"""
    truncate_prompt_tokens: int | None = None
    """keep only this many last tokens of each prompt; -1: as many as this server allows"""
    max_tokens: int = Field(16, ge=0)
    """maximum output tokens; a full context also ends a choice"""
    min_tokens: int = 0
    """before the output has this many tokens, EOS and `stop_token_ids` are not sampled, and stop strings are not looked for"""
    seed: int | None = None
    """the same seed gives the same output; default: random"""
    n: int = Field(1, ge=1)
    """choices for each prompt"""
    best_of: int | None = None
    """must equal n"""
    num_beams: int = Field(1, ge=1)
    """translation models only: beams of a beam search; 1: no beam search"""
    stop: StopField = ()
    """stop strings; the output ends before the first of them"""
    stop_token_ids: list[int] = Field([])
    """token ids that end the output as EOS does, and are not part of it"""
    ignore_eos: bool = False
    """continue after EOS tokens, which become part of the output"""
    skip_special_tokens: bool = True
    """leave special tokens, such as EOS, out of the text; otherwise they are shown as `<|endoftext|>`"""
    logprobs: int | None = Field(None, ge=0)
    """return the logprob of each token, and of this many likeliest ones"""
    echo: bool = False
    """return the prompt before the output"""
    return_token_ids: bool = False
    """return token ids of prompt and output"""
    stream: bool = False
    """send tokens as server-sent events as they are sampled"""
    stream_options: StreamOptions | None = None
    """only with `stream`"""
    user: str | None = None
    """accepted, as in OpenAI's API; has no effect"""
    metadata: dict[str, str] | None = None
    """accepted, as in OpenAI's API; has no effect"""
    store: bool | None = None
    """accepted, as in OpenAI's API; has no effect: nothing is stored"""
    service_tier: str | None = None
    """accepted, as in OpenAI's API; has no effect"""
    safety_identifier: str | None = None
    """accepted, as in OpenAI's API; has no effect"""
    prompt_cache_key: str | None = None
    """accepted, as in OpenAI's API; has no effect"""
    suffix: str | None = None
    """not supported: these models cannot infill"""

    # Fields that depend on others check those above them, so that an error names one field.

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _check_truncation(cls, value: int | None) -> int | None:
        if value is not None and (value == 0 or value < -1):
            raise ValueError(f"expected a number from 1, or -1, not {value}")
        return value

    @field_validator("min_tokens")
    @classmethod
    def _check_min_tokens(cls, value: int, info: ValidationInfo) -> int:
        max_tokens = info.data.get("max_tokens", value)
        if value > max_tokens:
            raise ValueError(f"min_tokens = {value} is above max_tokens = {max_tokens}")
        return value

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value != (n := info.data.get("n", value)):
            raise ValueError(f"best_of must equal n = {n} or be omitted, not {value}")
        return value

    @field_validator("stop_token_ids", "ignore_eos")
    @classmethod
    def _check_beam_search(cls, value: object, info: ValidationInfo) -> object:
        if value and info.data.get("num_beams", 1) > 1:
            raise ValueError(
                f"{info.field_name} is not for beam search, which ends at EOS: omit it"
            )
        return value

    @field_validator("stream_options")
    @classmethod
    def _check_stream(
        cls, value: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if value and not info.data.get("stream", True):
            raise ValueError("stream_options needs stream: true")
        return value

    @field_validator("suffix")
    @classmethod
    def _check_suffix(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("suffix is not supported: these models cannot infill; omit it")
        return value

    @property
    def needs_prompt_tokens(self) -> bool:
        """Whether the response has the tokens of the prompt, not only its text."""
        return self.echo and (self.logprobs is not None or self.return_token_ids)

    def sampling_params(self, seed: int) -> SamplingParams:
        """Return the engine's sampling parameters; `seed` replaces a missing one."""
        params = super().sampling_params(seed if self.seed is None else self.seed)
        if self.ignore_eos and not self.stop_token_ids:  # min_tokens would only slow the sampler
            params = dataclasses.replace(params, min_tokens=0)
        if self.num_beams > 1 and "temperature" not in self.model_fields_set:
            return dataclasses.replace(params, temperature=0.0)  # beam search does not sample
        return params

    def check_limits(self, limits: Limits) -> None:
        """Raise an APIError that names the first limit the request exceeds."""
        longest_stop = max(map(len, self.stop), default=0)
        many = "n" if self.n > 1 else "prompt"
        for name, subject, value, limit in (
            ("max_tokens", "max_tokens", self.max_tokens, limits.max_tokens),
            (many, "prompts times n", len(self.prompt) * self.n, limits.max_sequences),
            ("stop", "stop strings", len(self.stop), limits.max_stop_strings),
            ("stop", "length of a stop string", longest_stop, limits.max_stop_length),
            ("logprobs", "logprobs", self.logprobs or 0, limits.max_logprobs),
            ("num_beams", "num_beams", self.num_beams, limits.max_num_beams),
        ):
            if value > limit:
                raise APIError(400, f"{subject} = {value}: this server allows {limit}", name)


class TokenizeRequest(StrictModel):
    """Text to tokenize."""

    model: ModelName = None
    prompt: str
    """text to tokenize"""
    add_special_tokens: bool = True
    """start with EOS, as a completion's prompt"""


class DetokenizeRequest(StrictModel):
    """Token ids to decode."""

    model: ModelName = None
    tokens: list[int] = Field(description="token ids")
