"""The configuration of a training run, and the options of `tinygpt train` made from it.

tyro turns each field of `TrainingConfig` into an option and its docstring into the option's help.
The options of a model are its constructor's arguments.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from gpt import Model
from gpt.checkpoint import build_model, constructor_arguments, model_class
from gpt.cli import OptionalInt, OptionalText

PresetOnly: Any = tyro.conf.Suppress
"""Marks a field that a preset sets and that is no command-line option."""
OptionalRate = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
"""A learning rate; None is that of `learning_rate`."""

VALID_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "at least 1": (
        lambda v: v >= 1,
        "steps batch_size context_length gradient_accumulation_steps vocab_size data_limit "
        "shuffle_buffer eval_interval eval_tokens checkpoint_interval log_interval",
    ),
    "at least 0": (
        lambda v: v >= 0,
        "threads warmup_steps sample_tokens seed weight_decay embedding_weight_decay grad_clip step_decays",
    ),
    "above 0": (lambda v: v > 0, "learning_rate embedding_lr unembedding_lr vector_lr"),
    "at most 2147483647": (
        lambda v: v < 2**31,
        "steps batch_size context_length gradient_accumulation_steps vocab_size eval_interval "
        "checkpoint_interval log_interval warmup_steps sample_tokens step_decays shuffle_buffer",
    ),
    "at most 1024": (lambda v: v <= 1024, "threads"),
    "at most 9223372036854775807": (lambda v: v < 2**63, "data_limit eval_tokens seed"),
    "at most 1e38": (  # what float32 can hold
        lambda v: v <= 1e38,
        "learning_rate embedding_lr unembedding_lr vector_lr weight_decay embedding_weight_decay "
        "grad_clip",
    ),
    "at least 0 and below 1": (lambda v: 0 <= v < 1, "beta1 beta2 label_smoothing"),
    "between 0 and 1": (lambda v: 0 <= v <= 1, "cooldown_fraction final_lr_fraction"),
}
"""Ranges in words, as a test, and the names of the fields that have them."""


@dataclass(frozen=True)
class TrainingConfig:
    """All options of a training run. Raises ValueError for values that are invalid or contradict each other."""

    preset: Annotated[str, PresetOnly] = ""
    model: Annotated[str, PresetOnly] = "gpt"
    model_args: Annotated[dict[str, Any], PresetOnly] = field(default_factory=dict)

    task: str = "text"
    """Training task: `text` (predict the next token), `word-vectors`, `translation`, or one of the small tables of numbers."""
    data: str = "stdlib"
    """Corpus: `stdlib` (the standard library of this Python), `toy-pairs` (generated English-French sentence pairs, for the task translation), `known-truth` (a generated language of known entropy), a file (.txt .jsonl .csv .parquet, also compressed), a folder, or a Hugging Face dataset such as roneneldan/TinyStories. Several, each with its weight, are mixed: --data a.txt:0.7 --data b.txt:0.3."""
    data_config: OptionalText = None
    """Configuration of a Hugging Face dataset that has several."""
    data_revision: OptionalText = None
    """Branch, tag or commit of a Hugging Face dataset."""
    data_split: OptionalText = None
    """Split to train on, or a part of it in the notation of `datasets`, such as train[:10%]: the first tenth of its documents. Default: `train`."""
    text_column: OptionalText = None
    """Column that contains the text. Default: the column `text`, or the only column of strings."""
    languages: OptionalText = None
    """Source and target language of sentence pairs, such as en-fr. Default: the first two in the data."""
    streaming: bool = False
    """Stream a Hugging Face dataset instead of downloading it."""
    shuffle_buffer: OptionalInt = None
    """Stream the files in random order, and their documents through a buffer of this many: with --data-limit, a sample of the whole."""
    data_limit: OptionalInt = None
    """Read at most this many bytes of text from each split."""
    drop_duplicates: bool = False
    """Drop from train the documents that are in validation or test too, exactly or nearly (at least half of their shingles of 50 characters in common)."""
    tokenizer: str = "bpe"
    """Tokenizer: `bpe` (byte pairs learned on the training split), `words` (its most frequent words), `characters` (its most frequent characters), `bytes` (one token per byte), or what to load it from: the path of a tokenizer.json or of a run, or a model on the Hugging Face hub such as Qwen/Qwen3-0.6B."""
    end_of_text: OptionalText = None
    """Token of a tokenizer.json that ends a document. Default: the one that it, or a tokenizer_config.json beside it, names."""
    vocab_size: int = 4096
    """Maximum number of tokens that `bpe`, `words` or `characters` learns."""
    init_from: Annotated[
        str | None, tyro.conf.arg(name="from", metavar="RUN", help_behavior_hint="")
    ] = None
    """Begin with the weights and the tokenizer of this run: a name in runs/, or a path. The other options then have the defaults of fine-tuning."""
    init_embedding: OptionalText = None
    """Initialize the embedding from this run, for example a word2vec run. Both runs need the same tokenizer."""

    steps: int = 640
    """Number of optimizer steps."""
    batch_size: int = 16
    """Sequences per optimizer step, over all processes."""
    context_length: int = 256
    """Tokens per training sequence: the model's context."""
    stateful: bool = False
    """Truncated backpropagation through time: each batch row continues the previous step's text with the model's state."""
    gradient_accumulation_steps: int = 1
    """Micro-batches that a batch is split into: the same step in less memory."""
    optimizer: Literal["muon", "adamw", "sgd"] = "muon"
    """Optimizer of the hidden matrices. AdamW updates all other parameters; with sgd, SGD updates everything."""
    learning_rate: float = 0.02
    """Peak learning rate of the hidden matrices and of a regression's weights. It and the next three scale with --batch-size, --context-length and --width unless another rate is given."""
    embedding_lr: OptionalRate = 0.1
    """Peak learning rate of the embeddings. None: that of --learning-rate."""
    unembedding_lr: OptionalRate = 0.008
    """Peak learning rate of the unembedding (the output projection). None: that of --learning-rate."""
    vector_lr: OptionalRate = 0.01
    """Peak learning rate of norms, biases and attention's score vector. None: that of --learning-rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the hidden matrices and of a regression's weights: a step multiplies them by 1 - learning rate * decay."""
    embedding_weight_decay: float = 0.0
    """Decoupled weight decay of the embeddings and the unembedding."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment (the mean gradient)."""
    beta2: float = 0.95
    """AdamW's decay rate of the second moment (the mean squared gradient)."""
    warmup_steps: int = 20
    """Steps of linear warmup of the learning rates."""
    cooldown_fraction: float = 0.6
    """Final fraction of the steps, in which the learning rates decay."""
    final_lr_fraction: float = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    cosine_decay: bool = False
    """Decay along half a cosine instead of linearly."""
    step_decays: int = 0
    """Decay by halving the learning rates this many times instead of linearly."""
    grad_clip: float = 1.0
    """Maximum gradient norm; 0 disables clipping."""
    label_smoothing: float = 0.0
    """Share of each target that the training loss spreads evenly over the vocabulary. Validation and evaluation do without."""

    eval_interval: int = 100
    """Steps between validations."""
    eval_tokens: int = 32_768
    """Tokens of the validation split that each validation scores. The final evaluation scores all."""
    checkpoint_interval: int = 100
    """Steps between checkpoints."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_tokens: int = 40
    """Length in tokens of the sample generated at each validation; 0 disables it."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run directory."""
    track: Literal["off", "trackio", "wandb"] = "off"
    """Also log metrics and options to an experiment tracker: `trackio` (local, or in a Hugging Face Space) or `wandb` (Weights & Biases; locally with WANDB_MODE=offline). A resumed run continues its tracked run."""
    seed: int = 0
    """Random seed of weight initialization, data order and dropout."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1 or mps."""
    threads: int = 0
    """CPU threads. 0: all cores, or fewer if steps are faster so, which is measured at the start of a run."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of matrix products. auto: bfloat16, or float16 with scaled gradients on a GPU without bfloat16; on a CPU the faster of bfloat16 and float32, which is measured at the start of a run. A GPU trains in float32 with TF32 products."""
    fsdp: bool = False
    """Shard the model and its optimizer over the processes that torchrun starts (FSDP2), for models too large for one device."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model: a slow start, then faster steps. auto: on a GPU, for a run of a Transformer that takes longer than compiling. Needs Triton on a GPU, and a C++ compiler."""

    def __post_init__(self) -> None:
        for valid_range, (is_valid, names) in VALID_RANGES.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not is_valid(value):
                    option = name.replace("_", "-")
                    raise ValueError(f"--{option} must be {valid_range}, not {value}")
        if self.step_decays and self.final_lr_fraction:
            raise ValueError(
                "--step-decays determines the final rate: leave out --final-lr-fraction"
            )
        if self.step_decays and self.cosine_decay:
            raise ValueError("--step-decays and --cosine-decay exclude each other: leave one out")
        if self.stateful and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "--stateful cannot split a batch: leave out --gradient-accumulation-steps"
            )
        if self.shuffle_buffer is not None and not self.streaming:
            raise ValueError("--shuffle-buffer is of a stream: add --streaming")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"--batch-size {self.batch_size} cannot be divided into "
                f"--gradient-accumulation-steps {self.gradient_accumulation_steps} equal parts"
            )

    def peak_learning_rates(self) -> dict[str, float]:
        """Return the value of each of LEARNING_RATES; for None, that of `learning_rate`."""
        rates = {name: getattr(self, name) for name in LEARNING_RATES}
        return {k: self.learning_rate if v is None else v for k, v in rates.items()}


