"""Next-token distributions (`/v1/next`), activation maps (`/v1/xray`) and similar words (`/v1/nearest`).

They are for the web page.

Only the engine's thread may use the model, so every forward pass here runs on it, between two
engine steps. Long prompts are processed in chunks so that they delay no running sequence.
"""

import contextlib
import functools
import logging
import math
from asyncio import to_thread
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from gpt.embeddings import nearest_tokens
from gpt.generation import prefill
from gpt.models.base import LanguageModel
from gpt.sampling import NAN_LOGITS, Sampler, SamplingParams, mask_logits
from serving.engine.async_engine import QueueFullError, UnavailableError
from serving.engine.engine import MAX_NUM_BATCHED_TOKENS
from serving.engine.sequence import InvalidRequestError, Request
from serving.http.completions import CompletionStream, check_token_ids, encode_prompt
from serving.http.limits import Limits
from serving.http.protocol import (
    APIError,
    CompletionRequest,
    ModelName,
    PromptField,
    SamplingFields,
    StrictModel,
    bad_request,
    to_json,
)
from serving.http.registry import ModelEntry
from serving.tokenization import PromptTokens, token_text

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_XRAY_NUMBERS = 1_000_000
"""Maximum weights of an X-ray response: five to ten megabytes of JSON."""
XRAY_DECIMALS = 5
"""Decimals of each weight."""


class NextTokenRequest(SamplingFields):
    """A prompt and output so far, whose next-token distribution is returned."""

    model: ModelName = None
    prompt: PromptField
    """text or token ids, as in a completion"""
    tokens: list[int] = Field([])
    """token ids of the output so far"""
    candidates: int = Field(20, ge=1, le=100)
    """number of likeliest tokens to return"""
    include: list[int] = Field([], max_length=16)
    """token ids to return in any case"""


class XrayRequest(StrictModel):
    """A text whose activation maps are returned: attention, alignments, gates, experts."""

    model: ModelName = None
    prompt: PromptField
    """text or token ids; for a translation model, the source sentence"""
    translation: PromptField = None
    """translation models only: target text or token ids; default: the model's own translation"""
    layer: int | None = Field(None, ge=0)
    """return only this layer, counted from 0"""
    map_name: str | None = None
    """return only maps whose name contains this, such as attention"""


class NearestRequest(StrictModel):
    """A word, whose nearest tokens in the model's embedding are returned."""

    model: ModelName = None
    word: str = Field(min_length=1, max_length=200)
    """the token of it with a space before it, or without"""
    k: int = Field(10, ge=1, le=100)
    """number of tokens to return"""


async def _run_on_engine(entry: ModelEntry, function: Callable[[], Result]) -> Result:
    """Call a function on the engine's thread; an unexpected error fails only this request."""
    try:
        return await entry.engine.run_on_engine(function)
    except (ValueError, QueueFullError, UnavailableError):
        raise
    except Exception as error:
        logger.exception("a request of next tokens, an X-ray or similar words has failed")
        raise APIError(500, "the model failed on this request") from error


# Next tokens.


