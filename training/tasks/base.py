"""The interface of a training task: batches, also made ahead, a validation loss, samples, a score."""

import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gpt import Model
from tokenizer import Tokenizer
from training.config import TrainingConfig
from training.data.mixture import prepared_source
from training.data.sources import resolve_tokenizer
from training.presets import PRESETS

Batch = tuple[NDArray[Any], ...]
"""The arguments of `Model.loss`: axis 0 of every array is the row, the last array holds the targets."""


TEXT_OPTIONS = (
    *("data_config", "data_revision", "data_split", "text_column", "streaming", "shuffle_buffer"),
    *("data_limit", "drop_duplicates", "tokenizer", "vocab_size", "end_of_text"),
)
"""Options about text and how to tokenize it: none of them applies to prepared tokens."""


def refuse_text_option(data: str, name: str) -> NoReturn:
    """Raise the ValueError for one of `TEXT_OPTIONS` that was given with prepared tokens."""
    option = name.replace("_", "-")
    raise ValueError(
        f"{data} holds prepared tokens, which are used as they are: leave out --{option}, or give "
        "the text itself as --data"
    )


def check_text_options(config: TrainingConfig, tokenizer: Tokenizer) -> None:
    """Raise a ValueError for an option that the config's prepared tokens, by `tokenizer`, cannot honor.

    An option that equals the preset's was not given.
    """
    preset = PRESETS.get(config.preset, TrainingConfig())
    for name in TEXT_OPTIONS:
        value = getattr(config, name)
        if value == getattr(preset, name) or (name, value) == ("vocab_size", tokenizer.vocab_size):
            continue
        given = resolve_tokenizer(value, config.end_of_text) if name == "tokenizer" else None
        if given is None or given.fingerprint != tokenizer.fingerprint:
            refuse_text_option(prepared_source(config.data) or config.data, name)


class Report(Protocol):
    """The result of `Task.score`."""

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name."""

    def table(self) -> str:
        """Return the figures as lines of text, with their units and settings."""


class Task:
    """What a run trains on and is evaluated by; the trainer knows tasks only by this interface."""

    kind: ClassVar[str]
    """Kind of batches; a model that can learn the task has it in its `supported_tasks`."""
    unit: ClassVar[str] = "tokens"
    """Unit in which targets are counted."""
    eval_options: ClassVar[frozenset[str]] = frozenset()
    """Options of `score` besides the split."""
    unsupported_options: ClassVar[frozenset[str]] = frozenset()
    """Fields of `TrainingConfig` that do not apply to the task."""
    sample_in_report: ClassVar[bool] = False
    """Whether reports hold what `sample` returns."""

    config: TrainingConfig
    fingerprint: str
    """A hash of the data; it must not change when a run is resumed."""
    description: str
    """One line about the data."""
    sizes: list[str]
    """One line about the size of each split."""
    splits: list[str]
    """Names of the splits that can be scored."""
    model_args: dict[str, Any]
    """Constructor arguments that the data determines; a model takes those that it knows."""
    tokenizer: Tokenizer | None = None
    """The tokenizer of the data, if the data is tokens."""
    sequence_length: int | None = None
    """Tokens of a row, if all rows have the same length."""
    source_losses: Mapping[str, float] = MappingProxyType({})
    """The loss of each source of a mixture at the last validation."""
    calibration_tokens: NDArray[Any] | None = None
    """The first tokens of the validation split, if it is text; they are saved with the run."""

    @classmethod
    def expected_model_args(cls, config: TrainingConfig) -> dict[str, Any]:
        """Return `model_args` as far as they are known before the data is read."""
        tokenizer: Tokenizer | None
        if prepared := prepared_source(config.data):
            tokenizer = Tokenizer.load(Path(prepared).expanduser())
            check_text_options(config, tokenizer)
        else:
            tokenizer = resolve_tokenizer(config.tokenizer, config.end_of_text)
        vocab_size = tokenizer.vocab_size if tokenizer else config.vocab_size
        return {"vocab_size": vocab_size, "context_length": config.context_length}

    @classmethod
    def largest_batch(cls, config: TrainingConfig, batch_size: int) -> Batch:
        """Return zeros in the shapes of the largest batch of `batch_size` rows, without reading data."""
        tokens_BT = np.zeros((batch_size, config.context_length), np.int64)
        return tokens_BT, tokens_BT

    @classmethod
    def open(cls, config: TrainingConfig, tokenizer: Tokenizer | None, for_training: bool) -> Self:
        """Open the task with its data; see `training.tasks.open_task`."""
        raise NotImplementedError

    def batch(self, index: int) -> Batch:
        """Return the batch of step `index`, a function of the run's seed and `index` alone."""
        raise NotImplementedError

    def continues_previous(self, index: int) -> bool:  # noqa: ARG002 (for stateful training)
        """Return whether the rows of batch `index` continue those of the batch before it."""
        return False

    def validate(self, model: Model) -> float:
        """Return the loss on a part of the validation split, the same part at every call."""
        raise NotImplementedError

    def format_loss(self, loss: float) -> str:
        """Return a validation loss as text, with its perplexity if the model predicts tokens."""
        sources = "; ".join(f"{name} {value:.4f}" for name, value in self.source_losses.items())
        perplexity = math.exp(min(loss, 700))
        return f"validation loss {loss:.4f}, perplexity {perplexity:.2f}" + (
            f" ({sources})" if sources else ""
        )

    def sample(self, model: Model, length: int) -> str:
        """Return an example of the model's output, at most `length` tokens; deterministic."""
        raise NotImplementedError

    def score(self, model: Model, split: str, *, final: bool = False, **options: Any) -> Report:  # noqa: ANN401
        """Score all of a split; if `final`, add figures that take long to compute.

        The options are those in `eval_options`.
        """
        raise NotImplementedError


class Prefetcher:
    """The first `steps` batches of a task, one prepared ahead; if not enabled, made on request."""

    def __init__(self, task: Task, steps: int, enabled: bool) -> None:
        self.task, self.steps = task, steps
        self.executor = ThreadPoolExecutor(1, "batches") if enabled else None
        self.pending: dict[int, Future[Batch]] = {}

    def batch(self, index: int) -> Batch:
        """Return the batch of step `index`, or raise the error of making it."""
        if self.executor is None:
            return self.task.batch(index)
        future = self.pending.pop(index, None) or self.executor.submit(self.task.batch, index)
        batch = future.result()
        if index + 1 < self.steps:
            self.pending = {index + 1: self.executor.submit(self.task.batch, index + 1)}
        return batch

    def close(self) -> None:
        """Stop the thread."""
        if self.executor:
            self.executor.shutdown(cancel_futures=True)
