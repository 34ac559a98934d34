"""Regression and classification on the tables of `training.tasks.tables`."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from gpt import Model
from tokenizer import Tokenizer
from training.config import TrainingConfig
from training.evaluation.evaluate import inference_mode
from training.tasks.base import Batch, Task
from training.tasks.tables import (
    BINARY_CLASSIFICATION_TABLES,
    CLASSIFICATION_TABLES,
    REGRESSION_TABLES,
    Table,
    Tables,
)

TEXT_OPTIONS = (
    "data data_config data_split text_column streaming data_limit tokenizer vocab_size "
    "init_embedding languages context_length stateful gradient_accumulation_steps eval_tokens"
)
"""Options that apply only to tasks on text."""

MAX_LISTED_WEIGHTS = 40
"""Reports list all weights of a model that has at most this many."""


@dataclass(frozen=True)
class TableScore:
    """Figures of a model on each split of a table, with example predictions on one of them.

    Args:
        split: The split that was requested.
        loss_name: Name of the loss.
        figures: Figures by name, for each split.
        examples: Rows of the requested split with the model's predictions, as text.
        weights: The model's parameters by name, if they are few.
    """

    split: str
    loss_name: str
    figures: dict[str, dict[str, float]]
    examples: list[str]
    weights: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the figures of the requested split, then `<split>_<name>` of all splits."""
        prefixed = {
            f"{split}_{name}": value
            for split, figures in self.figures.items()
            for name, value in figures.items()
        }
        return {**self.figures[self.split], **prefixed}

    def table(self) -> str:
        """Return the figures, examples and weights as lines of text."""
        lines = [f"loss: {self.loss_name}"]
        for split, figures in self.figures.items():
            columns = "  ".join(f"{name} {value:<9.3g}" for name, value in figures.items())
            lines.append(f"  {split:<12}{columns}".rstrip())
        lines += [
            f"{self.split}, in brackets the true value:",
            *(f"  {it}" for it in self.examples),
        ]
        if self.weights:
            lines += ["weights:", *(f"  {name}: {it}" for name, it in self.weights.items())]
        return "\n".join(lines)


