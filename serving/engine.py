"""Many texts at once from one model, token by token: synchronous, ids in and ids out.

Continuous batching (Yu et al. 2022, "Orca"): a text joins the batch when a row is free
and leaves it when it ends, whatever the others do. Rows [0, n) are the live requests; a
row that ends is replaced by the last one. A slice of a State is a view, so a prompt is
`features(prompt, rows(state, n, n + 1))` and everyone's next token is
`features(last, rows(state, 0, n))`: the engine knows nothing else about a model.
"""

import dataclasses
from collections import deque
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch

from gpt.model import LanguageModel, rows
from gpt.sampling import Sampler, Sampling, only, room

Finish = Literal["stop", "length", "error"]


@dataclasses.dataclass(eq=False)
class Request:
    """One text to be made. `stop`, `choice`, `first`: as in `generate`."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: Collection[int] = ()
    choice: int = 0
    first: Sequence[int] = ()


class Event(NamedTuple):
    """What one step brought one request: a token, its end, or both. Nothing follows the end."""

    request: Request
    token: int | None
    finish: Finish | None = None
    error: str = ""


class Engine:
    """A model, and the requests that are queued for it or live in its rows.

    Args:
        model: What makes the texts.
        size: Number of rows: the most texts at once.
        length: The most positions of a row, prompt and text together; the model's limit, if smaller.
    """

    def __init__(self, model: LanguageModel, size: int, length: int | None = None) -> None:
        if size < 1:
            raise ValueError(f"an engine needs at least 1 row, not {size}")
        self.model, self.size = model, size
        given = [limit for limit in (model.limit, length) if limit is not None]
        self.limit = min(given, default=None)
        device = next(model.parameters()).device
        self.state = model.init_state(size, self.limit or model.context)
        self.empty = model.init_state(1, self.limit or model.context)
        self.sampler = Sampler(size, model.vocabulary, device)
        self.last_B1 = torch.zeros(size, 1, dtype=torch.long, device=device)
        self.queue: deque[Request] = deque()
        self.live: list[Request] = []
        self.left: list[int] = []  # tokens that each live request may still get

    @property
    def idle(self) -> bool:
        """True when a step would do nothing."""
        return not (self.queue or self.live)

    def check(self, request: Request) -> int:
        """How many tokens the request can get; a ValueError says why it can get none."""
        return room(self.model, request.prompt, request.max_tokens, self.limit)

    def add(self, request: Request) -> None:
        """Queue a request; a ValueError says why it can never be served."""
        self.check(request)
        self.queue.append(request)

    def cancel(self, request: Request) -> None:
        """Forget a request, wherever it is. No event of it follows; unknown ones are ignored."""
        if request in self.live:
            self._leave(self.live.index(request))
        elif request in self.queue:
            self.queue.remove(request)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for each live request, then room for one more: its prompt and first token.

        One prompt a step, so that an arrival holds up the others by no more than that.
        """
        events = self._decode() if self.live else []
        if self.queue and len(self.live) < self.size:
            events.append(self._prefill(self.queue.popleft()))
        return events

    def _decode(self) -> list[Event]:
        count = len(self.live)
        try:
            features_BTD = self.model.features(self.last_B1[:count], rows(self.state, 0, count))
            tokens_B = self.sampler(self.model.logits(features_BTD[:, -1]))
            self.last_B1[:count, 0] = tokens_B
            tokens = tokens_B.tolist()
        except Exception as error:  # out of memory, say: the queue lives on
            failed = [Event(request, None, "error", _say(error)) for request in self.live]
            self.live, self.left = [], []
            return failed
        events = [self._event(row, token) for row, token in enumerate(tokens)]
        for row in reversed(range(count)):  # from the end: a row that moves has been seen
            if events[row].finish:
                self._leave(row)
        return events

    def _prefill(self, request: Request) -> Event:
        row = len(self.live)
        try:
            prompt_BT = torch.tensor([list(request.prompt)], device=self.last_B1.device)
            for name, tensor in self.state.items():
                tensor[row] = self.empty[name][0]
            features_BD = self.model.read(prompt_BT, rows(self.state, row, row + 1))
            self.sampler.start(row, request.sampling, request.prompt, request.choice)
            logits_BV = only(self.model.logits(features_BD), request.first)
            token_B = self.sampler(logits_BV, first=row)
            self.last_B1[row, 0] = token_B[0]
            token = int(token_B)
        except Exception as error:  # the live rows live on
            return Event(request, None, "error", _say(error))
        self.live.append(request)
        self.left.append(self.check(request))
        event = self._event(row, token)
        if event.finish:
            self._leave(row)
        return event

    def _event(self, row: int, token: int) -> Event:
        request = self.live[row]
        if token in request.stop:
            return Event(request, None, "stop")
        self.left[row] -= 1
        return Event(request, token, None if self.left[row] else "length")

    def _leave(self, row: int) -> None:
        """Free a row: the last one takes its place."""
        last = len(self.live) - 1
        if row != last:
            for tensor in (*self.state.values(), self.last_B1):
                tensor[row] = tensor[last]
            self.sampler.move(last, row)
            self.live[row], self.left[row] = self.live[last], self.left[last]
        self.live.pop()
        self.left.pop()


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
