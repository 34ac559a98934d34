"""A training run's options as one frozen dataclass, and the command line that is made from it.

The options of a model are its constructor's arguments.
"""

import dataclasses
import inspect
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from gpt.checkpoint import constructor_arguments, model_class
from gpt.cli import MaybeInt, MaybeText

PresetOnly: Any = tyro.conf.Suppress
"""Chosen by the preset, not on the command line."""


@dataclass(frozen=True)
class TrainingConfig:
    """All that decides what a training run does."""

    preset: Annotated[str, PresetOnly] = ""
    model: Annotated[str, PresetOnly] = "gpt"
    model_args: Annotated[dict[str, Any], PresetOnly] = field(default_factory=dict)

    task: str = "text"
    """What to learn: text, vectors (of words), pairs (translation), or one of the small tables of numbers."""
    data: str = "stdlib"
    """Corpus: `stdlib` (this Python's standard library), a file (.txt .jsonl .csv .parquet, also compressed), a folder, or a hub name such as roneneldan/TinyStories."""
    data_config: MaybeText = None
    """Configuration of a hub dataset that has several."""
    data_split: MaybeText = None
    """Split to train on, in datasets' own notation; `train` when not given."""
    text_column: MaybeText = None
    """Column that holds the text; found by itself when it is `text` or the only one of strings."""
    languages: MaybeText = None
    """Of sentence pairs: from which to which, like en-fr; the first two in the data when not given."""
    streaming: bool = False
    """Read a hub dataset without storing a copy of its text."""
    data_limit: MaybeInt = None
    """Read at most this many bytes of text from each split."""
    tokenizer: str = "bpe"
    """`bpe`: learn byte pairs on the training split; `words`: its most frequent words; `characters`: the same of characters; `bytes`: one token a byte; or a tokenizer.json or a run to take it from."""
    vocab_size: int = 4096
    """Number of tokens that `bpe`, `words` or `characters` learns, at most."""
    init_embedding: MaybeText = None
    """Begin with the embedding of this run, of the same tokenizer: of word2vec, say."""

    steps: int = 640
    """Optimizer steps."""
    batch_size: int = 16
    """Rows of one step."""
    context_length: int = 256
    """Tokens of one row: the context of the model."""
    stateful: bool = False
    """Let each row go on where it ended in the step before, and carry the model's state on."""
    gradient_accumulation_steps: int = 1
    """Parts that a batch is computed in, one after the other: the same step in less memory."""
    optimizer: Literal["muon", "adamw", "sgd"] = "muon"
    """What moves the hidden matrices; AdamW moves all the rest, but sgd moves everything."""
    learning_rate: float = 0.02
    """Peak rate of the hidden matrices; it and the next three follow --batch-size, --context-length and --width where not given."""
    embedding_lr: float = 0.1
    """Peak rate of the embeddings."""
    unembedding_lr: float = 0.008
    """Peak rate of the unembedding."""
    vector_lr: float = 0.01
    """Peak rate of norms and biases."""
    weight_decay: float = 0.0
    """Decay of the hidden matrices, a share of the rate."""
    embedding_weight_decay: float = 0.0
    """The same of embeddings and unembedding."""
    beta1: float = 0.9
    """AdamW's memory of the gradient."""
    beta2: float = 0.95
    """AdamW's memory of its square."""
    warmup_steps: int = 20
    """Steps over which the rates rise."""
    cooldown_fraction: float = 0.6
    """Last share of the steps, over which the rates fall."""
    final_lr_fraction: float = 0.0
    """Share of the peak rate at the end."""
    cosine_decay: bool = False
    """Cool down along half a cosine instead of linearly."""
    step_decays: int = 0
    """Cool down by halving the rates so many times instead of linearly."""
    grad_clip: float = 1.0
    """Longest gradient allowed; 0 switches clipping off."""

    eval_interval: int = 100
    """Steps between validations."""
    eval_tokens: int = 32_768
    """Tokens of the validation split that are scored at each; the end scores them all."""
    checkpoint_interval: int = 100
    """Steps between checkpoints."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_tokens: int = 40
    """Length of the sample of text at each validation; 0 for none."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl."""
    seed: int = 0
    """Of the first weights, the order of the data and dropout."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; auto is bfloat16 where the device is fast at it."""
    fsdp: bool = False
    """Divide the model and its optimizer among the processes that torchrun starts (FSDP2), where one device cannot hold them."""
    compile: bool = False
    """Compile the model: slow to start, then faster. Needs a C++ compiler on CPU."""

    def __post_init__(self) -> None:
        at_least_1 = (
            "steps batch_size context_length gradient_accumulation_steps vocab_size eval_interval eval_tokens "
            "checkpoint_interval log_interval"
        )
        for name in at_least_1.split():
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        at_least_0 = "warmup_steps sample_tokens seed weight_decay embedding_weight_decay grad_clip step_decays"
        for name in at_least_0.split():
            _check(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "embedding_lr", "unembedding_lr", "vector_lr"):
            _check(self, name, 0 < getattr(self, name) < math.inf, "above 0")
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("cooldown_fraction", "final_lr_fraction"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        _check(self, "data_limit", self.data_limit is None or self.data_limit > 0, "at least 1")
        if self.step_decays and self.final_lr_fraction:
            raise ValueError(
                "--step-decays decides the rate at the end: leave out --final-lr-fraction"
            )
        if self.step_decays and self.cosine_decay:
            raise ValueError(
                "--step-decays and --cosine-decay are two ways to cool down: leave one out"
            )
        if self.stateful and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "--stateful takes a batch at once: leave out --gradient-accumulation-steps"
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"--batch-size {self.batch_size} cannot be divided into --gradient-accumulation-steps {self.gradient_accumulation_steps} "
                "equal parts"
            )


