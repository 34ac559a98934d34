"""Text as a task: to predict the next token of it, or to give each of its tokens a vector."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F

from gpt import LanguageModel, Model
from gpt.generation import generate
from gpt.models.word2vec import Word2Vec
from gpt.sampling import SamplingParams
from tokenizer import Tokenizer
from training.config import TrainingConfig
from training.data.corpus import (
    MANIFEST,
    Corpus,
    ShuffledWindows,
    Split,
    StatefulBatches,
    open_corpus,
)
from training.evaluation.evaluate import (
    compression_baselines,
    estimate_loss,
    evaluate,
    inference_mode,
)
from training.tasks.base import Batch, Report, Task

HELD_OUT = 2**14
"""Validation tokens that stay with a run, for a server to measure on what a number format costs."""
COMPRESSED = 2**24
"""Bytes of text up to which general compressors are run beside the model."""


class Text(Task):
    """The next token, from those before it.

    Args:
        run: Its window, batch and seed decide the batches.
        corpus: Prepared tokens.
        to_train: Whether batches will be asked for.
    """

    kind: ClassVar[str] = "text"
    eval_options: ClassVar[frozenset[str]] = frozenset({"stride", "context_length"})
    unsupported_options: ClassVar[frozenset[str]] = frozenset({"languages"})

    def __init__(self, run: TrainingConfig, corpus: Corpus, to_train: bool = True) -> None:
        self.config, self.corpus = run, corpus
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
            "context_length": run.context_length,
        }
        self.sequence_length = run.context_length
        if to_train and self.kind == "text":
            self.calibration_tokens = corpus.splits["validation"].tokens[:HELD_OUT]
        if to_train:
            order = StatefulBatches if run.stateful else ShuffledWindows
            self.order = order(
                corpus.splits["train"].tokens, run.context_length, run.batch_size, run.seed
            )

    @classmethod
    def open(cls, run: TrainingConfig, tokenizer: Tokenizer | None, to_train: bool) -> Self:
        """Text from anywhere; already prepared tokens are opened without `datasets`."""
        return cls(run, open_corpus_of(run, tokenizer, to_train), to_train)

    def batch(self, index: int) -> Batch:
        """(tokens_BT, targets_BT)."""
        return self.order.batch(index)

    def continues_previous(self, index: int) -> bool:
        """Where the state is carried, all but the first batch of an epoch."""
        return self.config.stateful and index % self.order.epoch != 0

    def validate(self, model: Model) -> float:
        """Nats per token over some of the validation split."""
        assert isinstance(model, LanguageModel)
        tokens = self.corpus.splits["validation"].tokens
        budget, precision = self.config.eval_tokens, self.config.precision
        return estimate_loss(model, tokens, budget, precision, self.config.stateful)

    def sample(self, model: Model, length: int) -> str:
        """A text of at most `length` tokens."""
        assert isinstance(model, LanguageModel)
        if not length:
            return ""
        end = self.corpus.tokenizer.eos_token
        with inference_mode(model):
            ids = list(
                generate(model, [end], length, SamplingParams(temperature=0.8, seed=0), {end})
            )
        return self.corpus.tokenizer.decode(ids)

    def score(self, model: Model, split: str, *, final: bool = False, **options: Any) -> Report:  # noqa: ANN401
        """Every token of a split, once; at last with general compressors beside it."""
        assert isinstance(model, LanguageModel)
        part = self.corpus.splits[split]
        lossless = self._lossless(part)
        score = evaluate(
            model,
            part.tokens,
            words=part.words,
            bytes=part.bytes if lossless else 0,
            stride=options.get("stride"),
            context_length=options.get("context_length"),
            precision=self.config.precision,
            stateful=self.config.stateful,
        )
        if final and lossless and part.bytes <= COMPRESSED:
            text = self.corpus.tokenizer.decode(part.tokens.tolist())
            score = dataclasses.replace(score, compressors=compression_baselines(text.encode()))
        return score

    def _lossless(self, part: Split) -> bool:
        """Whether the tokens say all of the text: words that a tokenizer does not know are lost."""
        if self.corpus.tokenizer.unk_token is None:
            return True
        sizes = [
            len(self.corpus.tokenizer.token_bytes(i)) for i in range(self.model_args["vocab_size"])
        ]
        return bool(np.bincount(part.tokens, minlength=len(sizes)) @ sizes == part.bytes)


@dataclass(frozen=True)
class Likeness:
    """How alike the vectors of neighbours are, and those of words taken by chance."""

    loss: float
    neighbours: float
    strangers: float
    pairs: int

    def to_json(self) -> dict[str, float]:
        """Every figure by name."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The figures in lines."""
        return (
            f"  loss             {self.loss:.4f} nats per pair\n"
            f"  mean cosine      {self.neighbours:.4f} of tokens side by side\n"
            f"                   {self.strangers:.4f} of tokens by chance\n"
            f"  {self.pairs:,} pairs of each"
        )


