"""Chapter 11: one network reads, one writes."""

import functools
from collections.abc import Callable, Iterator, Sequence

from gpt.models.encoder_decoder import EncoderDecoder
from gpt.models.seq2seq import Seq2Seq
from training.chapters.toy_translation import exact_matches, train, translate_sentences
from training.data.toy_pairs import SPLIT_SIZES, toy_pairs
from training.plots.panels import Panel

WIDTH = 96
"""Numbers in the context vector."""
LENGTHS = {"3 to 6 words": (3, 6), "7 to 10 words": (7, 10), "11 to 26 words": (11, 26)}
"""Shortest and longest sources of each group of test pairs."""
SENTENCES = "I love cats", "They look for us", "She does not see the black cat"


@functools.cache
def trained_seq2seq() -> Seq2Seq:
    """Return an encoder and a decoder with nothing but one vector between them."""
    return train(lambda *sizes: Seq2Seq(*sizes, width=WIDTH, depth=1, reverse=True), 800, 0.01)


def matches_by_length(model: EncoderDecoder) -> dict[str, float]:
    """Return the share of test pairs that a model translates without an error, by source length."""
    shares = {}
    for name, (shortest, longest) in LENGTHS.items():
        pairs = [p for p in toy_pairs()["test"] if shortest <= len(p[0].split()) <= longest]
        shares[name] = exact_matches(model, pairs)
    return shares


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield f"A GRU reads English and a GRU writes French: {SPLIT_SIZES['train']:,} generated pairs."
    model = trained_seq2seq()
    for en, fr in zip(SENTENCES, translate_sentences(model, SENTENCES), strict=True):
        yield f"  {en} -> {fr}"
    yield f"All that passes between them is one vector of {WIDTH} numbers."
    yield "Test sentences without an error, by length:"
    for name, share in matches_by_length(model).items():
        yield f"  {name:<15} {share:4.0%}"


FIGURES: Sequence[Callable[[], Sequence[Panel]]] = ()
