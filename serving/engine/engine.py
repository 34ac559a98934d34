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

from gpt.beam_search import searching
from gpt.kernels.quantization import exact
from gpt.models.base import LanguageModel, State, overwrite, rows
from gpt.sampling import (
    DRAWN,
    NEAR,
    NOT_A_NUMBER,
    PLAINLY,
    Sampler,
    Sampling,
    anew,
    choose,
    only,
    opened,
    room,
)
from serving.engine.cuda_graphs import Recorder

Finish = Literal["stop", "length", "error"]

BUDGET = 256
"""Tokens that a step takes in, of prompts and texts together."""
PART = 64
"""Tokens that a prompt counts for at least: reading the weights takes its time for the shortest too."""
REACH = 32
"""Positions are looked at in multiples of this, so that a view of them serves many steps."""


@dataclasses.dataclass(eq=False)
class Request:
    """One or several texts to be made after a prompt.

    Args:
        prompt: What is continued; with `begin`, the source sentence of a translation.
        max_tokens: Most tokens of each text; 0 only reads the prompt.
        sampling: How they are chosen.
        stop: Tokens that end a text and are no part of it.
        n: Number of texts.
        first: Tokens that a text may begin with; any, if empty.
        begin: The token after which a translation is written.
        beams: Translations that are followed at once by a beam search, which chooses the best
            itself and gives it when it ends: no sampling, one text, ended by the one token in `stop`.
        logprobs: So many of the likeliest tokens come with each of a text and its own
            logarithm; None gives neither.
        score: Give the same of the prompt's tokens.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: Collection[int] = ()
    n: int = 1
    first: Sequence[int] = ()
    begin: int | None = None
    beams: int = 1
    logprobs: int | None = None
    score: bool = False
    began: float | None = dataclasses.field(default=None, init=False)
    """When the engine began to read the prompt, of `time.perf_counter`."""


class Score(NamedTuple):
    """How likely a token was, by the model alone: before bias, penalties and temperature."""

    token: int
    logprob: float
    """In nats."""
    likeliest: Sequence[tuple[int, float]]
    """Tokens and theirs, the likeliest first."""


class Event(NamedTuple):
    """What one step brought one text: a token, its end, or both. Nothing follows the end."""

    request: Request
    choice: int
    token: int | None
    finish: Finish | None = None
    score: Score | None = None
    """Of the token, or of the one in `stop` that was the end."""
    prompt: Sequence[Score] = ()
    """Of the prompt's tokens from the second on, with the first event of choice 0."""
    error: str = ""


@dataclasses.dataclass(eq=False)
class Live:
    """A live text: one of a request's choices, and what has been made of it."""

    request: Request
    choice: int
    most: int
    """Tokens that it may have."""
    tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and text, that which begins a translation included."""
        return len(self.request.prompt) + len(self.tokens) + (self.request.begin is not None)


@dataclasses.dataclass(eq=False)
class Reading:
    """The request at the head of the queue, as far as its prompt is read and its texts are begun."""

    request: Request
    state: State
    read: int = 0
    begun: int = 0
    logits_1V: Tensor | None = None
    """Of what follows the prompt, once all is read."""
    scores: list[Score] = dataclasses.field(default_factory=list)


Kind = Literal["row", "rows", "prompt"]
"""What is computed at once: a step of one row, of several, or a part of a prompt."""


class Prompt(nn.Module):
    """What a model does for a part of a prompt: as it is, or to be compiled."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_1T: Tensor, state: State) -> tuple[Tensor]:
        """features_1TD; the state goes on."""
        return (self.model.features(tokens_1T, state),)


class Step(nn.Module):
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
        two_B2, tokens_B2 = logits_BV.topk(min(2, self.model.vocabulary), dim=-1)
        tokens_B, margin_B = tokens_B2[:, 0], (two_B2[:, 0] - two_B2[:, -1]).float()
        if drawn is not None:
            tokens_B = choose(logits_BV, drawn, PLAINLY)
            margin_B = torch.where(drawn["greedy"][:, 0], margin_B, torch.inf)
        last_B1.copy_(tokens_B.clamp(0, self.model.vocabulary - 1).unsqueeze(1))
        return logits_BV, tokens_B, margin_B


def whole(model: LanguageModel, kind: Kind) -> nn.Module:
    """What computes it, as long as nothing faster does."""
    return Prompt(model) if kind == "prompt" else Step(model)