class Vectors(Text):
    """A vector for each token, from the company that it keeps."""

    kind: ClassVar[str] = "word-vectors"
    eval_options: ClassVar[frozenset[str]] = frozenset()
    unsupported_options: ClassVar[frozenset[str]] = Text.unsupported_options | {
        "stateful",
        "init_embedding",
    }

    def validate(self, model: Model) -> float:
        """Nats per pair of neighbours over some of the validation split, the same negatives each time."""
        return self._loss(model, self.corpus.splits["validation"], self.config.eval_tokens)

    def _loss(self, model: Model, split: Split, tokens: int) -> float:
        device = next(model.parameters()).device
        rows = max(1, min(tokens, len(split.tokens) - 1) // self.config.context_length)
        order = ShuffledWindows(
            split.tokens, min(self.config.context_length, len(split.tokens) - 1), rows, 0
        )
        batch = (torch.from_numpy(array).to(device) for array in order.batch(0))
        devices = [device] if device.type == "cuda" else []
        with (
            inference_mode(model, self.config.precision),
            torch.random.fork_rng(devices, device_type="cuda"),
        ):
            torch.manual_seed(0)
            return model.loss(*batch).item()

    def format_loss(self, loss: float) -> str:
        """Without a perplexity: it predicts no token."""
        return f"validation loss {loss:.4f}"

    def sample(self, model: Model, length: int) -> str:
        """Some of the most frequent words, each with its nearest."""
        assert isinstance(model, Word2Vec)
        tokenizer = self.corpus.tokenizer
        texts = [tokenizer.decode([token]).strip() for token in range(tokenizer.vocab_size)]
        words = np.array([len(text) > 2 and text.isalpha() for text in texts])
        tokens = self.corpus.splits["validation"].tokens
        counts = np.bincount(tokens, minlength=tokenizer.vocab_size) * words
        vectors_VD = F.normalize(model.vectors_VD.float().cpu(), dim=-1)
        lines = []
        for token in np.argsort(-counts, kind="stable")[: 5 * min(1, length)]:
            likeness_V = vectors_VD @ vectors_VD[token]
            likeness_V[torch.from_numpy(~words)] = -1
            nearest = [texts[other] for other in likeness_V.topk(12).indices.tolist()]
            others = dict.fromkeys(word for word in nearest if word != texts[token])
            lines.append(f"{texts[token]}: {', '.join(list(others)[:6])}")
        return "\n".join(lines)

    def score(
        self,
        model: Model,
        split: str,
        *,
        final: bool = False,  # noqa: ARG002
        **options: Any,  # noqa: ANN401, ARG002
    ) -> Likeness:
        """The loss over a split, and the mean cosine of its neighbours and of strangers."""
        assert isinstance(model, Word2Vec)
        part = self.corpus.splits[split]
        tokens = torch.from_numpy(part.tokens.astype(np.int64))
        vectors_VD = F.normalize(model.vectors_VD.float().cpu(), dim=-1)
        shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
        near, far = (
            (vectors_VD[some[:-1]] * vectors_VD[some[1:]]).sum(-1).mean().item()
            for some in (tokens, shuffled)
        )
        return Likeness(self._loss(model, part, len(tokens)), near, far, len(tokens) - 1)


def open_corpus_of(
    run: TrainingConfig, tokenizer: Tokenizer | None, to_train: bool, pairs: bool = False
) -> Corpus:
    """The run's corpus as tokens; already prepared ones are opened without `datasets`."""
    if (Path(run.data) / MANIFEST).is_file():
        return open_corpus(Path(run.data), pairs)
    from training.data import sources

    source = sources.Source(
        run.data,
        config=run.data_config,
        split=run.data_split,
        column=run.text_column,
        streaming=run.streaming,
        limit=run.data_limit,
        languages=run.languages,
    )
    return sources.prepare(
        source, tokenizer or run.tokenizer, run.vocab_size, hold_out=to_train, pairs=pairs
    )