def next_token_distribution(
    logits_V: Tensor,
    sampling_params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int] = (),
    *,
    allowed_tokens: Sequence[int] = (),
    num_candidates: int = 20,
    include: Sequence[int] = (),
) -> dict[str, Any]:
    """Compute the next-token distribution, as the engine samples from it; empty `allowed_tokens` allow all.

    Returns a response's JSON. `candidates` are the likeliest tokens, the likeliest first, and those of
    `include`, with their rank from 1 by the model's probability. Probabilities are those of the model
    and those after all sampling parameters; `support_size` counts the tokens that have one of the
    latter above 0, `entropy` is in bits, and `rest` sums up the tokens that are not candidates.

    Raises:
        FloatingPointError: The logits are not finite.
    """
    sampler = Sampler(1, len(logits_V), logits_V.device)
    sampler.add_sequence(0, sampling_params, prompt, output=output)
    logits_1V = mask_logits(logits_V.unsqueeze(0), allowed_tokens)
    sampling_V = sampler.probabilities(logits_1V)[0].cpu().double()
    probabilities_2V = torch.stack([logits_V.cpu().double().softmax(dim=-1), sampling_V])
    if not probabilities_2V.isfinite().all():
        raise FloatingPointError(NAN_LOGITS)
    order_V = probabilities_2V[0].argsort(descending=True, stable=True)
    rank_V = order_V.argsort() + 1
    likeliest = order_V[:num_candidates].tolist()
    tokens = likeliest + sorted({*include} - {*likeliest}, key=lambda token: int(rank_V[token]))

    def by_kind(values_2: Tensor) -> dict[str, float]:
        return dict(zip(("probability", "sampling_probability"), values_2.tolist(), strict=True))

    rest_2V = probabilities_2V.index_fill(1, torch.tensor(tokens), 0)
    return {
        "candidates": [
            {"id": token, **by_kind(probabilities_2V[:, token]), "rank": int(rank_V[token])}
            for token in tokens
        ],
        "entropy": by_kind(torch.special.entr(probabilities_2V).sum(dim=-1) / math.log(2)),
        "support_size": int((sampling_V > 0).sum()),
        "rest": by_kind(rest_2V.sum(dim=-1)),
    }


async def next_tokens_response(
    entry: ModelEntry, request: NextTokenRequest, limits: Limits
) -> bytes:
    """Return the JSON response to a request; an APIError says what is wrong with it."""
    tokenizer = entry.tokenizer
    for name, ids in (("tokens", request.tokens), ("include", request.include)):
        with bad_request(name):
            check_token_ids(tokenizer, ids, name)
            if len(ids) > limits.max_tokens:
                raise ValueError(f"{len(ids)} {name}: this server allows {limits.max_tokens}")
    with bad_request("prompt"):
        prompt = await to_thread(encode_prompt, entry, request.prompt, limits)
        allowed_tokens = () if request.tokens else prompt.allowed_first_tokens
        num_tokens = len(request.tokens) + 1
        engine_request = Request(
            prompt.ids,
            num_tokens,
            request.sampling_params(0),
            allowed_first_tokens=allowed_tokens,
            decoder_start_token=entry.decoder_start_token,
        )
        if entry.engine.engine.validate(engine_request) < num_tokens:
            raise ValueError(
                f"prompt and tokens are {len(prompt.ids) + num_tokens - 1} tokens long: the model's "
                f"context has no room for another; send fewer tokens"
            )
    logits_V = await _next_token_logits(entry, prompt.ids, request.tokens)
    distribution = await _run_on_engine(
        entry,
        lambda: next_token_distribution(
            logits_V,
            engine_request.sampling_params,
            prompt.ids,
            request.tokens,
            allowed_tokens=allowed_tokens,
            num_candidates=request.candidates,
            include=request.include,
        ),
    )
    is_first = tokenizer.stream([*prompt.ids, *request.tokens]).is_first
    distribution["candidates"] = [
        {"text": token_text(tokenizer, candidate["id"], is_first=is_first), **candidate}
        for candidate in distribution["candidates"]
    ]
    return to_json({"model": entry.name, **distribution})


async def _next_token_logits(
    entry: ModelEntry, prompt: Sequence[int], output: Sequence[int]
) -> Tensor:
    """Return logits_V after prompt and output, with engine steps between the chunks."""
    model, start_token = entry.engine.engine.model, entry.decoder_start_token
    length = len(prompt) + len(output)
    in_one_piece = start_token is not None or not model.supports_chunked_prefill
    sizes = length if in_one_piece else MAX_NUM_BATCHED_TOKENS, MAX_NUM_BATCHED_TOKENS
    first_chunk, *chunks = [
        ids[start : start + size]
        for ids, size in zip((prompt, output), sizes, strict=True)
        for start in range(0, len(ids), size)
    ]
    state, features_1D = await _run_on_engine(
        entry, lambda: prefill(model, _batch_of_one(model, first_chunk), length, start_token)
    )
    num_tokens = len(first_chunk) + (start_token is not None)

    def extend(chunk: Sequence[int]) -> Tensor:
        chunk_1T = _batch_of_one(model, chunk)
        return model.features(chunk_1T, model.prefix_view(state, num_tokens))[:, -1]

    for chunk in chunks:
        num_tokens += len(chunk)
        features_1D = await _run_on_engine(entry, functools.partial(extend, chunk))
    return await _run_on_engine(entry, lambda: model.logits(features_1D)[0])


