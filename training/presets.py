"""A run is one frozen dataclass; a preset is a named instance of it.

The command line of `python -m training train PRESET` is made from these fields and from the
constructor of the preset's model, whose arguments are the model's configuration.
"""

import dataclasses
import inspect
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from gpt import CHAPTERS
from gpt.checkpoint import constructor_arguments, did_you_mean, model_class
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

RUNGS = {
    "sigma-pi": TrainingConfig(),
    "softmax": TrainingConfig(),
    "mlp": TrainingConfig(),
    "experts": TrainingConfig(),
    "rnn": TrainingConfig(learning_rate=0.04),
    # What gates let through is small at first, so the unembedding must move faster.
    "lstm": TrainingConfig(learning_rate=0.04, unembedding_lr=0.02),
    "gru": TrainingConfig(unembedding_lr=0.02),
    "seq2seq": TrainingConfig(),
    "attention": TrainingConfig(),
    "transformer": TrainingConfig(),
    # Its embedding is its unembedding too, which must not move as fast.
    "gpt2": TrainingConfig(embedding_lr=0.005),
}
"""The language models before today's GPT, by their names: nano size, the same data and budget."""

WORDS = {
    "word2vec": TrainingConfig(task="word-vectors", tokenizer="words", vocab_size=10_000),
    # The small model of Zaremba et al. 2014 for the Penn Treebank, of their `--data`: 13 epochs,
    # the rate halved after each from the fourth on. Their loss is a sum over the 20 tokens of a
    # window, ours a mean: the rate is 20 of their 1, the clipping a twentieth of their 5.
    "zaremba": TrainingConfig(
        model="lstm",
        model_args={"width": 200, "depth": 2, "init_range": 0.1},
        tokenizer="words",
        vocab_size=10_001,  # 9,999 words, the line's end and what stands before a document
        steps=13 * 2323,
        batch_size=20,
        context_length=20,
        stateful=True,
        optimizer="sgd",
        learning_rate=20.0,
        embedding_lr=20.0,
        unembedding_lr=20.0,
        vector_lr=20.0,
        warmup_steps=0,
        cooldown_fraction=9 / 13,
        step_decays=9,
        grad_clip=0.25,
        precision="float32",
        eval_interval=2323,
        eval_tokens=1_000_000,
        checkpoint_interval=2323,
        log_interval=100,
    ),
}
"""Where a token is a word."""

TABLE = TrainingConfig(
    batch_size=256,  # all rows at once
    optimizer="adamw",  # Muon does not suit a matrix of one row
    learning_rate=0.1,
    vector_lr=0.1,
    warmup_steps=0,
    cooldown_fraction=1.0,
    grad_clip=0.0,
    precision="float32",
    steps=1000,
    eval_interval=500,
    checkpoint_interval=1000,
    log_interval=100,
)

BENT = dataclasses.replace(TABLE, steps=2000, learning_rate=0.01, vector_lr=0.01)
"""Where there are many valleys, and a plane is one of them."""

GATED = dataclasses.replace(BENT, learning_rate=0.05, vector_lr=0.05)

TABLES = {
    name: dataclasses.replace(run, model=model, task=task, model_args=arguments)
    for name, run, model, task, arguments in [
        ("linear", TABLE, "linear", "basketball", {}),
        ("rice-linear", TABLE, "linear", "rice", {}),
        ("rice-sigma-pi", TABLE, "sigma-pi-table", "rice", {}),
        ("grain-sigma-pi", TABLE, "sigma-pi-table", "grains", {}),
        ("logistic", TABLE, "logistic", "white-or-brown", {}),
        ("grain-softmax", TABLE, "softmax-table", "which-grain", {}),
        ("curve-mlp", BENT, "mlp-table", "square", {"hidden": (32,)}),
        ("rice-mlp", BENT, "mlp-table", "rice", {"hidden": (32,)}),
        ("grain-mlp", BENT, "mlp-table", "grains", {"hidden": (64,)}),
        # Experts that see the cups, gates that see the darkness: of each grain a line, near and far.
        ("grain-experts", GATED, "experts-table", "grains", {"u": (0,), "v": (1,)}),
        ("lines-mlp", BENT, "mlp-table", "lines", {"hidden": (7,)}),
        ("lines-experts", GATED, "experts-table", "lines", {}),
    ]
}
"""The documents' own small data: a rung and a table."""

TRANSLATION = TrainingConfig(
    task="translation",
    batch_size=96,
    context_length=128,
    steps=1500,
    warmup_steps=100,
    cooldown_fraction=0.7,
    embedding_lr=0.01,
    unembedding_lr=0.004,
    eval_interval=300,
    checkpoint_interval=300,
    sample_tokens=64,
)
TRANSLATORS = {
    # A sentence in one vector takes long to learn, but a step is cheap. Without decay the matrices
    # that are used again at every word grow until what they do is chaotic.
    "translate-seq2seq": dataclasses.replace(
        TRANSLATION,
        model="seq2seq",
        model_args={"width": 256, "depth": 1, "dropout": 0.2, "reverse": True},
        batch_size=48,
        steps=5000,
        weight_decay=0.5,
        embedding_lr=0.02,
        unembedding_lr=0.02,
        eval_interval=500,
        checkpoint_interval=500,
    ),
    **{
        f"translate-{model}": dataclasses.replace(TRANSLATION, model=model, model_args=arguments)
        for model, arguments in {
            "attention": {"width": 256, "dropout": 0.2},
            "transformer": {"width": 192, "depth": 3, "heads": 3, "dropout": 0.1},
            "gpt2": {"width": 192, "depth": 4, "heads": 3, "dropout": 0.1},
            "gpt": {"width": 192, "depth": 4, "heads": 3, "dropout": 0.1},
        }.items()
    },
}
"""Every rung that translates, of a size for the 29,000 pairs of Multi30k."""

