"""The generated sentence pairs: their grammar, their splits, and as a source of data."""

import re

import numpy as np
import pytest

from training.data.prepare import prepare_corpus
from training.data.sources import Source
from training.data.toy_pairs import toy_pairs
from training.presets import PRESETS

PAIRS = {en: fr for pairs in toy_pairs().values() for en, fr in pairs}


def test_no_source_is_in_two_splits():
    sizes = {name: len(pairs) for name, pairs in toy_pairs().items()}
    assert sizes == {"train": 8000, "validation": 500, "test": 1000}
    assert len(PAIRS) == sum(sizes.values())
    assert toy_pairs()["validation"][0] == ("I love cats", "J'aime les chats")


@pytest.mark.parametrize(
    ("en", "fr"),
    [
        ("You find him", "Tu le trouves"),  # a pronoun precedes the verb
        ("She looks for him", "Elle le cherche"),  # two words are one
        (
            "You do not look for these boys",
            "Tu ne cherches pas ces garçons",
        ),  # negation encloses the verb
        ("Your large horses do not draw her", "Tes grands chevaux ne la dessinent pas"),
        ("This bird does not eat the apple", "Cet oiseau ne mange pas la pomme"),
        ("You eat white cakes", "Tu manges les gâteaux blancs"),  # a color follows, and agrees
        ("He does not hear the large sister", "Il n'entend pas la grande sœur"),  # elision
        ("They like these red sisters", "Ils aiment ces sœurs rouges"),
    ],
)
def test_french_agrees_and_orders_its_words(en, fr):
    assert PAIRS[en] == fr


def test_words_change_before_a_vowel():
    french = "\n".join(PAIRS.values()).lower()
    assert not re.search(r"\b(je|ne|me|te|le|la|ma|ta|ce) [aeéioœ]", french)
    assert not re.search(r"'[^aeéioœ]", french)
    assert {"j'aime", "n'aime", "l'oiseau", "l'orange", "cet", "mon"} <= set(french.split())
    assert "mon orange" in french


def test_pairs_are_a_corpus_in_either_direction(cache):
    def first_pair(**options):
        corpus = prepare_corpus(Source("toy-pairs", **options), "bytes", 0, sentence_pairs=True)
        tokens = corpus.splits["validation"].tokens[:32]
        _, source, target, *_ = bytes(np.where(tokens == 256, 0, tokens).tolist()).split(b"\0")
        return corpus.languages, source.decode(), target.decode()

    assert first_pair() == (("en", "fr"), "I love cats", "J'aime les chats")
    assert first_pair(languages="fr-en") == (("fr", "en"), "J'aime les chats", "I love cats")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("options", "sentence_pairs", "message"),
    [
        ({}, False, "toy-pairs holds sentence pairs, not text: use --task translation"),
        ({"languages": "en-de"}, True, "toy-pairs, pair 1: no 'de' sentence, only en, fr"),
        ({"column": "text"}, True, "toy-pairs: no column 'text' of sentence pairs"),
        ({"config": "small"}, True, "--data-config is only for hub datasets"),
    ],
)
def test_options_that_do_not_apply_are_errors(options, sentence_pairs, message):
    with pytest.raises(ValueError, match=message):
        prepare_corpus(Source("toy-pairs", **options), "bytes", 0, sentence_pairs=sentence_pairs)


def test_every_translator_trains_without_data():
    translators = {name: c for name, c in PRESETS.items() if name.startswith("translate-")}
    assert len(translators) == 5
    assert {config.data for config in translators.values()} == {"toy-pairs"}