LEARNING_RATES = ("learning_rate", "embedding_lr", "unembedding_lr", "vector_lr")
"""The fields that `scale_learning_rates` scales."""


def scale_learning_rates(config: TrainingConfig, preset: TrainingConfig) -> TrainingConfig:
    """Return the config with learning rates scaled from the preset's batch and width to its own.

    Only rates that still equal the preset's are scaled; both configs must name all model arguments.
    All rates grow with the square root of the tokens per batch, because a larger batch has less
    gradient noise (Malladi et al. 2022). The unembedding's rate falls with the width, because it
    sums over that many terms. So does the rate of hidden matrices under AdamW, but not under Muon,
    whose updates have the same size at every width (Yang et al. 2022, 2023). SGD's rates stay.
    """
    if config.optimizer == "sgd":
        return config
    preset_tokens = preset.batch_size * preset.context_length
    batch_scale = (config.batch_size * config.context_length / preset_tokens) ** 0.5
    # The model refuses a width below 1.
    width_scale = max(1, config.model_args.get("width", 1)) / preset.model_args.get("width", 1)
    scales = dict.fromkeys(LEARNING_RATES, batch_scale)
    scales["unembedding_lr"] /= width_scale
    if config.optimizer == "adamw":
        scales["learning_rate"] /= width_scale
    rates, preset_rates = config.peak_learning_rates(), preset.peak_learning_rates()
    scaled: dict[str, Any] = {
        name: float(f"{rate * scales[name]:.4g}") if rate == preset_rates[name] else rate
        for name, rate in rates.items()
    }
    return config if scaled == rates else dataclasses.replace(config, **scaled)


