"""Many texts at once from one model, token by token: synchronous, ids in and ids out.

Continuous batching (Yu et al. 2022, "Orca"): a text joins the batch when a row is free
and leaves it when it ends, whatever the others do. Rows [0, n) are the live texts; a row
that ends is replaced by the last one. A slice of a State is a view, so everyone's next
token is `features(last, rows(state, 0, n))`: the engine knows nothing else about a model.

A step gives each live text a token and spends what is left of its budget of tokens on the
prompt at the head of the queue, read in parts in a state of its own (Agrawal et al. 2023):
a long one holds up nobody. What it leaves there goes to a row for each of its choices.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from gpt.beam_search import beam_search
from gpt.kernels.quantization import has_exact_logits
from gpt.models.base import LanguageModel, State, batch_slice, copy_state
from gpt.sampling import (
    NAN_LOGITS,
    PLAIN_SAMPLING,
    RANDOM_STATE,
    TIE_MARGIN,
    Sampler,
    SamplingParams,
    clamp_max_tokens,
    mask_logits,
    prefill,
    recompute_logits,
    sample,
)
from serving.engine.cuda_graphs import GraphRunner

FinishReason = Literal["stop", "length", "error"]

MAX_NUM_BATCHED_TOKENS = 256
"""Tokens that a step takes in, of prompts and texts together."""
MIN_PREFILL_COST = 64
"""Tokens that a prompt counts for at least: reading the weights takes its time for the shortest too."""
LENGTH_BUCKET = 32
"""Positions are looked at in multiples of this, so that a view of them serves many steps."""


@dataclasses.dataclass(eq=False)
class Request:
    """One or several texts to be made after a prompt.

    Args:
        prompt: What is continued; with `begin`, the source sentence of a translation.
        max_tokens: Most tokens of each text; 0 only reads the prompt.
        sampling_params: How they are chosen.
        stop_tokens: Tokens that end a text and are no part of it.
        n: Number of texts.
        allowed_first_tokens: Tokens that a text may begin with; any, if empty.
        decoder_start_token: The token after which a translation is written.
        num_beams: Translations that are followed at once by a beam search, which chooses the best
            itself and gives it when it ends: no sampling, one text, ended by the one token in `stop`.
        logprobs: So many of the likeliest tokens come with each of a text and its own
            logarithm; None gives neither.
        score: Give the same of the prompt's tokens.
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
    """When the engine began to read the prompt, of `time.perf_counter`."""


class TokenLogprobs(NamedTuple):
    """How likely a token was, by the model alone: before bias, penalties and temperature."""

    token: int
    logprob: float
    """In nats."""
    top_logprobs: Sequence[tuple[int, float]]
    """Tokens and theirs, the likeliest first."""


class SequenceOutput(NamedTuple):
    """What one step brought one text: a token, its end, or both. Nothing follows the end."""

    request: Request
    choice: int
    token: int | None
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    """Of the token, or of the one in `stop` that was the end."""
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    """Of the prompt's tokens from the second on, with the first event of choice 0."""
    error: str = ""


@dataclasses.dataclass(eq=False)
class RunningSequence:
    """A live text: one of a request's choices, and what has been made of it."""

    request: Request
    choice: int
    max_tokens: int
    """Tokens that it may have."""
    tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and text, that which begins a translation included."""
        return (
            len(self.request.prompt)
            + len(self.tokens)
            + (self.request.decoder_start_token is not None)
        )


@dataclasses.dataclass(eq=False)
class Prefill:
    """The request at the head of the queue, as far as its prompt is read and its texts are begun."""

    request: Request
    state: State
    num_computed_tokens: int = 0
    num_started: int = 0
    logits_1V: Tensor | None = None
    """Of what follows the prompt, once all is read."""
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)


StepKind = Literal["row", "rows", "prompt"]
"""What is computed at once: a step of one row, of several, or a part of a prompt."""


class PrefillStep(nn.Module):
    """What a model does for a part of a prompt: as it is, or to be compiled."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_1T: Tensor, state: State) -> tuple[Tensor]:
        """features_1TD; the state goes on."""
        return (self.model.features(tokens_1T, state),)


