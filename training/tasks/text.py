"""Language modeling: predict the next token of a text."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from gpt import LanguageModel, Model
from gpt.generation import generate
from gpt.sampling import SamplingParams
from tokenizer import Tokenizer
from training.config import TrainingConfig
from training.data.batches import ShuffledWindows, StatefulBatches
from training.data.corpus import MANIFEST, Corpus, Split, open_corpus
from training.data.sources import Source
from training.evaluation.evaluate import (
    compression_baselines,
    estimate_loss,
    evaluate,
    inference_mode,
)
from training.tasks.base import Batch, Report, Task

CALIBRATION_TOKENS = 2**14
"""Validation tokens saved with a run, on which a server measures the loss of quantized weights."""
MAX_COMPRESSION_BYTES = 2**24
"""Compare with general compressors on text of at most this many bytes."""


def load_corpus(
    config: TrainingConfig,
    tokenizer: Tokenizer | None,
    for_training: bool,
    sentence_pairs: bool = False,
) -> Corpus:
    """Return a run's data as tokens; already prepared tokens are opened without `datasets`."""
    if (Path(config.data) / MANIFEST).is_file():
        return open_corpus(Path(config.data), sentence_pairs)
    from training.data.prepare import prepare_corpus

    source = Source(
        config.data,
        config=config.data_config,
        split=config.data_split,
        column=config.text_column,
        streaming=config.streaming,
        limit=config.data_limit,
        languages=config.languages,
    )
    return prepare_corpus(
        source, tokenizer or config.tokenizer, config.vocab_size, for_training, sentence_pairs
    )


class Text(Task):
    """Prediction of the next token from the tokens before it.

    Args:
        config: The run's options; context length, batch size and seed determine the batches.
        corpus: Prepared tokens.
        for_training: Whether batches are needed.
    """

    kind: ClassVar[str] = "text"
    eval_options: ClassVar[frozenset[str]] = frozenset({"stride", "context_length"})
    unsupported_options: ClassVar[frozenset[str]] = frozenset({"languages"})
    tokenizer: Tokenizer

    def __init__(self, config: TrainingConfig, corpus: Corpus, for_training: bool = True) -> None:
        self.config, self.corpus = config, corpus
        self.fingerprint, self.description = corpus.fingerprint, corpus.description
        self.tokenizer = corpus.tokenizer
        self.splits = list(corpus.splits)
        self.sizes = [
            f"{split.name}: {split.bytes:,} bytes, {len(split.tokens):,} tokens, "
            f"{split.documents:,} documents"
            for split in corpus.splits.values()
        ]
        self.model_args = {
            "vocab_size": self.tokenizer.vocab_size,
            "context_length": config.context_length,
        }
        self.sequence_length = config.context_length
        if for_training and self.kind == "text":
            self.calibration_tokens = corpus.splits["validation"].tokens[:CALIBRATION_TOKENS]
        if for_training:
            batches = StatefulBatches if config.stateful else ShuffledWindows
            self.batches = batches(
                corpus.splits["train"].tokens,
                config.context_length,
                config.batch_size,
                config.seed,
            )

    @classmethod
    def open(cls, config: TrainingConfig, tokenizer: Tokenizer | None, for_training: bool) -> Self:
        """Open the task with its corpus."""
        return cls(config, load_corpus(config, tokenizer, for_training), for_training)

    def batch(self, index: int) -> Batch:
        """Return (tokens_BT, targets_BT)."""
        return self.batches.batch(index)

    def continues_previous(self, index: int) -> bool:
        """Return True in stateful training, except for the first batch of an epoch."""
        return (
            isinstance(self.batches, StatefulBatches)
            and index % self.batches.batches_per_epoch != 0
        )

    def validate(self, model: Model) -> float:
        """Return nats per token over about `eval_tokens` tokens of the validation split."""
        assert isinstance(model, LanguageModel)
        return estimate_loss(
            model,
            self.corpus.splits["validation"].tokens,
            self.config.eval_tokens,
            self.config.precision,
            self.config.stateful,
        )

    def sample(self, model: Model, length: int) -> str:
        """Return a text of at most `length` tokens."""
        assert isinstance(model, LanguageModel)
        if not length:
            return ""
        eos_token = self.tokenizer.eos_token
        params = SamplingParams(temperature=0.8, seed=0)
        with inference_mode(model):
            return self.tokenizer.decode(
                list(generate(model, [eos_token], length, params, {eos_token}))
            )

    def score(self, model: Model, split: str, *, final: bool = False, **options: Any) -> Report:  # noqa: ANN401
        """Score every token of a split once; if `final`, add the figures of general compressors.

        Options: `stride` and `context_length` as in `evaluate`.
        """
        assert isinstance(model, LanguageModel)
        data = self.corpus.splits[split]
        lossless = self._is_lossless(data)
        score = evaluate(
            model,
            data.tokens,
            words=data.words,
            bytes=data.bytes if lossless else 0,
            stride=options.get("stride"),
            context_length=options.get("context_length"),
            precision=self.config.precision,
            stateful=self.config.stateful,
        )
        if final and lossless and data.bytes <= MAX_COMPRESSION_BYTES:
            text = self.tokenizer.decode(data.tokens.tolist())
            score = dataclasses.replace(score, compressors=compression_baselines(text.encode()))
        return score

    def _is_lossless(self, split: Split) -> bool:
        """Return whether the tokens hold the whole text: none of it became `<unk>`."""
        if self.tokenizer.unk_token is None:
            return True
        sizes = [len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size)]
        return bool(np.bincount(split.tokens, minlength=len(sizes)) @ sizes == split.bytes)
