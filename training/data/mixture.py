"""Several texts mixed by weight of tokens: `--data a.txt:0.7 --data b.txt:0.3`.

One value says the same, where an option cannot be repeated (run.json, a configuration file,
`make train DATA=`): `a.txt:0.7 b.txt:0.3`, words as in a shell. The weight follows the last colon,
so a name may hold others. Weights are exact fractions: so are the shares of the windows drawn.
"""

import hashlib
import json
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenizer import Tokenizer
from training.data.corpus import Part, ShuffledWindows, Windows, gather_windows, is_prepared

OPTION = "--data"


class WeightedSource(NamedTuple):
    """A value of `--data` that names one source."""

    data: str
    weight: Fraction
    """As it was typed."""
    share: Fraction
    """Its share of the tokens: the weight divided by the sum of all."""


def parse_data(data: str) -> list[WeightedSource]:
    """Return the sources that `--data` names: one, or those of a mixture with shares that sum to 1.

    Raises:
        ValueError: Of several sources one has no weight, or one that is not above 0, or is there twice.
    """
    if os.path.exists(os.path.expanduser(data)):  # noqa: PTH110, PTH111 (Path refuses some names)
        return [WeightedSource(data, Fraction(1), Fraction(1))]
    words = _split_words(data)
    if not any(_weight_of(word) for word in words):
        return [WeightedSource(data, Fraction(1), Fraction(1))]
    weights = _weights(words)
    total = sum(weights.values())
    return [WeightedSource(name, weight, weight / total) for name, weight in weights.items()]


def join_data_options(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments in which several `--data` have become one.

    A ValueError if one of several has no weight.
    """
    joined: list[str] = []
    values: list[str] = []
    position, remaining = 0, iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != OPTION:
            joined.append(argument)
            continue
        if not equals and (following := next(remaining, None)) is None:
            return list(arguments)  # the parser reports that the value is missing
        values.append(value if equals else str(following))
        position = position if len(values) > 1 else len(joined)
    if len(values) < 2:
        return list(arguments)
    _weights(values)
    joined[position:position] = [OPTION, shlex.join(values)]
    return joined


def prepared_source(data: str) -> str | None:
    """Return the first source of `--data` that is a directory of prepared tokens, if any."""
    return next((source.data for source in parse_data(data) if is_prepared(source.data)), None)


def _split_words(data: str) -> list[str]:
    lexer = shlex.shlex(data, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    lexer.escape = ""  # a backslash separates folders on Windows
    try:
        return list(lexer)
    except ValueError:  # a quotation mark that is not closed, as in it's.txt
        return [data]


def _weight_of(word: str) -> tuple[str, str] | None:
    """Return the name and the weight of a source such as a.txt:0.7; None if it has no weight."""
    name, _, weight = word.rpartition(":")
    try:
        float(weight)
    except ValueError:
        return None
    return (name, weight) if name else None


def _weights(words: Sequence[str]) -> dict[str, Fraction]:
    """Return the weight of each source by its name."""
    weights: dict[str, Fraction] = {}
    seen = set()
    for word in words:
        found = _weight_of(word)
        if found is None:
            raise ValueError(
                f"{word}: no such file, or no weight: several {OPTION} are mixed by weight of "
                f"tokens, such as {OPTION} a.txt:0.7 {OPTION} b.txt:0.3"
            )
        name, weight = found
        if not (math.isfinite(float(weight)) and float(weight) > 0):
            raise ValueError(
                f"{word}: a weight must be a number above 0, not {weight}: to mix nothing of "
                "a source, leave it out"
            )
        path = Path(name).expanduser()
        identity = str(path.resolve()) if path.exists() else name
        if identity in seen:
            raise ValueError(f"{name} is in {OPTION} twice: give it once, with the sum of weights")
        seen.add(identity)
        weights[name] = Fraction(weight)
    return weights


@dataclass(frozen=True)
class Mixture:
    """Corpora by one tokenizer, each with its share of the tokens that are trained on and scored."""

    parts: tuple[Part, ...]
    weights_sum: Fraction
    """Sum of the weights as they were typed."""

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens of all parts, and of their shares."""
        parts = [[part.corpus.fingerprint, str(part.share)] for part in self.parts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def description(self) -> str:
        """One line: the parts and their shares."""
        shares = ", ".join(f"{float(part.share):.2%} {part.name}" for part in self.parts)
        note = f" (weights divided by their sum, {float(self.weights_sum):g})"
        return f"mixture by weight of tokens: {shares}{note * (self.weights_sum != 1)}"

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens of all parts."""
        return self.parts[0].corpus.tokenizer

    @property
    def splits(self) -> list[str]:
        """Names of the splits that every part has."""
        first, *others = (part.corpus.splits for part in self.parts)
        return [name for name in first if all(name in splits for splits in others)]


class MixedWindows:
    """Batches of windows from several texts, in shares that hold for any run of draws.

    Which text a draw is of, and which of its windows, depend on the number of the draw only, so
    that resuming needs no state. No random number decides: of any first n draws, a text has
    its share of n to within one or two (a low-discrepancy sequence), so nearly every batch has it.
    """

    def __init__(self, windows: Sequence[ShuffledWindows], shares: Sequence[Fraction]) -> None:
        self.windows = windows
        self.batch_size, self.context_length = windows[0].batch_size, windows[0].context_length
        remaining = [sum(shares[i:], Fraction(0)) for i in range(len(shares))]
        self.ratios = [share / rest for share, rest in zip(shares, remaining, strict=True)]
        """Of the draws that are of no text before this one, the share that are of this one."""

    def draw(self, number: int) -> tuple[int, int]:
        """Return which text a draw is of, and how many earlier draws are of it."""
        for text, ratio in enumerate(self.ratios[:-1]):
            before, until = _rounded(number, ratio), _rounded(number + 1, ratio)
            if until > before:
                return text, before
            number -= before
        return len(self.ratios) - 1, number

    def batch(self, index: int) -> Windows:
        """Return (tokens_BT, targets_BT) of step `index`."""
        first = index * self.batch_size
        draws = [self.draw(number) for number in range(first, first + self.batch_size)]
        tokens_BT = np.empty((self.batch_size, self.context_length), np.int64)
        targets_BT = np.empty_like(tokens_BT)
        for text, windows in enumerate(self.windows):
            rows = [row for row, (of, _) in enumerate(draws) if of == text]
            starts = np.array([windows.start(draws[row][1]) for row in rows], np.int64)
            if rows:
                tokens_BT[rows], targets_BT[rows] = gather_windows(
                    windows.tokens, starts, self.context_length
                )
        return tokens_BT, targets_BT


def _rounded(number: int, ratio: Fraction) -> int:
    """Return number * ratio, rounded to the nearest integer; exact for any number."""
    return (2 * number * ratio.numerator + ratio.denominator) // (2 * ratio.denominator)
