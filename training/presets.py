"""Presets: named instances of `TrainingConfig`."""

from dataclasses import replace
from typing import Any, NamedTuple

from gpt import CHAPTERS
from gpt.checkpoint import did_you_mean, model_class
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

DIGITS = replace(
    LINEAR_TABLE,
    batch_size=64,
    optimizer="sgd",  # plain gradient descent, as in the chapter
    learning_rate=0.5,
    steps=2000,
    eval_interval=500,
    checkpoint_interval=2000,
)

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
        ("digits-softmax", DIGITS, "softmax-table", "digits", {}),
        ("digits-mlp", DIGITS, "mlp-classifier-table", "digits", {"hidden": (64,)}),
        ("grain-mlp", MLP_TABLE, "mlp-table", "grains", {"hidden": (64,)}),
        # The experts see the cups and the gates the darkness: a line per grain, which extrapolates.
        ("grain-experts", EXPERTS_TABLE, "experts-table", "grains", {"u": (0,), "v": (1,)}),
        ("lines-mlp", MLP_TABLE, "mlp-table", "lines", {"hidden": (7,)}),
        ("lines-experts", EXPERTS_TABLE, "experts-table", "lines", {}),
    ]
}
"""A tabular model of the chapters and one of their small tables of numbers."""

TOY_TRANSLATION = TrainingConfig(
    task="translation",
    data="toy-pairs",
    batch_size=64,
    context_length=64,
    vocab_size=1024,
    steps=300,
    embedding_lr=0.02,
    sample_tokens=32,
)

