"""Tasks on text: predict the next token, or learn a vector for each token from those near it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F

from gpt import LanguageModel, Model
from gpt.device import fork_rng
from gpt.embeddings import cosines
from gpt.generation import generate
from gpt.models.word2vec import Word2Vec
from gpt.sampling import SamplingParams
from tokenizer import Tokenizer
from training.config import TrainingConfig
from training.data.corpus import (
    Corpus,
    Part,
    ShuffledWindows,
    Split,
    StatefulBatches,
    is_prepared,
    open_corpus,
)
from training.data.known_truth import KNOWN_TRUTH, Entropy, split_entropy
from training.data.mixture import MixedWindows, Mixture, parse_data, prepared_source
from training.data.sources import resolve_tokenizer, source_of
from training.evaluation.analysis import ScoredText, calibration, loss_by_position
from training.evaluation.evaluate import (
    MixtureScore,
    Predictions,
    Score,
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
SAMPLE_WORDS = 5
SAMPLE_NEIGHBORS = 6


def load_corpus(config: TrainingConfig, tokenizer: Tokenizer | None, for_training: bool) -> Corpus:
    """Return one source of data as tokens; already prepared tokens are opened without `datasets`."""
    sentence_pairs = config.task == "translation"
    (one, *others) = parse_data(config.data)
    if others:
        raise ValueError(
            f"a mixture is of text, for the task text: give one --data, not {config.data}"
        )
    if is_prepared(one.data):
        return open_corpus(one.data, sentence_pairs, tokenizer)
    from training.data.prepare import prepare_corpus

    tokenizer = tokenizer or resolve_tokenizer(config.tokenizer, config.end_of_text)
    return prepare_corpus(
        source_of(config, one.data),
        tokenizer or config.tokenizer,
        config.vocab_size,
        for_training,
        sentence_pairs,
    )


def load_texts(
    config: TrainingConfig, tokenizer: Tokenizer | None, for_training: bool
) -> Corpus | Mixture:
    """Return text as tokens, also a mixture.

    Without a tokenizer it is that of prepared tokens in the mixture, or trained on the mixture.
    """
    sources = parse_data(config.data)
    if len(sources) == 1:
        return load_corpus(config, tokenizer, for_training)
    if tokenizer is None and (prepared := prepared_source(config.data)):
        tokenizer = open_corpus(prepared).tokenizer
    tokenizer = tokenizer or resolve_tokenizer(config.tokenizer, config.end_of_text)
    if tokenizer is None:
        from training.data.prepare import mixture_tokenizer

        tokenizer = mixture_tokenizer(
            [(source_of(config, source.data), source.share) for source in sources],
            config.tokenizer,
            config.vocab_size,
        )
    parts = []
    for data, _, share in sources:
        one = dataclasses.replace(config, data=data)
        parts.append(Part(data, share, load_corpus(one, tokenizer, for_training)))
    mixture = Mixture(tuple(parts), sum((source.weight for source in sources), Fraction(0)))
    if not mixture.splits:
        raise ValueError(f"{config.data}: no split is in every source of the mixture")
    return mixture


class CorpusTask(Task):
    """A task on prepared tokens."""

    tokenizer: Tokenizer

    def __init__(
        self,
        config: TrainingConfig,
        corpus: Corpus | Mixture,
        for_training: bool = True,  # noqa: ARG002 (for batches)
    ) -> None:
        self.config, self.parts = config, corpus.parts
        self.fingerprint, self.description = corpus.fingerprint, corpus.description
        self.tokenizer = corpus.tokenizer
        self.splits = list(corpus.splits)
        self.model_args = {
            "vocab_size": self.tokenizer.vocab_size,
            "context_length": config.context_length,
        }

    @property
    def is_mixture(self) -> bool:
        """Whether there are several sources."""
        return len(self.parts) > 1

    def split_of(self, part: Part, name: str) -> Split:
        """Return a split of one source; a ValueError if it has no token to predict."""
        split = part.corpus.splits[name]
        if len(split.tokens) < 2:
            raise ValueError(
                f"{part.name if self.is_mixture else self.config.data}: the {name} split has no "
                "token to predict: give it more text"
            )
        return split

    def tokenizer_notes(self) -> list[str]:
        """Return a line about the tokenizer of prepared tokens, and one about text that is lost."""
        notes = []
        if prepared_source(self.config.data):
            notes.append(f"tokenizer: that of the data, {self.tokenizer.vocab_size:,} ids")
        splits = [split for part in self.parts for split in part.corpus.splits.values()]
        if lossy := {split.name: split.lost for split in splits if split.lost}:
            names, example = ", ".join(lossy), next(iter(lossy.values()))
            notes.append(f"no bits per byte of {names}: the tokenizer loses text: {example}")
        elif self.tokenizer.lost_text:
            notes.append(f"the tokenizer loses other text than this: {self.tokenizer.lost_text}")
        return notes

    @classmethod
    def open(cls, config: TrainingConfig, tokenizer: Tokenizer | None, for_training: bool) -> Self:
        """Open the task with its corpus."""
        load = load_corpus if cls.kind == "translation" else load_texts
        return cls(config, load(config, tokenizer, for_training), for_training)


class Text(CorpusTask):
    """Prediction of the next token from the tokens before it."""

    kind = "text"
    eval_options = frozenset({"stride", "context_length", "by", "accuracy"})
    unsupported_options = frozenset({"languages"})

    def __init__(
        self, config: TrainingConfig, corpus: Corpus | Mixture, for_training: bool = True
    ) -> None:
        super().__init__(config, corpus)
        self.sizes = [line for part in self.parts for line in self._part_sizes(part, for_training)]
        self.sizes += self.tokenizer_notes()
        self.sequence_length = config.context_length
        if self.kind == "text" and (truth := self.entropy("validation")):
            self.sizes.append(f"the truth: {truth.nats_per_token:.4f} nats per validation token")
        if not for_training:
            return
        validation = [
            self.split_of(part, "validation").tokens[: math.ceil(CALIBRATION_TOKENS * part.share)]
            for part in self.parts
        ]
        if self.kind == "text":
            self.calibration_tokens = np.concatenate(validation)
        self.batches = self._make_batches()

    def _part_sizes(self, part: Part, for_training: bool) -> list[str]:
        """Return a line about each split of a source, in a mixture after one about the source."""
        lines = part.corpus.size_lines()
        if not self.is_mixture:
            return lines
        head = f"{float(part.share):.2%} {part.corpus.description}"
        if for_training:
            config, tokens = self.config, len(part.corpus.splits["train"].tokens)
            drawn = config.steps * config.batch_size * config.context_length * part.share
            head += f"; its training split is read {float(drawn / tokens):.2g} times"
        return [head, *(f"  {line}" for line in lines)]

    def _make_batches(self) -> "StatefulBatches | ShuffledWindows | MixedWindows":
        config, windows = self.config, []
        if config.stateful:
            if self.is_mixture:
                raise ValueError(
                    "--stateful reads one text from its start to its end: give one --data, or "
                    "leave out --stateful"
                )
            tokens = self.parts[0].corpus.splits["train"].tokens
            return StatefulBatches(tokens, config.context_length, config.batch_size)
        for part in self.parts:
            tokens = part.corpus.splits["train"].tokens
            try:
                windows.append(
                    ShuffledWindows(tokens, config.context_length, config.batch_size, config.seed)
                )
            except ValueError as error:
                raise ValueError(f"{part.name}: {error}" if self.is_mixture else error) from None
        if not self.is_mixture:
            return windows[0]
        return MixedWindows(windows, [part.share for part in self.parts])

    def entropy(self, name: str) -> Entropy | None:
        """Return the entropy of a split if it is known exactly, else None."""
        split = self.parts[0].corpus.splits.get(name)
        if self.config.data != KNOWN_TRUTH or split is None or split.lost:
            return None
        entropy = split_entropy(split, self.tokenizer)
        # Options such as --data-limit may cut a document, so that the text starts within it.
        return entropy if math.isfinite(entropy.nats_per_token) else None

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
        """Return nats per token over about `eval_tokens` tokens of the validation split.

        Of a mixture it is the mean over its sources, weighted by their shares.
        """
        losses = {part.name: self._estimate(model, part) for part in self.parts}
        self.source_losses = losses if self.is_mixture else {}
        return sum(float(part.share) * losses[part.name] for part in self.parts)

    def _estimate(self, model: Model, part: Part) -> float:
        """Return the loss on some of the validation split of a source."""
        assert isinstance(model, LanguageModel)
        return estimate_loss(
            model,
            part.corpus.splits["validation"].tokens,
            math.ceil(self.config.eval_tokens * part.share),
            self.config.precision,
            self.config.stateful,
        )

    def sample(self, model: Model, length: int) -> str:
        """Return a text of at most `length` tokens."""
        assert isinstance(model, LanguageModel)
        if not length:
            return ""
        eos, params = self.tokenizer.eos_token, SamplingParams(temperature=0.8, seed=0)
        with inference_mode(model):
            return self.tokenizer.decode(list(generate(model, [eos], length, params, {eos})))

    def score(self, model: Model, split: str, *, final: bool = False, **options: Any) -> Report:  # noqa: ANN401
        """Score every token of a split once; if `final`, add intervals and general compressors.

        Options: `stride`, `context_length` and `accuracy` as in `evaluate`; `by`, "position" or
        "document" or both, adds the loss by these. Of a mixture each source is scored.
        """
        scores = {
            part.name: self._score(model, self.split_of(part, split), final, **options)
            for part in self.parts
        }
        if not self.is_mixture:
            return next(iter(scores.values()))
        return MixtureScore(scores, {part.name: float(part.share) for part in self.parts})

    def _score(
        self,
        model: Model,
        data: Split,
        final: bool,
        by: Sequence[str] = (),
        **options: Any,  # noqa: ANN401
    ) -> Score:
        predictions = self.predictions(model, data, **options)
        text, nll_N = self.scored_text(data), predictions.nll_N
        fields: dict[str, Any] = {"unknown_tokens": data.unknown, "lost": data.lost}
        if final:
            fields["intervals"], fields["resampled"] = text.intervals(nll_N)
            if not data.lost and data.bytes <= MAX_COMPRESSION_BYTES:
                decoded = self.tokenizer.decode(data.tokens.tolist())
                fields["compressors"] = compression_baselines(decoded.encode())
        if options.get("accuracy"):
            rank_N, confidence_N = predictions.columns[:, 1:].T
            fields["accuracy"], fields["calibration_bins"] = calibration(rank_N, confidence_N)
        if "position" in by:
            fields["by_position"] = loss_by_position(predictions.context_N, nll_N)
        if "document" in by:
            fields["by_document"] = text.loss_by_document(nll_N)
        return predictions.score(data.words, data.bytes, **fields)

    def predictions(self, model: Model, data: Split, **options: Any) -> Predictions:  # noqa: ANN401
        """Score every token of a split once; the options are those of `evaluate`."""
        assert isinstance(model, LanguageModel)
        return evaluate(
            model,
            data.tokens,
            precision=self.config.precision,
            stateful=self.config.stateful,
            **options,
        )

    def scored_text(self, data: Split) -> ScoredText:
        """Return documents and sizes of a split's tokens."""
        return ScoredText(data.tokens, self.tokenizer, data.lost)


