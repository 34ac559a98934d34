"""What the nll of each token tells besides its mean: intervals, a paired test, position, document.

Tokens of one document depend on each other, and documents hardly do: intervals and the test resample
whole documents. A text of fewer than MIN_DOCUMENTS is cut into blocks of equal size instead.

    bootstrap     draw as many units as there are, with replacement, RESAMPLES times; the interval goes
                  from the 2.5th to the 97.5th percentile of the figure (Efron 1979)
    sign flips    if two models are equally good, the difference of each unit could as well have the
                  other sign: p is the share of random signs, the observed ones included, with a sum
                  at least as far from 0 (Phipson and Smyth 2010)
    calibration   expected calibration error: the mean of |accuracy - confidence| over BINS bins of equal
                  width, weighted by their tokens (Guo et al. 2017); the confidence is the probability
                  of the likeliest token, the accuracy how often it is the target
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer import Tokenizer

RESAMPLES = 1000
SIGN_FLIPS = 9999
SEED = 0
MIN_DOCUMENTS = 10
"""Documents from which on they are resampled; fewer are cut into blocks."""
MAX_BLOCKS, MIN_BLOCK_SIZE = 100, 100
BINS = 15
EXCERPT_LENGTH = 40
"""Characters of a document's beginning."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Interval = tuple[float, float]
Row = dict[str, Any]


class Units(NamedTuple):
    """The units that are resampled: documents, or blocks of text."""

    unit_N: Ints
    """The unit of each scored token."""
    num_units: int
    description: str

    def sums(self, *columns_N: NDArray[Any]) -> Floats:
        """Return sums_UK of columns over the tokens of each unit."""
        sums = [np.bincount(self.unit_N, column_N, self.num_units) for column_N in columns_N]
        return np.stack(sums, axis=-1)