def _batch_of_one(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    """Return ids_1T on the model's device."""
    return torch.tensor([list(ids)], device=next(model.parameters()).device)


# X-rays.


def activation_maps(
    model: LanguageModel,
    ids: Sequence[int],
    decoder_ids: Sequence[int] | None = None,
    layer: int | None = None,
    name: str = "",
) -> list[tuple[dict[str, Any], Tensor]]:
    """Return the activation maps of a text, as JSON fields with token ids, and weights_LHTS.

    With the decoder's input `decoder_ids`, `ids` are the source of an encoder-decoder. Only this
    `layer`, counted from 0, and only maps whose name contains `name` are returned.

    Raises:
        ValueError: There is no such map or layer, or there are too many weights.
        FloatingPointError: The weights are not finite.
    """
    ids_1S = _batch_of_one(model, ids)
    batch = [ids_1S]
    if decoder_ids is not None:
        batch += [ids_1S.new_tensor([len(ids)]), _batch_of_one(model, decoder_ids)]
    all_maps = model.xray(*batch)
    maps = [m for m in all_maps if name in m.name]
    if not maps:
        names = ", ".join(m.name for m in all_maps)
        message = f"map_name = {name[:80]!r}: no map's name contains this; maps: {names}"
        raise InvalidRequestError("map_name", message)
    num_layers = max(m.weights.shape[1] for m in maps)
    if layer is not None and layer >= num_layers:
        message = f"layer = {layer}: there are {num_layers} layers, counted from 0"
        raise InvalidRequestError("layer", message)
    first, last = (0, num_layers) if layer is None else (layer, layer + 1)
    selected = [(m, m.weights[0, first:last]) for m in maps if first < m.weights.shape[1]]
    num_weights = sum(weights_LHTS.numel() for _, weights_LHTS in selected)
    if num_weights > MAX_XRAY_NUMBERS:
        names = ", ".join(m.name for m, _ in selected)
        raise ValueError(
            f"these maps have {num_weights:,} weights, this server returns {MAX_XRAY_NUMBERS:,}: "
            f"send a `layer` below {num_layers}, a `map_name` out of {names}, or a shorter text"
        )
    if not all(weights_LHTS.isfinite().all() for _, weights_LHTS in selected):
        raise FloatingPointError(NAN_LOGITS)
    return [
        (
            {
                "name": m.name,
                "num_layers": m.weights.shape[1],
                "num_heads": m.weights.shape[2],
                "first_layer": first,
                "rows": m.rows[0].tolist(),
                "columns": None if isinstance(m.columns, str) else m.columns[0].tolist(),
                "column_label": m.columns if isinstance(m.columns, str) else None,
                "min": float(weights_LHTS.min()),
                "max": float(weights_LHTS.max()),
            },
            weights_LHTS.cpu().double().round(decimals=XRAY_DECIMALS),
        )
        for m, weights_LHTS in selected
    ]


async def xray_response(entry: ModelEntry, request: XrayRequest, limits: Limits) -> bytes:
    """Return the JSON response to a request; an APIError says what is wrong with it."""
    tokenizer, model = entry.tokenizer, entry.engine.engine.model
    start_token = entry.decoder_start_token

    def encode(text_or_ids: str | list[int], name: str) -> list[int]:
        if isinstance(text_or_ids, str):
            return tokenizer.encode(text_or_ids)
        check_token_ids(tokenizer, text_or_ids, name)
        return text_or_ids

    def check_length(num_tokens: int) -> None:
        limit = limits.max_xray_tokens
        if num_tokens > limit:
            message = f"the X-ray would have {num_tokens} tokens, this server allows {limit}"
            raise ValueError(f"{message}: shorten the text by {num_tokens - limit}")

    with bad_request("prompt"):
        ids = await to_thread(encode, request.prompt, "the prompt")
        if isinstance(request.prompt, str) and not entry.is_translation:
            ids = [tokenizer.eos_token, *ids]
        if not ids:
            raise ValueError("the prompt is empty: expected at least one token")
        check_length(len(ids))
    decoder_ids = None
    with bad_request("translation"):
        if start_token is None and request.translation is not None:
            raise ValueError("translation is only for translation models: omit it")
        if start_token is not None:
            if request.translation is None:
                target = await _translate(entry, ids, limits.max_xray_tokens - len(ids) - 1)
            else:
                target = await to_thread(encode, request.translation, "the translation")
            # The last token of a translation that fills the context is never an input.
            decoder_ids = [start_token, *target][: model.max_target_length(len(ids))]
            check_length(len(ids) + len(decoder_ids))
    with bad_request("prompt"):
        options = decoder_ids, request.layer, request.map_name or ""
        maps = await _run_on_engine(entry, lambda: activation_maps(model, ids, *options))

    def with_text(ids: Sequence[int]) -> list[dict[str, Any]]:
        return [{"id": token, "text": token_text(tokenizer, token)} for token in ids]

    def nested_json(weights: Tensor) -> bytes:
        if weights.ndim == 1:
            return to_json(weights.tolist())
        return b"[" + b",".join(map(nested_json, weights)) + b"]"

    def to_response() -> bytes:
        # Encoded in small pieces, between which Python lets the event loop run. No torch operation
        # here may start OpenMP workers, which this thread would then keep (see `run_in_own_thread`).
        head = {
            "model": entry.name,
            "tokens": with_text(ids),
            "target_tokens": decoder_ids and with_text(decoder_ids),
        }
        maps_json = []
        for fields, weights_LHTS in maps:
            tokens = {key: with_text(fields[key]) for key in ("rows", "columns") if fields[key]}
            weights = b',"weights":' + nested_json(weights_LHTS) + b"}"
            maps_json.append(to_json(fields | tokens)[:-1] + weights)
        return to_json(head)[:-1] + b',"maps":[' + b",".join(maps_json) + b"]}"

    return await to_thread(to_response)


async def _translate(entry: ModelEntry, source: list[int], max_tokens: int) -> list[int]:
    """Return the model's own greedy translation, a completion like any other."""
    fields = {"prompt": source, "max_tokens": max(0, max_tokens), "temperature": 0}
    request = CompletionRequest.model_validate({**fields, "return_token_ids": True})
    target: list[int] = []
    with contextlib.closing(CompletionStream(entry, request, [PromptTokens(source)])) as completion:
        async with contextlib.aclosing(completion.deltas()) as batches:
            async for deltas in batches:
                target += [token for delta in deltas for token in delta.token_ids]
    return target


# Similar words.


async def nearest_response(entry: ModelEntry, request: NearestRequest) -> bytes:
    """Return the JSON response to a request; an APIError says what is wrong with it."""
    tokenizer, model = entry.tokenizer, entry.engine.engine.model
    with bad_request("word"):
        token = tokenizer.word_token(request.word)
    with bad_request("model"):
        nearest = await _run_on_engine(entry, lambda: nearest_tokens(model, token, request.k))

    def with_text(token: int) -> dict[str, Any]:
        return {"id": token, "text": token_text(tokenizer, token)}

    neighbors = [{**with_text(neighbor), "cosine": cosine} for neighbor, cosine in nearest]
    return to_json({"model": entry.name, "token": with_text(token), "neighbors": neighbors})
