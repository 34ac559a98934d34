"""Next-token distributions (`/v1/next`) and activation maps (`/v1/xray`) for the web page.

Only the engine's thread may use the model, so every forward pass here runs on it, between two
engine steps. Long prompts are processed in chunks so that they delay no running sequence.
"""

import contextlib
import functools
import logging
import math
from asyncio import to_thread
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from gpt.generation import prefill
from gpt.models.base import LanguageModel, State
from gpt.sampling import NAN_LOGITS, Sampler, SamplingParams, mask_logits
from serving.engine.async_engine import QueueFullError, UnavailableError
from serving.engine.engine import MAX_NUM_BATCHED_TOKENS
from serving.engine.sequence import Request
from serving.http.completions import CompletionStream, check_token_ids, encode_prompt
from serving.http.limits import Limits
from serving.http.protocol import (
    MODEL_DESCRIPTION,
    APIError,
    CompletionRequest,
    PromptField,
    SamplingFields,
    StrictModel,
    to_json,
)
from serving.http.registry import ModelEntry
from serving.tokenization import PromptTokens, token_text
from tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_XRAY_NUMBERS = 1_000_000
"""Maximum weights of an X-ray response: five to ten megabytes of JSON."""
XRAY_DECIMALS = 5
"""Decimals of each weight."""


class NextTokenRequest(SamplingFields):
    """A prompt and output so far, whose next-token distribution is returned."""

    model: str | None = Field(None, description=MODEL_DESCRIPTION)
    prompt: PromptField = Field(description="text or token ids, as in a completion")
    tokens: list[int] = Field([], description="token ids of the output so far")
    candidates: int = Field(20, ge=1, le=100, description="number of likeliest tokens to return")
    include: list[int] = Field([], max_length=16, description="token ids to return in any case")


class XrayRequest(StrictModel):
    """A text whose activation maps are returned: attention, alignments, gates, experts."""

    model: str | None = Field(None, description=MODEL_DESCRIPTION)
    prompt: PromptField = Field(
        description="text or token ids; for a translation model, the source sentence"
    )
    translation: PromptField = Field(
        None,
        description="translation models only: target text or token ids; default: the model's own translation",
    )
    layer: int | None = Field(None, ge=0, description="return only this layer, counted from 0")
    map_name: str | None = Field(
        None, description="return only maps whose name contains this, such as attention"
    )


async def _run_on_engine(entry: ModelEntry, function: Callable[[], Result]) -> Result:
    """Call a function on the engine's thread; an unexpected error fails only this request."""
    try:
        return await entry.engine.run_on_engine(function)
    except (ValueError, QueueFullError, UnavailableError):
        raise
    except Exception as error:
        logger.exception("a request of next tokens or an X-ray has failed")
        raise APIError(500, "the model failed on this request") from error


@contextlib.contextmanager
def _bad_request(param: str) -> Iterator[None]:
    """Convert a ValueError to a 400 response about a field."""
    try:
        yield
    except ValueError as error:
        raise APIError(400, str(error), param) from error


# Next tokens.


class Candidate(NamedTuple):
    """A possible next token."""

    id: int
    probability: float
    """The model's probability."""
    sampling_probability: float
    """The probability after all sampling parameters."""
    rank: int
    """Rank by the model's probability, from 1."""


class NextTokenDistribution(NamedTuple):
    """The next-token distribution: some tokens individually, the others summed up."""

    candidates: list[Candidate]
    entropy: tuple[float, float]
    """In bits, of the model's probabilities and of the sampling probabilities."""
    support_size: int
    """Number of tokens with a sampling probability above 0."""
    rest: tuple[float, float]
    """Both probabilities of all tokens that are not candidates."""


def next_token_distribution(
    logits_V: Tensor,
    sampling_params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int] = (),
    *,
    allowed_tokens: Sequence[int] = (),
    num_candidates: int = 20,
    include: Sequence[int] = (),
) -> NextTokenDistribution:
    """Compute the next-token distribution, as the engine samples from it.

    Args:
        logits_V: The model's logits of the next token.
        sampling_params: Sampling parameters.
        prompt: Prompt tokens, for the repetition penalty.
        output: Output tokens so far, for the penalties.
        allowed_tokens: Tokens that may be sampled; any, if empty.
        num_candidates: Number of likeliest tokens to return, the likeliest first.
        include: Further tokens to return.

    Raises:
        FloatingPointError: The logits are not finite.
    """
    sampler = Sampler(1, len(logits_V), logits_V.device)
    sampler.add_sequence(0, sampling_params, prompt, output=output)
    logits_1V = mask_logits(logits_V.unsqueeze(0), allowed_tokens)
    sampling_V = sampler.probabilities(logits_1V)[0].cpu().double()
    model_V = logits_V.cpu().double().softmax(dim=-1)
    if not (sampling_V.isfinite().all() and model_V.isfinite().all()):
        raise FloatingPointError(NAN_LOGITS)
    order_V = model_V.argsort(descending=True, stable=True)
    rank_V = torch.empty_like(order_V)
    rank_V[order_V] = torch.arange(1, len(order_V) + 1)
    likeliest = order_V[:num_candidates].tolist()
    tokens = likeliest + sorted({*include} - {*likeliest}, key=lambda token: int(rank_V[token]))
    probabilities_2V = torch.stack([model_V, sampling_V])
    rest_2V = probabilities_2V.clone()
    rest_2V[:, tokens] = 0
    entropy_2 = torch.special.entr(probabilities_2V).sum(dim=-1) / math.log(2)
    return NextTokenDistribution(
        [
            Candidate(token, float(model_V[token]), float(sampling_V[token]), int(rank_V[token]))
            for token in tokens
        ],
        (float(entropy_2[0]), float(entropy_2[1])),
        int((sampling_V > 0).sum()),
        (float(rest_2V[0].sum()), float(rest_2V[1].sum())),
    )


