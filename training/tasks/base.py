"""What a run learns from and is judged by. The trainer knows no more of it than is written here."""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gpt import Model
from tokenizer import Tokenizer
from training.data.corpus import FILE, given_tokenizer
from training.presets import Run

Batch = tuple[NDArray[Any], ...]
"""What `Model.loss` takes: the first axis of every array is the row, the last array the targets."""


class Report(Protocol):
    """What a final score says."""

    def to_json(self) -> dict[str, Any]:
        """Every figure by name."""
        ...

    def table(self) -> str:
        """The figures in lines, their units and settings with them."""
        ...


class Task:
    """Batches, a validation loss, something to look at, and a final score."""

    kind: ClassVar[str]
    """What a model must have among its `learns`."""
    unit: ClassVar[str] = "tokens"
    """What its targets are counted in."""
    options: ClassVar[frozenset[str]] = frozenset()
    """What `score` can be told beside the split."""
    foreign: ClassVar[frozenset[str]] = frozenset()
    """Options of a run that mean nothing to it."""

    run: Run
    """The settings."""
    fingerprint: str
    """A hash of the data: a run that is resumed must find the same."""
    description: str
    """One line: what it is."""
    sizes: list[str]
    """A line for each part of it."""
    splits: list[str]
    """The parts that can be scored."""
    given: dict[str, Any]
    """Constructor arguments that the data decides; a model takes those that it knows."""
    tokenizer: Tokenizer | None = None
    """What made the tokens, if it is about tokens."""
    row: int | None = None
    """Tokens of a row, where all rows are of one length."""
    held_out: NDArray[Any] | None = None
    """The first tokens of the validation split, where it is one text: they stay with the run."""

    @classmethod
    def expects(cls, run: Run) -> dict[str, Any]:
        """What `given` will be, as far as it is known before the data is read."""
        return {"vocabulary": _vocabulary(run), "context": run.window}

    @classmethod
    def largest(cls, run: Run, rows: int) -> Batch:
        """Zeros in the shapes of the largest batch of so many rows, known before the data is read."""
        tokens_BT = np.zeros((rows, run.window), np.int64)
        return tokens_BT, tokens_BT

    @classmethod
    def open(cls, run: Run, tokenizer: Tokenizer | None, to_train: bool) -> Self:
        """The task with its data: see `tasks.open_task`."""
        raise NotImplementedError

    def batch(self, index: int) -> Batch:
        """The batch of step `index`: a function of the run's seed and the step alone."""
        raise NotImplementedError

    def follows(self, index: int) -> bool:  # noqa: ARG002 (for those whose batches follow)
        """Whether the rows of this batch go on where those of the one before it ended."""
        return False

    def validate(self, model: Model) -> float:
        """The loss on what is held out, of the same part of it every time."""
        raise NotImplementedError

    def say(self, loss: float) -> str:
        """A validation loss; of a model that predicts tokens, with its perplexity."""
        return f"validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}"

    def sample(self, model: Model, length: int) -> str:
        """Something to look at, at most `length` tokens of it; the same for the same weights."""
        raise NotImplementedError

    def score(self, model: Model, split: str, *, final: bool = False, **options: Any) -> Report:  # noqa: ANN401
        """The whole of a split, scored; `final` with what takes long beside it."""
        raise NotImplementedError


class Feed:
    """A task's batches, each made by a thread while the one before it is learned.

    Args:
        task: Whose batches.
        steps: There is no batch from here on.
        ahead: Whether a thread makes them; else they are made when they are wanted.
    """

    def __init__(self, task: Task, steps: int, ahead: bool) -> None:
        self.task, self.steps = task, steps
        self.thread = ThreadPoolExecutor(1, "batches") if ahead else None
        self.coming: dict[int, Future[Batch]] = {}

    def batch(self, index: int) -> Batch:
        """The batch of step `index`, or the error that making it ended with."""
        if self.thread is None:
            return self.task.batch(index)
        found = self.coming.pop(index, None) or self.thread.submit(self.task.batch, index)
        arrays = found.result()
        if index + 1 < self.steps:
            self.coming = {index + 1: self.thread.submit(self.task.batch, index + 1)}
        return arrays

    def close(self) -> None:
        """End the thread."""
        if self.thread:
            self.thread.shutdown(cancel_futures=True)


def _vocabulary(run: Run) -> int:
    """Tokens of the tokenizer that is there already, or as many as one is to learn."""
    if (Path(run.data) / FILE).is_file():
        return Tokenizer.open(run.data).vocabulary
    given = given_tokenizer(run.tokenizer)
    return given.vocabulary if given else run.vocabulary