class DecodeStep(nn.Module):
    """What a model does for one more token of each row: as it is, or to be compiled."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, last_B1: Tensor, state: State, drawn: State | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """logits_BV, tokens_B, and the margin_B in nats by which each is the likeliest.

        States go on, and the tokens are written to last_B1: the step can be taken again.

        Args:
            last_B1: The tokens that are fed.
            state: Of these rows.
            drawn: The parts in `DRAWN` of their sampler's state, where one draws: a token that is
                drawn has an infinite margin. Without it, all are the likeliest.
        """
        logits_BV = self.model.logits(self.model.features(last_B1, state)[:, -1])
        two_B2, tokens_B2 = logits_BV.topk(min(2, self.model.vocab_size), dim=-1)
        tokens_B, margin_B = tokens_B2[:, 0], (two_B2[:, 0] - two_B2[:, -1]).float()
        if drawn is not None:
            tokens_B = sample(logits_BV, drawn, PLAIN_SAMPLING)
            margin_B = torch.where(drawn["greedy"][:, 0], margin_B, torch.inf)
        last_B1.copy_(tokens_B.clamp(0, self.model.vocab_size - 1).unsqueeze(1))
        return logits_BV, tokens_B, margin_B


def eager_step(model: LanguageModel, kind: StepKind) -> nn.Module:
    """What computes it, as long as nothing faster does."""
    return PrefillStep(model) if kind == "prompt" else DecodeStep(model)


class Engine:
    """A model, and the requests that are queued for it or live in its rows.

    Args:
        model: What makes the texts.
        max_num_seqs: Number of rows: the most texts at once.
        max_model_len: The most positions of a row, prompt and text together; the model's limit, if smaller.
        max_num_batched_tokens: Tokens that a step takes in.
        deterministic: Compute every text by itself, so that it is the same to the last bit
            whoever else is there. Many texts then take as long as one after the other.
        num_scheduler_steps: Tokens that each text gets in a step where all are greedy or plainly drawn, before any
            is looked at. For models so small that looking takes as long as the token.
        cuda_graphs: Record steps and replay them, with all that is `ahead` for sampled texts too: for a card.
    """

    def __init__(
        self,
        model: LanguageModel,
        max_num_seqs: int,
        max_model_len: int | None = None,
        *,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        deterministic: bool = False,
        num_scheduler_steps: int = 1,
        cuda_graphs: bool = False,
    ) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1 or num_scheduler_steps < 1:
            raise ValueError(
                f"an engine needs at least 1 row, token and step, not {max_num_seqs}, {max_num_batched_tokens} and {num_scheduler_steps}"
            )
        self.model, self.max_num_seqs = model, max_num_seqs
        self.max_num_batched_tokens, self.deterministic, self.num_scheduler_steps = (
            max_num_batched_tokens,
            deterministic,
            num_scheduler_steps,
        )
        given = [limit for limit in (model.max_length, max_model_len) if limit is not None]
        self.max_model_len = min(given, default=None)
        weight = next(model.parameters())
        self.cache_length = self.max_model_len or model.context_length
        self.state = model.init_state(max_num_seqs, self.cache_length)
        self.empty_state = model.init_state(1, 1)
        self.prefill_state = model.init_state(1, self.cache_length)
        self.sampler = Sampler(max_num_seqs, model.vocab_size, weight.device)
        self.last_B1 = torch.zeros(max_num_seqs, 1, dtype=torch.long, device=weight.device)
        self.waiting: deque[Request] = deque()
        self.prefill: Prefill | None = None
        self.running: list[RunningSequence] = []
        self.beam_searches: dict[Request, Generator[None, None, list[list[int]]]] = {}
        self.steps: dict[StepKind, Callable[..., Sequence[Tensor]]] = {
            kind: eager_step(model, kind) for kind in get_args(StepKind)
        }
        """What computes each; a compiled one may take its place at any time, from any thread."""
        self.graph_runner = None if deterministic or not cuda_graphs else GraphRunner(self)
        # Elsewhere a row's own neighbours decide less than the card or the format does.
        self.breaks_ties = has_exact_logits(model)
        self._part: tuple[tuple[int, int, int], State, State] = ((0, 0, 0), {}, {})

    @property
    def idle(self) -> bool:
        """True when a step would do nothing."""
        return not (self.waiting or self.running or self.beam_searches)

    @property
    def num_compiled_steps(self) -> int:
        """How many of its parts are not the model itself any more."""
        return sum(not isinstance(part, nn.Module) for part in self.steps.values())

    @property
    def memory_bytes(self) -> int:
        """What the weights, the rows and their sampling take in memory, from the beginning on."""
        tensors = {
            id(tensor): tensor.nbytes
            for tensor in (
                *self.model.parameters(),
                *self.model.buffers(),
                *self.state.values(),
                *self.prefill_state.values(),
                *self.sampler.state.values(),
            )
        }
        return sum(tensors.values())

    @property
    def num_free_slots(self) -> int:
        """Rows that are free; a search has none, but takes as long as one."""
        return self.max_num_seqs - len(self.running) - len(self.beam_searches)

    def validate(self, request: Request) -> int:
        """How many tokens each text can get; a ValueError says why the request can never be served."""
        most = clamp_max_tokens(
            self.model,
            request.prompt,
            request.max_tokens,
            self.max_model_len,
            request.decoder_start_token,
        )
        for token, _ in request.sampling_params.logit_bias:
            if token >= self.model.vocab_size:
                raise ValueError(
                    f"logit_bias has token {token}, the model knows 0 to "
                    f"{self.model.vocab_size - 1}"
                )
        if request.prompt_logprobs and not (
            self.model.supports_chunked_prefill and request.decoder_start_token is None
        ):
            raise ValueError(
                "there are no logprobs of a prompt that is read as a whole: this model writes only "
                "what follows"
            )
        if request.num_beams > 1:
            if request.decoder_start_token is None:
                raise ValueError("beams are for models that translate: leave them out")
            if request.n > 1 or request.logprobs is not None or not request.sampling_params.greedy:
                raise ValueError(
                    "beams give one text, the best: set n to 1, temperature to 0, no logprobs"
                )
        return most

    def add_request(self, request: Request) -> None:
        """Queue a request; a ValueError says why it can never be served."""
        self.validate(request)
        self.waiting.append(request)

    def abort(self, request: Request, choice: int | None = None) -> None:
        """Forget a request or one of its texts, wherever it is. No event of it follows."""
        for row in reversed(range(len(self.running))):
            text = self.running[row]
            if text.request is request and choice in (None, text.choice):
                self._leave(row)
        if choice is None:
            self.beam_searches.pop(request, None)
        if choice is None and request in self.waiting:
            self.waiting.remove(request)
            if self.prefill and self.prefill.request is request:
                self.prefill = None

    @torch.inference_mode()
    def step(self) -> list[SequenceOutput]:
        """One token for each live text; then prompts, as far as the budget of tokens goes."""
        events = self._decode() if self.running else []
        events += self._search()
        left = max(self.max_num_batched_tokens - len(self.running), 1)
        while left > 0 and self.waiting and self.num_free_slots > 0:
            request = self.waiting[0]
            try:
                # A part's length may depend on the others where its rounding may.
                read = self._read(
                    request, self.max_num_batched_tokens if self.deterministic else left
                )
                left -= max(read, MIN_PREFILL_COST)
                events += self._begin()
            except Exception as error:  # the live texts live on
                begun = self.prefill.num_started if self.prefill else 0
                events += [_failed(request, choice, error) for choice in range(begun, request.n)]
                self._next_request()
        return events

    # Texts.

    def _decode(self) -> list[SequenceOutput]:
        count = len(self.running)
        try:
            if self.graph_runner:
                events = self._replayed(self.graph_runner)
            elif self.deterministic:
                events = [event for row in range(count) for event in self._computed(row, row + 1)]
            else:
                events = self._computed(0, count)
        except Exception as error:  # out of memory, say: the queue lives on
            failed = [_failed(text.request, text.choice, error) for text in self.running]
            self.running = []
            return failed
        ended = {(event.request, event.choice) for event in events if event.finish_reason}
        for row in reversed(range(count)):  # from the end: a row that moves has been seen
            if (self.running[row].request, self.running[row].choice) in ended:
                self._leave(row)
        return events

    def _computed(self, first: int, last: int) -> list[SequenceOutput]:
        """The next tokens of the texts in rows [first, last)."""
        texts = self.running[first:last]
        plain = all(_plain(text.request) for text in texts)
        return self._plainly(first, texts) if plain else self._sampled(first, texts)

    def _step(self, first: int, count: int, reach: int, drawing: bool) -> Sequence[Tensor]:
        """One step of some rows that hold up to `reach` tokens with the one that is fed.

        `drawing` tells whether the step may draw tokens; without it no random stream goes on.
        """
        reach = min(-(-reach // LENGTH_BUCKET) * LENGTH_BUCKET, self.cache_length)
        key, last = (first, count, reach), first + count
        if self._part[0] != key:
            own = self.model.prefix_view(batch_slice(self.state, first, last), reach)
            sampler = {name: self.sampler.state[name][first:last] for name in RANDOM_STATE}
            self._part = key, own, sampler
        _, state, drawn = self._part
        part = self.steps["rows" if count > 1 else "row"]
        if isinstance(part, nn.Module) and not drawing:
            return part(self.last_B1[first:last], state)
        if not drawing:  # compiled code draws all the same
            drawn = drawn | {"position": drawn["position"].clone()}
        return part(self.last_B1[first:last], state, drawn)

    def _room(self, texts: Sequence[RunningSequence]) -> tuple[int, int]:
        """How far these texts reach with the token that is fed, and how many can follow before one is looked at."""
        reach = max(text.length for text in texts)
        left = max(text.max_tokens - len(text.tokens) for text in texts)
        if self.max_model_len is not None:
            # A translation may have places of its own, and prompt and text together be longer.
            left = min(left, max(1, self.cache_length - reach + 1))
        return reach, min(self.num_scheduler_steps, left)

    def _replayed(self, recorder: GraphRunner) -> list[SequenceOutput]:
        """The next tokens of all texts, from recorded steps."""
        count = len(self.running)
        reach, most = self._room(self.running)
        if any(text.request.logprobs is not None for text in self.running):
            most = 1
        ways, taken = self.sampler.flags(0, count), []
        for number in range(most):
            logits_BV, tokens_B = recorder(count, reach + number, ways)
            taken.append(tokens_B.clone())
        tokens_NB = torch.stack(taken).tolist()
        scores = self._scores(logits_BV, self.running, tokens_NB[0])
        events = []
        for row in range(count):
            for tokens_B in tokens_NB:
                events.append(self._event(row, tokens_B[row], scores[row]))
                if events[-1].finish_reason:
                    break
        return events

    def _sampled(self, first: int, texts: Sequence[RunningSequence]) -> list[SequenceOutput]:
        """The next token of these texts, in rows from `first` on."""
        reach = max(text.length for text in texts)
        logits_BV = self._step(first, len(texts), reach, drawing=False)[0]
        tokens_B = self._choose(logits_BV, first, texts)
        self.last_B1[first : first + len(texts), 0] = tokens_B.clamp(min=0)
        tokens = tokens_B.tolist()
        scores = self._scores(logits_BV, texts, tokens)
        return [
            self._event(first + row, token, score)
            for row, (token, score) in enumerate(zip(tokens, scores, strict=True))
        ]

    def _plainly(self, first: int, texts: Sequence[RunningSequence]) -> list[SequenceOutput]:
        """The next tokens of these texts where each is the likeliest one or plainly drawn, for some steps."""
        reach, most = self._room(texts)
        drawing = not all(text.request.sampling_params.greedy for text in texts)
        taken = [
            self._step(first, len(texts), reach + number, drawing)[1:] for number in range(most)
        ]
        tokens_NB = torch.stack([tokens_B for tokens_B, _ in taken]).tolist()
        margins_NB = torch.stack([margin_B for _, margin_B in taken])
        least = TIE_MARGIN if self.breaks_ties and self.model.vocab_size > 1 else 0
        # Not `<`: a margin may be no number.
        doubts_NB = (~(margins_NB >= least)).tolist()
        events = []
        for row, text in enumerate(texts, first):
            for tokens_B, doubts_B in zip(tokens_NB, doubts_NB, strict=True):
                token, doubt = tokens_B[row - first], doubts_B[row - first]
                settled = self._likeliest(text) if doubt else token
                events.append(self._event(row, settled, None))
                if events[-1].finish_reason:
                    break
                if settled != token:
                    self._mend(row, text)
                    break
        return events

    def _alone(self, text: RunningSequence) -> Tensor:
        """logits_V of what follows a text, computed of it alone."""
        request = text.request
        logits_V = recompute_logits(
            self.model, request.prompt, text.tokens, request.decoder_start_token
        )
        return (
            logits_V
            if text.tokens
            else mask_logits(logits_V.unsqueeze(0), request.allowed_first_tokens)[0]
        )

    def _likeliest(self, text: RunningSequence) -> int:
        """The likeliest token after a text, computed of it alone; -1 where there is none."""
        logits_V = self._alone(text)
        return int(logits_V.argmax()) if bool(logits_V.max().isfinite()) else -1

    def _mend(self, row: int, text: RunningSequence) -> None:
        """Let a row be where its text is, after steps that took it elsewhere."""
        device, request = self.last_B1.device, text.request
        prompt_1T = torch.tensor([list(request.prompt)], device=device)
        state, _ = prefill(self.model, prompt_1T, self.cache_length, request.decoder_start_token)
        if text.tokens[:-1]:
            text_1T = torch.tensor([text.tokens[:-1]], device=device)
            self.model.features(text_1T, self.model.prefix_view(state, text.length))
        self._copy(state, row, text.length)
        self.last_B1[row] = text.tokens[-1]

    def _choose(self, logits_BV: Tensor, first: int, texts: Sequence[RunningSequence]) -> Tensor:
        """tokens_B for these texts, in rows from `first` on, each by its own parameters."""

        def again(row: int) -> Tensor:
            return self._alone(texts[row - first])

        return self.sampler(logits_BV, first, again if self.breaks_ties else None)

    def _scores(
        self, logits_BV: Tensor, texts: Sequence[RunningSequence], tokens: Sequence[int]
    ) -> list[TokenLogprobs | None]:
        """Of the token of each text, where its request asks for it."""
        asked = [row for row, text in enumerate(texts) if text.request.logprobs is not None]
        found: list[TokenLogprobs | None] = [None] * len(texts)
        if asked:
            wanted = [texts[row].request.logprobs or 0 for row in asked]
            chosen = [max(tokens[row], 0) for row in asked]
            for row, score in zip(asked, _scored(logits_BV[asked], chosen, wanted), strict=True):
                found[row] = score
        return found

    def _event(
        self,
        row: int,
        token: int,
        score: TokenLogprobs | None,
        prompt: Sequence[TokenLogprobs] = (),
    ) -> SequenceOutput:
        """What happened to a row; its text grows by the token."""
        text = self.running[row]
        if token < 0:
            return _failed(text.request, text.choice, ValueError(NAN_LOGITS))
        if token in text.request.stop_tokens:
            return SequenceOutput(text.request, text.choice, None, "stop", score, prompt)
        text.tokens.append(token)
        finish: FinishReason | None = "length" if len(text.tokens) == text.max_tokens else None
        return SequenceOutput(text.request, text.choice, token, finish, score, prompt)

    def _leave(self, row: int) -> None:
        """Free a row: the last one takes its place."""
        last = len(self.running) - 1
        if row != last:
            self._copy(self._row(last), row, self.running[last].length)
            self.last_B1[row] = self.last_B1[last]
            self.sampler.move(last, row)
            self.running[row] = self.running[last]
        self.running.pop()

    def _row(self, row: int) -> State:
        return batch_slice(self.state, row, row + 1)

    def _copy(self, source: State, row: int, length: int) -> None:
        """Let a row hold what `source` does of so many tokens, and nothing else."""
        copy_state(
            self.model.prefix_view(self._row(row), length), self.model.prefix_view(source, length)
        )

    # Prompts.

    def _read(self, request: Request, most: int) -> int:
        """Read on in the prompt at the head of the queue, up to so many tokens; how many were read."""
        if self.prefill is None:
            copy_state(
                self.model.prefix_view(self.prefill_state, 0),
                self.model.prefix_view(self.empty_state, 0),
            )
            self.prefill = Prefill(request, self.prefill_state)
            request.prefill_started = time.perf_counter()
        reading, prompt = self.prefill, request.prompt
        if reading.logits_1V is not None:
            return 0
        if request.num_beams > 1:
            self._begin_search(request)
            return len(prompt)
        device = self.last_B1.device
        start = reading.num_computed_tokens
        if request.decoder_start_token is not None or not self.model.supports_chunked_prefill:
            prompt_1T = torch.tensor([list(prompt)], device=device)
            reading.state, features_1D = prefill(
                self.model, prompt_1T, self.cache_length, request.decoder_start_token
            )
            reading.num_computed_tokens = len(prompt)
        else:
            reading.num_computed_tokens = min(start + most, len(prompt))
            part_1T = torch.tensor(
                [list(prompt[start : reading.num_computed_tokens])], device=device
            )
            state = self.model.prefix_view(reading.state, reading.num_computed_tokens)
            if part_1T.shape[1] > 1:
                (features_1TD,) = self.steps["prompt"](part_1T, state)
            else:
                features_1TD = self.model.features(part_1T, state)
            if request.prompt_logprobs:
                self._score_prompt(reading, features_1TD, start)
            features_1D = features_1TD[:, -1]
        if reading.num_computed_tokens == len(prompt):
            reading.logits_1V = self.model.logits(features_1D)
        return reading.num_computed_tokens - start

    def _score_prompt(self, reading: Prefill, features_1TD: Tensor, start: int) -> None:
        """Score the prompt's tokens that these features, of those from `start` on, predict."""
        request = reading.request
        follow = request.prompt[start + 1 : start + features_1TD.shape[1] + 1]
        if follow:
            logits_TV = self.model.logits(features_1TD[0, : len(follow)])
            wanted = [request.logprobs or 0] * len(follow)
            reading.prompt_logprobs += _scored(logits_TV, follow, wanted)

    def _begin(self) -> list[SequenceOutput]:
        """Let the texts of a prompt that is read begin, as far as there are rows."""
        reading = self.prefill
        if reading is None or reading.logits_1V is None:
            return []
        request, events = reading.request, []
        most = self.validate(request)
        while reading.num_started < request.n and self.num_free_slots > 0:
            row, choice = len(self.running), reading.num_started
            prompt = reading.prompt_logprobs if choice == 0 else ()
            if most == 0:
                reading.num_started += 1
                events.append(SequenceOutput(request, choice, None, "length", None, prompt))
                continue
            text = RunningSequence(request, choice, most)
            self._copy(reading.state, row, text.length)
            self.sampler.add_sequence(row, request.sampling_params, request.prompt, choice)
            token_B = self._choose(
                mask_logits(reading.logits_1V, request.allowed_first_tokens), row, [text]
            )
            self.last_B1[row] = token_B.clamp(min=0)
            token, score = int(token_B), None
            if request.logprobs is not None:
                (score,) = _scored(reading.logits_1V, [max(token, 0)], [request.logprobs])
            reading.num_started += 1
            self.running.append(text)
            event = self._event(row, token, score, prompt)
            if event.finish_reason:
                self._leave(row)
            events.append(event)
        if reading.num_started == request.n:
            self._next_request()
        return events

    # Searches.

    def _begin_search(self, request: Request) -> None:
        assert request.decoder_start_token is not None
        (end,) = request.stop_tokens
        self.beam_searches[request] = beam_search(
            self.model,
            [request.prompt],
            decoder_start_token=request.decoder_start_token,
            eos_token=end,
            max_tokens=self.validate(request),
            num_beams=request.num_beams,
        )
        self._next_request()

    def _search(self) -> list[SequenceOutput]:
        """Go on with each search by a step."""
        events = []
        for request, steps in list(self.beam_searches.items()):
            try:
                next(steps)
            except StopIteration as done:
                (tokens,) = done.value
                events += [SequenceOutput(request, 0, token) for token in tokens]
                whole = len(tokens) < self.validate(request)
                events.append(SequenceOutput(request, 0, None, "stop" if whole else "length"))
                del self.beam_searches[request]
            except Exception as error:  # the others go on
                events.append(_failed(request, 0, error))
                del self.beam_searches[request]
        return events

    def _next_request(self) -> None:
        self.waiting.popleft()
        self.prefill = None


