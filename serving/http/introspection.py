"""A look inside: what a model may say next, and what it listens to.

A model belongs to its engine's thread. What is asked of it here is called there, between two
steps of those who are being served; a long prompt is read in parts, so that it holds up nobody.
"""

import contextlib
import functools
import logging
import math
from asyncio import to_thread
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import Field, PlainValidator
from torch import Tensor

from gpt.generation import prefill
from gpt.models.base import LanguageModel, State
from gpt.sampling import NAN_LOGITS, Sampler, SamplingParams, mask_logits
from serving.engine.async_engine import QueueFullError, UnavailableError
from serving.engine.engine import MAX_NUM_BATCHED_TOKENS
from serving.engine.sequence import Request
from serving.http.completions import (
    ApiError,
    CompletionRequest,
    CompletionStream,
    ModelEntry,
    SamplingFields,
    StrictModel,
    check_token_ids,
    encode_prompt,
    to_json,
)
from serving.http.limits import Limits
from serving.tokenization import PromptTokens, token_text
from tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

NUMBERS = 1_000_000
"""Of an X-ray, at most: five to ten megabytes of JSON."""
DIGITS = 5
"""Of each, after the point."""


def _prompt(value: object) -> object:
    ids = isinstance(value, list) and all(type(item) is int for item in value)
    if not isinstance(value, str) and not ids:
        raise ValueError("expected a text or token ids")
    return value


Prompt = Annotated[Any, PlainValidator(_prompt, json_schema_input_type=str | list[int])]


class NextTokenRequest(SamplingFields):
    """What may follow a text, before and after everything that sampling does."""

    model: str | None = Field(None, description="a name from /v1/models; default: the first")
    prompt: Prompt = Field(description="as of a completion")
    tokens: list[int] = Field([], description="of the text so far, after the prompt")
    candidates: int = Field(20, ge=1, le=100, description="so many of the likeliest tokens")
    include: list[int] = Field([], max_length=16, description="tokens that are told in any case")


class XrayRequest(StrictModel):
    """What a model listens to in a text: attention, alignments, gates, experts."""

    model: str | None = Field(None, description="a name from /v1/models; default: the first")
    prompt: Prompt = Field(description="a text begins a document, or is what a translator reads")
    translation: Annotated[
        Any, PlainValidator(_prompt, json_schema_input_type=str | list[int] | None)
    ] = Field(None, description="what a translator then writes; default: its own")
    layer: int | None = Field(None, ge=0, description="of all maps only this one, from 0")
    map_name: str | None = Field(None, description="maps whose name contains this")


async def _ask(served: ModelEntry, function: Callable[[], Result]) -> Result:
    """What the function gives on the engine's thread; a fault there is this request's alone."""
    try:
        return await served.engine.run_on_engine(function)
    except (ValueError, QueueFullError, UnavailableError):
        raise
    except Exception as error:
        logger.exception("a question has failed")
        raise ApiError(500, "the model failed on this request") from error


@contextlib.contextmanager
def _about(param: str) -> Iterator[None]:
    """A ValueError is the client's, about this field."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error), param) from error


# What may follow.


class Candidate(NamedTuple):
    """A token that may come next."""

    id: int
    probability: float
    """The model's alone."""
    sampling_probability: float
    """What it is drawn from."""
    rank: int
    """From 1, by the model alone."""


class NextTokenDistribution(NamedTuple):
    """All that may come next: some of it one by one, the rest together."""

    candidates: list[Candidate]
    entropy: tuple[float, float]
    """In bits: of the model's probabilities, and of those that are drawn from."""
    kept: int
    """Tokens that can be drawn."""
    rest: tuple[float, float]
    """Both probabilities of all that are not among the candidates."""


def next_token_distribution(
    logits_V: Tensor,
    sampling: SamplingParams,
    prompt: Sequence[int],
    text: Sequence[int] = (),
    *,
    first: Sequence[int] = (),
    most: int = 20,
    include: Sequence[int] = (),
) -> NextTokenDistribution:
    """What may come next after a text.

    Args:
        logits_V: What the model says of it.
        sampling: How the next token is chosen.
        prompt: For the penalties.
        text: The tokens so far, after the prompt.
        first: The tokens that it is chosen from; any, if empty.
        most: Candidates, the likeliest first.
        include: Further ones.
    """
    sampler = Sampler(1, len(logits_V), logits_V.device)
    sampler.add_sequence(0, sampling, prompt, output=text)
    logits_1V = mask_logits(logits_V.unsqueeze(0), first)
    sampled_V = sampler.probabilities(logits_1V)[0].cpu().double()
    probability_V = logits_V.cpu().double().softmax(dim=-1)
    if not (sampled_V.isfinite().all() and probability_V.isfinite().all()):
        raise FloatingPointError(NAN_LOGITS)
    order_V = probability_V.argsort(descending=True, stable=True)
    rank_V = torch.empty_like(order_V)
    rank_V[order_V] = torch.arange(1, len(order_V) + 1)
    likeliest = order_V[:most].tolist()
    told = likeliest + sorted({*include} - {*likeliest}, key=lambda one: int(rank_V[one]))
    both_2V = torch.stack([probability_V, sampled_V])
    rest_2V = both_2V.clone()
    rest_2V[:, told] = 0
    bits_2 = torch.special.entr(both_2V).sum(dim=-1) / math.log(2)
    return NextTokenDistribution(
        [
            Candidate(
                token, float(probability_V[token]), float(sampled_V[token]), int(rank_V[token])
            )
            for token in told
        ],
        (float(bits_2[0]), float(bits_2[1])),
        int((sampled_V > 0).sum()),
        (float(rest_2V[0].sum()), float(rest_2V[1].sum())),
    )


