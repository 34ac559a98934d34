"""Sampling: from logits to the next token. Every command and the server use this code.

    p      = softmax(adjust(logits) / temperature)       over the tokens that pass the filters
    token  = the first whose cumulative p exceeds u      u uniform in [0, 1)

u is a hash of (seed, choice, position), not the next draw of a generator. So a sequence depends
neither on its neighbors in the batch nor on anything sampled before it. The steps follow the
order of `transformers`: bias, penalties, temperature, top-k, top-p, min-p.

A matrix product rounds differently when other rows are in the batch: by a millionth, which
matters only where the two likeliest tokens are that close. There a greedy choice is made from
logits recomputed for the sequence alone, so that it too depends on nothing else.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt.models.base import State, batch_slice

TIE_MARGIN = 2e-4
"""Two logits (nats) closer than this may swap by rounding, which moves a logit by about 1e-5."""

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")

NAN_LOGITS = "the model's logits are not numbers: its weights may be damaged"


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. A value out of its range raises a ValueError that names it.

    Args:
        temperature: Divides the logits; 0 always takes the most likely token, the first of ties.
        top_k: Keep the k most likely tokens (and ties with the last); 0 keeps all.
        top_p: Keep the smallest set of likeliest tokens whose probabilities reach p (Holtzman et
            al. 2019).
        min_p: Keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024).
        repetition_penalty: Divides positive logits and multiplies negative ones, for all tokens in
            the prompt and the output so far (Keskar et al. 2019).
        presence_penalty: Subtracted from the logits of tokens in the output so far (as in OpenAI's
            API).
        frequency_penalty: The same, once for each occurrence of the token in the output so far.
        seed: Seed of the random stream.
        logit_bias: Pairs of a token and a number added to its logit before all other steps.
        min_tokens: Sample no stop token before the output has this many tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, 100),
            ("top_k", 0, 2**31 - 1),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0.01, 100),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
            ("seed", -(2**63), 2**63 - 1),
            ("min_tokens", 0, 2**31 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"{name} must be between {low} and {high}, not {value}")
        for token, bias in self.logit_bias:
            if token < 0 or not -100 <= bias <= 100:
                raise ValueError(
                    "logit_bias must map token ids from 0 to numbers between -100 and 100, not "
                    f"token {token} to {bias}"
                )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken; float32 cannot divide by less than 1e-5."""
        return self.temperature < 1e-5

    @property
    def adjusted(self) -> bool:
        """Whether logits are changed: by a bias, a penalty or `min_tokens`."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0) or bool(self.logit_bias) or self.min_tokens > 0


class SamplingFlags(NamedTuple):
    """Which sampling steps a batch needs; they decide the code path, all else is in tensors."""

    random: bool
    """Some sequence is not greedy."""
    adjusted: bool
    """Some sequence has a bias, a penalty or `min_tokens`."""
    top_p: bool
    """Some sequence that is not greedy has a `top_p` below 1."""
    num_sorted: int
    """How many of the largest logits top-k and top-p need sorted; 0 for none."""


RANDOM_STATE = ("stream", "position", "greedy", "temperature", "log_min_p")
"""The tensors of a sampler's state that `sample` reads under `PLAIN_SAMPLING`."""
PLAIN_SAMPLING = SamplingFlags(random=True, adjusted=False, top_p=False, num_sorted=0)