def resolve_config(config: TrainingConfig, options: Any, preset: TrainingConfig) -> TrainingConfig:  # noqa: ANN401
    """Return the config with `options`, an instance of `model_options`, and scaled learning rates."""
    defaults = dataclasses.asdict(model_options(preset)())
    complete_preset = dataclasses.replace(preset, model_args=preset.model_args | defaults)
    model_args = preset.model_args | dataclasses.asdict(options)
    return scale_learning_rates(dataclasses.replace(config, model_args=model_args), complete_preset)


TASK_ARGS = ("vocab_size", "context_length", "inputs", "classes")
"""Constructor arguments of models that the task sets."""
PRESET_ARGS = ("products",)
"""Constructor arguments of models that only a preset can set: their types have no option syntax."""


def model_options(config: TrainingConfig) -> type:
    """Return a dataclass of the command-line options of the config's model, with its values as defaults."""
    model = model_class(config.model)
    parameters = inspect.signature(model).parameters
    task_args = {name: 2 for name in TASK_ARGS if name in parameters}  # any valid value
    defaults = constructor_arguments(config.model, {**task_args, **config.model_args})
    helps = _argument_docs(model)
    options: list[tuple[str, Any, Any]] = []
    for name, parameter in parameters.items():
        if name not in (*task_args, *PRESET_ARGS):
            help_text = tyro.conf.arg(help=helps.get(name, ""))
            options.append((name, Annotated[parameter.annotation, help_text], defaults[name]))
    return dataclasses.make_dataclass(f"{config.model} options", options, frozen=True)


def _argument_docs(model: type) -> dict[str, str]:
    """Parse the Args sections of a class and its bases: the text of each argument by name."""
    docs = [inspect.cleandoc(base.__doc__ or "") for base in reversed(model.__mro__)]
    sections = "\n".join(doc.partition("Args:\n")[2] for doc in docs)
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", sections, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def model_arguments(config: TrainingConfig, task_args: dict[str, Any]) -> dict[str, Any]:
    """Return `model_args`, and of `task_args`, which the task sets, those that the model takes."""
    parameters = inspect.signature(model_class(config.model)).parameters
    return {k: v for k, v in task_args.items() if k in parameters} | config.model_args


def new_model(config: TrainingConfig, task_args: dict[str, Any]) -> Model:
    """Return the config's model with newly initialized weights; arguments as in `model_arguments`."""
    return build_model(config.model, model_arguments(config, task_args))
