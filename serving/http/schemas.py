"""The shapes of responses, for `/openapi.json` only: responses are encoded without them, which is faster.

A test compares them with the responses of a server.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue


class Schema(BaseModel):
    """A JSON object in a response."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Error(Schema):
    """What was wrong."""

    message: str
    """what was wrong, and what was expected"""
    type: Literal[
        "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    """the request field at fault"""
    code: str | None


class ErrorResponse(Schema):
    """OpenAI's error object."""

    error: Error


class Logprobs(Schema):
    """The tokens of a text; position i of each list belongs to the same token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """logprobs in nats by the model alone; null for a first token that nothing predicts"""
    top_logprobs: list[dict[str, float] | None]
    """the likeliest tokens and their logprobs"""
    text_offset: list[int]
    """where each token starts in the text, in characters"""


class CompletionChoice(Schema):
    """An output, or in a chunk what is added to it."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    """null in chunks before the last of a choice"""
    token_ids: list[int] | None = None
    """only with `return_token_ids`"""
    prompt_token_ids: list[int] | None = None
    """only with `return_token_ids`, in the first chunk of a choice"""


class Usage(Schema):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(Schema):
    """A completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Schema):
    """The data of a server-sent event, if it is neither an ErrorResponse nor `[DONE]`, the last."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    """only with `stream_options`"""
    obfuscation: str | None = None
    """only with `stream_options.include_obfuscation`"""


class ModelInfo(Schema):
    """A served model: OpenAI's model object and further fields."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    rung: str
    chapter: int
    year: int
    paper: str
    idea: str
    parameters: int
    vocab_size: int
    eos_token_id: int
    dtype: str
    translates: bool
    bits_per_byte: float | None
    run: str | None


class ModelList(Schema):
    """The served models."""

    object: Literal["list"]
    data: list[ModelInfo]


class TokenizeResponse(Schema):
    """Token ids of a text."""

    count: int
    max_model_len: int | None
    tokens: list[int]


class DetokenizeResponse(Schema):
    """The text of token ids."""

    prompt: str


class TokenizerInfo(Schema):
    """The special tokens, all of them the EOS token."""

    bos_token: str
    eos_token: str
    pad_token: str
    vocab_size: int


class Status(Schema):
    """Whether the server works."""

    status: Literal["ok", "unavailable"]
    reason: str | None = None
    """why it is unavailable"""


class Version(Schema):
    """The version of this server."""

    version: str


class Probabilities(Schema):
    """The same of two distributions: the model's, and that after all sampling parameters."""

    probability: float
    sampling_probability: float


class Candidate(Probabilities):
    """A token that may be next."""

    id: int
    text: str
    rank: int
    """by the model's probability, from 1"""


class NextTokenResponse(Schema):
    """A next-token distribution."""

    model: str
    candidates: list[Candidate]
    entropy: Probabilities
    """in bits"""
    support_size: int
    """number of tokens that can be sampled"""
    rest: Probabilities
    """sums over the tokens that are not candidates"""


class Token(Schema):
    """A token."""

    id: int
    text: str


class Map(Schema):
    """The weights of one kind of attention, gate or expert."""

    name: str
    num_layers: int
    num_heads: int
    first_layer: int
    rows: list[Token]
    columns: list[Token] | None
    column_label: str | None
    min: float
    max: float
    weights: list[list[list[list[float]]]]
    """by layer, head, row and column"""


class XrayResponse(Schema):
    """Activation maps of a text."""

    model: str
    tokens: list[Token]
    target_tokens: list[Token] | None
    maps: list[Map]


class Neighbor(Token):
    """A token with a similar vector."""

    cosine: float


class NearestResponse(Schema):
    """The tokens whose vectors are nearest to that of a word, the nearest first."""

    model: str
    token: Token
    neighbors: list[Neighbor]


class RunSummary(Schema):
    """A run and its latest metrics; null where the run has none."""

    name: str
    task: str | None
    model: str | None
    preset: str | None
    steps: int | None
    step: int | None
    tokens: int | None
    seconds: float | None
    loss: float | None
    validation_loss: float | None
    final_bits_per_byte: float | None
    updated: float
    """Unix time of the last change"""
    finished: bool
    parameters: int | None


class RunList(Schema):
    """The runs of the runs folder."""

    object: Literal["list"]
    data: list[RunSummary]


class RunDetails(Schema):
    """A run's configuration and metrics."""

    name: str
    config: dict[str, JsonValue]
    metrics: list[dict[str, JsonValue]]
    """the lines of metrics.jsonl"""
    next: int
    """`after` of the next request"""
    finished: bool
    restarted: bool | None = None
    """true if training has returned to a checkpoint, and all metrics are sent again"""


class Rung(Schema):
    """A model of the ladder."""

    name: str
    chapter: int
    year: int
    paper: str
    idea: str
    equation: str
    description: str


class Ladder(Schema):
    """The rungs, and the results of the newest ladder that was trained."""

    rows: list[dict[str, JsonValue]]
    rungs: list[Rung]
    source: str | None
    """the folder of these results"""


# Responses of routes, as FastAPI's argument `responses`.

Responses = dict[int | str, dict[str, Any]]

_RETRY_AFTER = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
_DESCRIPTIONS = {
    400: "An invalid request: `param` names the field",
    401: "No API key, or a wrong one",
    404: "No such model or run",
    413: "A body above the server's limit",
    429: "No capacity: all slots and the waiting queue are full",
    500: "A fault of the server; its log says more",
    503: "The server is loading or shutting down, or an engine has failed",
}


def errors(*statuses: int) -> Responses:
    """Return the error responses of a route: with these statuses, those of every route, and others."""
    responses: Responses = {}
    for status in (*statuses, 401, 500):
        headers = {"headers": _RETRY_AFTER} if status in (429, 503) else {}
        description = _DESCRIPTIONS[status]
        responses[status] = {"model": ErrorResponse, "description": description, **headers}
    return {**responses, "default": {"model": ErrorResponse, "description": "Any other error"}}


def _reference(schema: type[Schema]) -> dict[str, Any]:
    """Return a schema whose parts are among the components of `/openapi.json`."""
    fields = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    return {name: value for name, value in fields.items() if name != "$defs"}


STREAM: Responses = {
    200: {
        "description": "The completion; with `stream`, server-sent events, of which `[DONE]` is the last",
        "content": {"text/event-stream": {"schema": _reference(CompletionChunk)}},
    }
}
"""A streamed completion, beside the one that is not streamed."""

UNAVAILABLE: Responses = {503: {"model": Status, "description": "It is not"}}
"""The negative answer of a route about the server's status."""

METRICS: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
"""Prometheus' text format."""
