"""Datasets of sentence pairs: their languages, splits and errors."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpora import PAIRS, STORY, pair_lines
from training.data.corpus import open_corpus
from training.data.prepare import prepare_corpus
from training.data.sources import Source

pytestmark = pytest.mark.usefixtures("cache")


def read_pairs(path, **options):
    """The pairs of each split."""
    corpus = prepare_corpus(Source(str(path), **options), "bytes", 300, sentence_pairs=True)
    assert open_corpus(corpus.directory, sentence_pairs=True).languages == corpus.languages
    pairs = {}
    for name, split in corpus.splits.items():
        _, *documents = bytes(np.where(split.tokens == 256, 0, split.tokens).tolist()).split(b"\0")
        texts = [document.decode() for document in documents]
        pairs[name] = list(zip(texts[::2], texts[1::2], strict=True))
    return corpus.languages, pairs


def test_every_format_gives_the_same_pairs_and_splits(tmp_path):
    (tmp_path / "a.jsonl").write_text(pair_lines(PAIRS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(pair_lines(PAIRS).encode()))
    rows = [{"translation": {"en": en, "fr": fr}} for en, fr in PAIRS]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    languages, splits = read_pairs(tmp_path / "a.jsonl")
    assert languages == ("en", "fr")
    assert splits["train"] + splits["validation"] != PAIRS
    assert sorted(splits["train"] + splits["validation"]) == sorted(PAIRS)
    assert 2 <= len(splits["validation"]) <= 25
    for name in ("a.jsonl.gz", "a.json", "a.parquet"):
        assert read_pairs(tmp_path / name) == (languages, splits)
    other = [(en, fr + " Vite !") for en, fr in PAIRS[:100]]
    (tmp_path / "b.jsonl").write_text(pair_lines(other))
    _, other_splits = read_pairs(tmp_path / "b.jsonl")
    held_out = {en for en, _ in splits["validation"]}
    assert {en for en, _ in other_splits["validation"]} == held_out & {en for en, _ in other}


def test_language_direction(tmp_path):
    pairs = [(en, fr, f"{i} Hunde.") for i, (en, fr) in enumerate(PAIRS)]
    folder = tmp_path / "three"
    folder.mkdir()
    (folder / "train.jsonl").write_text(pair_lines(pairs, ("en", "fr", "de")))
    # The order of languages in other files does not matter.
    reordered = [(fr, de, en) for en, fr, de in pairs[:3]]
    (folder / "valid.jsonl").write_text(pair_lines(reordered, ("fr", "de", "en")))
    (folder / "test.jsonl").write_text(pair_lines(reordered, ("fr", "de", "en")))
    languages, splits = read_pairs(folder)
    assert languages == ("en", "fr")
    assert splits == {"train": PAIRS, "validation": PAIRS[:3], "test": PAIRS[:3]}
    languages, splits = read_pairs(folder, languages="de-en")
    assert languages == ("de", "en")
    assert splits["train"][7] == ("7 Hunde.", PAIRS[7][0])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for languages in ("en", "en-fr-de", "en-", "fr-fr"):
        with pytest.raises(ValueError, match=f"two names like en-fr, not '{languages}'"):
            read_pairs(folder, languages=languages)
    with pytest.raises(ValueError, match=r"train.jsonl, line 1: no 'es' sentence, only en, fr, de"):
        read_pairs(folder, languages="en-es")


def test_few_pairs_are_held_out_from_the_end_and_limits_cut_no_pair(tmp_path):
    (tmp_path / "a.jsonl").write_text(pair_lines([("aa", "b" * 9)] * 4))
    _, splits = read_pairs(tmp_path / "a.jsonl")
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 3, "validation": 1}
    _, splits = read_pairs(tmp_path / "a.jsonl", limit=32)
    assert splits == {"train": [("aa", "b" * 9)], "validation": [("aa", "b" * 9)]}


def test_tokenizer_is_trained_on_both_languages(tmp_path):
    (tmp_path / "a.jsonl").write_text(pair_lines(PAIRS))
    source = Source(str(tmp_path / "a.jsonl"))
    tokenizer = prepare_corpus(source, "bpe", 300, sentence_pairs=True).tokenizer
    assert len(tokenizer.encode(" run")) == len(tokenizer.encode(" courent")) == 1


GOOD = '{"translation": {"en": "a", "fr": "b"}}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD * 16 + '{"translation": {"en": "a"}}', "a.jsonl, line 17: no 'fr' sentence, only en"),
        ("a.jsonl", GOOD * 299 + '{"translation": {"en": "a", "fr": null}}', "line 300: no 'fr' sentence, only en"),
        ("a.jsonl", GOOD + '{"translation": {"en": " \\n", "fr": "b"}}', "line 2: no 'en' sentence, only fr"),
        ("a.jsonl", GOOD + '{"translation": {"en": 3, "fr": "b"}}', "line 2: no 'en' sentence, only fr"),
        ("a.jsonl", GOOD + '{"translation": {"de": "a", "fr": "b"}}', "line 2: no 'en' sentence, only de, fr"),
        ("a.jsonl", GOOD + '{"translation": null}', "line 2: no sentence pair: expected a row like {"),
        ("a.jsonl", GOOD + '{"translation": "a - b"}', "line 2: no sentence pair: expected a row like {"),
        ("a.jsonl", GOOD + '{"text": "a"}', "line 2: no sentence pair: expected a row like {"),
        ("a.jsonl", '{"translation": {"en": "a"}}\n' * 3, "line 1: expected two languages, found en;"),
        ("a.jsonl", '{"text": "a"}\n', r"no column 'translation' of sentence pairs, only: text \(string\); expected rows like {"),
        ("a.jsonl", GOOD + "{", "a.jsonl, line 2: not JSON"),
        ("a.jsonl", GOOD, "too little text, none for the train split"),
        ("a.csv", "translation\na\n", "line 2: no sentence pair: expected a row like {"),
        ("a.txt", "a\tb\n", "a.txt is plain text, not sentence pairs: expected a .jsonl"),
    ],
)  # fmt: skip
def test_errors_name_the_row(tmp_path, cache, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_pairs(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1
    assert not cache.exists() or not list(cache.iterdir())


def test_error_names_the_file_of_a_bad_pair(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / f"a/{i}.jsonl").write_text(
            GOOD * 5 + '{"translation": {"fr": "b"}}\n' * (i == 1)
        )
    with pytest.raises(ValueError, match=r"a/1.jsonl, line 6: no 'en' sentence, only fr"):
        read_pairs(tmp_path / "a")


def test_pairs_and_text_are_not_confused(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(pair_lines(PAIRS))
    (tmp_path / "text.txt").write_text(STORY)
    with pytest.raises(ValueError, match=r"holds sentence pairs, not text"):
        prepare_corpus(Source(str(tmp_path / "pairs.jsonl")), "bytes", 0)
    with pytest.raises(ValueError, match="stdlib is plain text"):
        read_pairs("stdlib")
    text = prepare_corpus(Source(str(tmp_path / "text.txt")), "bytes", 0).directory
    pairs = prepare_corpus(
        Source(str(tmp_path / "pairs.jsonl")), "bytes", 0, sentence_pairs=True
    ).directory
    assert prepare_corpus(Source(str(pairs)), "bytes", 0, sentence_pairs=True).languages == (
        "en",
        "fr",
    )
    with pytest.raises(ValueError, match="holds text, not sentence pairs"):
        prepare_corpus(Source(str(text)), "bytes", 0, sentence_pairs=True)
    with pytest.raises(ValueError, match=r"holds sentence pairs \(en-fr\), not text"):
        prepare_corpus(Source(str(pairs)), "bytes", 0)


def test_multi30k_has_the_published_number_of_pairs(real_data):
    languages, splits = read_pairs(real_data / "multi30k-en-fr")
    assert languages == ("en", "fr")
    counts = {name: len(pairs) for name, pairs in splits.items()}
    assert counts == {"train": 29_000, "validation": 1_014, "test": 1_000}
    assert splits["validation"][0] == (
        "A group of men are loading cotton onto a truck",
        "Un groupe d'hommes chargent du coton dans un camion",
    )
