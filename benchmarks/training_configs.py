"""The training configs that `benchmarks.train` compares: with nanoGPT's recipes, and with ablations."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from benchmarks.models import ABLATIONS
from gpt import Model
from tokenizer import Tokenizer
from training.config import LEARNING_RATES, TrainingConfig, scale_learning_rates
from training.presets import get_preset
from training.tasks import TASKS
from training.tasks.base import Batch, Task

Configs = dict[str, TrainingConfig]


@dataclass(frozen=True)
class AveragedConfig(TrainingConfig):
    """A config whose loss is that of the exponential moving average (EMA) of the weights."""

    ema_decay: float = 0.99
    """A step keeps this share of the average."""


@dataclass(frozen=True)
class Comparison:
    """Training configs that are compared by the time they take to a target loss."""

    title: str
    configs: Configs
    baseline: str
    """The config whose time to the target is 1, and within whose total time the best loss counts."""
    target_loss: float | None = None
    """Nats per character; None: only losses after as many tokens are compared."""
    segments: int = 50
    """Equal parts that each config's steps are divided into; the loss is scored after each."""


def cpu_comparison() -> Comparison:
    """Compare with nanoGPT's CPU recipe. 1.886 is the final loss of a run of nanoGPT itself."""
    baseline = get_preset("nanogpt-cpu")
    sizes = {name: baseline.model_args[name] for name in ("width", "depth", "heads")}
    configs = {
        "shakespeare": get_preset("shakespeare"),
        "nanogpt-cpu": baseline,
        "transformers": dataclasses.replace(baseline, model="transformers", model_args=sizes),
    }
    return Comparison("CPU: time to loss", on_device("cpu", configs), "nanogpt-cpu", 1.886)


def gpu_comparison() -> Comparison:
    """Compare with nanoGPT's GPU recipe, whose published loss is 1.4697."""
    configs = {name: get_preset(name) for name in ("shakespeare-gpu", "nanogpt-gpu")}
    return Comparison("GPU: time to loss", on_device("cuda", configs), "nanogpt-gpu", 1.47)


def ablation_study() -> Comparison:
    """Compare the preset `shakespeare` with variants in which one setting is changed, for as many tokens."""
    base = get_preset("shakespeare")
    tokens = base.steps * base.batch_size * base.context_length

    def variant(changes: dict[str, Any] | None = None, **model_args: Any) -> TrainingConfig:  # noqa: ANN401
        config = dataclasses.replace(
            base, model_args=base.model_args | model_args, **(changes or {})
        )
        steps = tokens // (config.batch_size * config.context_length)
        return dataclasses.replace(config, steps=steps)

    adamw = {"optimizer": "adamw", "weight_decay": 0.1, "embedding_weight_decay": 0.1}
    configs = {
        "shakespeare": base,
        "no n-grams": variant(ngrams=0),
        "n-grams, 4,096 rows": variant(ngrams=4096),
        "AdamW instead of Muon": variant(adamw | dict.fromkeys(LEARNING_RATES, 0.002)),
        **{
            title: variant({"model": "gpt-ablated"}, without=name)
            for name, title in ABLATIONS.items()
        },
        "tied unembedding": variant({"embedding_lr": 0.005}, tied=True),
        "matrices' rate 0.03": variant({"learning_rate": 0.03}),
        "embeddings' rate 0.1": variant({"embedding_lr": 0.1}),
        "cooldown over 60%": variant({"cooldown_fraction": 0.6}),
        "cosine cooldown": variant({"cosine_decay": True}),
        "gradient clipping at 1": variant({"grad_clip": 1.0}),
        "AdamW's beta2 0.99": variant({"beta2": 0.99}),
        "weight decay 0.1": variant({"weight_decay": 0.1}),
        "dropout 0.1": variant(dropout=0.1),
        "label smoothing 0.05": variant({"label_smoothing": 0.05}),
        "context of 128": variant({"context_length": 128, "batch_size": 12}),
        "context of 512": variant({"context_length": 512, "batch_size": 3}),
        "batches of 12": scale_learning_rates(variant({"batch_size": 12}), base),
        "EMA of the weights, decay 0.99": AveragedConfig(**dataclasses.asdict(base)),
        "4 layers of 128": variant({"unembedding_lr": 0.008}, depth=4, width=128, heads=4),
        "6 heads": variant(heads=6),
    }
    configs = on_device("cpu", configs)
    return Comparison("CPU: ablations", configs, "shakespeare", segments=5)


def throughput_configs() -> Configs:
    """GPT and GPT-2 (12 layers, width 768) on random tokens with equal vocabulary, context and batch."""
    gpt2 = dataclasses.replace(get_preset("gpt2-124m"), task="random")
    shared_settings = (
        "task",
        "vocab_size",
        "batch_size",
        "context_length",
        "gradient_accumulation_steps",
        "compile",
        "precision",
    )
    settings = {name: getattr(gpt2, name) for name in shared_settings}
    gpt = dataclasses.replace(get_preset("gpt-small"), **settings)
    return on_device("cuda", {"gpt-small": gpt, "gpt2-124m": gpt2})


def on_device(device: str, configs: Configs) -> Configs:
    """Return the same configs with another device."""
    return {name: dataclasses.replace(config, device=device) for name, config in configs.items()}


class RandomTokens(Task):
    """One batch of random tokens, repeated: for throughput, where the loss does not matter."""

    kind: ClassVar[str] = "text"
    fingerprint = ""
    description = "random tokens"

    def __init__(self, config: TrainingConfig) -> None:
        self.model_args = {
            "vocab_size": config.vocab_size,
            "context_length": config.context_length,
        }
        self.sequence_length = config.context_length
        shape = config.batch_size, config.context_length + 1
        tokens_BT = np.random.default_rng(config.seed).integers(config.vocab_size, size=shape)
        self.arrays = tokens_BT[:, :-1], tokens_BT[:, 1:]

    @classmethod
    def open(cls, config: TrainingConfig, tokenizer: Tokenizer | None, for_training: bool) -> Self:  # noqa: ARG003
        return cls(config)

    def batch(self, index: int) -> Batch:  # noqa: ARG002
        return self.arrays

    def validate(self, model: Model) -> float:  # noqa: ARG002
        return math.nan


TASKS["random"] = RandomTokens