class ScoredText:
    """A text by its scored tokens: all but the first, which is context only.

    Args:
        tokens: An EOS token precedes every document.
        tokenizer: The one that made the tokens.
        lost: An example of text that the tokens do not hold; empty if they hold all of it.
    """

    def __init__(self, tokens: NDArray[Any], tokenizer: Tokenizer, lost: str) -> None:
        self.tokens, self.tokenizer = tokens, tokenizer
        started_N = np.cumsum(tokens[:-1] == tokenizer.eos_token)
        self.document_N = started_N - started_N[0]
        """The document of each token; an EOS token belongs to the one that it ends."""
        self.size_unit = "tokens" if lost else "bytes"
        """Unit in which the text is measured: tokens where there are no figures per byte."""
        self.size_N = np.ones(len(tokens) - 1, np.int64)
        if not lost:
            sizes = [len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)]
            self.size_N = np.array(sizes)[tokens[1:]]

    def units(self) -> Units:
        """Return the documents or, if they are few, blocks of equal size."""
        documents = int(self.document_N[-1]) + 1
        if documents >= MIN_DOCUMENTS:
            return Units(self.document_N, documents, f"{documents:,} documents")
        size = int(self.size_N.sum())
        block_size = max(MIN_BLOCK_SIZE, math.ceil(size / MAX_BLOCKS))
        count = math.ceil(size / block_size)
        start_N = np.cumsum(self.size_N) - self.size_N
        # An EOS token at the end, which has no bytes, belongs to the last block.
        block_N = np.minimum(start_N // block_size, count - 1)
        return Units(block_N, count, f"{count:,} blocks of {block_size:,} {self.size_unit}")

    def digest(self) -> str:
        """Return a hash of the documents, the same under every tokenizer that loses no text.

        Where the tokens do not hold the whole text, it is a hash of the tokens.
        """
        if self.size_unit == "tokens":
            tokens = hashlib.sha256(self.tokens.tobytes()).hexdigest()
            return f"{self.tokenizer.fingerprint} {tokens}"
        eos = self.tokenizer.eos_token
        # A byte that is not in UTF-8 stands for the border of two documents.
        pieces = (
            b"\xff" if token == eos else self.tokenizer.token_bytes(token)
            for token in self.tokens.tolist()
        )
        return hashlib.sha256(b"".join(pieces)).hexdigest()

    def intervals(self, nll_N: Floats) -> tuple[dict[str, Interval], str]:
        """Return the 95% intervals of loss, perplexity and bits per byte, and what was resampled."""
        units = self.units()
        sums_UK = units.sums(nll_N, np.ones_like(nll_N), self.size_N)
        if len(sums_UK) < 2 or not np.isfinite(sums_UK).all():
            return {}, ""
        low, high = bootstrap_interval(sums_UK, lambda nll, tokens, _: nll / tokens)
        with np.errstate(over="ignore"):
            perplexities = float(np.exp(low)), float(np.exp(high))
        intervals = {"loss": (low, high), "perplexity": perplexities}
        if self.size_unit == "bytes":
            intervals["bits_per_byte"] = bootstrap_interval(
                sums_UK, lambda nll, _, size: nll / (math.log(2) * size)
            )
        return intervals, units.description

    def loss_by_document(self, nll_N: Floats) -> list[Row]:
        """Return the loss, the bits per byte and the beginning of each document, in their order."""
        starts_D = np.flatnonzero(np.diff(self.document_N, prepend=-1)) + 1
        documents = Units(self.document_N, len(starts_D), "")
        sums_DK = documents.sums(np.ones_like(nll_N), nll_N, self.size_N)
        rows: list[Row] = []
        for start, (tokens, nll, size) in zip(starts_D.tolist(), sums_DK.tolist(), strict=True):
            row = {"document": len(rows) + 1, "tokens": int(tokens), "loss": nll / tokens}
            if self.size_unit == "bytes":
                row |= {"bytes": int(size), "bits_per_byte": nll / (math.log(2) * max(1, size))}
            beginning = self.tokens[start : start + min(int(tokens), EXCERPT_LENGTH)].tolist()
            row["text"] = self.tokenizer.decode(beginning)[:EXCERPT_LENGTH]
            rows.append(row)
        return rows


class PairedSums:
    """The nll of a text's documents or blocks under one model, to compare with another model's."""

    def __init__(self, text: ScoredText, nll_N: Floats) -> None:
        units = text.units()
        self.description = units.description
        self.nll_U, self.size_U = units.sums(nll_N, text.size_N).T
        has_bytes = text.size_unit == "bytes"
        self.unit = "bits per byte" if has_bytes else "nats per token"
        self.nats = math.log(2) if has_bytes else 1.0
        """Nats in the unit."""

    def figures(self) -> dict[str, float]:
        """Return the bits per byte, if they are defined."""
        bits_per_byte = float(self.nll_U.sum() / (self.nats * self.size_U.sum()))
        return {"bits_per_byte": bits_per_byte} if self.unit == "bits per byte" else {}

    def difference(self, baseline: "PairedSums") -> dict[str, Any]:
        """Return the difference from a baseline on the same text, its 95% interval and p-value."""
        # Those of the baseline: a token at the border of two blocks may end elsewhere here.
        difference_U, size_U = self.nll_U - baseline.nll_U, baseline.size_U
        difference = float(difference_U.sum() / (self.nats * size_U.sum()))
        interval = bootstrap_interval(
            np.stack([difference_U, size_U], axis=-1), lambda nll, size: nll / (self.nats * size)
        )
        p_value = sign_flip_p_value(difference_U)
        return {"difference": difference, "interval": interval, "p": p_value}


def bootstrap_interval(sums_UK: Floats, statistic: Callable[..., Floats]) -> Interval:
    """Return the 95% interval of `statistic`, a function of the K sums over all units."""
    rng, num_units = np.random.default_rng(SEED), len(sums_UK)
    samples = (rng.integers(num_units, size=num_units) for _ in range(RESAMPLES))
    sums_KR = np.stack([sums_UK[sample_U].sum(axis=0) for sample_U in samples], axis=-1)
    low, high = np.percentile(statistic(*sums_KR), (2.5, 97.5))
    return float(low), float(high)


def sign_flip_p_value(difference_U: Floats) -> float:
    """Return the two-sided p-value of paired differences under the hypothesis that signs are random."""
    rng, num_units = np.random.default_rng(SEED), len(difference_U)
    observed = abs(difference_U.sum()) * (1 - 1e-12)  # the same sum in another order is equal
    as_far = sum(
        abs(difference_U @ (2.0 * rng.integers(2, size=num_units) - 1)) >= observed
        for _ in range(SIGN_FLIPS)
    )
    return float((1 + as_far) / (1 + SIGN_FLIPS))


def loss_by_position(context_N: Ints, nll_N: Floats) -> list[Row]:
    """Return the loss of tokens that had 1, 2, 3 to 4, 5 to 8, … tokens of context."""
    bucket_N = np.ceil(np.log2(context_N)).astype(np.int64)
    tokens, nll = np.bincount(bucket_N), np.bincount(bucket_N, weights=nll_N)
    return [
        {
            "context_from": 2**bucket // 2 + 1,
            "context_to": min(2**bucket, int(context_N.max())),
            "tokens": int(tokens[bucket]),
            "loss": float(nll[bucket] / tokens[bucket]),
        }
        for bucket in np.flatnonzero(tokens).tolist()
    ]


def calibration(rank_N: Floats, confidence_N: Floats) -> tuple[dict[str, float], list[Row]]:
    """Return accuracy@1, accuracy@5 and expected calibration error, and the bins of the last."""
    is_hit_N = rank_N < 1
    # A model that has diverged has no confidence: NaN.
    bin_N = np.minimum((np.nan_to_num(confidence_N) * BINS).astype(np.int64), BINS - 1)
    bins = [
        {
            "tokens": int(is_in_N.sum()),
            "confidence": float(confidence_N[is_in_N].mean()),
            "accuracy": float(is_hit_N[is_in_N].mean()),
        }
        for is_in_N in (bin_N == number for number in np.unique(bin_N))
    ]
    error = sum(row["tokens"] * abs(row["accuracy"] - row["confidence"]) for row in bins)
    figures = {
        "accuracy_at_1": float(is_hit_N.mean()),
        "accuracy_at_5": float((rank_N < 5).mean()),
        "expected_calibration_error": error / len(rank_N),
    }
    return figures, bins