async def next_tokens_response(
    served: ModelEntry, asked: NextTokenRequest, limits: Limits
) -> bytes:
    """The answer to what may follow; an ApiError says what is wrong with the question."""
    tokenizer, engine = served.tokenizer, served.engine.engine
    for name, ids in (("tokens", asked.tokens), ("include", asked.include)):
        with _about(name):
            check_token_ids(tokenizer, ids, name)
            if len(ids) > limits.max_tokens:
                raise ValueError(f"{len(ids)} {name}: this server allows {limits.max_tokens}")
    with _about("prompt"):
        prompt = await to_thread(encode_prompt, served, asked.prompt, limits)
        first = () if asked.tokens else prompt.allowed_first_tokens
        count = len(asked.tokens) + 1
        request = Request(
            prompt.ids,
            count,
            asked.sampling(0),
            allowed_first_tokens=first,
            decoder_start_token=served.decoder_start_token,
        )
        if engine.validate(request) < count:
            raise ValueError(
                f"prompt and tokens are {len(prompt.ids) + count - 1} tokens long: the model's "
                f"context has no room for another; send fewer tokens"
            )
    logits_V = await _read(served, prompt.ids, asked.tokens)
    found = await _ask(
        served,
        functools.partial(
            next_token_distribution,
            logits_V,
            request.sampling_params,
            prompt.ids,
            asked.tokens,
            first=first,
            most=asked.candidates,
            include=asked.include,
        ),
    )

    def both(values: tuple[float, float]) -> dict[str, float]:
        return dict(zip(("probability", "sampling_probability"), values, strict=True))

    candidates = [
        {"id": one.id, "text": token_text(tokenizer, one.id)} | one._asdict()
        for one in found.candidates
    ]
    return to_json(
        {
            "model": served.name,
            "candidates": candidates,
            "entropy": both(found.entropy),
            "support_size": found.kept,
            "rest": both(found.rest),
        }
    )