@dataclass(frozen=True)
class WordVectorScore:
    """Mean cosine similarity of the vectors of adjacent tokens, and of random pairs of tokens."""

    loss: float
    adjacent_cosine: float
    random_cosine: float
    pairs: int

    def to_json(self) -> dict[str, float]:
        """Return all figures by name."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """Return the figures as lines of text."""
        return (
            f"  loss             {self.loss:.4f} nats per pair\n"
            f"  mean cosine      {self.adjacent_cosine:.4f} of adjacent tokens\n"
            f"                   {self.random_cosine:.4f} of random tokens\n"
            f"  {self.pairs:,} pairs of each"
        )


class WordVectors(Text):
    """A vector for each token, trained to tell the tokens near it from random ones."""

    kind = "word-vectors"
    eval_options = frozenset()
    unsupported_options = Text.unsupported_options | {
        "stateful",
        "init_embedding",
        "label_smoothing",
    }

    def _estimate(self, model: Model, part: Part) -> float:
        """Return nats per pair over some of the validation split, with the same negatives each time."""
        return self._loss(model, part.corpus.splits["validation"], self.config.eval_tokens)

    def _loss(self, model: Model, split: Split, num_tokens: int) -> float:
        device = next(model.parameters()).device
        max_tokens = len(split.tokens) - 1
        context_length = self.config.context_length
        batch_size = max(1, min(num_tokens, max_tokens) // context_length)
        windows = ShuffledWindows(split.tokens, min(context_length, max_tokens), batch_size, 0)
        batch = (torch.from_numpy(array).to(device) for array in windows.batch(0))
        with inference_mode(model, self.config.precision), fork_rng(device):
            torch.manual_seed(0)
            return model.loss(*batch).item()

    def format_loss(self, loss: float) -> str:
        """Return the loss without a perplexity: no token is predicted."""
        return f"validation loss {loss:.4f}"

    def sample(self, model: Model, length: int) -> str:
        """Return some of the most frequent words, each with its nearest neighbors."""
        assert isinstance(model, Word2Vec)
        texts = [self.tokenizer.decode([i]).strip() for i in range(self.tokenizer.vocab_size)]
        is_word = np.array([len(text) > 2 and text.isalpha() for text in texts])
        counts = is_word * sum(
            np.bincount(part.corpus.splits["validation"].tokens, minlength=len(texts))
            for part in self.parts
        )
        lines = []
        for token in np.argsort(-counts, kind="stable")[: SAMPLE_WORDS * min(1, length)]:
            cosine_V = cosines(model, int(token)).cpu()
            cosine_V[torch.from_numpy(~is_word)] = -1
            # More than are shown: tokens that differ only in white space have the same text.
            nearest = [texts[i] for i in cosine_V.topk(2 * SAMPLE_NEIGHBORS).indices.tolist()]
            words = dict.fromkeys(word for word in nearest if word != texts[token])
            lines.append(f"{texts[token]}: {', '.join(list(words)[:SAMPLE_NEIGHBORS])}")
        return "\n".join(lines)

    def score(self, model: Model, split: str, **options: Any) -> WordVectorScore:  # noqa: ANN401, ARG002
        """Return the loss over a split, and the mean cosine of adjacent and of random tokens.

        Of a mixture they are the means over its sources, weighted by their shares.
        """
        scores = [self._cosines(model, self.split_of(part, split)) for part in self.parts]
        shares = [float(part.share) for part in self.parts]
        figures = [(it.loss, it.adjacent_cosine, it.random_cosine) for it in scores]
        loss, adjacent, random = np.average(figures, 0, shares).tolist()
        return WordVectorScore(loss, adjacent, random, sum(it.pairs for it in scores))

    def _cosines(self, model: Model, data: Split) -> WordVectorScore:
        assert isinstance(model, Word2Vec)
        tokens = torch.from_numpy(data.tokens.astype(np.int64))
        vectors_VD = F.normalize(model.vectors_VD.float().cpu(), dim=-1)
        shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
        adjacent, random = (
            (vectors_VD[order[:-1]] * vectors_VD[order[1:]]).sum(-1).mean().item()
            for order in (tokens, shuffled)
        )
        return WordVectorScore(
            self._loss(model, data, len(tokens)), adjacent, random, len(tokens) - 1
        )
