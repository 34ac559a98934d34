"""Translation: given a sentence, predict its translation token by token.

    loss        mean of -ln p(token | source, tokens before it), including the end of the sentence
    BLEU        share of the output's word 1- to 4-grams that are in the reference too (Papineni et
                al. 2002), by `sacrebleu` (Post 2018)
    chrF        the same for character n-grams (Popovic 2015)

BLEU and chrF are computed over a whole corpus, from 0 to 100. They are comparable between
tokenizers, provided that their signatures are the same. The source of a pair may fill one half
of the context length, the target the other.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpt import LanguageModel, Model
from gpt.beam_search import translate
from training.config import TrainingConfig
from training.data.corpus import Corpus, Tokens
from training.evaluation.evaluate import MAX_BATCH_TOKENS, inference_mode
from training.progress import format_duration
from training.tasks.base import Batch
from training.tasks.text import CorpusTask

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

BATCHES_SORTED_TOGETHER = 100
"""Batches whose pairs are sorted by length together: more give less padding, but less randomness."""
MAX_BEAMS_AT_ONCE = 128
"""Sentences, times beams of each, that are translated in one batch."""
MAX_LENGTH_PENALTY = 10
"""Of `--length-penalty`: the power of a length must stay finite."""
IGNORE_INDEX = -100
"""Target of padding, as in torch's cross-entropy."""
BUCKETS = ("short", "middle", "long")

Indices = NDArray[np.int64]
"""Indices of sentence pairs in a split."""