MULTI30K = TrainingConfig(
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

TRANSLATION_PRESETS = {
    # Every model that translates, sized for the generated sentence pairs: a minute on two cores.
    "translate-seq2seq": replace(
        TOY_TRANSLATION,
        model="seq2seq",
        model_args={"width": 128, "depth": 1, "reverse": True},
        steps=900,
        weight_decay=0.5,
        unembedding_lr=0.02,
        eval_interval=300,
        checkpoint_interval=300,
    ),
    **{
        f"translate-{model}": replace(TOY_TRANSLATION, model=model, model_args=model_args)
        for model, model_args in {
            "attention": {"width": 128},
            "transformer": {"width": 128, "depth": 2, "heads": 4},
            "gpt2": {"width": 128, "depth": 3, "heads": 4},
            "gpt": {"width": 128, "depth": 3, "heads": 4},
        }.items()
    },
    # The same for the 29,000 sentence pairs of Multi30k, to be given with --data.
    # Encoding a sentence in one vector takes long to learn, but a step is cheap. Without weight
    # decay the recurrent matrices grow until their dynamics are chaotic.
    "multi30k-seq2seq": replace(
        MULTI30K,
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
        f"multi30k-{model}": replace(MULTI30K, model=model, model_args=model_args)
        for model, model_args in {
            "attention": {"width": 256, "dropout": 0.2},
            "gpt2": {"width": 192, "depth": 4, "heads": 3, "dropout": 0.1},
            "gpt": {"width": 192, "depth": 4, "heads": 3, "dropout": 0.1},
        }.items()
    },
    # 15 passes over the pairs need more dropout and smoothed labels (Vaswani et al. 2017).
    "multi30k-transformer": replace(
        MULTI30K,
        model="transformer",
        model_args={"width": 256, "depth": 3, "heads": 4, "dropout": 0.3},
        label_smoothing=0.1,
        steps=4500,
        unembedding_lr=0.003,
        eval_interval=450,
        checkpoint_interval=450,
    ),
}
"""The models of chapters 11 to 15 and the task translation."""

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

# Models of words, to be trained on the Penn Treebank with --data.
PENN_TREEBANK = TrainingConfig(
    tokenizer="words",
    vocab_size=10_001,  # 9,999 words, the end of a line and <|endoftext|>
    eval_tokens=1_000_000,
)

# The loss of Zaremba et al. 2014 is summed over the 20 tokens of a window, ours is their mean: so the
# rate is 20 times their 1, grad_clip their 5 / 20.
PENN_TREEBANK_LSTM = replace(
    PENN_TREEBANK,
    model="lstm",
    batch_size=20,
    stateful=True,
    optimizer="sgd",
    learning_rate=20.0,
    **ONE_RATE,
    warmup_steps=0,
    grad_clip=0.25,
    log_interval=100,
)

SHAKESPEARE = TrainingConfig(tokenizer="characters", eval_tokens=120_000)

PRESETS: dict[str, TrainingConfig] = {
    name: replace(config, preset=name, model=name if name in CHAPTERS else config.model)
    for name, config in {
        **LADDER_PRESETS,
        # Models of words.
        "word2vec": TrainingConfig(task="word-vectors", tokenizer="words", vocab_size=10_000),
        # The small model of Zaremba et al. 2014: 13 epochs, the rate halved after each from the
        # fourth on.
        "zaremba": replace(
            PENN_TREEBANK_LSTM,
            model_args={"width": 200, "depth": 2, "init_range": 0.1},
            steps=13 * 2323,
            context_length=20,
            cooldown_fraction=9 / 13,
            step_decays=9,
            precision="float32",
            eval_interval=2323,
            checkpoint_interval=2323,
        ),
        # An LSTM as wide as their medium one: the hyperparameters of torch's example of a word-level
        # language model, but 26 epochs and a linear decay of the rate.
        "ptb-lstm": replace(
            PENN_TREEBANK_LSTM,
            model_args={"width": 650, "depth": 2, "tied": True, "dropout": 0.5},
            steps=26 * 1328,
            context_length=35,
            cooldown_fraction=0.8,
            eval_interval=2 * 1328,
            checkpoint_interval=1328,
        ),
        # Today's GPT on the same words. A rare word is a target once in hundreds of steps, and lowered
        # a little by all others: beta2 must be near 1 for AdamW to weigh both alike.
        "ptb-gpt": replace(
            PENN_TREEBANK,
            model_args={"width": 256, "depth": 3, "heads": 4, "dropout": 0.4},
            steps=2900,
            batch_size=16,
            context_length=128,
            learning_rate=0.01414,
            embedding_lr=0.07071,
            unembedding_lr=0.004243,
            vector_lr=0.007071,
            beta2=0.999,
            eval_interval=250,
        ),
        **TABLE_PRESETS,
        **TRANSLATION_PRESETS,
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
        # Today's GPT for the time that nanoGPT's recipe for a CPU takes, where bfloat16 is fast, and
        # at the size of its recipe for a GPU. docs/experiments.md measures every choice.
        "shakespeare": replace(
            SHAKESPEARE,
            model_args={"width": 192, "depth": 2, "heads": 3, "ngrams": 16_384},
            steps=1100,
            batch_size=6,
            context_length=256,
            embedding_lr=0.05,
            unembedding_lr=0.0053,
            cooldown_fraction=0.9,
            grad_clip=0.0,  # scaling the gradients of the n-gram tables takes 3% of a step
        ),
        "shakespeare-gpu": replace(
            SHAKESPEARE,
            model_args={"width": 384, "depth": 6, "heads": 6, "dropout": 0.1},
            steps=1000,
            batch_size=64,
            context_length=256,
        ),
        # Two layers: in the same time better than four or three. In batches of 32 a token costs less
        # than in those of 16.
        "gpt-nano": TrainingConfig(
            model_args={"width": 192, "depth": 2, "heads": 3},
            steps=500,
            batch_size=32,
            learning_rate=0.02828,
            embedding_lr=0.1414,
            unembedding_lr=0.01131,
            vector_lr=0.01414,
        ),
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


class About(NamedTuple):
    """What `tinygpt presets` says about a preset."""

    learns: str
    time: str
    """How long training takes on two cores, about."""


TABLE_TIME, GPU_TIME = "5 s", "on a GPU"
TOY_PAIRS, MULTI30K_PAIRS = "generated sentence pairs", "sentence pairs such as Multi30k (--data)"

TRANSLATORS = {
    "seq2seq": "through one vector per sentence",
    "attention": "looking back at every word",
    "transformer": "by attention alone",
    "gpt2": "each as one text",
    "gpt": "each as one text",
}
"""The models that translate, and how."""

ABOUT: dict[str, About] = {
    "sigma-pi": About("the next token, from products of the last four", "2 min"),
    "softmax": About("the next token from the last one: a table of bigrams", "1 min"),
    "mlp": About("the next token, by layers over the last eight", "2 min"),
    "experts": About("the next token, by layers and gated experts over the last eight", "3 min"),
    "rnn": About("the next token, from a state that is fed back", "3 min"),
    "lstm": About("the next token, from a cell state behind four gates", "4 min"),
    "gru": About("the next token, from a state behind two gates", "3 min"),
    "seq2seq": About("the second half of a text, from one vector of the first", "3 min"),
    "attention": About(
        "the second half of a text, looking back at every token of the first", "6 min"
    ),
    "transformer": About("the second half of a text, by attention without recurrence", "3 min"),
    "gpt2": About("the next token, by OpenAI's architecture of 2019", "5 min"),
    "word2vec": About("a vector for each of 10,000 words, from the words near it", "1 min"),
    "zaremba": About("the words of the Penn Treebank (--data), as Zaremba et al. 2014", "30 min"),
    "ptb-lstm": About(
        "the words of the Penn Treebank (--data), by 650 units with dropout", "150 min"
    ),
    "ptb-gpt": About("the words of the Penn Treebank (--data), by today's GPT", "20 min"),
    "linear": About("power = 4.5 x + 5, from eight throws; so ten meters need 50", TABLE_TIME),
    "rice-linear": About("no plane fits both rices: an error of 0.42 remains", TABLE_TIME),
    "rice-sigma-pi": About(
        "water = 2 x z + 2 x, also at ten cups; but franken-grain gets 4 cups, not 1",
        TABLE_TIME,
    ),
    "grain-sigma-pi": About("no product fits three grains: an error of 5.3 remains", TABLE_TIME),
    "logistic": About("which of two rices was cooked, right more than 95 times in 100", TABLE_TIME),
    "grain-softmax": About(
        "which of three grains it is, with borders at 0.25 and 0.75", TABLE_TIME
    ),
    "curve-mlp": About(
        "x^2 + 1 from 60 points; beyond them the network goes straight on", TABLE_TIME
    ),
    "rice-mlp": About("both rices by 32 ReLUs, which leave their lines at ten cups", TABLE_TIME),
    "grain-mlp": About("three grains by 64 ReLUs, which leave their lines at ten cups", TABLE_TIME),
    "grain-experts": About("three grains by mixed lines, which hold at ten cups", TABLE_TIME),
    "digits-softmax": About("handwritten digits from 64 pixels, by straight borders", TABLE_TIME),
    "digits-mlp": About("handwritten digits from 64 pixels, by a hidden layer", TABLE_TIME),
    "lines-mlp": About(
        "five random lines by seven ReLUs, which leave them beyond the data", TABLE_TIME
    ),
    "lines-experts": About(
        "five random lines by five lines, which hold better beyond the data", TABLE_TIME
    ),
    **{
        f"{kind}-{model}": About(f"{pairs}, {how}", time)
        for kind, pairs, times in [
            ("translate", TOY_PAIRS, ("30 s", "30 s", "30 s", "30 s", "30 s")),
            ("multi30k", MULTI30K_PAIRS, ("30 min", "35 min", "45 min", "35 min", "35 min")),
        ]
        for (model, how), time in zip(TRANSLATORS.items(), times, strict=True)
    },
    "nanogpt-cpu": About("characters of Shakespeare (--data): nanoGPT's recipe for a CPU", "2 min"),
    "nanogpt-gpu": About("characters of Shakespeare (--data): nanoGPT's recipe", GPU_TIME),
    "gpt2-124m": About("GPT-2 itself, on text of its size (--data)", GPU_TIME),
    "shakespeare": About("characters of Shakespeare (--data), in the time of nanogpt-cpu", "2 min"),
    "shakespeare-gpu": About("characters of Shakespeare (--data)", GPU_TIME),
    "gpt-nano": About("the next token, by today's GPT; the default on a CPU", "4 min"),
    "gpt-micro": About("the next token, by today's GPT; the default on a GPU", GPU_TIME),
    "gpt-small": About("the next token, at the size of GPT-2", GPU_TIME),
}
"""What each preset learns."""


def chapter_of(config: TrainingConfig) -> int:
    """Return the chapter of a config's model."""
    return model_class(config.model).chapter


def describe_preset(config: TrainingConfig) -> str:
    """Return chapter and aim of a config's preset; and its duration, unless the steps are others."""
    about, preset = ABOUT[config.preset], PRESETS[config.preset]
    duration = about.time if about.time == GPU_TIME else f"about {about.time} on two cores"
    text = f"chapter {chapter_of(preset)}: {about.learns}"
    return f"{text} ({duration})" if config.steps == preset.steps else text


def get_preset(name: str) -> TrainingConfig:
    """Return the preset of that name. The ValueError for an unknown one suggests similar names."""
    if name not in PRESETS:
        raise ValueError(
            f"no preset is named {name!r}{did_you_mean(name, PRESETS)}; `tinygpt presets` lists them"
        )
    return PRESETS[name]
