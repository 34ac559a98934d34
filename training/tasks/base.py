"""What a run learns from and is judged by. The trainer knows no more of it than is written here."""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gpt import Model
from tokenizer import Tokenizer
from training.config import TrainingConfig
from training.data.corpus import MANIFEST, load_given_tokenizer

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
    eval_options: ClassVar[frozenset[str]] = frozenset()
    """What `score` can be told beside the split."""
    unsupported_options: ClassVar[frozenset[str]] = frozenset()
    """Options of a run that mean nothing to it."""

    config: TrainingConfig
    """The settings."""
    fingerprint: str
    """A hash of the data: a run that is resumed must find the same."""
    description: str
    """One line: what it is."""
    sizes: list[str]
    """A line for each part of it."""
    splits: list[str]
    """The parts that can be scored."""
    model_args: dict[str, Any]
    """Constructor arguments that the data decides; a model takes those that it knows."""
    tokenizer: Tokenizer | None = None
    """What made the tokens, if it is about tokens."""
    sequence_length: int | None = None
    """Tokens of a row, where all rows are of one length."""
    calibration_tokens: NDArray[Any] | None = None
    """The first tokens of the validation split, where it is one text: they stay with the run."""

    @classmethod
    def expected_model_args(cls, run: TrainingConfig) -> dict[str, Any]:
        """What `given` will be, as far as it is known before the data is read."""
        return {"vocab_size": _vocabulary(run), "context_length": run.context_length}

    @classmethod
    def largest_batch(cls, run: TrainingConfig, rows: int) -> Batch:
        """Zeros in the shapes of the largest batch of so many rows, known before the data is read."""
        tokens_BT = np.zeros((rows, run.context_length), np.int64)
        return tokens_BT, tokens_BT

    @classmethod
    def open(cls, run: TrainingConfig, tokenizer: Tokenizer | None, to_train: bool) -> Self:
        """The task with its data: see `tasks.open_task`."""
        raise NotImplementedError

    def batch(self, index: int) -> Batch:
        """The batch of step `index`: a function of the run's seed and the step alone."""
        raise NotImplementedError

    def continues_previous(self, index: int) -> bool:  # noqa: ARG002 (for those whose batches follow)
        """Whether the rows of this batch go on where those of the one before it ended."""
        return False

    def validate(self, model: Model) -> float:
        """The loss on what is held out, of the same part of it every time."""
        raise NotImplementedError

    def format_loss(self, loss: float) -> str:
        """A validation loss; of a model that predicts tokens, with its perplexity."""
        return f"validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}"

    def sample(self, model: Model, length: int) -> str:
        """Something to look at, at most `length` tokens of it; the same for the same weights."""
        raise NotImplementedError

    def score(self, model: Model, split: str, *, final: bool = False, **options: Any) -> Report:  # noqa: ANN401
        """The whole of a split, scored; `final` with what takes long beside it."""
        raise NotImplementedError


class Prefetcher:
    """A task's batches, each made by a thread while the one before it is learned.

    Args:
        task: Whose batches.
        steps: There is no batch from here on.
        enabled: Whether a thread makes them; else they are made when they are wanted.
    """

    def __init__(self, task: Task, steps: int, enabled: bool) -> None:
        self.task, self.steps = task, steps
        self.thread = ThreadPoolExecutor(1, "batches") if enabled else None
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


def _vocabulary(run: TrainingConfig) -> int:
    """Tokens of the tokenizer that is there already, or as many as one is to learn."""
    if (Path(run.data) / MANIFEST).is_file():
        return Tokenizer.load(run.data).vocab_size
    given = load_given_tokenizer(run.tokenizer)
    return given.vocab_size if given else run.vocab_size