class PairSplit:
    """The sentence pairs of one split of a corpus: two documents each, the source and the target."""

    def __init__(self, tokens: Tokens, eos_token: int) -> None:
        self.tokens, self.eos_token = tokens, eos_token
        starts = np.flatnonzero(tokens == eos_token)
        ends = np.append(starts[1:], len(tokens))
        self.starts = (starts + 1).reshape(-1, 2)
        self.lengths = (ends - starts - 1).reshape(-1, 2)
        """Tokens of source and target of each pair."""

    def __len__(self) -> int:
        return len(self.lengths)

    def sentence(self, index: int, side: int) -> list[int]:
        """Return the tokens of the source (side 0) or the target (side 1) of a pair."""
        start = self.starts[index, side]
        return self.tokens[start : start + self.lengths[index, side]].tolist()

    def shorter_than(self, max_tokens: int) -> Indices:
        """Return the pairs with at most `max_tokens` in the source and in the target with its end."""
        sources, targets = self.lengths.T
        return np.flatnonzero((sources <= max_tokens) & (targets < max_tokens))

    def sort_by_length(self, indices: Indices) -> Indices:
        """Return the same pairs, the shortest targets first."""
        sources, targets = self.lengths[indices].T
        return indices[np.lexsort((sources, targets))]

    def batch(self, indices: Indices) -> Batch:
        """Return (source_BS, lengths_B, tokens_BT, targets_BT) of some pairs."""
        source_BS, _ = self._pad(indices, 0)
        target_BT, mask_BT = self._pad(indices, 1)
        rows, lengths_B = np.arange(len(indices)), self.lengths[indices]
        eos_B1 = np.full((len(indices), 1), self.eos_token)
        targets_BT = np.hstack(
            [np.where(mask_BT, target_BT, IGNORE_INDEX), np.full_like(eos_B1, IGNORE_INDEX)]
        )
        targets_BT[rows, lengths_B[:, 1]] = self.eos_token
        return source_BS, lengths_B[:, 0], np.hstack([eos_B1, target_BT]), targets_BT

    def _pad(self, indices: Indices, side: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return one side of some pairs, padded with 0, and the mask of its tokens."""
        starts, lengths = self.starts[indices, side, None], self.lengths[indices, side, None]
        positions = np.arange(lengths.max())
        mask = positions < lengths
        ids = self.tokens[np.where(mask, starts + positions, 0)].astype(np.int64)
        return np.where(mask, ids, 0), mask


def _split_evenly(indices: Indices, max_size: int) -> list[Indices]:
    return np.array_split(indices, math.ceil(len(indices) / max_size))


class Translation(CorpusTask):
    """Translation of a sentence, token by token."""

    kind = "translation"
    eval_options = frozenset({"num_beams", "length_penalty"})
    unsupported_options = frozenset({"stateful"})

    def __init__(self, config: TrainingConfig, corpus: Corpus, for_training: bool = True) -> None:
        super().__init__(config, corpus)
        assert corpus.languages
        self.languages = corpus.languages
        if config.languages not in (None, "-".join(self.languages)):
            raise ValueError(
                f"{config.data} was prepared from {' to '.join(self.languages)}: leave out "
                "--languages, or give the sentence pairs themselves as --data"
            )
        if self.tokenizer.unk_token is not None:
            raise ValueError(
                "translation needs a tokenizer that can encode every word: --tokenizer bpe or bytes"
            )
        for split in corpus.splits.values():
            if split.lost:  # BLEU would compare with references that are not those of the data
                raise ValueError(
                    f"translation needs a tokenizer that loses no text: {split.lost}; "
                    "choose --tokenizer bpe or bytes"
                )
        self.description += f"; {' to '.join(self.languages)}"
        self.pairs = {
            name: PairSplit(split.tokens, self.tokenizer.eos_token)
            for name, split in corpus.splits.items()
        }
        self.max_sentence_tokens = config.context_length // 2
        """Tokens of a source, and of a target with its end, at most."""
        self.sizes = []
        for name, pairs in self.pairs.items():
            too_long = len(pairs) - len(pairs.shorter_than(self.max_sentence_tokens))
            line = f"{name}: {len(pairs):,} pairs, {pairs.lengths.sum():,} tokens"
            if too_long:
                line += f"; {too_long:,} pairs longer than half a window are left out"
            self.sizes.append(line)
        self.sizes += corpus.duplicate_notes() + self.tokenizer_notes()
        if for_training:
            self._epoch_batches = functools.lru_cache(maxsize=2)(self._shuffle_epoch)
            self.batches_per_epoch = len(self._epoch_batches(0))
            self._usable_pairs("validation")

    @classmethod
    def largest_batch(cls, config: TrainingConfig, batch_size: int) -> Batch:
        """Return zeros in the shapes of a batch of the longest pairs."""
        length = config.context_length // 2
        zeros_BT = np.zeros((batch_size, length), np.int64)
        return zeros_BT, np.full(batch_size, length), zeros_BT, zeros_BT

    def _usable_pairs(self, split: str, limit: int | None = None) -> Indices:
        """Return those of the first `limit` pairs of a split that fit; a ValueError if none does."""
        indices = self.pairs[split].shorter_than(self.max_sentence_tokens)
        if limit is not None:
            indices = indices[indices < limit]
        if not len(indices):
            raise ValueError(
                f"none of the pairs of the {split} split fits into a window of "
                f"{self.config.context_length}, one half for the source and one for the target: "
                "choose a larger --context-length"
            )
        return indices

    def _shuffle_epoch(self, epoch: int) -> list[Indices]:
        """Return the batches of an epoch: each pair once, pairs of similar length together."""
        random = np.random.default_rng([self.config.seed, epoch])
        pairs, batch_size = self.pairs["train"], self.config.batch_size
        order = random.permutation(self._usable_pairs("train"))
        batches: list[Indices] = []
        for group in _split_evenly(order, BATCHES_SORTED_TOGETHER * batch_size):
            batches += _split_evenly(pairs.sort_by_length(group), batch_size)
        return [batches[i] for i in random.permutation(len(batches))]

    def batch(self, index: int) -> Batch:
        """Return (source_BS, lengths_B, tokens_BT, targets_BT) of at most `batch_size` pairs."""
        epoch, position = divmod(index, self.batches_per_epoch)
        return self.pairs["train"].batch(self._epoch_batches(epoch)[position])

    def validate(self, model: Model) -> float:
        """Return nats per target token over evenly spaced pairs of the validation split."""
        assert isinstance(model, LanguageModel)
        pairs, indices = self.pairs["validation"], self._usable_pairs("validation")
        num_tokens = int(pairs.lengths[indices, 1].sum()) + len(indices)
        stride = max(1, num_tokens // self.config.eval_tokens)
        nll, count = self._nll(model, pairs, indices[::stride])
        return nll / count

    def sample(self, model: Model, length: int) -> str:
        """Return two validation sentences, the model's translations and the references."""
        assert isinstance(model, LanguageModel)
        if not length:
            return ""
        pairs = self.pairs["validation"]
        indices = sorted({0, len(pairs) // 2})
        sources = [pairs.sentence(i, 0)[: self.max_sentence_tokens] for i in indices]
        translations = self._translate(model, sources, min(length, self.max_sentence_tokens))
        lines = []
        for index, source, translation in zip(indices, sources, translations, strict=True):
            reference = self.tokenizer.decode(pairs.sentence(index, 1))
            lines.append(f"{self.languages[0]:>9}: {self.tokenizer.decode(source)}")
            lines.append(f"{'model':>9}: {translation}")
            lines.append(f"{self.languages[1]:>9}: {reference}")
        return "\n".join(lines)

    def score(self, model: Model, split: str, **options: Any) -> "TranslationScore":  # noqa: ANN401
        """Translate all of a split, compare it with the references, and compute the loss.

        Options: `num_beams` and `length_penalty` of the beam search (default 1 for both), and
        `limit`, the number of pairs (default all). A source longer than half the context length is truncated.
        """
        assert isinstance(model, LanguageModel)
        bleu, chrf = _metrics()
        num_beams, limit = options.get("num_beams", 1), options.get("limit")
        length_penalty = options.get("length_penalty", 1.0)
        if num_beams < 1:
            raise ValueError(f"--num-beams must be at least 1, not {num_beams}")
        if not 0 <= length_penalty <= MAX_LENGTH_PENALTY:
            raise ValueError(
                f"--length-penalty must be between 0 and {MAX_LENGTH_PENALTY}, not {length_penalty}"
            )
        if num_beams == 1 and "length_penalty" in options:
            raise ValueError(
                "--length-penalty compares the hypotheses of several beams: add --num-beams 4"
            )
        search = {"num_beams": num_beams, "length_penalty": length_penalty}
        pairs, usable = self.pairs[split], self._usable_pairs(split, limit)
        indices = range(len(pairs))[:limit]
        sources = [pairs.sentence(i, 0) for i in indices]
        source_words = np.array([len(self.tokenizer.decode(source).split()) for source in sources])
        references = [self.tokenizer.decode(pairs.sentence(i, 1)) for i in indices]
        truncated = [source[: self.max_sentence_tokens] for source in sources]
        translations = self._translate(model, truncated, self.max_sentence_tokens, **search)
        nll, tokens = self._nll(model, pairs, usable)
        return TranslationScore(
            languages="-".join(self.languages),
            bleu=bleu.corpus_score(translations, [references]).score,
            chrf=chrf.corpus_score(translations, [references]).score,
            nll=nll,
            tokens=tokens,
            pairs=len(indices),
            too_long=len(indices) - len(usable),
            **search,
            bleu_signature=str(bleu.get_signature()),
            chrf_signature=str(chrf.get_signature()),
            buckets=_buckets(bleu, source_words, translations, references),
            translations=translations,
        )

    def _nll(self, model: LanguageModel, pairs: PairSplit, indices: Indices) -> tuple[float, int]:
        """Return the summed negative log-likelihood of the pairs' target tokens, and their number."""
        batch_size = max(1, MAX_BATCH_TOKENS // self.config.context_length)
        order = pairs.sort_by_length(indices)
        nll, count = 0.0, 0
        with inference_mode(model, self.config.precision) as device:
            for start in range(0, len(order), batch_size):
                arrays = pairs.batch(order[start : start + batch_size])
                batch = (torch.from_numpy(array).to(device) for array in arrays)
                nll += model.nll(*batch).cpu().double().sum().item()
                count += int((arrays[-1] != IGNORE_INDEX).sum())
        return nll, count

    def _translate(
        self,
        model: LanguageModel,
        sources: list[list[int]],
        max_tokens: int,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> list[str]:
        """Translate sources in order of length, so that those of a batch have similar lengths."""
        eos_token = self.tokenizer.eos_token
        order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
        batch_size = max(1, MAX_BEAMS_AT_ONCE // num_beams)
        translations = [""] * len(sources)
        with inference_mode(model):
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                targets = translate(
                    model,
                    [sources[i] for i in indices],
                    decoder_start_token=eos_token,
                    eos_token=eos_token,
                    max_tokens=max_tokens,
                    num_beams=num_beams,
                    length_penalty=length_penalty,
                )
                for i, target in zip(indices, targets, strict=True):
                    translations[i] = self.tokenizer.decode(target)
        return translations


@dataclass(frozen=True)
class Bucket:
    """The figures of sentences whose sources have from `shortest` to `longest` words."""

    name: str
    shortest: int
    longest: int
    pairs: int
    bleu: float


@dataclass(frozen=True)
class TranslationScore:
    """Translation quality."""

    languages: str
    bleu: float
    chrf: float
    nll: float
    """Sum over `tokens` target tokens, in nats."""
    tokens: int
    pairs: int
    too_long: int
    """Pairs that do not fit into the context length: translated from a truncated source, without a loss."""
    num_beams: int
    length_penalty: float
    """Power of the length that divides the score of a hypothesis."""
    bleu_signature: str
    chrf_signature: str
    buckets: list[Bucket]
    """Thirds of the pairs, by the number of source words."""
    translations: list[str]

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per target token."""
        return math.exp(min(self.loss, 700))

    @property
    def search(self) -> str:
        """How the translations were found."""
        if self.num_beams == 1:
            return "greedy"
        return f"{self.num_beams} beams, length penalty {self.length_penalty:g}"

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name, without the translations."""
        figures = dataclasses.asdict(self)
        del figures["translations"]
        return {"loss": self.loss, "perplexity": self.perplexity, **figures}

    def table(self) -> str:
        """Return the figures as lines of text, with their units and settings."""
        too_long = f", {self.too_long:,} pairs too long for the window" * bool(self.too_long)
        lines = [f"  BLEU             {self.bleu:.2f}  {self.bleu_signature}"]
        lines += [
            f"    {bucket.name:<15}{bucket.bleu:.2f}  "
            f"{bucket.shortest} to {bucket.longest} words, {bucket.pairs:,} pairs"
            for bucket in self.buckets
        ]
        lines += [
            f"  chrF             {self.chrf:.2f}  {self.chrf_signature}",
            f"  loss             {self.loss:.4f} nats per token",
            f"  perplexity       {self.perplexity:.3f} per token",
            f"  {self.languages}, {self.search}; {self.pairs:,} pairs, "
            f"{self.tokens:,} tokens{too_long}",
        ]
        return "\n".join(lines)


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return scores as a Markdown table.

    A row is `TranslationScore.to_json` with the run, split, parameters and seconds.
    """
    first = rows[0]
    words = [f"{b['shortest']} to {b['longest']} words" for b in first["buckets"]]
    lines = [
        f"| run | parameters | training | loss | BLEU | {' | '.join(words)} | chrF |",
        f"|---|---:|---:|---:|---:|{'---:|' * len(words)}---:|",
    ]
    for row in rows:
        buckets = " | ".join(f"{bucket['bleu']:.1f}" for bucket in row["buckets"])
        lines.append(
            f"| {row['run']} | {row['parameters']:,} | {format_duration(row['seconds'])} "
            f"| {row['loss']:.3f} | **{row['bleu']:.1f}** | {buckets} | {row['chrf']:.1f} |"
        )
    lines += [
        "",
        f"{first['languages']}, the {first['pairs']:,} pairs of the {first['split']} split, beams "
        f"{first['num_beams']}; {first['bleu_signature']}.",
    ]
    return "\n".join(lines) + "\n"


def _metrics() -> "tuple[Metric, Metric]":
    """Return BLEU and chrF with the default settings of sacrebleu."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ModuleNotFoundError:
        raise ValueError(
            "scoring translations needs one more package: pip install sacrebleu"
        ) from None
    return BLEU(), CHRF()


def _buckets(
    bleu: "Metric", source_words: Indices, translations: Sequence[str], references: Sequence[str]
) -> list[Bucket]:
    """Divide the pairs into thirds by source words; sources of equal length stay together."""
    borders = np.quantile(source_words, [1 / 3, 2 / 3], method="inverted_cdf")
    bucket_of = np.searchsorted(borders, source_words)
    buckets = []
    for number, name in enumerate(BUCKETS):
        indices = np.flatnonzero(bucket_of == number).tolist()
        if indices:
            outputs, targets = ([texts[i] for i in indices] for texts in (translations, references))
            score = bleu.corpus_score(outputs, [targets]).score
            words = source_words[indices]
            buckets.append(Bucket(name, int(words.min()), int(words.max()), len(indices), score))
    return buckets
