"""Documents of train that are in validation or test too: reported, and dropped if asked for."""

import dataclasses
import random

import pytest

from tests.corpora import pair_lines, text_lines
from tests.training.helpers import save_lower_case_tokenizer
from training.config import TrainingConfig
from training.data import duplicates
from training.data.corpus import open_corpus
from training.data.duplicates import find_duplicates
from training.data.prepare import prepare_corpus
from training.data.sources import Source
from training.finetuning import RESET
from training.tasks.text import Text, load_texts

pytestmark = pytest.mark.usefixtures("cache")

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "ll")]


def story(seed, words=150):
    """A document of about 700 characters that shares no shingle with another."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def edited(text, *words):
    """The text with other words at these numbers."""
    parts = text.split()
    for number in words:
        parts[number] = "another"
    return " ".join(parts)


STORIES = [story(seed) for seed in range(40)]
TRAIN, HELD_OUT = STORIES[:30], STORIES[30:]


@pytest.fixture
def write(tmp_path):
    def write(name="data", **splits):
        (tmp_path / name).mkdir()
        for split, texts in splits.items():
            (tmp_path / name / f"{split}.jsonl").write_text(text_lines(texts))
        return str(tmp_path / name)

    return write


def prepare(data, tokenizer="bytes", **options):
    return prepare_corpus(Source(data, **options), tokenizer, 300)


def dropped_from(data, **options):
    """Prepare without and with --drop-duplicates; return both."""
    return prepare(data, **options), prepare(data, drop_duplicates=True, **options)


def test_of_different_documents_none_is_reported_or_dropped(write):
    reported, dropped = dropped_from(write(train=TRAIN, validation=HELD_OUT))
    assert reported.duplicates == {"validation": {"exact": 0, "near": 0}}
    assert reported.duplicate_notes() == []
    assert dropped.fingerprint == reported.fingerprint
    assert dropped.description.endswith("; duplicates dropped from train: 0 of 30 documents")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_planted_copies_are_reported_and_dropped(write, tokenizer):
    exact, near = HELD_OUT[2], edited(HELD_OUT[5], 10, 70, 71, 120)
    data = write(train=[near, *TRAIN[:9], exact, *TRAIN[9:], exact], validation=HELD_OUT)
    reported = prepare(data, tokenizer)
    assert reported.duplicates == {"validation": {"exact": 1, "near": 1}}
    assert reported.duplicate_notes() == [
        "2 of 10 validation documents have a duplicate in train (1 exact, 1 near); "
        "--drop-duplicates drops such documents from train"
    ]
    dropped = prepare(data, tokenizer, drop_duplicates=True)
    assert dropped.directory != reported.directory
    assert dropped.duplicate_notes() == []
    assert dropped.description.endswith("; duplicates dropped from train: 3 of 33 documents")
    # Sizes and tokens are those of the text without them.
    clean = prepare(write("clean", train=TRAIN, validation=HELD_OUT), reported.tokenizer)
    assert dropped.fingerprint == clean.fingerprint
    for name, split in clean.splits.items():
        found = dropped.splits[name]
        assert (found.bytes, found.words, found.documents) == (
            *(split.bytes, split.words, split.documents),
        )


def test_copies_of_test_documents_are_found_too(write):
    data = write(train=[*TRAIN, HELD_OUT[7]], validation=HELD_OUT[:5], test=HELD_OUT[5:])
    reported, dropped = dropped_from(data)
    assert {name: found["exact"] for name, found in reported.duplicates.items()} == {
        "validation": 0,
        "test": 1,
    }
    assert "1 of 5 test documents has a duplicate" in reported.duplicate_notes()[0]
    assert dropped.splits["train"].documents == 30


def test_a_document_counts_once_and_every_copy_is_dropped(write):
    """A near duplicate of two documents, of which one is held out twice."""
    first = HELD_OUT[0]
    data = write(train=[*TRAIN, first, first], validation=[first, first, edited(first, 40)])
    reported, dropped = dropped_from(data)
    assert reported.duplicates == {"validation": {"exact": 2, "near": 1}}
    assert dropped.splits["train"].documents == 30


def test_documents_shorter_than_a_shingle_can_be_in_both(write):
    short, long = "x" * 49, "x" * 50
    reported, dropped = dropped_from(write(train=[*TRAIN, short], validation=[*HELD_OUT, short]))
    assert reported.duplicate_notes() == []
    assert dropped.splits["train"].documents == 31
    _, dropped = dropped_from(write("long", train=[*TRAIN, long], validation=[*HELD_OUT, long]))
    assert dropped.splits["train"].documents == 30


def test_repetitive_documents_are_not_near_duplicates(write):
    """They have few different shingles, of which maybe none is sampled."""
    texts = [letter * 2000 for letter in "abcdefghij"]
    corpus = prepare(write(train=texts[:5], validation=texts[5:]))
    assert corpus.duplicate_notes() == []


def test_a_sentence_pair_is_one_document(tmp_path):
    pairs = [(text, text[::-1]) for text in STORIES]
    (tmp_path / "pairs").mkdir()
    # The source of a held-out pair with another target; a whole pair.
    other = (pairs[31][0], story(99)), pairs[33]
    (tmp_path / "pairs" / "train.jsonl").write_text(pair_lines([*pairs[:30], *other]))
    (tmp_path / "pairs" / "validation.jsonl").write_text(pair_lines(pairs[30:]))
    source = Source(str(tmp_path / "pairs"))
    corpus = prepare_corpus(source, "bytes", 0, sentence_pairs=True)
    assert corpus.duplicates == {"validation": {"exact": 1, "near": 0}}
    assert "1 of 10 validation pairs has" in corpus.duplicate_notes()[0]
    source = Source(str(tmp_path / "pairs"), drop_duplicates=True)
    dropped = prepare_corpus(source, "bytes", 0, sentence_pairs=True)
    assert dropped.splits["train"].documents == 2 * 31
    assert dropped.description.endswith("; duplicates dropped from train: 1 of 32 pairs")


def test_the_tokens_are_read_in_blocks(write, monkeypatch):
    near = edited(HELD_OUT[5], 10)
    corpus = prepare(write(train=[*TRAIN, HELD_OUT[0], near], validation=HELD_OUT))
    tokens = {name: split.tokens for name, split in corpus.splits.items()}
    whole = find_duplicates(tokens, corpus.tokenizer, sentence_pairs=False, near=True)
    assert list(whole.is_dropped) == [0] * 30 + [1, 1]
    monkeypatch.setattr(duplicates, "BLOCK", 100)
    assert find_duplicates(tokens, corpus.tokenizer, sentence_pairs=False, near=True) == whole


def test_of_a_large_corpus_near_duplicates_are_found_only_to_be_dropped(write, monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_NEAR_BYTES", 10_000)
    near = edited(HELD_OUT[5], 10)
    reported, dropped = dropped_from(write(train=[*TRAIN, near], validation=HELD_OUT))
    assert reported.duplicates == {"validation": {"exact": 0}}
    assert dropped.splits["train"].documents == 30


def test_dropped_tokens_are_in_the_cache_and_in_a_folder(write, tmp_path, monkeypatch):
    data = write(train=[*TRAIN, HELD_OUT[0]], validation=HELD_OUT)
    source = Source(data, drop_duplicates=True)
    dropped = prepare_corpus(source, "bpe", 300, directory=tmp_path / "folder")
    assert open_corpus(tmp_path / "folder").duplicate_notes() == []
    assert prepare_corpus(source, "bpe", 300).fingerprint == dropped.fingerprint
    # The tokenizer is that of the whole text.
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1
    monkeypatch.setattr("training.data.prepare._tokenize", None)
    assert prepare_corpus(source, "bpe", 300).fingerprint == dropped.fingerprint
    with pytest.raises(ValueError, match="prepared tokens, which are used as they are"):
        prepare(str(tmp_path / "folder"), drop_duplicates=True)


def test_a_text_of_nothing_but_duplicates_is_refused(write):
    with pytest.raises(ValueError, match="all of it is in validation too, none for the train"):
        prepare(write(train=HELD_OUT, validation=HELD_OUT), drop_duplicates=True)


def test_white_space_and_case_aside_texts_are_near_duplicates(write, tmp_path):
    data = write(train=[*TRAIN, HELD_OUT[0].upper().replace(" ", " \n")], validation=HELD_OUT)
    reported, dropped = dropped_from(data)
    assert reported.duplicates == {"validation": {"exact": 0, "near": 1}}
    assert dropped.splits["train"].documents == 30
    # If the tokens are the same, they are exact ones.
    save_lower_case_tokenizer(tmp_path / "tokenizer.json")
    data = write("upper", train=[*TRAIN, HELD_OUT[0].upper()], validation=HELD_OUT)
    assert prepare(data, str(tmp_path / "tokenizer.json")).duplicates == {
        "validation": {"exact": 1, "near": 0}
    }


def test_documents_of_a_folder_of_an_earlier_version_are_unknown(write):
    corpus = prepare(write(train=[*TRAIN, HELD_OUT[0]], validation=HELD_OUT))
    manifest = corpus.directory / "corpus.json"
    text = manifest.read_text()
    assert '"duplicates"' in text
    manifest.write_text(text.replace('"duplicates"', '"unknown"'))
    assert open_corpus(corpus.directory).duplicate_notes() == []


def test_the_sources_of_a_mixture_are_compared_each_by_itself(write):
    first = write("first", train=[*TRAIN[:15], HELD_OUT[0]], validation=HELD_OUT[:5])
    second = write("second", train=[*TRAIN[15:], HELD_OUT[1]], validation=HELD_OUT[5:])
    config = TrainingConfig(data=f"{first}:1 {second}:2", tokenizer="bytes")
    assert Text(config, load_texts(config, None, True)).sizes[3].startswith("  1 of 5 validation")
    config = dataclasses.replace(config, drop_duplicates=True)
    parts = load_texts(config, None, True).parts
    assert [part.corpus.splits["train"].documents for part in parts] == [15, 16]


@pytest.mark.parametrize("damage", ['"duplicates": {"dev": {}}', '"duplicates": {"validation": 1}'])
def test_a_damaged_manifest_is_told(write, damage):
    corpus = prepare(write(train=TRAIN, validation=HELD_OUT))
    manifest = corpus.directory / "corpus.json"
    manifest.write_text(manifest.read_text().replace('"duplicates"', f'{damage}, "old"'))
    with pytest.raises(ValueError, match="damaged"):
        open_corpus(corpus.directory)


def test_a_run_that_begins_with_another_reads_its_own_text():
    assert "drop_duplicates" in RESET