class TabularTask(Task):
    """Prediction of a target from the numbers of a row.

    Args:
        config: The run's options; batch size and seed determine the batches.
        table: The rows.
    """

    unit: ClassVar[str] = "rows"
    unsupported_options: ClassVar[frozenset[str]] = frozenset(TEXT_OPTIONS.split())
    tables: ClassVar[Tables]
    loss_name: ClassVar[str]

    def __init__(self, config: TrainingConfig, table: Table) -> None:
        self.config, self.table = config, table
        self.description = table.description
        self.splits = list(table.splits)
        self.sizes = [f"{name}: {len(y_B):,} rows" for name, (_, y_B) in table.splits.items()]
        x_BD, _ = table.splits["train"]
        self.model_args = {"inputs": x_BD.shape[1], "classes": len(table.classes)}
        digest = hashlib.sha256()
        for rows in table.splits.values():
            for tensor in rows:
                digest.update(tensor.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def expected_model_args(cls, config: TrainingConfig) -> dict[str, Any]:
        """Return `model_args`; the data needs no reading."""
        return cls.open(config, None, for_training=False).model_args

    @classmethod
    def open(cls, config: TrainingConfig, tokenizer: Tokenizer | None, for_training: bool) -> Self:  # noqa: ARG003
        """Make the table of the run's task and seed."""
        return cls(config, cls.tables[config.task](config.seed))

    @classmethod
    def largest_batch(cls, config: TrainingConfig, batch_size: int) -> Batch:
        """Return the first batch; the data needs no reading."""
        config = dataclasses.replace(config, batch_size=batch_size)
        return cls.open(config, None, for_training=True).batch(0)

    def batch(self, index: int) -> Batch:
        """Return (x_BD, y_B): the next rows of a shuffled epoch, or all rows if `batch_size` is larger."""
        x_BD, y_B = self.table.splits["train"]
        batch_size = min(self.config.batch_size, len(y_B))
        epoch, position = divmod(index, len(y_B) // batch_size)
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(y_B))
        rows = order[position * batch_size : (position + 1) * batch_size]
        return x_BD.numpy()[rows], y_B.numpy()[rows]

    def validate(self, model: Model) -> float:
        """Return the loss on the validation split."""
        return self._evaluate(model, "validation")["loss"]

    def format_loss(self, loss: float) -> str:
        """Return a validation loss as text, with its name."""
        return f"validation: {self.loss_name} {loss:.3g}"

    def sample(self, model: Model, length: int) -> str:
        """Return predictions for some rows of each split but the training split."""
        if not length:
            return ""
        return "\n".join(
            line for split in self.splits[1:] for line in self._examples(model, split, 4)
        )

    def score(self, model: Model, split: str, *, final: bool = False, **options: Any) -> TableScore:  # noqa: ANN401, ARG002
        """Score every split, with example predictions for the requested one."""
        parameters = dict(model.named_parameters())
        num_weights = sum(weight.numel() for weight in parameters.values())
        weights = (
            {name: _round(weight.tolist()) for name, weight in parameters.items()}
            if num_weights <= MAX_LISTED_WEIGHTS
            else {}
        )
        figures = {name: self._evaluate(model, name) for name in self.splits}
        return TableScore(split, self.loss_name, figures, self._examples(model, split, 12), weights)

    def _evaluate(self, model: Model, split: str) -> dict[str, float]:
        """Return the figures of a split by name."""
        return {"loss": _call(model, model.loss, *self.table.splits[split]).item()}

    def _examples(self, model: Model, split: str, max_rows: int) -> list[str]:
        """Return evenly spaced rows of a split as text, each with its prediction and true value."""
        x_BD, y_B = self.table.splits[split]
        rows = torch.linspace(0, len(y_B) - 1, min(max_rows, len(y_B))).long()
        outputs = _call(model, model, x_BD[rows])
        return [
            f"{self.table.describe_inputs(*x)}: {self._format_output(output)} ({self._format_target(y)})"
            for x, output, y in zip(x_BD[rows].tolist(), outputs, y_B[rows].tolist(), strict=True)
        ]

    def _format_output(self, output: Tensor) -> str:
        """Return the model's output for one row as text."""
        raise NotImplementedError

    def _format_target(self, y: float) -> str:
        """Return the true value of a row as text."""
        raise NotImplementedError


class Regression(TabularTask):
    """Prediction of a number."""

    kind: ClassVar[str] = "regression"
    loss_name: ClassVar[str] = "mean squared error"
    tables: ClassVar[Tables] = REGRESSION_TABLES

    def _format_output(self, output: Tensor) -> str:
        return f"{output.item():.4g}{self.table.unit}"

    def _format_target(self, y: float) -> str:
        return f"{y:.4g}"


class Classification(TabularTask):
    """Prediction of a class."""

    kind: ClassVar[str] = "classification"
    loss_name: ClassVar[str] = "cross-entropy in nats"
    tables: ClassVar[Tables] = CLASSIFICATION_TABLES

    def _evaluate(self, model: Model, split: str) -> dict[str, float]:
        x_BD, class_B = self.table.splits[split]
        predictions = (_probabilities(output).argmax() for output in _call(model, model, x_BD))
        correct = sum(prediction == y for prediction, y in zip(predictions, class_B, strict=True))
        return {**super()._evaluate(model, split), "accuracy": int(correct) / len(class_B)}

    def _format_output(self, output: Tensor) -> str:
        p_V = _probabilities(output)
        return f"{self._format_target(p_V.argmax().item())}, {p_V.max():.0%} sure"

    def _format_target(self, y: float) -> str:
        return self.table.classes[int(y)]


class BinaryClassification(Classification):
    """Prediction of one of two classes."""

    kind: ClassVar[str] = "binary-classification"
    tables: ClassVar[Tables] = BINARY_CLASSIFICATION_TABLES


TABULAR_TASKS: dict[str, type[TabularTask]] = {
    name: task
    for task in (Regression, BinaryClassification, Classification)
    for name in task.tables
}
"""The tasks of this file by table name."""


def _probabilities(output: Tensor) -> Tensor:
    """Return p_V of each class; a scalar output is the probability of class 1."""
    return output if output.ndim else torch.stack([1 - output, output])


def _call(model: Model, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call a function of the model on its device in evaluation mode; return the result on the CPU."""
    with inference_mode(model) as device:
        return function(*(tensor.to(device) for tensor in tensors)).cpu()


def _round(numbers: Any) -> Any:  # noqa: ANN401 (nested lists of numbers)
    """Round numbers to three decimals."""
    if isinstance(numbers, list):
        return [_round(number) for number in numbers]
    return round(numbers, 3) + 0.0  # turns -0.0 into 0.0
