"""From logits to the next token, the only copy, and `generate`: the reference that engines are held to.

    p      = softmax(adjusted(logits) / temperature)       over the tokens that the filters leave
    token  = the first whose cumulative p is above u       u uniform in [0, 1)

u is a hash of (seed, choice, position), not the next draw of a generator. So a row's
text depends neither on its neighbours in the batch nor on anything sampled before it.
Steps come in the order of `transformers`: bias, penalties, temperature, top-k, top-p, min-p.

A product of matrices rounds otherwise when a row has neighbours: by a millionth, which can
only matter where the two likeliest tokens are as near as that. There a greedy choice is made
from logits that are computed anew, of the row alone, so that it too depends on nothing else.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt.models.base import LanguageModel, State, batch_slice

TIE_MARGIN = 2e-4
"""Nats between two logits that rounding alone might turn around: it moves one by about 1e-5."""

NAN_LOGITS = "the model's logits are not numbers: its weights may be damaged"


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; a ValueError says which value is out of its range.

    Args:
        temperature: Divides the logits; 0 always takes the most likely token, the first of ties.
        top_k: Keep the k most likely tokens (and ties with the last); 0 keeps all.
        top_p: Keep the fewest likely tokens whose probabilities reach p (Holtzman et al. 2019).
        min_p: Keep tokens at least this share as likely as the likeliest (Nguyen et al. 2024).
        repetition_penalty: Divides the logits, if positive, else multiplies them, of all tokens in
            the prompt and the text so far (Keskar et al. 2019).
        presence_penalty: Taken from the logits of tokens in the text so far (as OpenAI defines it).
        frequency_penalty: The same, once for each time the token is in the text so far.
        seed: Where the random stream starts.
        logit_bias: Pairs of a token and what is added to its logit, before all else.
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
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"{name} must be between {low} and {high}, not {value}")
        for token, bias in self.logit_bias:
            if token < 0 or not -100 <= bias <= 100:
                raise ValueError(
                    "logit_bias must be of tokens from 0 on and between -100 and 100, not "
                    f"{bias} of {token}"
                )

    @property
    def greedy(self) -> bool:
        """True where nothing is left to chance; what is colder than 1e-5 is 0 to float32."""
        return self.temperature < 1e-5

    @property
    def adjusted(self) -> bool:
        """True where logits are changed: by a bias, or by what has been said."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0) or bool(self.logit_bias)


class SamplingFlags(NamedTuple):
    """What the parameters of some rows have in common; all else about them is in tensors."""

    random: bool
    """One leaves something to chance."""
    adjusted: bool
    """One changes logits."""
    top_p: bool
    """One draws with a `top_p`."""
    num_sorted: int
    """So many of the likeliest tokens must be sorted for what filters; 0 for none."""


RANDOM_STATE = ("stream", "position", "greedy", "temperature", "log_min_p")
"""The parts of a sampler's state that plain drawing looks at."""
PLAIN_SAMPLING = SamplingFlags(random=True, adjusted=False, top_p=False, num_sorted=0)


