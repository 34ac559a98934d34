"""Presets: named instances of `TrainingConfig`."""

from dataclasses import replace
from typing import Any

from gpt import CHAPTERS
from gpt.checkpoint import did_you_mean
from training.config import TrainingConfig

ONE_RATE: dict[str, Any] = {"embedding_lr": None, "unembedding_lr": None, "vector_lr": None}
"""The rate of all kinds of parameters is `learning_rate`."""


LADDER_PRESETS = {
    "sigma-pi": TrainingConfig(),
    "softmax": TrainingConfig(),
    "mlp": TrainingConfig(),
    "experts": TrainingConfig(),
    "rnn": TrainingConfig(learning_rate=0.04),
    # Gates pass only small values at first, so the unembedding needs a higher rate.
    "lstm": TrainingConfig(learning_rate=0.04, unembedding_lr=0.02),
    "gru": TrainingConfig(unembedding_lr=0.02),
    "seq2seq": TrainingConfig(),
    "attention": TrainingConfig(),
    "transformer": TrainingConfig(),
    # The embedding is tied to the unembedding, which needs a lower rate.
    "gpt2": TrainingConfig(embedding_lr=0.005),
}
"""The language models before today's GPT, by model name: nano size, the same data and budget."""

LINEAR_TABLE = TrainingConfig(
    batch_size=256,  # the whole table
    optimizer="adamw",  # Muon does not suit a matrix of one row
    learning_rate=0.1,
    **ONE_RATE,
    warmup_steps=0,
    cooldown_fraction=1.0,
    grad_clip=0.0,
    precision="float32",
    steps=1000,
    eval_interval=500,
    checkpoint_interval=1000,
    log_interval=100,
)

MLP_TABLE = replace(LINEAR_TABLE, steps=2000, learning_rate=0.01)
"""Lower rates for a loss with many local minima, one of which is a linear fit."""

EXPERTS_TABLE = replace(MLP_TABLE, learning_rate=0.05)

TABLE_PRESETS = {
    name: replace(config, model=model, task=task, model_args=model_args)
    for name, config, model, task, model_args in [
        ("linear", LINEAR_TABLE, "linear", "basketball", {}),
        ("rice-linear", LINEAR_TABLE, "linear", "rice", {}),
        ("rice-sigma-pi", LINEAR_TABLE, "sigma-pi-table", "rice", {}),
        ("grain-sigma-pi", LINEAR_TABLE, "sigma-pi-table", "grains", {}),
        ("logistic", LINEAR_TABLE, "logistic", "white-or-brown", {}),
        ("grain-softmax", LINEAR_TABLE, "softmax-table", "which-grain", {}),
        ("curve-mlp", MLP_TABLE, "mlp-table", "square", {"hidden": (32,)}),
        ("rice-mlp", MLP_TABLE, "mlp-table", "rice", {"hidden": (32,)}),
        ("grain-mlp", MLP_TABLE, "mlp-table", "grains", {"hidden": (64,)}),
        # The experts see the cups and the gates the darkness: a line per grain, which extrapolates.
        ("grain-experts", EXPERTS_TABLE, "experts-table", "grains", {"u": (0,), "v": (1,)}),
        ("lines-mlp", MLP_TABLE, "mlp-table", "lines", {"hidden": (7,)}),
        ("lines-experts", EXPERTS_TABLE, "experts-table", "lines", {}),
    ]
}
"""A tabular model of the chapters and one of their small tables of numbers."""

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

