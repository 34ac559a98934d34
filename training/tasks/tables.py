"""Regression and classification on the chapters' own small datasets: tables of numbers.

    basketball       power of a shot from its distance: ten meters need fifty
    white-rice       cups of water for cups of white rice: y = 2x
    rice             white and brown rice: y = 2x at low darkness, 3x at high darkness
    grains           with franken-grain, the darkest, y = x: no smooth law fits all three
    lines            five random lines, and which of them applies
    square           x^2 + 1
    cubic            x^3 - 2x^2 + 1
    sine             sin 2x
    white-or-brown   which of two rices, from measured cups of rice and water
    which-grain      which of three grains, from a measured darkness
    digits           which of ten handwritten digits, from 8 x 8 pixels (scikit-learn's load_digits)

Each has rows to train on and, for validation, rows between them. Where the law continues, rows
beyond the range of training tell a model that learned it from one that interpolates.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from gpt import Model
from tokenizer import Tokenizer
from training.config import TrainingConfig
from training.evaluation.evaluate import inference_mode
from training.tasks.base import Batch, Task

TEXT_OPTIONS = (
    "data data_config data_revision data_split text_column streaming data_limit "
    "drop_duplicates tokenizer vocab_size end_of_text "
    "init_embedding languages context_length stateful gradient_accumulation_steps eval_tokens "
    "label_smoothing"
)
"""Options that apply only to tasks on text."""

MAX_LISTED_WEIGHTS = 40
"""Reports write out a model that has at most this many weights."""
MAX_EXAMPLES = 4
"""Rows of a split that reports and samples show."""
SPLIT_NOTES = {"beyond": "beyond the range of training", "franken": "a grain it has not seen"}

Rows = tuple[Tensor, Tensor]
"""x_BD in float32 and y_B: numbers in float32, or classes in int64."""


@dataclass(frozen=True)
class Table:
    """A small dataset."""

    description: str
    splits: dict[str, Rows]
    """Rows of `train`, `validation`, and those beyond the range of training, by name."""
    describe_inputs: Callable[..., str]
    """Formats the inputs of a row as text."""
    unit: str = ""
    """Unit of the targets, with a leading space."""
    classes: tuple[str, ...] = ()
    """Names of the classes, if the targets are classes."""
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the inputs are, by the letters that they have in equations; empty if they are many."""


class Grain(NamedTuple):
    """A kind of grain."""

    name: str
    darkness: float
    water: float
    """Cups of water per cup of grain."""


WHITE = Grain("white rice", 0.0, 2.0)
BROWN = Grain("brown rice", 0.5, 3.0)
FRANKEN = Grain("franken-grain", 1.0, 1.0)
GRAINS = WHITE, BROWN, FRANKEN

CUPS = torch.linspace(1, 5, 9)
TEN = torch.tensor([10.0])

CURVES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "square": ("x^2 + 1", lambda x: x**2 + 1),
    "cubic": ("x^3 - 2x^2 + 1", lambda x: x**3 - 2 * x**2 + 1),
    "sine": ("sin 2x", lambda x: torch.sin(2 * x)),
}
"""Formula and function of each curve."""


def grain_rows(cups_B: Tensor, *grains: Grain) -> Rows:
    """Return cups and darkness of each grain, and the cups of water they need."""
    x_BD = torch.cat([torch.stack([cups_B, cups_B * 0 + grain.darkness], -1) for grain in grains])
    return x_BD, torch.cat([grain.water * cups_B for grain in grains])


def five_lines(seed: int, x_B: Tensor) -> Rows:
    """Return x, z and y of five lines of random slope and intercept; z, from -1 to 1, selects one."""
    slope, intercept = 4 * torch.rand(2, 5, generator=torch.Generator().manual_seed(seed)) - 2
    line_B = torch.arange(5).repeat_interleave(len(x_B))
    x_B = x_B.repeat(5)
    return torch.stack([x_B, line_B / 2 - 1], -1), slope[line_B] * x_B + intercept[line_B]


def _describe_cups(cups: float, darkness: float = WHITE.darkness) -> str:
    """Format a row of `grain_rows`; the grain is the one of the nearest darkness."""
    grain = min(GRAINS, key=lambda grain: abs(grain.darkness - darkness))
    return f"{cups:g} {'cup' if cups == 1 else 'cups'} of {grain.name}"


def _law(rows: Callable[[Tensor], Rows], train_B: Tensor, beyond_B: Tensor) -> dict[str, Rows]:
    """Return the splits of a law: rows at the points of training, midway between, and beyond."""
    between_B = (train_B[1:] + train_B[:-1]) / 2
    points = {"train": train_B, "validation": between_B, "beyond": beyond_B}
    return {split: rows(x_B) for split, x_B in points.items()}


def _basketball(_: int) -> Table:
    # In the chapter, the arm has a base strength of 5, and a shot of 10 meters takes 50.
    return Table(
        "basketball: the power of a shot from its distance",
        _law(lambda x_B: (x_B.unsqueeze(-1), 4.5 * x_B + 5), torch.arange(1.0, 9.0), TEN),
        lambda meters: f"{meters:g} meters",
        " units of power",
        inputs={"x": "meters"},
    )


