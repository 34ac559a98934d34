"""A generated language whose entropy is known exactly: what no honest model can beat.

    E({ded{}cbahgfEedcb}afe)Ed
    AhabacddefgAhahg[(A)ahgfA]ed({AcAbedc[bAd]})Ac[bahgfedc{Abcd[e]f}gha{}b]

A document is what a small hidden Markov model emits, symbol by symbol, until it ends:

    a name           a capital, which the document repeats: to be remembered over any distance
    letters          run up or down the alphabet a to h, from h on to a; which way is hidden and
                     changes at times, and some letters are random
    brackets         ()[]{}, nested at most three deep, each closed by its own kind

A table of bigrams sees none of the three; letters need a few tokens of context; names and
brackets need a memory. A document is independent of the one before, and its end is a symbol too.
So with one token per symbol (`--tokenizer characters` or `bytes`), the exact entropy per token is
-log p of the documents and their ends under this source, over their number of tokens: the forward
algorithm computes it (Rabiner 1989).
"""

import bisect
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

import numpy as np

from tokenizer import Tokenizer
from training.data.corpus import Split

KNOWN_TRUTH = "known-truth"
"""The value of `--data`."""
SPLIT_SIZES = {"train": 30_000, "validation": 1000}
"""Documents of each split."""

NAMES, LETTERS, BRACKETS = "ABCDEFGH", "abcdefgh", {"(": ")", "[": "]", "{": "}"}
MAX_DEPTH = 3
TURN, NOISE = 0.1, 0.1
"""Probabilities that the direction changes before a letter, and that the letter is random."""
END = ""
"""The symbol at the end of a document."""
LEAK_NATS = 14
"""A model with this many nats less than the truth in all has seen what it predicts."""


class Entropy(NamedTuple):
    """The entropy of a text that is known exactly."""

    nats_per_token: float
    """-log p of the very text under its source, over its number of scored tokens."""
    standard_error: float
    """That of this figure as an estimate of the source's entropy per token."""


class State(NamedTuple):
    """A state of the source, within a document."""

    name: str
    closing: str
    """The closing brackets of those that are open, the next one last."""
    letter: int
    """Number of the last letter."""
    direction: int
    """1: letters run up the alphabet, -1: down. It is the one thing that the text does not show."""


class Arc(NamedTuple):
    """A symbol that can come next, and the state after it."""

    probability: float
    symbol: str
    state: State | None
    """None after the end of a document."""


@functools.cache
def arcs(state: State | None) -> list[Arc]:
    """Return what can follow a state; None is the start of a document. Probabilities sum to 1."""
    if state is None:
        starts = itertools.product(NAMES, range(len(LETTERS)), (1, -1))
        each = 1 / (2 * len(NAMES) * len(LETTERS))
        return [Arc(each, name, State(name, "", *start)) for name, *start in starts]
    name, closing, letter, direction = state
    weights: list[Arc] = [Arc(0.12, name, state)]
    for way, turning in ((direction, 1 - TURN), (-direction, TURN)):
        for step in range(len(LETTERS)):
            chosen = NOISE / len(LETTERS) + (1 - NOISE) * (step == 1)
            next_letter = (letter + way * step) % len(LETTERS)
            after = State(name, closing, next_letter, way)
            weights.append(Arc(0.68 * turning * chosen, LETTERS[next_letter], after))
    if len(closing) < MAX_DEPTH:
        for bracket, its_closing in BRACKETS.items():
            after = state._replace(closing=closing + its_closing)
            weights.append(Arc(0.12 / len(BRACKETS), bracket, after))
    if closing:
        weights.append(Arc(0.14, closing[-1], state._replace(closing=closing[:-1])))
    else:
        weights.append(Arc(0.05, END, None))
    total = sum(arc.probability for arc in weights)
    return [arc._replace(probability=arc.probability / total) for arc in weights]


@functools.cache
def _cumulative(state: State | None) -> list[float]:
    return list(itertools.accumulate(arc.probability for arc in arcs(state)))


def generate_documents(seed: str) -> Iterator[str]:
    """Yield documents without end, the same ones for the same seed."""
    random = Random(seed)
    while True:
        symbols: list[str] = []
        state: State | None = None
        while not symbols or state is not None:
            # hi: rounding may leave the last cumulative probability below 1.
            index = bisect.bisect(_cumulative(state), random.random(), hi=len(arcs(state)) - 1)
            _, symbol, state = arcs(state)[index]
            symbols.append(symbol)
        yield "".join(symbols)


def split_documents(split: str) -> Iterator[str]:
    """Yield the documents of a split."""
    return itertools.islice(generate_documents(split), SPLIT_SIZES[split])


@functools.cache
def _arcs_by_symbol(state: State | None) -> dict[str, list[Arc]]:
    by_symbol = defaultdict(list)
    for arc in arcs(state):
        by_symbol[arc.symbol].append(arc)
    return by_symbol


def document_nll(text: str, is_whole: bool = True) -> float:
    """Return -log p of a document under the source, in nats, by the forward algorithm.

    The end of a document is a part of it, unless it is not whole but only the start of one.
    Infinite for a text that the source never emits.
    """
    nll = 0.0
    belief: dict[State | None, float] = {None: 1.0}
    """The probability of each state, given the text so far."""
    for symbol in [*text, END] if is_whole else text:
        after: dict[State | None, float] = defaultdict(float)
        for state, probability in belief.items():
            for arc in _arcs_by_symbol(state).get(symbol, ()):
                after[arc.state] += probability * arc.probability
        total = sum(after.values())
        if not total:
            return math.inf
        nll -= math.log(total)
        belief = {state: probability / total for state, probability in after.items()}
    return nll


def split_entropy(split: Split, tokenizer: Tokenizer) -> Entropy:
    """Return the entropy of a split, whose tokens hold all of the text, per token that is scored.

    The first token, which starts a document, is context only. After the last one nothing is
    scored: neither is its end.
    """
    starts = np.flatnonzero(split.tokens == tokenizer.eos_token)
    parts = np.split(split.tokens, starts)[1:]
    texts = [tokenizer.decode(part[1:].tolist()) for part in parts]
    nlls = np.array([document_nll(text) for text in texts[:-1]] + [document_nll(texts[-1], False)])
    lengths = np.array([len(part) for part in parts])
    lengths[-1] -= 1
    mean = nlls.sum() / lengths.sum()
    error = np.sqrt(np.square(nlls - mean * lengths).sum()) / lengths.sum()
    return Entropy(float(mean), float(error))
