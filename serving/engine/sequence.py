"""Requests, the sequences generated for them, and what an engine step outputs: tokens, logprobs."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gpt.models.base import State
from gpt.sampling import SamplingParams

STREAM_INTERVAL = 0.04
"""Default seconds between two chunks of a stream: at most 25 chunks a second."""

FinishReason = Literal["stop", "length", "error"]


class InvalidRequestError(ValueError):
    """A request that can never be served, because of a field other than its prompt."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        """The field's name in the HTTP API."""


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt, and how to continue it.

    Args:
        prompt: Token ids to continue; with `decoder_start_token`, the source sentence to translate.
        max_tokens: Most tokens of each sequence; 0 processes the prompt only.
        sampling_params: How tokens are sampled.
        stop_tokens: Tokens that end a sequence and are not part of it.
        n: Number of sequences.
        allowed_first_tokens: Tokens that a sequence may start with; empty allows all.
        decoder_start_token: The token that starts a translation.
        num_beams: Hypotheses of a beam search. It samples nothing, makes one sequence, ends at the
            only token in `stop_tokens`, and outputs the best translation once it is complete.
        logprobs: Number of most likely tokens to return, with their log-probabilities, beside
            each generated token and its own; None returns neither.
        prompt_logprobs: Return the same for the tokens of the prompt.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling_params: SamplingParams
    stop_tokens: Collection[int] = ()
    n: int = 1
    allowed_first_tokens: Sequence[int] = ()
    decoder_start_token: int | None = None
    num_beams: int = 1
    logprobs: int | None = None
    prompt_logprobs: bool = False
    prefill_started: float | None = dataclasses.field(default=None, init=False)
    """When the engine started the prefill, by `time.perf_counter`."""


class TokenLogprobs(NamedTuple):
    """A token's log-probability under the model alone: before bias, penalties and temperature."""

    token: int
    logprob: float
    """In nats."""
    top_logprobs: Sequence[tuple[int, float]]
    """The most likely tokens and their log-probabilities, most likely first."""


def compute_logprobs(
    logits_NV: Tensor, tokens: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Return the logprobs of each row's token, and of that row's `num_top` most likely tokens."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    tokens_N1 = torch.tensor(tokens, device=logprobs_NV.device).unsqueeze(1)
    logprobs = logprobs_NV.gather(1, tokens_N1).squeeze(1).tolist()
    top_NK, top_tokens_NK = logprobs_NV.topk(min(max(num_top), logprobs_NV.shape[-1]), dim=-1)
    rows = zip(tokens, logprobs, top_tokens_NK.tolist(), top_NK.tolist(), num_top, strict=True)
    return [
        TokenLogprobs(token, logprob, list(zip(top_tokens, top, strict=True))[:count])
        for token, logprob, top_tokens, top, count in rows
    ]


class SequenceOutput(NamedTuple):
    """What one step added to one sequence: a token, its end, or both. The end is the last output."""

    request: Request
    choice: int
    token: int | None
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    """Of the token, or of the stop token that ended the sequence."""
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    """Of the prompt's tokens from the second on, with the first output of choice 0."""
    error: str = ""


@dataclasses.dataclass(eq=False)
class RunningSequence:
    """A sequence in a slot of the engine: one of its request's choices, and its tokens so far."""

    request: Request
    choice: int
    max_tokens: int
    tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def length(self) -> int:
        """Number of tokens of prompt and output, including a decoder start token."""
        has_start_token = self.request.decoder_start_token is not None
        return len(self.request.prompt) + has_start_token + len(self.tokens)


@dataclasses.dataclass(eq=False)
class Prefill:
    """Progress of the head of the waiting queue: its prefill, then the start of its sequences."""

    request: Request
    state: State
    num_computed_tokens: int = 0
    num_started: int = 0
    """Number of its sequences that have been given a slot."""
    logits_1V: Tensor | None = None
    """Logits of the first output token, once the whole prompt is processed."""
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