def _water(description: str, splits: dict[str, Rows]) -> Table:
    x_BD, _ = splits["train"]
    inputs = dict([("x", "cups"), ("z", "darkness")][: x_BD.shape[1]])
    return Table(description, splits, _describe_cups, " cups of water", inputs=inputs)


def _white_rice(_: int) -> Table:
    return _water(
        "white rice: cups of water to cups of it",
        _law(lambda cups_B: (cups_B.unsqueeze(-1), WHITE.water * cups_B), CUPS, TEN),
    )


def _rice(_: int) -> Table:
    splits = _law(lambda cups_B: grain_rows(cups_B, WHITE, BROWN), CUPS, TEN)
    return _water(
        "white and brown rice: cups of water to cups and darkness",
        splits | {"franken": grain_rows(torch.ones(1), FRANKEN)},
    )


def _grains(_: int) -> Table:
    return _water(
        "white rice, brown rice and franken-grain: cups of water to cups and darkness",
        _law(lambda cups_B: grain_rows(cups_B, *GRAINS), CUPS, TEN),
    )


def _lines(seed: int) -> Table:
    beyond_B = torch.linspace(1.5, 3, 4)
    beyond_B = torch.cat([-beyond_B.flip(0), beyond_B])
    return Table(
        "five random lines, and a z that selects one of them",
        _law(lambda x_B: five_lines(seed, x_B), torch.linspace(-1, 1, 10), beyond_B),
        lambda x, z: f"x = {x:.3g} on the line of z = {z:g}",
        inputs={"x": "", "z": "selects the line"},
    )


def _curve(name: str, _: int) -> Table:
    formula, curve = CURVES[name]
    x_B, beyond_B = torch.linspace(-1.5, 2.5, 60), torch.linspace(3, 4, 3)
    return Table(
        f"the curve {formula}",
        _law(lambda x_B: (x_B.unsqueeze(-1), curve(x_B)), x_B, beyond_B),
        lambda x: f"x = {x:.3g}",
        inputs={"x": ""},
    )


def _white_or_brown(seed: int) -> Table:
    generator = torch.Generator().manual_seed(seed)

    def measure(rows_per_class: int) -> Rows:
        cups_B = 1 + 4 * torch.rand(rows_per_class, generator=generator)
        x_BD, water_B = grain_rows(cups_B, WHITE, BROWN)
        water_B = water_B + 0.5 * torch.randn(len(water_B), generator=generator)
        class_B = torch.arange(2).repeat_interleave(rows_per_class)
        return torch.stack([x_BD[:, 0], water_B], -1), class_B

    return Table(
        "white or brown: the rice that was cooked, from cups of it and of water",
        {"train": measure(100), "validation": measure(500)},
        lambda cups, water: f"{cups:.1f} cups in {water:.1f} cups of water",
        classes=(WHITE.name, BROWN.name),
        inputs={"x": "cups", "w": "cups of water"},
    )


def _which_grain(seed: int) -> Table:
    generator = torch.Generator().manual_seed(seed)

    def measure(rows_per_class: int) -> Rows:
        class_B = torch.arange(len(GRAINS)).repeat_interleave(rows_per_class)
        darkness_B = torch.tensor([grain.darkness for grain in GRAINS])[class_B]
        darkness_B = darkness_B + 0.15 * torch.randn(len(class_B), generator=generator)
        return darkness_B.clamp(0, 1).unsqueeze(-1), class_B

    return Table(
        "which of three grains, from its measured darkness",
        {"train": measure(100), "validation": measure(500)},
        lambda darkness: f"darkness {darkness:.2f}",
        classes=tuple(grain.name for grain in GRAINS),
        inputs={"z": "darkness"},
    )


def digit_rows() -> dict[str, Rows]:
    """Return the pixels, 0 to 1, and classes of handwritten digits; the last fifth is `validation`.

    The rows are in the order of the people who wrote them, so most writers of `validation` are new.
    """
    from sklearn.datasets import load_digits  # takes a second to import

    images = load_digits()
    x_BD, class_B = torch.tensor(images.data / 16).float(), torch.tensor(images.target).long()
    split = {"train": slice(0, -360), "validation": slice(-360, None)}
    return {name: (x_BD[rows], class_B[rows]) for name, rows in split.items()}


def _digits(_: int) -> Table:
    return Table(
        "handwritten digits of 8 x 8 pixels",
        digit_rows(),
        lambda *pixels: f"{sum(pixels) / len(pixels):.0%} of the paper inked",
        classes=tuple("0123456789"),
    )


Tables = dict[str, Callable[[int], Table]]
"""Functions by table name that make a table from a seed."""

REGRESSION_TABLES: Tables = {
    "basketball": _basketball,
    "white-rice": _white_rice,
    "rice": _rice,
    "grains": _grains,
    "lines": _lines,
    **{name: functools.partial(_curve, name) for name in CURVES},
}
BINARY_CLASSIFICATION_TABLES: Tables = {"white-or-brown": _white_or_brown}
CLASSIFICATION_TABLES: Tables = {"which-grain": _which_grain, "digits": _digits}


