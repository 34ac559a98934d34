"""Sentence pairs as a task: to write in one language what a sentence of another says.

    loss        mean of -ln p(token | source, tokens before it), the end of the sentence included
    BLEU        how many of the words, pairs, triples and quadruples of words that were written
                stand in the reference too (Papineni et al. 2002), by `sacrebleu` (Post 2018)
    chrF        the same of runs of characters (Popovic 2015)

BLEU and chrF are of a whole corpus, from 0 to 100, and comparable under every tokenizer if
their signatures are the same. A pair gets a window: the source one half, the target the other.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from gpt import LanguageModel, Model
from gpt.beam_search import translate
from tokenizer import Tokenizer
from training.config import TrainingConfig
from training.data.corpus import Corpus, Tokens
from training.evaluation.evaluate import MAX_BATCH_TOKENS, inference_mode
from training.progress import format_duration
from training.tasks.base import Batch, Task
from training.tasks.text import open_corpus_of

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

ALIKE = 100
"""Batches whose pairs are sorted together: the more, the less padding and the less chance."""
ROWS = 128
"""Sentences, or beams of them, that are translated at once."""
BUCKETS = ("short", "middle", "long")

Which = NDArray[np.int64]
"""Numbers of pairs."""


class PairSplit:
    """The pairs of a split of a corpus.

    Args:
        tokens: Two documents of each pair, the source and the target.
        mark: The token before every document.
    """

    def __init__(self, tokens: Tokens, mark: int) -> None:
        self.tokens, self.mark = tokens, mark
        marks = np.flatnonzero(tokens == mark)
        ends = np.append(marks[1:], len(tokens))
        self.starts = (marks + 1).reshape(-1, 2)
        self.lengths = (ends - marks - 1).reshape(-1, 2)
        """Tokens of both sides of each pair."""

    def __len__(self) -> int:
        return len(self.lengths)

    def side(self, side: int, pair: int) -> list[int]:
        """The tokens of the source (0) or the target (1) of a pair."""
        start = self.starts[pair, side]
        return self.tokens[start : start + self.lengths[pair, side]].tolist()

    def fitting(self, room: int) -> Which:
        """The pairs whose sides take at most `room` tokens each, the target with a mark."""
        sources, targets = self.lengths.T
        return np.flatnonzero((sources <= room) & (targets < room))

    def by_length(self, which: Which) -> Which:
        """The same pairs, the shortest targets first."""
        sources, targets = self.lengths[which].T
        return which[np.lexsort((sources, targets))]

    def batch(self, which: Which) -> Batch:
        """(source_BS, lengths_B, tokens_BT, targets_BT) of some pairs."""
        source_BS, _ = self._padded(which, 0)
        target_BT, inside_BT = self._padded(which, 1)
        rows, lengths_B = np.arange(len(which)), self.lengths[which]
        marks_B1 = np.full((len(which), 1), self.mark)
        targets_BT = np.hstack([np.where(inside_BT, target_BT, -100), np.full_like(marks_B1, -100)])
        targets_BT[rows, lengths_B[:, 1]] = self.mark
        return source_BS, lengths_B[:, 0], np.hstack([marks_B1, target_BT]), targets_BT

    def _padded(self, which: Which, side: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """One side of some pairs, 0 behind its end, and where it is not."""
        starts, lengths = self.starts[which, side, None], self.lengths[which, side, None]
        places = np.arange(lengths.max())
        inside = places < lengths
        ids = self.tokens[np.where(inside, starts + places, 0)].astype(np.int64)
        return np.where(inside, ids, 0), inside


class Pairs(Task):
    """The translation of a sentence, token by token.

    Args:
        run: Its window, batch and seed decide the batches.
        corpus: Prepared tokens of pairs.
        to_train: Whether batches will be asked for.
    """

    kind: ClassVar[str] = "translation"
    eval_options: ClassVar[frozenset[str]] = frozenset({"num_beams"})
    unsupported_options: ClassVar[frozenset[str]] = frozenset({"stateful"})

    def __init__(self, run: TrainingConfig, corpus: Corpus, to_train: bool = True) -> None:
        assert corpus.languages
        self.config, self.languages = run, corpus.languages
        if run.languages not in (None, "-".join(self.languages)):
            raise ValueError(
                f"{run.data} was prepared from {' to '.join(self.languages)}: leave out "
                "--languages, or give the pairs themselves as --data"
            )
        self._tokenizer = self.tokenizer = corpus.tokenizer
        if self._tokenizer.unk_token is not None:
            raise ValueError(
                "a translation needs a tokenizer that can write every word: --tokenizer bpe or bytes"
            )
        self.fingerprint, self.description = corpus.fingerprint, corpus.description
        self.description += f"; {' to '.join(self.languages)}"
        self.splits = list(corpus.splits)
        self.pairs = {
            name: PairSplit(split.tokens, self._tokenizer.eos_token)
            for name, split in corpus.splits.items()
        }
        self.room = run.context_length // 2
        """Tokens of a side at most."""
        self.sizes = []
        for name, pairs in self.pairs.items():
            long = len(pairs) - len(pairs.fitting(self.room))
            self.sizes.append(
                f"{name}: {len(pairs):,} pairs, {pairs.lengths.sum():,} tokens"
                + f"; {long:,} pairs longer than half a window are left out" * bool(long)
            )
        self.model_args = {
            "vocab_size": self._tokenizer.vocab_size,
            "context_length": run.context_length,
        }
        if to_train:
            for name in ("train", "validation"):
                self._fitting(name)
            self._batches = functools.lru_cache(maxsize=2)(self._shuffled)
            self.epoch = len(self._batches(0))
            """Batches in an epoch."""

    @classmethod
    def open(cls, run: TrainingConfig, tokenizer: Tokenizer | None, to_train: bool) -> Self:
        """Pairs from anywhere; already prepared tokens are opened without `datasets`."""
        return cls(run, open_corpus_of(run, tokenizer, to_train, pairs=True), to_train)

    @classmethod
    def largest_batch(cls, run: TrainingConfig, rows: int) -> Batch:
        """Both sides as long as there is room for."""
        side_BT = np.zeros((rows, run.context_length // 2), np.int64)
        return side_BT, np.full(rows, run.context_length // 2), side_BT, side_BT

    def _fitting(self, split: str, limit: int | None = None) -> Which:
        """Those of the first `limit` pairs of a split that can be learned."""
        which = self.pairs[split].fitting(self.room)
        if limit is not None:
            which = which[which < limit]
        if not len(which):
            raise ValueError(
                f"none of the pairs of the {split} split fits into a window of {self.config.context_length}, one half "
                "for the source and one for the target: choose a larger --context-length"
            )
        return which

    def _shuffled(self, epoch: int) -> list[Which]:
        """The batches of an epoch: every pair once, in each batch pairs of about one length."""
        random = np.random.default_rng([self.config.seed, epoch])
        pairs = self.pairs["train"]
        order = random.permutation(self._fitting("train"))
        batches = [
            batch
            for alike in np.array_split(
                order, math.ceil(len(order) / (ALIKE * self.config.batch_size))
            )
            for batch in np.array_split(
                pairs.by_length(alike), math.ceil(len(alike) / self.config.batch_size)
            )
        ]
        return [batches[i] for i in random.permutation(len(batches))]

    def batch(self, index: int) -> Batch:
        """(source_BS, lengths_B, tokens_BT, targets_BT) of at most `run.batch` pairs."""
        return self.pairs["train"].batch(self._batches(index // self.epoch)[index % self.epoch])

    def validate(self, model: Model) -> float:
        """Nats per target token over some of the validation split."""
        assert isinstance(model, LanguageModel)
        pairs, which = self.pairs["validation"], self._fitting("validation")
        tokens = int(pairs.lengths[which, 1].sum()) + len(which)
        some = which[:: max(1, tokens // self.config.eval_tokens)]
        nats, count = self._nats(model, pairs, some)
        return nats / count

    def sample(self, model: Model, length: int) -> str:
        """Two sentences of the validation split, what the model makes of them, and the references."""
        assert isinstance(model, LanguageModel)
        if not length:
            return ""
        pairs = self.pairs["validation"]
        some = sorted({0, len(pairs) // 2})
        sources = [pairs.side(0, pair)[: self.room] for pair in some]
        found = self._translate(model, sources, most=min(length, self.room))
        lines = []
        for pair, source, translation in zip(some, sources, found, strict=True):
            reference = pairs.side(1, pair)
            lines.append(f"{self.languages[0]:>9}: {self._tokenizer.decode(source)}")
            lines.append(f"{'model':>9}: {translation}")
            lines.append(f"{self.languages[1]:>9}: {self._tokenizer.decode(reference)}")
        return "\n".join(lines)

    def score(
        self,
        model: Model,
        split: str,
        *,
        final: bool = False,  # noqa: ARG002
        **options: Any,  # noqa: ANN401
    ) -> "TranslationScore":
        """All of a split translated and compared with the references, and its loss.

        Options: `beams`, how many translations the search follows, 1 if not given; `limit`,
        how many pairs to take, all if not given. A source longer than half a window loses its end.
        """
        assert isinstance(model, LanguageModel)
        bleu, chrf = _metrics()
        beams, limit = options.get("num_beams", 1), options.get("limit")
        if beams < 1:
            raise ValueError(f"--num-beams must be at least 1, not {beams}")
        pairs, fitting = self.pairs[split], self._fitting(split, limit)
        which = range(len(pairs))[:limit]
        sources = [pairs.side(0, pair) for pair in which]
        words = np.array([len(self._tokenizer.decode(source).split()) for source in sources])
        references = [self._tokenizer.decode(pairs.side(1, pair)) for pair in which]
        cut = [source[: self.room] for source in sources]
        translations = self._translate(model, cut, self.room, beams)
        nats, tokens = self._nats(model, pairs, fitting)
        return TranslationScore(
            languages="-".join(self.languages),
            bleu=_score(bleu, translations, references),
            chrf=_score(chrf, translations, references),
            nats=nats,
            tokens=tokens,
            pairs=len(which),
            too_long=len(which) - len(fitting),
            beams=beams,
            bleu_signature=str(bleu.get_signature()),
            chrf_signature=str(chrf.get_signature()),
            buckets=_buckets(bleu, words, translations, references),
            translations=translations,
        )

    def _nats(self, model: LanguageModel, pairs: PairSplit, which: Which) -> tuple[float, int]:
        """The nats of the targets of some pairs, and how many tokens they are, with their ends."""
        rows = max(1, MAX_BATCH_TOKENS // self.config.context_length)
        order = pairs.by_length(which)
        nats, count = 0.0, 0
        with inference_mode(model, self.config.precision) as device:
            for start in range(0, len(order), rows):
                arrays = pairs.batch(order[start : start + rows])
                batch = (torch.from_numpy(array).to(device) for array in arrays)
                nats += model.nll(*batch).cpu().double().sum().item()
                count += int((arrays[-1] != -100).sum())
        return nats, count

    def _translate(
        self, model: LanguageModel, sources: Sequence[list[int]], most: int, beams: int = 1
    ) -> list[str]:
        """The translation of each source, the longest first, so that each batch has one length."""
        end = self._tokenizer.eos_token
        order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
        rows = max(1, ROWS // beams)
        found: dict[int, str] = {}
        with inference_mode(model):
            for start in range(0, len(order), rows):
                some = order[start : start + rows]
                targets = translate(
                    model,
                    [sources[i] for i in some],
                    decoder_start_token=end,
                    eos_token=end,
                    max_tokens=most,
                    num_beams=beams,
                )
                found |= dict(zip(some, map(self._tokenizer.decode, targets), strict=True))
        return [found[i] for i in range(len(sources))]


@dataclass(frozen=True)
class Bucket:
    """The sentences of about one length."""

    name: str
    shortest: int
    """Words of the shortest source."""
    longest: int
    pairs: int
    bleu: float


@dataclass(frozen=True)
class TranslationScore:
    """How good translations are; `nats` is the sum over `tokens` target tokens."""

    languages: str
    bleu: float
    chrf: float
    nats: float
    tokens: int
    pairs: int
    too_long: int
    """Pairs that do not fit into a window: translated from what fits, without a loss."""
    beams: int
    bleu_signature: str
    chrf_signature: str
    buckets: list[Bucket]
    """Thirds, by the number of words of the source."""
    translations: list[str]

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Per target token."""
        return math.exp(min(self.loss, 700))

    def to_json(self) -> dict[str, Any]:
        """Every figure by name, without the translations."""
        figures = dataclasses.asdict(self)
        del figures["translations"]
        return {"loss": self.loss, "perplexity": self.perplexity, **figures}

    def table(self) -> str:
        """The figures in lines, their units and settings with them."""
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
            f"  {self.languages}, beams {self.beams}; {self.pairs:,} pairs, {self.tokens:,} tokens"
            + f", {self.too_long:,} pairs too long for the window" * bool(self.too_long),
        ]
        return "\n".join(lines)