def _scored(logits_NV: Tensor, tokens: Sequence[int], wanted: Sequence[int]) -> list[TokenLogprobs]:
    """Each row's token and as many of the likeliest as are wanted of it."""
    logs_NV = logits_NV.float().log_softmax(dim=-1)
    places_N1 = torch.tensor(tokens, device=logs_NV.device).unsqueeze(1)
    chosen = logs_NV.gather(1, places_N1).squeeze(1).tolist()
    most = min(max(wanted), logs_NV.shape[-1])
    values_NK, tokens_NK = logs_NV.topk(most, dim=-1)
    likeliest = zip(tokens_NK.tolist(), values_NK.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, list(zip(ids[:count], values[:count], strict=True)))
        for token, logprob, (ids, values), count in zip(
            tokens, chosen, likeliest, wanted, strict=True
        )
    ]


def _plain(request: Request) -> bool:
    """Whether nothing but a token is asked for, that nothing filters or adjusts but `min_p`."""
    sampling = request.sampling_params
    sorting = not sampling.greedy and (sampling.top_k > 0 or sampling.top_p < 1)
    return not (sampling.adjusted or sorting or request.logprobs is not None)


def _failed(request: Request, choice: int, error: Exception) -> SequenceOutput:
    message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return SequenceOutput(request, choice, None, "error", error=message)