class Engine:
    """A model, and the requests that are queued for it or live in its rows.

    Args:
        model: What makes the texts.
        size: Number of rows: the most texts at once.
        length: The most positions of a row, prompt and text together; the model's limit, if smaller.
        budget: Tokens that a step takes in.
        deterministic: Compute every text by itself, so that it is the same to the last bit
            whoever else is there. Many texts then take as long as one after the other.
        ahead: Tokens that each text gets in a step where all are greedy or plainly drawn, before any
            is looked at. For models so small that looking takes as long as the token.
        recorded: Record steps and replay them, with all that is `ahead` for sampled texts too: for a card.
    """

    def __init__(
        self,
        model: LanguageModel,
        size: int,
        length: int | None = None,
        *,
        budget: int = BUDGET,
        deterministic: bool = False,
        ahead: int = 1,
        recorded: bool = False,
    ) -> None:
        if size < 1 or budget < 1 or ahead < 1:
            raise ValueError(
                f"an engine needs at least 1 row, token and step, not {size}, {budget} and {ahead}"
            )
        self.model, self.size = model, size
        self.budget, self.deterministic, self.ahead = budget, deterministic, ahead
        given = [limit for limit in (model.limit, length) if limit is not None]
        self.limit = min(given, default=None)
        weight = next(model.parameters())
        self.length = self.limit or model.context
        self.state = model.init_state(size, self.length)
        self.empty = model.init_state(1, 1)
        self.scratch = model.init_state(1, self.length)
        self.sampler = Sampler(size, model.vocabulary, weight.device)
        self.last_B1 = torch.zeros(size, 1, dtype=torch.long, device=weight.device)
        self.queue: deque[Request] = deque()
        self.reading: Reading | None = None
        self.live: list[Live] = []
        self.searches: dict[Request, Generator[None, None, list[list[int]]]] = {}
        self.parts: dict[Kind, Callable[..., Sequence[Tensor]]] = {
            kind: whole(model, kind) for kind in get_args(Kind)
        }
        """What computes each; a compiled one may take its place at any time, from any thread."""
        self.recorder = None if deterministic or not recorded else Recorder(self)
        # Elsewhere a row's own neighbours decide less than the card or the format does.
        self.certain = exact(model)
        self._part: tuple[tuple[int, int, int], State, State] = ((0, 0, 0), {}, {})

    @property
    def idle(self) -> bool:
        """True when a step would do nothing."""
        return not (self.queue or self.live or self.searches)

    @property
    def compiled(self) -> int:
        """How many of its parts are not the model itself any more."""
        return sum(not isinstance(part, nn.Module) for part in self.parts.values())

    @property
    def bytes(self) -> int:
        """What the weights, the rows and their sampling take in memory, from the beginning on."""
        tensors = {
            id(tensor): tensor.nbytes
            for tensor in (
                *self.model.parameters(),
                *self.model.buffers(),
                *self.state.values(),
                *self.scratch.values(),
                *self.sampler.state.values(),
            )
        }
        return sum(tensors.values())

    @property
    def free(self) -> int:
        """Rows that are free; a search has none, but takes as long as one."""
        return self.size - len(self.live) - len(self.searches)

    def check(self, request: Request) -> int:
        """How many tokens each text can get; a ValueError says why the request can never be served."""
        most = room(self.model, request.prompt, request.max_tokens, self.limit, request.begin)
        for token, _ in request.sampling.logit_bias:
            if token >= self.model.vocabulary:
                raise ValueError(
                    f"logit_bias has token {token}, the model knows 0 to "
                    f"{self.model.vocabulary - 1}"
                )
        if request.score and not (self.model.reads_in_parts and request.begin is None):
            raise ValueError(
                "there are no logprobs of a prompt that is read as a whole: this model writes only "
                "what follows"
            )
        if request.beams > 1:
            if request.begin is None:
                raise ValueError("beams are for models that translate: leave them out")
            if request.n > 1 or request.logprobs is not None or not request.sampling.greedy:
                raise ValueError(
                    "beams give one text, the best: set n to 1, temperature to 0, no logprobs"
                )
        return most

    def add(self, request: Request) -> None:
        """Queue a request; a ValueError says why it can never be served."""
        self.check(request)
        self.queue.append(request)

    def cancel(self, request: Request, choice: int | None = None) -> None:
        """Forget a request or one of its texts, wherever it is. No event of it follows."""
        for row in reversed(range(len(self.live))):
            text = self.live[row]
            if text.request is request and choice in (None, text.choice):
                self._leave(row)
        if choice is None:
            self.searches.pop(request, None)
        if choice is None and request in self.queue:
            self.queue.remove(request)
            if self.reading and self.reading.request is request:
                self.reading = None

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for each live text; then prompts, as far as the budget of tokens goes."""
        events = self._decode() if self.live else []
        events += self._search()
        left = max(self.budget - len(self.live), 1)
        while left > 0 and self.queue and self.free > 0:
            request = self.queue[0]
            try:
                # A part's length may depend on the others where its rounding may.
                read = self._read(request, self.budget if self.deterministic else left)
                left -= max(read, PART)
                events += self._begin()
            except Exception as error:  # the live texts live on
                begun = self.reading.begun if self.reading else 0
                events += [_failed(request, choice, error) for choice in range(begun, request.n)]
                self._next_request()
        return events

    # Texts.

    def _decode(self) -> list[Event]:
        count = len(self.live)
        try:
            if self.recorder:
                events = self._replayed(self.recorder)
            elif self.deterministic:
                events = [event for row in range(count) for event in self._computed(row, row + 1)]
            else:
                events = self._computed(0, count)
        except Exception as error:  # out of memory, say: the queue lives on
            failed = [_failed(text.request, text.choice, error) for text in self.live]
            self.live = []
            return failed
        ended = {(event.request, event.choice) for event in events if event.finish}
        for row in reversed(range(count)):  # from the end: a row that moves has been seen
            if (self.live[row].request, self.live[row].choice) in ended:
                self._leave(row)
        return events

    def _computed(self, first: int, last: int) -> list[Event]:
        """The next tokens of the texts in rows [first, last)."""
        texts = self.live[first:last]
        plain = all(_plain(text.request) for text in texts)
        return self._plainly(first, texts) if plain else self._sampled(first, texts)

    def _step(self, first: int, count: int, reach: int, drawing: bool) -> Sequence[Tensor]:
        """One step of some rows that hold up to `reach` tokens with the one that is fed.

        `drawing` tells whether the step may draw tokens; without it no random stream goes on.
        """
        reach = min(-(-reach // REACH) * REACH, self.length)
        key, last = (first, count, reach), first + count
        if self._part[0] != key:
            own = self.model.part(rows(self.state, first, last), reach)
            sampler = {name: self.sampler.state[name][first:last] for name in DRAWN}
            self._part = key, own, sampler
        _, state, drawn = self._part
        part = self.parts["rows" if count > 1 else "row"]
        if isinstance(part, nn.Module) and not drawing:
            return part(self.last_B1[first:last], state)
        if not drawing:  # compiled code draws all the same
            drawn = drawn | {"position": drawn["position"].clone()}
        return part(self.last_B1[first:last], state, drawn)

    def _room(self, texts: Sequence[Live]) -> tuple[int, int]:
        """How far these texts reach with the token that is fed, and how many can follow before one is looked at."""
        reach = max(text.length for text in texts)
        left = max(text.most - len(text.tokens) for text in texts)
        if self.limit is not None:
            # A translation may have places of its own, and prompt and text together be longer.
            left = min(left, max(1, self.length - reach + 1))
        return reach, min(self.ahead, left)

    def _replayed(self, recorder: Recorder) -> list[Event]:
        """The next tokens of all texts, from recorded steps."""
        count = len(self.live)
        reach, most = self._room(self.live)
        if any(text.request.logprobs is not None for text in self.live):
            most = 1
        ways, taken = self.sampler.ways(0, count), []
        for number in range(most):
            logits_BV, tokens_B = recorder(count, reach + number, ways)
            taken.append(tokens_B.clone())
        tokens_NB = torch.stack(taken).tolist()
        scores = self._scores(logits_BV, self.live, tokens_NB[0])
        events = []
        for row in range(count):
            for tokens_B in tokens_NB:
                events.append(self._event(row, tokens_B[row], scores[row]))
                if events[-1].finish:
                    break
        return events

    def _sampled(self, first: int, texts: Sequence[Live]) -> list[Event]:
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

    def _plainly(self, first: int, texts: Sequence[Live]) -> list[Event]:
        """The next tokens of these texts where each is the likeliest one or plainly drawn, for some steps."""
        reach, most = self._room(texts)
        drawing = not all(text.request.sampling.greedy for text in texts)
        taken = [
            self._step(first, len(texts), reach + number, drawing)[1:] for number in range(most)
        ]
        tokens_NB = torch.stack([tokens_B for tokens_B, _ in taken]).tolist()
        margins_NB = torch.stack([margin_B for _, margin_B in taken])
        least = NEAR if self.certain and self.model.vocabulary > 1 else 0
        # Not `<`: a margin may be no number.
        doubts_NB = (~(margins_NB >= least)).tolist()
        events = []
        for row, text in enumerate(texts, first):
            for tokens_B, doubts_B in zip(tokens_NB, doubts_NB, strict=True):
                token, doubt = tokens_B[row - first], doubts_B[row - first]
                settled = self._likeliest(text) if doubt else token
                events.append(self._event(row, settled, None))
                if events[-1].finish:
                    break
                if settled != token:
                    self._mend(row, text)
                    break
        return events

    def _alone(self, text: Live) -> Tensor:
        """logits_V of what follows a text, computed of it alone."""
        request = text.request
        logits_V = anew(self.model, request.prompt, text.tokens, request.begin)
        return logits_V if text.tokens else only(logits_V.unsqueeze(0), request.first)[0]

    def _likeliest(self, text: Live) -> int:
        """The likeliest token after a text, computed of it alone; -1 where there is none."""
        logits_V = self._alone(text)
        return int(logits_V.argmax()) if bool(logits_V.max().isfinite()) else -1

    def _mend(self, row: int, text: Live) -> None:
        """Let a row be where its text is, after steps that took it elsewhere."""
        device, request = self.last_B1.device, text.request
        prompt_1T = torch.tensor([list(request.prompt)], device=device)
        state, _ = opened(self.model, prompt_1T, self.length, request.begin)
        if text.tokens[:-1]:
            text_1T = torch.tensor([text.tokens[:-1]], device=device)
            self.model.features(text_1T, self.model.part(state, text.length))
        self._copy(state, row, text.length)
        self.last_B1[row] = text.tokens[-1]

    def _choose(self, logits_BV: Tensor, first: int, texts: Sequence[Live]) -> Tensor:
        """tokens_B for these texts, in rows from `first` on, each by its own parameters."""

        def again(row: int) -> Tensor:
            return self._alone(texts[row - first])

        return self.sampler(logits_BV, first, again if self.certain else None)

    def _scores(
        self, logits_BV: Tensor, texts: Sequence[Live], tokens: Sequence[int]
    ) -> list[Score | None]:
        """Of the token of each text, where its request asks for it."""
        asked = [row for row, text in enumerate(texts) if text.request.logprobs is not None]
        found: list[Score | None] = [None] * len(texts)
        if asked:
            wanted = [texts[row].request.logprobs or 0 for row in asked]
            chosen = [max(tokens[row], 0) for row in asked]
            for row, score in zip(asked, _scored(logits_BV[asked], chosen, wanted), strict=True):
                found[row] = score
        return found

    def _event(
        self, row: int, token: int, score: Score | None, prompt: Sequence[Score] = ()
    ) -> Event:
        """What happened to a row; its text grows by the token."""
        text = self.live[row]
        if token < 0:
            return _failed(text.request, text.choice, ValueError(NOT_A_NUMBER))
        if token in text.request.stop:
            return Event(text.request, text.choice, None, "stop", score, prompt)
        text.tokens.append(token)
        finish: Finish | None = "length" if len(text.tokens) == text.most else None
        return Event(text.request, text.choice, token, finish, score, prompt)

    def _leave(self, row: int) -> None:
        """Free a row: the last one takes its place."""
        last = len(self.live) - 1
        if row != last:
            self._copy(self._row(last), row, self.live[last].length)
            self.last_B1[row] = self.last_B1[last]
            self.sampler.move(last, row)
            self.live[row] = self.live[last]
        self.live.pop()

    def _row(self, row: int) -> State:
        return rows(self.state, row, row + 1)

    def _copy(self, source: State, row: int, length: int) -> None:
        """Let a row hold what `source` does of so many tokens, and nothing else."""
        overwrite(self.model.part(self._row(row), length), self.model.part(source, length))

    # Prompts.

    def _read(self, request: Request, most: int) -> int:
        """Read on in the prompt at the head of the queue, up to so many tokens; how many were read."""
        if self.reading is None:
            overwrite(self.model.part(self.scratch, 0), self.model.part(self.empty, 0))
            self.reading = Reading(request, self.scratch)
            request.began = time.perf_counter()
        reading, prompt = self.reading, request.prompt
        if reading.logits_1V is not None:
            return 0
        if request.beams > 1:
            self._begin_search(request)
            return len(prompt)
        device = self.last_B1.device
        start = reading.read
        if request.begin is not None or not self.model.reads_in_parts:
            prompt_1T = torch.tensor([list(prompt)], device=device)
            reading.state, features_1D = opened(self.model, prompt_1T, self.length, request.begin)
            reading.read = len(prompt)
        else:
            reading.read = min(start + most, len(prompt))
            part_1T = torch.tensor([list(prompt[start : reading.read])], device=device)
            state = self.model.part(reading.state, reading.read)
            if part_1T.shape[1] > 1:
                (features_1TD,) = self.parts["prompt"](part_1T, state)
            else:
                features_1TD = self.model.features(part_1T, state)
            if request.score:
                self._score_prompt(reading, features_1TD, start)
            features_1D = features_1TD[:, -1]
        if reading.read == len(prompt):
            reading.logits_1V = self.model.logits(features_1D)
        return reading.read - start

    def _score_prompt(self, reading: Reading, features_1TD: Tensor, start: int) -> None:
        """Score the prompt's tokens that these features, of those from `start` on, predict."""
        request = reading.request
        follow = request.prompt[start + 1 : start + features_1TD.shape[1] + 1]
        if follow:
            logits_TV = self.model.logits(features_1TD[0, : len(follow)])
            wanted = [request.logprobs or 0] * len(follow)
            reading.scores += _scored(logits_TV, follow, wanted)

    def _begin(self) -> list[Event]:
        """Let the texts of a prompt that is read begin, as far as there are rows."""
        reading = self.reading
        if reading is None or reading.logits_1V is None:
            return []
        request, events = reading.request, []
        most = self.check(request)
        while reading.begun < request.n and self.free > 0:
            row, choice = len(self.live), reading.begun
            prompt = reading.scores if choice == 0 else ()
            if most == 0:
                reading.begun += 1
                events.append(Event(request, choice, None, "length", None, prompt))
                continue
            text = Live(request, choice, most)
            self._copy(reading.state, row, text.length)
            self.sampler.start(row, request.sampling, request.prompt, choice)
            token_B = self._choose(only(reading.logits_1V, request.first), row, [text])
            self.last_B1[row] = token_B.clamp(min=0)
            token, score = int(token_B), None
            if request.logprobs is not None:
                (score,) = _scored(reading.logits_1V, [max(token, 0)], [request.logprobs])
            reading.begun += 1
            self.live.append(text)
            event = self._event(row, token, score, prompt)
            if event.finish:
                self._leave(row)
            events.append(event)
        if reading.begun == request.n:
            self._next_request()
        return events

    # Searches.

    def _begin_search(self, request: Request) -> None:
        assert request.begin is not None
        (end,) = request.stop
        self.searches[request] = searching(
            self.model,
            [request.prompt],
            begin=request.begin,
            end=end,
            most=self.check(request),
            beams=request.beams,
        )
        self._next_request()

    def _search(self) -> list[Event]:
        """Go on with each search by a step."""
        events = []
        for request, steps in list(self.searches.items()):
            try:
                next(steps)
            except StopIteration as done:
                (tokens,) = done.value
                events += [Event(request, 0, token) for token in tokens]
                whole = len(tokens) < self.check(request)
                events.append(Event(request, 0, None, "stop" if whole else "length"))
                del self.searches[request]
            except Exception as error:  # the others go on
                events.append(_failed(request, 0, error))
                del self.searches[request]
        return events

    def _next_request(self) -> None:
        self.queue.popleft()
        self.reading = None