class Sampler:
    """Samples the next token of each slot of a batch, each with its own parameters.

    Its `state` is a State like a model's: an engine moves the slots of both in the same way.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, device: torch.device | str = "cpu"
    ) -> None:
        def column(dtype: torch.dtype, value: float = 0) -> Tensor:
            return torch.full((max_num_seqs, 1), value, dtype=dtype, device=device)

        self.vocab_size = vocab_size
        # A slot that never held a sequence may be computed with others: it is greedy.
        self.params = [SamplingParams(temperature=0)] * max_num_seqs
        self.state: State = {
            "stream": column(torch.long),
            "position": column(torch.long),
            "greedy": column(torch.bool, True),
            "needs_sort": column(torch.bool),
            "temperature": column(torch.float, 1),
            "top_k": column(torch.long, 1),
            **{name: column(torch.float) for name in ("top_p", "log_min_p", *PENALTIES)},
            "min_tokens": column(torch.long),
            "is_stop": torch.zeros(max_num_seqs, vocab_size, dtype=torch.bool, device=device),
            "logit_bias": torch.zeros(max_num_seqs, vocab_size, device=device),
            "in_prompt": torch.zeros(max_num_seqs, vocab_size, dtype=torch.bool, device=device),
            "output_counts": torch.zeros(max_num_seqs, vocab_size, dtype=torch.int, device=device),
        }

    def add_sequence(
        self,
        slot: int,
        params: SamplingParams,
        prompt: Sequence[int],
        choice: int = 0,
        output: Sequence[int] = (),
        stop_tokens: Collection[int] = (),
    ) -> None:
        """Start a sequence in `slot`, or continue one after `output`.

        `choice` numbers the sequences of one request, so that each has a random stream of its own.
        `stop_tokens` are those that are not sampled before `min_tokens`.
        """
        self.params[slot] = params
        seed = torch.tensor(params.seed)
        for name, value in (
            ("stream", int(mix(mix(seed) + choice))),
            ("position", len(output)),
            ("greedy", params.greedy),
            ("needs_sort", params.top_k > 0 or params.top_p < 1),
            ("temperature", 1.0 if params.greedy else params.temperature),
            ("top_k", params.top_k or self.vocab_size),
            ("top_p", params.top_p if params.top_p < 1 else math.inf),
            ("log_min_p", math.log(params.min_p) if params.min_p else -math.inf),
            ("min_tokens", params.min_tokens),
            *((name, getattr(params, name)) for name in PENALTIES),
        ):
            self.state[name][slot] = value
        self.state["logit_bias"][slot] = 0
        for token, bias in params.logit_bias:
            self.state["logit_bias"][slot, token] = bias
        if params.min_tokens:
            self.state["is_stop"][slot] = False
            self.state["is_stop"][slot, list(stop_tokens)] = True
        if params.adjusted:
            counts_V = torch.tensor(output, dtype=torch.long).bincount(minlength=self.vocab_size)
            self.state["output_counts"][slot] = counts_V
            self.state["in_prompt"][slot] = False
            self.state["in_prompt"][slot, list(prompt)] = True

    def move(self, source: int, target: int) -> None:
        """Copy the sequence in slot `source` to slot `target`."""
        self.params[target] = self.params[source]
        for tensor in self.state.values():
            tensor[target] = tensor[source]

    def __call__(
        self,
        logits_BV: Tensor,
        first: int = 0,
        recompute: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Return tokens_B, the next token of each slot; -1 where logits are NaN or infinite.

        Args:
            logits_BV: Logits of slots `first`, `first` + 1, ...
            first: The first slot.
            recompute: Returns the logits_V of a slot computed alone; called for greedy slots whose
                two largest logits are within `TIE_MARGIN`. Without it, rounding may decide there.
        """
        last = first + len(logits_BV)

        def break_ties(logits_BV: Tensor) -> Tensor:
            """Replace near-ties of greedy slots by logits computed alone."""
            top2_B2 = logits_BV.topk(min(2, self.vocab_size), dim=-1).values
            near_tie_B = (top2_B2[:, 0] - top2_B2[:, -1] < TIE_MARGIN).tolist()
            for slot, near_tie in enumerate(near_tie_B, first):
                if recompute and near_tie and self.params[slot].greedy:
                    logits_1V = recompute(slot).to(logits_BV.dtype).unsqueeze(0)
                    logits_1V = _adjust(logits_1V, batch_slice(self.state, slot, slot + 1))
                    logits_BV = logits_BV.clone()  # it may be the caller's
                    logits_BV[slot - first] = logits_1V
            return logits_BV

        greedy = any(params.greedy for params in self.params[first:last])
        state, flags = batch_slice(self.state, first, last), self.flags(first, last)
        return sample(logits_BV, state, flags, break_ties if greedy and recompute else None)

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """Return probabilities_BV of each token for slots 0, 1, ...; the state does not change.

        Where logits are NaN or infinite, probabilities are NaN.
        """
        count = len(logits_BV)
        state, flags = batch_slice(self.state, 0, count), self.flags(0, count)
        logits_BV = _adjust_if_needed(logits_BV, state, flags)
        max_B1, argmax_B1 = logits_BV.max(dim=-1, keepdim=True)
        sampled_BV = _softmax_filtered(logits_BV - max_B1, state, flags)
        greedy_BV = torch.zeros_like(logits_BV).scatter_(1, argmax_B1, 1.0)
        return torch.where(state["greedy"] & max_B1.isfinite(), greedy_BV, sampled_BV)

    def flags(self, first: int, last: int) -> SamplingFlags:
        """Return the sampling flags of slots [first, last) together."""
        slots = self.params[first:last]
        random = [params for params in slots if not params.greedy]
        top_p = any(params.top_p < 1 for params in random)
        num_sorted = 0
        if top_p or any(params.top_k for params in random):
            num_sorted = self.vocab_size
            if all(params.top_k or params.top_p == 1 for params in random):
                max_top_k = max(params.top_k for params in random)
                num_sorted = min(num_sorted, 2 ** math.ceil(math.log2(max_top_k)))
        adjusted = any(params.adjusted for params in slots)
        return SamplingFlags(bool(random), adjusted, top_p, num_sorted)