async def next_tokens_response(
    entry: ModelEntry, request: NextTokenRequest, limits: Limits
) -> bytes:
    """Return the JSON response to a request; an APIError says what is wrong with it."""
    tokenizer = entry.tokenizer
    for name, ids in (("tokens", request.tokens), ("include", request.include)):
        with _bad_request(name):
            check_token_ids(tokenizer, ids, name)
            if len(ids) > limits.max_tokens:
                raise ValueError(f"{len(ids)} {name}: this server allows {limits.max_tokens}")
    with _bad_request("prompt"):
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
        functools.partial(
            next_token_distribution,
            logits_V,
            engine_request.sampling_params,
            prompt.ids,
            request.tokens,
            allowed_tokens=allowed_tokens,
            num_candidates=request.candidates,
            include=request.include,
        ),
    )

    def both(values: tuple[float, float]) -> dict[str, float]:
        return dict(zip(("probability", "sampling_probability"), values, strict=True))

    candidates = [
        {"id": candidate.id, "text": token_text(tokenizer, candidate.id)} | candidate._asdict()
        for candidate in distribution.candidates
    ]
    return to_json(
        {
            "model": entry.name,
            "candidates": candidates,
            "entropy": both(distribution.entropy),
            "support_size": distribution.support_size,
            "rest": both(distribution.rest),
        }
    )


async def _next_token_logits(
    entry: ModelEntry, prompt: Sequence[int], output: Sequence[int]
) -> Tensor:
    """Return logits_V after prompt and output, with engine steps between the chunks."""
    model, start_token = entry.engine.engine.model, entry.decoder_start_token
    length = len(prompt) + len(output)
    in_one_piece = start_token is not None or not model.supports_chunked_prefill
    first_chunk, *chunks = [
        *_chunks(prompt, length if in_one_piece else MAX_NUM_BATCHED_TOKENS),
        *_chunks(output, MAX_NUM_BATCHED_TOKENS),
    ]
    state, features_1D = await _run_on_engine(
        entry, lambda: prefill(model, _batch_of_one(model, first_chunk), length, start_token)
    )
    num_computed = len(first_chunk) + (start_token is not None)
    for chunk in chunks:
        num_computed += len(chunk)
        features_1D = await _run_on_engine(
            entry, functools.partial(_extend, model, state, chunk, num_computed)
        )
    return await _run_on_engine(entry, lambda: model.logits(features_1D)[0])