def _check(run: TrainingConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        option = name.replace("_", "-")
        raise ValueError(f"--{option} must be {expected}, not {getattr(run, name)}")


DECIDED = ("vocab_size", "context_length", "inputs", "classes")
"""Arguments of a model that its task decides."""
UNTYPED = ("products",)
"""Arguments of a shape that a command line does not have."""

RATES = ("learning_rate", "embedding_lr", "unembedding_lr", "vector_lr")


def scale_learning_rates(run: TrainingConfig, chosen: TrainingConfig) -> TrainingConfig:
    """The run with rates that follow its batch and its width, where they are still those of `chosen`.

    With more tokens in a batch its gradient is less by chance: all rates grow with the root of
    their number (Malladi et al. 2022). The unembedding adds up as many terms as the model is wide:
    its rate falls as the width grows; so does that of hidden matrices that AdamW moves, but not of
    those that Muon moves, whose steps have one size at any width (Yang et al. 2022, 2023). SGD has no
    such rule. Both runs must name all arguments of their model.
    """
    if run.optimizer == "sgd":
        return run
    batch = (
        run.batch_size * run.context_length / (chosen.batch_size * chosen.context_length)
    ) ** 0.5
    width = run.model_args.get("width", 1) / chosen.model_args.get("width", 1)
    shares = dict.fromkeys(RATES, batch)
    shares["unembedding_lr"] /= width
    if run.optimizer == "adamw":
        shares["learning_rate"] /= width
    changes: dict[str, Any] = {
        name: float(f"{getattr(run, name) * share:.4g}")
        for name, share in shares.items()
        if share != 1 and getattr(run, name) == getattr(chosen, name)
    }
    return dataclasses.replace(run, **changes)


def resolve_config(settings: TrainingConfig, model: Any, chosen: TrainingConfig) -> TrainingConfig:  # noqa: ANN401 (of model_options)
    """What a command line asks for: its settings, its `model_options`, and rates that follow them."""
    usual = dataclasses.asdict(model_options(chosen)())
    whole = dataclasses.replace(chosen, model_args=chosen.model_args | usual)
    given = chosen.model_args | dataclasses.asdict(model)
    return scale_learning_rates(dataclasses.replace(settings, model_args=given), whole)


def model_options(run: TrainingConfig) -> type:
    """A dataclass of the options that the run's model takes, the preset's values as defaults."""
    model = model_class(run.model)
    wanted = inspect.signature(model).parameters
    decided = {name: 2 for name in DECIDED if name in wanted}
    defaults = constructor_arguments(run.model, {**decided, **run.model_args})
    help_of = _argument_help(model)
    options: list[tuple[str, Any, Any]] = [
        (
            name,
            Annotated[parameter.annotation, tyro.conf.arg(help=help_of.get(name, ""))],
            defaults[name],
        )
        for name, parameter in wanted.items()
        if name not in (*decided, *UNTYPED)
    ]
    return dataclasses.make_dataclass(f"{run.model} options", options, frozen=True)


def _argument_help(model: type) -> dict[str, str]:
    """The lines `name: text` under Args in a class's docstring."""
    _, _, lines = (inspect.getdoc(model) or "").partition("Args:")
    pairs = (line.strip().partition(": ") for line in lines.splitlines())
    return {name: text for name, colon, text in pairs if colon}