async def _read(served: ModelEntry, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """logits_V of what follows a text after a prompt; others' steps come between its parts."""
    model, begin = served.engine.engine.model, served.decoder_start_token
    length = len(prompt) + len(text)
    whole = begin is not None or not model.supports_chunked_prefill
    head, *tail = [
        *_parts(prompt, length if whole else MAX_NUM_BATCHED_TOKENS),
        *_parts(text, MAX_NUM_BATCHED_TOKENS),
    ]
    state, features_1D = await _ask(
        served, lambda: prefill(model, _row(model, head), length, begin)
    )
    seen = len(head) + (begin is not None)
    for part in tail:
        seen += len(part)
        features_1D = await _ask(served, functools.partial(_go_on, model, state, part, seen))
    return await _ask(served, lambda: model.logits(features_1D)[0])


def _parts(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def _row(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    """ids_1T where the model is."""
    return torch.tensor([list(ids)], device=next(model.parameters()).device)


def _go_on(model: LanguageModel, state: State, ids: Sequence[int], seen: int) -> Tensor:
    """features_1D of what follows more ids, with which the row is `seen` tokens long."""
    return model.features(_row(model, ids), model.prefix_view(state, seen))[:, -1]


# X-rays.


class LayerMap(NamedTuple):
    """One kind of choice, of some of its layers."""

    name: str
    weights_LHTS: Tensor
    rows: list[int]
    """Tokens."""
    columns: list[int] | str
    """Tokens, or what is counted there."""
    layers: int
    """How many it has."""
    layer: int
    """The first of those that are told."""
    least: float
    most: float


def activation_maps(
    model: LanguageModel,
    ids: Sequence[int],
    fed: Sequence[int] | None = None,
    layer: int | None = None,
    only: str = "",
) -> list[LayerMap]:
    """What a model listens to as it reads a text, or a source with what it is fed as it writes.

    A ValueError says what cannot be shown.
    """
    source_1S = _row(model, ids)
    batch = [source_1S]
    if fed is not None:
        batch += [source_1S.new_tensor([len(ids)]), _row(model, fed)]
    everything = model.xray(*batch)
    found = [one for one in everything if only in one.name]
    if not found:
        names = ", ".join(one.name for one in everything)
        raise ValueError(f"map_name = {only[:80]!r}: no map has this in its name; there are {names}")
    most = max(one.weights.shape[1] for one in found)
    if layer is not None and layer >= most:
        raise ValueError(f"layer = {layer}: there are {most} layers, counted from 0")
    first, last = (0, most) if layer is None else (layer, layer + 1)
    chosen = [(one, one.weights[0, first:last]) for one in found if first < one.weights.shape[1]]
    count = sum(weights_LHTS.numel() for _, weights_LHTS in chosen)
    if count > NUMBERS:
        names = ", ".join(one.name for one, _ in chosen)
        raise ValueError(
            f"these maps are {count:,} numbers, this server tells {NUMBERS:,}: send a `layer` "
            f"below {most}, `map_name` one of {names}, or a shorter text"
        )
    if not all(weights_LHTS.isfinite().all() for _, weights_LHTS in chosen):
        raise FloatingPointError(NAN_LOGITS)
    return [
        LayerMap(
            one.name,
            weights_LHTS.double().round(decimals=DIGITS).cpu(),
            one.rows[0].tolist(),
            one.columns if isinstance(one.columns, str) else one.columns[0].tolist(),
            one.weights.shape[1],
            first,
            float(weights_LHTS.min()),
            float(weights_LHTS.max()),
        )
        for one, weights_LHTS in chosen
    ]


async def xray_response(served: ModelEntry, asked: XrayRequest, limits: Limits) -> bytes:
    """The answer to what a model listens to; an ApiError says what is wrong with the question."""
    tokenizer, model = served.tokenizer, served.engine.engine.model
    with _about("prompt"):
        ids = await to_thread(_ids, tokenizer, asked.prompt, "the prompt")
        if isinstance(asked.prompt, str) and not served.is_translation:
            ids = [tokenizer.eos_token, *ids]
        if not ids:
            raise ValueError("the prompt is empty: expected at least one token")
        _check_length(len(ids), limits)
    fed = None
    with _about("translation"):
        if served.decoder_start_token is None and asked.translation is not None:
            raise ValueError("translation is for models that translate: leave it out")
        if served.decoder_start_token is not None:
            if asked.translation is None:
                text = await _translation(served, ids, limits.max_xray_tokens - len(ids) - 1)
            else:
                text = await to_thread(_ids, tokenizer, asked.translation, "the translation")
            # Where there was no room for more, the last token was written but never fed.
            fed = [served.decoder_start_token, *text][: model.max_target_length(len(ids))]
            _check_length(len(ids) + len(fed), limits)
    with _about("prompt"):
        told = functools.partial(activation_maps, model, ids, fed, asked.layer, asked.map_name or "")
        found = await _ask(served, told)
    head = {
        "model": served.name,
        "tokens": _tokens(tokenizer, ids),
        "target_tokens": None if fed is None else _tokens(tokenizer, fed),
    }
    return await to_thread(_xray_json, tokenizer, head, found)


def _ids(tokenizer: Tokenizer, given: str | list[int], what: str) -> list[int]:
    if isinstance(given, str):
        return tokenizer.encode(given)
    check_token_ids(tokenizer, given, what)
    return given


def _check_length(count: int, limits: Limits) -> None:
    if count > limits.max_xray_tokens:
        raise ValueError(
            f"{count} tokens are to be shown, this server shows {limits.max_xray_tokens}: "
            f"shorten the text by {count - limits.max_xray_tokens}"
        )


async def _translation(served: ModelEntry, source: list[int], most: int) -> list[int]:
    """The model's own, greedily, of so many tokens: made among the other texts."""
    asked = {"prompt": source, "max_tokens": max(0, most), "temperature": 0}
    wanted = CompletionRequest.model_validate({**asked, "return_token_ids": True})
    written: list[int] = []
    with contextlib.closing(CompletionStream(served, wanted, [PromptTokens(source)])) as answer:
        async with contextlib.aclosing(answer.parts()) as parts:
            async for some in parts:
                written += [token for news in some for token in news.ids]
    return written


def _tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[dict[str, Any]]:
    return [{"id": token, "text": token_text(tokenizer, token)} for token in ids]


def _xray_json(tokenizer: Tokenizer, head: dict[str, Any], told: Sequence[LayerMap]) -> bytes:
    """The whole answer, written in small pieces: Python lets the event loop in between two of them.

    It computes nothing: torch would keep workers for its thread (see `tuning.apart`).
    """

    def one(shown: LayerMap) -> bytes:
        weights_LHTS, columns = shown.weights_LHTS, shown.columns
        about = {
            "name": shown.name,
            "num_layers": shown.layers,
            "num_heads": weights_LHTS.shape[1],
            "first_layer": shown.layer,
            "rows": _tokens(tokenizer, shown.rows),
            "columns": None if isinstance(columns, str) else _tokens(tokenizer, columns),
            "column_label": columns if isinstance(columns, str) else None,
            "min": shown.least,
            "max": shown.most,
        }
        return to_json(about)[:-1] + b',"weights":' + nested(weights_LHTS) + b"}"

    def nested(weights: Tensor) -> bytes:
        if weights.ndim == 1:
            return to_json(weights.tolist())
        return b"[" + b",".join(map(nested, weights)) + b"]"

    return to_json(head)[:-1] + b',"maps":[' + b",".join(map(one, told)) + b"]}"
