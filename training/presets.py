"""Presets: named instances of `TrainingConfig`."""

import dataclasses

from gpt import CHAPTERS
from gpt.checkpoint import did_you_mean
from training.config import TrainingConfig

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