NANOGPT = TrainingConfig(
    model="gpt2",
    tokenizer="characters",
    optimizer="adamw",
    learning_rate=1e-3,
    **ONE_RATE,
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

SHAKESPEARE = TrainingConfig(tokenizer="characters", eval_tokens=120_000)

PRESETS: dict[str, TrainingConfig] = {
    name: replace(config, preset=name, model=name if name in CHAPTERS else config.model)
    for name, config in {
        **LADDER_PRESETS,
        # Models of words.
        "word2vec": TrainingConfig(task="word-vectors", tokenizer="words", vocab_size=10_000),
        # The small model of Zaremba et al. 2014 for the Penn Treebank, to be trained on it with
        # --data: 13 epochs, the rate halved after each from the fourth on. Their loss is summed
        # over the 20 tokens of a window, ours is their mean: so the rate is 20 times their 1,
        # grad_clip their 5 / 20.
        "zaremba": TrainingConfig(
            model="lstm",
            model_args={"width": 200, "depth": 2, "init_range": 0.1},
            tokenizer="words",
            vocab_size=10_001,  # 9,999 words, the end of a line and <|endoftext|>
            steps=13 * 2323,
            batch_size=20,
            context_length=20,
            stateful=True,
            optimizer="sgd",
            learning_rate=20.0,
            **ONE_RATE,
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
        **TABLE_PRESETS,
        # Every model that translates, sized for the 29,000 sentence pairs of Multi30k.
        # Encoding a sentence in one vector takes long to learn, but a step is cheap. Without weight
        # decay the recurrent matrices grow until their dynamics are chaotic.
        "translate-seq2seq": replace(
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
            f"translate-{model}": replace(TRANSLATION, model=model, model_args=model_args)
            for model, model_args in {
                "attention": {"width": 256, "dropout": 0.2},
                "transformer": {"width": 192, "depth": 3, "heads": 3, "dropout": 0.1},
                "gpt2": {"width": 192, "depth": 4, "heads": 3, "dropout": 0.1},
                "gpt": {"width": 192, "depth": 4, "heads": 3, "dropout": 0.1},
            }.items()
        },
        # Published recipes with their own hyperparameters, for comparison.
        # nanoGPT's two recipes for tinyshakespeare by characters (Karpathy). Two things differ:
        # nanoGPT draws windows at random, we go through shuffled epochs; its AdamW epsilon is 1e-8,
        # ours 1e-10.
        "nanogpt-cpu": replace(
            NANOGPT,
            model_args={"width": 128, "depth": 4, "heads": 4, "bias": False},
            steps=2000,
            batch_size=12,
            context_length=64,
            cooldown_fraction=1900 / 2000,
            precision="float32",
        ),
        "nanogpt-gpu": replace(
            NANOGPT,
            model_args={"width": 384, "depth": 6, "heads": 6, "bias": False, "dropout": 0.2},
            steps=5000,
            batch_size=64,
            context_length=256,
            cooldown_fraction=4900 / 5000,
        ),
        # OpenAI's GPT-2 with nanoGPT's hyperparameters. nanoGPT pads the vocabulary of 50,257 to
        # 50,304, a multiple of 128, which is faster.
        "gpt2-124m": replace(
            NANOGPT,
            model_args={"width": 768, "depth": 12, "heads": 12},
            tokenizer="bpe",
            vocab_size=50_304,
            learning_rate=6e-4,
            beta2=0.95,
            steps=600_000,
            batch_size=480,
            context_length=1024,
            gradient_accumulation_steps=15,
            warmup_steps=2000,
            cooldown_fraction=598 / 600,
            precision="bfloat16",
            eval_interval=1000,
            eval_tokens=1_048_576,
            checkpoint_interval=1000,
        ),
        # Today's GPT at the sizes of nanoGPT's two recipes for tinyshakespeare.
        # Tuned for the first minute of training; docs/experiments.md measures every choice.
        "shakespeare": replace(
            SHAKESPEARE,
            model_args={"width": 128, "depth": 4, "heads": 4, "ngrams": 16_384},
            steps=720,
            batch_size=12,
            context_length=128,
            embedding_lr=0.05,
            cooldown_fraction=0.9,
            precision="float32",
        ),
        "shakespeare-gpu": replace(
            SHAKESPEARE,
            model_args={"width": 384, "depth": 6, "heads": 6, "dropout": 0.1},
            steps=1000,
            batch_size=64,
            context_length=256,
        ),
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
    """Return the preset of that name. The ValueError for an unknown one suggests similar names."""
    if name not in PRESETS:
        raise ValueError(
            f"no preset is named {name!r}{did_you_mean(name, PRESETS)}; `tinygpt presets` lists them"
        )
    return PRESETS[name]