NANOGPT = TrainingConfig(
    model="gpt2",
    tokenizer="characters",
    optimizer="adamw",
    learning_rate=1e-3,
    embedding_lr=1e-3,
    unembedding_lr=1e-3,
    vector_lr=1e-3,
    weight_decay=0.1,
    embedding_weight_decay=0.1,
    beta2=0.99,
    warmup_steps=100,
    cosine_decay=True,
    final_lr_fraction=0.1,
    eval_interval=250,
    eval_tokens=120_000,
    checkpoint_interval=250,
)
YARDSTICKS = {
    # Karpathy's nanoGPT, its two recipes for the characters of tinyshakespeare. Two things differ:
    # it draws windows at random where we go through a shuffled epoch, and lets AdamW's
    # denominator be no smaller than 1e-8, we than 1e-10.
    "nanogpt-cpu": dataclasses.replace(
        NANOGPT,
        model_args={"width": 128, "depth": 4, "heads": 4, "bias": False},
        steps=2000,
        batch_size=12,
        context_length=64,
        cooldown_fraction=1900 / 2000,
        precision="float32",
    ),
    "nanogpt-gpu": dataclasses.replace(
        NANOGPT,
        model_args={"width": 384, "depth": 6, "heads": 6, "bias": False, "dropout": 0.2},
        steps=5000,
        batch_size=64,
        context_length=256,
        cooldown_fraction=4900 / 5000,
        compile=True,
    ),
    # GPT-2 as OpenAI built it, with nanoGPT's constants. 50,304 is what nanoGPT fills up OpenAI's
    # 50,257 tokens to: a multiple of 128, which is faster.
    "gpt2-124m": dataclasses.replace(
        NANOGPT,
        model_args={"width": 768, "depth": 12, "heads": 12},
        tokenizer="bpe",
        vocab_size=50_304,
        learning_rate=6e-4,
        embedding_lr=6e-4,
        unembedding_lr=6e-4,
        vector_lr=6e-4,
        beta2=0.95,
        steps=600_000,
        batch_size=480,
        context_length=1024,
        gradient_accumulation_steps=15,
        warmup_steps=2000,
        cooldown_fraction=598 / 600,
        compile=True,
        precision="bfloat16",
        eval_interval=1000,
        eval_tokens=1_048_576,
        checkpoint_interval=1000,
    ),
}
"""What others published, in their constants: to be compared with."""

SHAKESPEARE = TrainingConfig(tokenizer="characters", eval_tokens=120_000)
RIVALS = {
    # Short-lived: all is for the first minute. Every choice is weighed in docs/experiments.md.
    "shakespeare": dataclasses.replace(
        SHAKESPEARE,
        model_args={"width": 128, "depth": 4, "heads": 4, "ngrams": 16_384},
        steps=720,
        batch_size=12,
        context_length=128,
        embedding_lr=0.05,
        cooldown_fraction=0.9,
        precision="float32",
    ),
    "shakespeare-gpu": dataclasses.replace(
        SHAKESPEARE,
        model_args={"width": 384, "depth": 6, "heads": 6, "dropout": 0.1},
        steps=1000,
        batch_size=64,
        context_length=256,
        compile=True,
    ),
}
"""Today's GPT at the sizes of nanoGPT's two recipes."""

PRESETS: dict[str, TrainingConfig] = {
    name: dataclasses.replace(run, preset=name, model=name if name in CHAPTERS else run.model)
    for name, run in {
        **RUNGS,
        **WORDS,
        **TABLES,
        **TRANSLATORS,
        **YARDSTICKS,
        **RIVALS,
        "gpt-nano": TrainingConfig(model_args={"width": 192, "depth": 4, "heads": 3}),
        "gpt-micro": TrainingConfig(
            model_args={"width": 384, "depth": 6, "heads": 6},
            unembedding_lr=0.004,
            steps=2000,
            batch_size=64,
            context_length=512,
            vocab_size=8192,
        ),
        "gpt-small": TrainingConfig(
            model_args={"width": 768, "depth": 12, "heads": 12},
            unembedding_lr=0.002,
            steps=5000,
            batch_size=256,
            context_length=1024,
            gradient_accumulation_steps=8,
            vocab_size=32_768,
            eval_tokens=1_048_576,
            checkpoint_interval=500,
            eval_interval=250,
        ),
    }.items()
}


def get_preset(name: str) -> TrainingConfig:
    """The preset of that name; a ValueError names the nearest."""
    if name not in PRESETS:
        raise ValueError(
            f"no preset is named {name!r}{did_you_mean(name, PRESETS)}; `tinygpt presets` lists them"
        )
    return PRESETS[name]


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