@dataclass(frozen=True)
class TableScore:
    """Figures of a model on each split of a table, example predictions, and the model written out."""

    split: str
    """The split that was requested."""
    loss_name: str
    figures: dict[str, dict[str, float]]
    """Figures by name, for each split."""
    examples: dict[str, list[str]]
    """Rows with the model's predictions: of the requested split, and those not trained on."""
    formulas: list[str]
    """The model as equations, if its weights are few."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures of the requested split, then `<split>_<name>` of all splits."""
        prefixed = {
            f"{split}_{name}": value
            for split, figures in self.figures.items()
            for name, value in figures.items()
        }
        return {**self.figures[self.split], **prefixed}

    def table(self) -> str:
        """Return the figures, examples and equations as lines of text."""
        lines = [f"loss: {self.loss_name}"]
        for split, figures in self.figures.items():
            columns = "  ".join(f"{name} {value:<9.3g}" for name, value in figures.items())
            lines.append(f"  {split:<12}{columns}".rstrip())
        lines.append("predictions, in brackets the true value:")
        for split, examples in self.examples.items():
            names = itertools.chain([split], itertools.repeat(""))
            lines += [f"  {name:<12}{row}" for name, row in zip(names, examples, strict=False)]
        if self.formulas:
            lines += ["the model:", *(f"  {formula}" for formula in self.formulas)]
        return "\n".join(lines)


class TabularTask(Task):
    """Prediction of a target from the numbers of a row."""

    unit = "rows"
    unsupported_options = frozenset(TEXT_OPTIONS.split())
    sample_in_report = True
    tables: ClassVar[Tables]
    loss_name: ClassVar[str]

    def __init__(self, config: TrainingConfig, table: Table) -> None:
        self.config, self.table = config, table
        self.description = table.description
        self.splits = list(table.splits)
        self.sizes = []
        for name, (_, y_B) in table.splits.items():
            note = f", {SPLIT_NOTES[name]}" if name in SPLIT_NOTES else ""
            self.sizes.append(f"{name}: {len(y_B):,} {'row' if len(y_B) == 1 else 'rows'}{note}")
        x_BD, _ = table.splits["train"]
        self.model_args = {"inputs": x_BD.shape[1], "classes": len(table.classes)}
        tensors = itertools.chain.from_iterable(table.splits.values())
        data = b"".join(tensor.numpy().tobytes() for tensor in tensors)
        self.fingerprint = hashlib.sha256(data).hexdigest()

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
        splits = self.splits[1:] if length else []
        examples = (self._examples(model, split) for split in splits)
        return "\n".join(itertools.chain.from_iterable(examples))

    def score(self, model: Model, split: str, **options: Any) -> TableScore:  # noqa: ANN401, ARG002
        """Score every split; predict rows of the requested one and of those not trained on."""
        figures = {name: self._evaluate(model, name) for name in self.splits}
        shown = dict.fromkeys([split, *self.splits[1:]])
        examples = {name: self._examples(model, name) for name in shown}
        return TableScore(split, self.loss_name, figures, examples, self._formulas(model))

    def _formulas(self, model: Model) -> list[str]:
        """Return the model written out, and what its letters mean; nothing if it is too large."""
        num_weights = sum(weight.numel() for weight in model.parameters())
        if num_weights > MAX_LISTED_WEIGHTS or not self.table.inputs:
            return []
        units = [*self.table.inputs.items(), ("y", self.table.unit.strip())]
        letters = [f"{letter}: {meaning}" for letter, meaning in units if meaning]
        formulas = model.formulas(list(self.table.inputs), self.table.classes)
        return formulas + [f"({', '.join(letters)})"] * bool(letters)

    def _evaluate(self, model: Model, split: str) -> dict[str, float]:
        """Return the figures of a split by name."""
        return {"loss": _call(model, model.loss, *self.table.splits[split]).item()}

    def _examples(self, model: Model, split: str) -> list[str]:
        """Return evenly spaced rows of a split as text, each with its prediction and true value."""
        x_BD, y_B = self.table.splits[split]
        rows = torch.linspace(0, len(y_B) - 1, min(MAX_EXAMPLES, len(y_B))).long()
        outputs = _call(model, model, x_BD[rows])
        return [
            f"{self.table.describe_inputs(*x)}: {self._format_output(output)} ({self._format_target(y)})"
            for x, output, y in zip(x_BD[rows].tolist(), outputs, y_B[rows].tolist(), strict=True)
        ]

    def _format_output(self, output: Tensor) -> str:
        """Return the model's output for one row as text."""
        return f"{output.item():.4g}{self.table.unit}"

    def _format_target(self, y: float) -> str:
        """Return the true value of a row as text."""
        return f"{y:.4g}"


class Regression(TabularTask):
    """Prediction of a number."""

    kind = "regression"
    loss_name = "mean squared error"
    tables = REGRESSION_TABLES


class Classification(TabularTask):
    """Prediction of a class."""

    kind = "classification"
    loss_name = "cross-entropy in nats"
    tables = CLASSIFICATION_TABLES

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

    kind = "binary-classification"
    tables = BINARY_CLASSIFICATION_TABLES


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