def sample(
    logits_BV: Tensor,
    state: State,
    flags: SamplingFlags,
    break_ties: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return tokens_B, -1 where logits are NaN or infinite, and advance the state in place.

    Never synchronizes with the device: it can be compiled, and captured in a CUDA graph. Under
    `PLAIN_SAMPLING` the tensors named in `RANDOM_STATE` are all of the state that it needs.

    Args:
        logits_BV: Logits of each sequence.
        state: A `Sampler`'s state of the same sequences.
        flags: The steps that they need.
        break_ties: Replaces adjusted logits_BV where rounding could decide a greedy choice.
    """
    logits_BV = _adjust_if_needed(logits_BV, state, flags)
    if break_ties:
        logits_BV = break_ties(logits_BV)
    max_B1, tokens_B1 = logits_BV.max(dim=-1, keepdim=True)
    if flags.random:
        cumulative_BV = _softmax_filtered(logits_BV - max_B1, state, flags).cumsum(dim=-1)
        u_B1 = _uniform(state["stream"], state["position"], cumulative_BV.dtype)
        u_B1 = u_B1 * cumulative_BV[:, -1:]
        sampled_B1 = torch.searchsorted(cumulative_BV, u_B1, right=True)
        tokens_B1 = torch.where(state["greedy"], tokens_B1, sampled_B1)
    if flags.random or flags.adjusted:
        state["position"] += 1
    if flags.adjusted:
        counted_B1 = tokens_B1.clamp(max=logits_BV.shape[-1] - 1)
        ones_B1 = torch.ones_like(counted_B1, dtype=torch.int)
        state["output_counts"].scatter_add_(1, counted_B1, ones_B1)
    return torch.where(max_B1.isfinite(), tokens_B1, -1).squeeze(1)


def mask_logits(logits_BV: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return logits_BV, minus infinity for all but these tokens; unchanged if there are none."""
    if not tokens:
        return logits_BV
    masked_BV = torch.full_like(logits_BV, -math.inf)
    masked_BV[:, tokens] = logits_BV[:, tokens]
    return masked_BV


def _adjust_if_needed(logits_BV: Tensor, state: State, flags: SamplingFlags) -> Tensor:
    """Return logits_BV in float32 or float64, adjusted if any sequence needs it."""
    if logits_BV.dtype != torch.float64:
        logits_BV = logits_BV.float()
    return _adjust(logits_BV, state) if flags.adjusted else logits_BV


def _adjust(logits_BV: Tensor, state: State) -> Tensor:
    """Return logits_BV with bias and penalties, minus infinity for stop tokens before `min_tokens`."""
    logits_BV = logits_BV + state["logit_bias"]
    in_output_BV = state["output_counts"] > 0
    seen_BV = state["in_prompt"] | in_output_BV
    penalty_B1 = state["repetition_penalty"].to(logits_BV.dtype)
    penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    logits_BV = torch.where(seen_BV, penalized_BV, logits_BV)
    logits_BV = logits_BV - state["presence_penalty"] * in_output_BV
    logits_BV = logits_BV - state["frequency_penalty"] * state["output_counts"]
    masked_BV = state["is_stop"] & (state["position"] < state["min_tokens"])
    return logits_BV.masked_fill(masked_BV, -math.inf)


def _softmax_filtered(logits_BV: Tensor, state: State, flags: SamplingFlags) -> Tensor:
    """Return probabilities_BV to sample from: 0 where top-k, top-p or min-p drops the token.

    Every filter is a threshold on the logits: the vocabulary keeps its order, so that a row's
    cumulative sum does not depend on its neighbors. The largest logit of each row must be 0.
    """
    logits_BV = logits_BV / state["temperature"]
    threshold_B1 = state["log_min_p"].to(logits_BV.dtype)
    if flags.num_sorted:
        sorted_BN = logits_BV.topk(flags.num_sorted, dim=-1).values
        keep_BN = torch.arange(flags.num_sorted, device=logits_BV.device) < state["top_k"]
        if flags.top_p:
            p_BN = sorted_BN.masked_fill(~keep_BN, -math.inf).softmax(dim=-1)
            keep_BN &= p_BN.cumsum(dim=-1) - p_BN < state["top_p"]
            keep_BN[:, 0] = True
        smallest_B1 = sorted_BN.gather(1, keep_BN.sum(dim=-1, keepdim=True) - 1)
        smallest_B1 = torch.where(state["needs_sort"], smallest_B1, -math.inf)
        threshold_B1 = torch.maximum(threshold_B1, smallest_B1)
    return logits_BV.masked_fill(logits_BV < threshold_B1, -math.inf).softmax(dim=-1)


def mix(number: Tensor) -> Tensor:
    """Hash each 64-bit integer: one step of splitmix64 (Steele et al. 2014)."""

    def shift_right(number: Tensor, bits: int) -> Tensor:
        return (number >> bits) & (2 ** (64 - bits) - 1)  # >> alone would copy the sign

    number = number - 0x61C8864680B583EB  # multiply and add wrap around, on every device
    number = (number ^ shift_right(number, 30)) * -0x40A7B892E31B1A47
    number = (number ^ shift_right(number, 27)) * -0x6B2FB644ECCEEE15
    return number ^ shift_right(number, 31)


def _uniform(stream: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the number in [0, 1) at `position` of each stream, with all bits of `dtype`."""
    bits = 53 if dtype == torch.float64 else 24
    number = mix(stream - 0x61C8864680B583EB * position)
    return ((number >> (64 - bits)) & (2**bits - 1)).to(dtype) * 2.0**-bits