class Sampler:
    """Chooses the next token of each row of a batch, each by its own parameters.

    What it remembers is a State like a model's: an engine moves a row of both alike.
    """

    def __init__(
        self, max_num_seqs: int, vocabulary: int, device: torch.device | str = "cpu"
    ) -> None:
        def column(dtype: torch.dtype, value: float = 0) -> Tensor:
            return torch.full((max_num_seqs, 1), value, dtype=dtype, device=device)

        self.vocabulary = vocabulary
        self.samplings = [SamplingParams(temperature=0)] * max_num_seqs
        # What never started may be computed with others: as `samplings` say, greedily.
        self.state: State = {
            "stream": column(torch.long),
            "position": column(torch.long),
            "greedy": column(torch.bool, True),
            "sorted": column(torch.bool),
            "temperature": column(torch.float, 1),
            "top_k": column(torch.long, 1),
            "top_p": column(torch.float),
            "log_min_p": column(torch.float),
            "repetition": column(torch.float),
            "presence": column(torch.float),
            "frequency": column(torch.float),
            "bias": torch.zeros(max_num_seqs, vocabulary, device=device),
            "in_prompt": torch.zeros(max_num_seqs, vocabulary, dtype=torch.bool, device=device),
            "times": torch.zeros(max_num_seqs, vocabulary, dtype=torch.int, device=device),
        }

    def add_sequence(
        self,
        slot: int,
        sampling: SamplingParams,
        prompt: Sequence[int],
        choice: int = 0,
        output: Sequence[int] = (),
    ) -> None:
        """Let `row` begin a new text after `prompt`, or go on with one; `choice` numbers the texts of one seed."""
        self.samplings[slot] = sampling
        seed = torch.tensor(sampling.seed)
        for name, value in (
            ("stream", int(mix(mix(seed) + choice))),
            ("position", len(output)),
            ("greedy", sampling.greedy),
            ("sorted", sampling.top_k > 0 or sampling.top_p < 1),
            ("temperature", 1.0 if sampling.greedy else sampling.temperature),
            ("top_k", sampling.top_k or self.vocabulary),
            ("top_p", sampling.top_p if sampling.top_p < 1 else math.inf),
            ("log_min_p", math.log(sampling.min_p) if sampling.min_p else -math.inf),
            ("repetition", sampling.repetition_penalty),
            ("presence", sampling.presence_penalty),
            ("frequency", sampling.frequency_penalty),
        ):
            self.state[name][slot] = value
        self.state["bias"][slot] = 0
        for token, bias in sampling.logit_bias:
            self.state["bias"][slot, token] = bias
        if sampling.adjusted:
            counts_V = torch.tensor(output, dtype=torch.long).bincount(minlength=self.vocabulary)
            self.state["times"][slot] = counts_V
            self.state["in_prompt"][slot] = False
            self.state["in_prompt"][slot, list(prompt)] = True

    def move(self, source: int, target: int) -> None:
        """Let row `target` go on where row `source` is."""
        self.samplings[target] = self.samplings[source]
        for tensor in self.state.values():
            tensor[target] = tensor[source]

    def __call__(
        self,
        logits_BV: Tensor,
        first: int = 0,
        recompute: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """tokens_B: the next token of each row of logits, -1 where a logit is not a number.

        Args:
            logits_BV: Of rows `first` and following.
            first: Number of the first row.
            recompute: Gives the logits_V of a row computed alone, and is asked where rounding could
                decide a greedy choice. Without it, it may.
        """
        last = first + len(logits_BV)
        settle = None
        if recompute and any(sampling.greedy for sampling in self.samplings[first:last]):
            settle = functools.partial(self._break_ties, first=first, recompute=recompute)
        return sample(
            logits_BV, batch_slice(self.state, first, last), self.flags(first, last), settle
        )

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """probabilities_BV that the next token of each row has of being chosen; NaN where a logit is not a number.

        The rows are the first ones, and stay where they are.
        """
        count = len(logits_BV)
        state, ways = batch_slice(self.state, 0, count), self.flags(0, count)
        logits_BV = _adjusted(logits_BV, state, ways)
        best_B1, tokens_B1 = logits_BV.max(dim=-1, keepdim=True)
        drawn_BV = _probabilities(logits_BV - best_B1, state, ways)
        best_BV = torch.zeros_like(logits_BV).scatter_(1, tokens_B1, 1.0)
        return torch.where(state["greedy"] & best_B1.isfinite(), best_BV, drawn_BV)

    def flags(self, first: int, last: int) -> SamplingFlags:
        """What rows [first, last) ask for between them."""
        drawing = [one for one in self.samplings[first:last] if not one.greedy]
        nucleus = any(one.top_p < 1 for one in drawing)
        most = 0
        if nucleus or any(one.top_k for one in drawing):
            most = self.vocabulary
            if all(one.top_k or one.top_p == 1 for one in drawing):
                largest = max(one.top_k for one in drawing)
                most = min(most, 2 ** math.ceil(math.log2(largest)))
        adjusted = any(one.adjusted for one in self.samplings[first:last])
        return SamplingFlags(bool(drawing), adjusted, nucleus, most)

    def _break_ties(
        self, logits_BV: Tensor, *, first: int, recompute: Callable[[int], Tensor]
    ) -> Tensor:
        """logits_BV, where rounding could turn a greedy row around those that it has alone."""
        two_B2 = logits_BV.topk(min(2, self.vocabulary), dim=-1).values
        near_B = (two_B2[:, 0] - two_B2[:, -1] < TIE_MARGIN).tolist()
        for row, sampling in enumerate(self.samplings[first : first + len(near_B)]):
            if near_B[row] and sampling.greedy and self.vocabulary > 1:
                number = first + row
                alone_1V = recompute(number).to(logits_BV.dtype).unsqueeze(0)
                logits_BV = logits_BV.clone()  # it may be the caller's
                logits_BV[row] = _adjust(alone_1V, batch_slice(self.state, number, number + 1))
        return logits_BV


def sample(
    logits_BV: Tensor,
    state: State,
    flags: SamplingFlags,
    break_ties: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """tokens_B of rows with these parts of a `Sampler`'s state, which goes on; -1 where a logit is not a number.

    Nothing is asked of the device: it can be compiled and recorded. Where no row changes logits
    or sorts them, the parts in `DRAWN` are enough.
    """
    logits_BV = _adjusted(logits_BV, state, flags)
    if break_ties:
        logits_BV = break_ties(logits_BV)
    best_B1, tokens_B1 = logits_BV.max(dim=-1, keepdim=True)
    if flags.random:
        cumulative_BV = _probabilities(logits_BV - best_B1, state, flags).cumsum(dim=-1)
        height_B1 = _uniform(state["stream"], state["position"], cumulative_BV.dtype)
        height_B1 = height_B1 * cumulative_BV[:, -1:]
        drawn_B1 = torch.searchsorted(cumulative_BV, height_B1, right=True)
        tokens_B1 = torch.where(state["greedy"], tokens_B1, drawn_B1)
        state["position"] += 1
    if flags.adjusted:
        chosen_B1 = tokens_B1.clamp(max=logits_BV.shape[-1] - 1)
        state["times"].scatter_add_(1, chosen_B1, torch.ones_like(chosen_B1, dtype=torch.int))
    return torch.where(best_B1.isfinite(), tokens_B1, -1).squeeze(1)


def _adjusted(logits_BV: Tensor, state: State, ways: SamplingFlags) -> Tensor:
    """logits_BV in float32 or better, changed where a row asks for it."""
    if logits_BV.dtype != torch.float64:
        logits_BV = logits_BV.float()
    return _adjust(logits_BV, state) if ways.adjusted else logits_BV


def _probabilities(logits_BV: Tensor, state: State, ways: SamplingFlags) -> Tensor:
    """probabilities_BV that rows draw from. The largest logit of each row must be 0."""
    return _filter(logits_BV / state["temperature"], state, ways).softmax(dim=-1)


def _adjust(logits_BV: Tensor, state: State) -> Tensor:
    """logits_BV with their bias, then lower where a token has been seen (or higher, as a reward)."""
    logits_BV = logits_BV + state["bias"]
    seen_BV = state["in_prompt"] | (state["times"] > 0)
    repetition_B1 = state["repetition"].to(logits_BV.dtype)
    repeated_BV = torch.where(logits_BV < 0, logits_BV * repetition_B1, logits_BV / repetition_B1)
    logits_BV = torch.where(seen_BV, repeated_BV, logits_BV)
    presence_BV = state["presence"] * (state["times"] > 0)
    return logits_BV - presence_BV - state["frequency"] * state["times"]


def _filter(logits_BV: Tensor, state: State, ways: SamplingFlags) -> Tensor:
    """logits_BV, minus infinity where a filter of the row drops the token.

    Every filter is a lowest logit to keep: the vocabulary stays in its order, and a row's
    sum is the same whatever its neighbours ask for. The largest logit of each row must be 0.
    """
    lowest_B1 = state["log_min_p"].to(logits_BV.dtype)
    if ways.num_sorted:
        sorted_BK = logits_BV.topk(ways.num_sorted, dim=-1).values
        keep_BK = torch.arange(ways.num_sorted, device=logits_BV.device) < state["top_k"]
        if ways.top_p:
            kept_BK = sorted_BK.masked_fill(~keep_BK, -math.inf).softmax(dim=-1)
            keep_BK &= kept_BK.cumsum(dim=-1) - kept_BK < state["top_p"]
            keep_BK[:, 0] = True
        last_B1 = sorted_BK.gather(1, keep_BK.sum(dim=-1, keepdim=True) - 1)
        last_B1 = torch.where(state["sorted"], last_B1, -math.inf)
        lowest_B1 = torch.maximum(lowest_B1, last_B1)
    return logits_BV.masked_fill(logits_BV < lowest_B1, -math.inf)


def mix(number: Tensor) -> Tensor:
    """A hash of each 64-bit integer: one step of splitmix64 (Steele et al. 2014)."""

    def shifted(number: Tensor, by: int) -> Tensor:
        return (number >> by) & (2 ** (64 - by) - 1)  # >> alone would copy the sign

    number = number - 0x61C8864680B583EB  # multiply and add wrap around, on every device
    number = (number ^ shifted(number, 30)) * -0x40A7B892E31B1A47
    number = (number ^ shifted(number, 27)) * -0x6B2FB644ECCEEE15
    return number ^ shifted(number, 31)


def _uniform(stream: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    """The number in [0, 1) at `position` of each stream, with as many bits as `dtype` can hold."""
    bits = 53 if dtype == torch.float64 else 24
    number = mix(stream - 0x61C8864680B583EB * position)
    return ((number >> (64 - bits)) & (2**bits - 1)).to(dtype) * 2.0**-bits


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: SamplingParams,
    stop: Collection[int] = (),
    choice: int = 0,
    allowed_first_tokens: Sequence[int] = (),
    decoder_start_token: int | None = None,
) -> Iterator[int]:
    """The tokens that follow `prompt`, one at a time, for one text alone.

    Ends after `max_tokens`, when the model's context is full, or at a token in `stop`,
    which is not part of the text and not given. With `first`, the text begins with one of
    those tokens. With `begin`, the prompt is a source sentence, and its translation is written
    after that token.

    A prompt is tokens as the model saw them in training, where every document begins with
    the end of the one before. A ValueError says what is wrong with it.
    """
    most = clamp_max_tokens(model, prompt, max_tokens, model.max_length, decoder_start_token)
    return _generate(
        model, prompt, most, sampling, stop, choice, allowed_first_tokens, decoder_start_token
    )


def mask_logits(logits_BV: Tensor, tokens: Sequence[int]) -> Tensor:
    """logits_BV, minus infinity for all but these tokens; unchanged where there are none."""
    if not tokens:
        return logits_BV
    kept_BV = torch.full_like(logits_BV, -math.inf)
    kept_BV[:, tokens] = logits_BV[:, tokens]
    return kept_BV


def prefill(
    model: LanguageModel, prompt_1T: Tensor, length: int, decoder_start_token: int | None = None
) -> tuple[State, Tensor]:
    """A state of one row that has read a prompt, with room for `length` tokens; features_1D of what follows.

    With `begin`, the prompt is a source sentence, and this token begins its translation.
    """
    if decoder_start_token is None:
        state = model.init_state(1, length)
        return state, model.prefill(prompt_1T, model.prefix_view(state, prompt_1T.shape[1]))
    state = model.init_state(1, model.context_length)
    started = model.encode_source(prompt_1T, prompt_1T.new_full((1,), prompt_1T.shape[1]))
    for name, tensor in started.items():  # as long as the source, where there is room for more
        state[name][tuple(slice(size) for size in tensor.shape)] = tensor
    begin_11 = prompt_1T.new_full((1, 1), decoder_start_token)
    return state, model.features(begin_11, model.prefix_view(state, prompt_1T.shape[1] + 1))[:, -1]


def recompute_logits(
    model: LanguageModel,
    prompt: Sequence[int],
    output: Sequence[int],
    decoder_start_token: int | None = None,
) -> Tensor:
    """logits_V of what follows `text` after `prompt`, from nothing but these."""
    device = next(model.parameters()).device
    prompt_1T = torch.tensor([list(prompt)], device=device)
    length = len(prompt) + len(output)
    state, features_1D = prefill(model, prompt_1T, length, decoder_start_token)
    if output:
        text_1T = torch.tensor([list(output)], device=device)
        features_1D = model.features(text_1T, model.prefix_view(state, length + 1))[:, -1]
    return model.logits(features_1D)[0]


def clamp_max_tokens(
    model: LanguageModel,
    prompt: Sequence[int],
    max_tokens: int,
    max_length: int | None,
    decoder_start_token: int | None = None,
) -> int:
    """How many tokens can follow `prompt` in `limit` positions: `max_tokens` or fewer.

    With `begin`, the prompt is a source sentence, and the model says how many it has room for.

    The last token is predicted, never looked back on: it takes no position. A ValueError
    says why there can be none.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be at least 0, not {max_tokens}")
    if not len(prompt):
        raise ValueError("the prompt is empty: expected at least one token")
    if min(prompt) < 0 or max(prompt) >= model.vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < model.vocab_size)
        raise ValueError(
            f"the prompt has token {wrong}, the model knows 0 to {model.vocab_size - 1}"
        )
    if decoder_start_token is not None:
        places = model.max_target_length(len(prompt))
        if len(prompt) > model.context_length or (places is not None and places < 1):
            raise ValueError(
                f"the source sentence is {len(prompt)} tokens long: the model's context of "
                f"{model.context_length} has no room for it and a translation"
            )
        if places is None:
            return max_tokens
        missing = (
            0 if max_length is None or model.max_length is None else model.max_length - max_length
        )
        return max(0, min(max_tokens, places - missing))
    if max_length is None:
        return max_tokens
    if len(prompt) > max_length:
        raise ValueError(
            f"the prompt is {len(prompt)} tokens long, the model's context holds {max_length}: "
            f"shorten it by {len(prompt) - max_length}"
        )
    return min(max_tokens, max_length - len(prompt) + 1)


@torch.inference_mode()
def _generate(
    model: LanguageModel,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: SamplingParams,
    stop: Collection[int],
    choice: int,
    first: Sequence[int],
    begin: int | None,
) -> Iterator[int]:
    if max_tokens == 0:
        return
    device = next(model.parameters()).device
    sampler = Sampler(1, model.vocab_size, device)
    sampler.add_sequence(0, sampling, prompt, choice)
    prompt_1T = torch.tensor([list(prompt)], device=device)
    state, features_1D = prefill(model, prompt_1T, len(prompt) + max_tokens - 1, begin)
    text: list[int] = []

    def recompute(_: int) -> Tensor:
        return mask_logits(
            recompute_logits(model, prompt, text, begin).unsqueeze(0), () if text else first
        )[0]

    while True:
        logits_1V = mask_logits(model.logits(features_1D), () if text else first)
        token = int(sampler(logits_1V, recompute=recompute))
        if token < 0:
            raise ValueError(NAN_LOGITS)
        if token in stop:
            return
        yield token
        text.append(token)
        if len(text) == max_tokens:
            return
        part = model.prefix_view(state, len(prompt) + len(text) + (begin is not None))
        features_1D = model.features(prompt_1T.new_full((1, 1), token), part)[:, -1]