def _chunks(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def _batch_of_one(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    """Return ids_1T on the model's device."""
    return torch.tensor([list(ids)], device=next(model.parameters()).device)


def _extend(model: LanguageModel, state: State, chunk: Sequence[int], length: int) -> Tensor:
    """Return the last features_1D after a further chunk, with which the sequence has `length` tokens."""
    chunk_1T = _batch_of_one(model, chunk)
    return model.features(chunk_1T, model.prefix_view(state, length))[:, -1]


# X-rays.


class LayerMaps(NamedTuple):
    """One kind of activation map, of one layer or of all."""

    name: str
    weights_LHTS: Tensor
    rows: list[int]
    """Token ids of the rows."""
    columns: list[int] | str
    """Token ids of the columns, or what the columns are: units, experts."""
    num_layers: int
    """Layers the model has of this kind."""
    first_layer: int
    """Number of the first layer in the weights, from 0."""
    min: float
    max: float


def activation_maps(
    model: LanguageModel,
    ids: Sequence[int],
    decoder_ids: Sequence[int] | None = None,
    layer: int | None = None,
    name: str = "",
) -> list[LayerMaps]:
    """Return the activation maps of a model on a text.

    Args:
        model: A language model, or an encoder-decoder.
        ids: The text; for an encoder-decoder, the source.
        decoder_ids: For an encoder-decoder, the decoder's input.
        layer: Return only this layer.
        name: Return only maps whose name contains this.

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
        raise ValueError(f"map_name = {name[:80]!r}: no map's name contains this; maps: {names}")
    num_layers = max(m.weights.shape[1] for m in maps)
    if layer is not None and layer >= num_layers:
        raise ValueError(f"layer = {layer}: there are {num_layers} layers, counted from 0")
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
        LayerMaps(
            m.name,
            weights_LHTS.double().round(decimals=XRAY_DECIMALS).cpu(),
            m.rows[0].tolist(),
            m.columns if isinstance(m.columns, str) else m.columns[0].tolist(),
            m.weights.shape[1],
            first,
            float(weights_LHTS.min()),
            float(weights_LHTS.max()),
        )
        for m, weights_LHTS in selected
    ]


async def xray_response(entry: ModelEntry, request: XrayRequest, limits: Limits) -> bytes:
    """Return the JSON response to a request; an APIError says what is wrong with it."""
    tokenizer, model = entry.tokenizer, entry.engine.engine.model
    start_token = entry.decoder_start_token
    with _bad_request("prompt"):
        ids = await to_thread(_token_ids, tokenizer, request.prompt, "the prompt")
        if isinstance(request.prompt, str) and not entry.is_translation:
            ids = [tokenizer.eos_token, *ids]
        if not ids:
            raise ValueError("the prompt is empty: expected at least one token")
        _check_length(len(ids), limits)
    decoder_ids = None
    with _bad_request("translation"):
        if start_token is None and request.translation is not None:
            raise ValueError("translation is only for translation models: omit it")
        if start_token is not None:
            if request.translation is None:
                target = await _translate(entry, ids, limits.max_xray_tokens - len(ids) - 1)
            else:
                target = await to_thread(
                    _token_ids, tokenizer, request.translation, "the translation"
                )
            # The last token of a translation that fills the context is never an input.
            decoder_ids = [start_token, *target][: model.max_target_length(len(ids))]
            _check_length(len(ids) + len(decoder_ids), limits)
    with _bad_request("prompt"):
        compute = functools.partial(
            activation_maps, model, ids, decoder_ids, request.layer, request.map_name or ""
        )
        maps = await _run_on_engine(entry, compute)
    head = {
        "model": entry.name,
        "tokens": _tokens_json(tokenizer, ids),
        "target_tokens": None if decoder_ids is None else _tokens_json(tokenizer, decoder_ids),
    }
    return await to_thread(_xray_json, tokenizer, head, maps)


def _token_ids(tokenizer: Tokenizer, text_or_ids: str | list[int], name: str) -> list[int]:
    if isinstance(text_or_ids, str):
        return tokenizer.encode(text_or_ids)
    check_token_ids(tokenizer, text_or_ids, name)
    return text_or_ids


def _check_length(num_tokens: int, limits: Limits) -> None:
    if num_tokens > limits.max_xray_tokens:
        raise ValueError(
            f"the X-ray would have {num_tokens} tokens, this server allows {limits.max_xray_tokens}: "
            f"shorten the text by {num_tokens - limits.max_xray_tokens}"
        )


async def _translate(entry: ModelEntry, source: list[int], max_tokens: int) -> list[int]:
    """Return the model's own greedy translation, a completion like any other."""
    fields = {"prompt": source, "max_tokens": max(0, max_tokens), "temperature": 0}
    request = CompletionRequest.model_validate({**fields, "return_token_ids": True})
    target: list[int] = []
    completion = CompletionStream(entry, request, [PromptTokens(source)])
    with contextlib.closing(completion):
        async with contextlib.aclosing(completion.deltas()) as batches:
            async for deltas in batches:
                target += [token for delta in deltas for token in delta.token_ids]
    return target


def _tokens_json(tokenizer: Tokenizer, ids: Sequence[int]) -> list[dict[str, Any]]:
    return [{"id": token, "text": token_text(tokenizer, token)} for token in ids]


def _xray_json(tokenizer: Tokenizer, head: dict[str, Any], maps: Sequence[LayerMaps]) -> bytes:
    """Encode the response in small pieces, between which Python lets the event loop run.

    No torch operation here may start OpenMP workers, which this thread would then keep
    (see `run_in_own_thread`).
    """

    def map_json(m: LayerMaps) -> bytes:
        weights_LHTS, columns = m.weights_LHTS, m.columns
        fields = {
            "name": m.name,
            "num_layers": m.num_layers,
            "num_heads": weights_LHTS.shape[1],
            "first_layer": m.first_layer,
            "rows": _tokens_json(tokenizer, m.rows),
            "columns": None if isinstance(columns, str) else _tokens_json(tokenizer, columns),
            "column_label": columns if isinstance(columns, str) else None,
            "min": m.min,
            "max": m.max,
        }
        return to_json(fields)[:-1] + b',"weights":' + nested_json(weights_LHTS) + b"}"

    def nested_json(weights: Tensor) -> bytes:
        if weights.ndim == 1:
            return to_json(weights.tolist())
        return b"[" + b",".join(map(nested_json, weights)) + b"]"

    return to_json(head)[:-1] + b',"maps":[' + b",".join(map(map_json, maps)) + b"]}"