def _scored(logits_NV: Tensor, tokens: Sequence[int], wanted: Sequence[int]) -> list[Score]:
    """Each row's token and as many of the likeliest as are wanted of it."""
    logs_NV = logits_NV.float().log_softmax(dim=-1)
    places_N1 = torch.tensor(tokens, device=logs_NV.device).unsqueeze(1)
    chosen = logs_NV.gather(1, places_N1).squeeze(1).tolist()
    most = min(max(wanted), logs_NV.shape[-1])
    values_NK, tokens_NK = logs_NV.topk(most, dim=-1)
    likeliest = zip(tokens_NK.tolist(), values_NK.tolist(), strict=True)
    return [
        Score(token, logprob, list(zip(ids[:count], values[:count], strict=True)))
        for token, logprob, (ids, values), count in zip(
            tokens, chosen, likeliest, wanted, strict=True
        )
    ]


def _plain(request: Request) -> bool:
    """Whether nothing but a token is asked for, that nothing filters or adjusts but `min_p`."""
    sampling = request.sampling
    sorting = not sampling.greedy and (sampling.top_k > 0 or sampling.top_p < 1)
    return not (sampling.adjusted or sorting or request.logprobs is not None)


def _failed(request: Request, choice: int, error: Exception) -> Event:
    message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return Event(request, choice, None, "error", error=message)