def comparison(rows: Sequence[dict[str, Any]]) -> str:
    """Several scores as a Markdown table; a row has its run, its model, and what `to_json` gives."""
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
        f"{first['beams']}; {first['bleu_signature']}.",
    ]
    return "\n".join(lines) + "\n"


def _metrics() -> "tuple[Metric, Metric]":
    """BLEU and chrF, with their customary settings."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ModuleNotFoundError:
        raise ValueError("translations are scored by a package: pip install sacrebleu") from None
    return BLEU(), CHRF()


def _score(metric: "Metric", translations: Sequence[str], references: Sequence[str]) -> float:
    return float(metric.corpus_score(translations, [references]).score)


def _buckets(
    bleu: "Metric", words: Which, translations: Sequence[str], references: Sequence[str]
) -> list[Bucket]:
    """Thirds by the words of the source; sentences of one length stay together."""
    borders = np.quantile(words, [1 / 3, 2 / 3], method="inverted_cdf")
    bucket_of = np.searchsorted(borders, words)
    found = []
    for number, name in enumerate(BUCKETS):
        which = np.flatnonzero(bucket_of == number).tolist()
        if which:
            score = _score(bleu, [translations[i] for i in which], [references[i] for i in which])
            shortest, longest = int(words[which].min()), int(words[which].max())
            found.append(Bucket(name, shortest, longest, len(which), score))
    return found
