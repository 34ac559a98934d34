import json
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.growth import memory_of
from tokenizer import byte_tokenizer, train_words
from training.data import duplicates
from training.data.corpus import (
    CorpusWriter,
    ShuffledWindows,
    TextChunk,
    open_corpus,
    release_pages,
)

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token

needs_file_pages = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux reports a process's pages of files (RssFile)"
)


@pytest.fixture
def folder(tmp_path):
    writer = CorpusWriter(tmp_path, TOKENIZER)
    writer.write(
        "train",
        [TextChunk("one two\nthrée\n", True), TextChunk("more", False), TextChunk("b", True)],
    )
    writer.write("validation", [TextChunk("c", True)])
    writer.close("a corpus")
    return tmp_path


def test_tokens_and_counts_round_trip(folder):
    corpus = open_corpus(folder)
    train = corpus.splits["train"]
    assert train.tokens.tolist() == [EOS, *"one two\nthrée\nmore".encode(), EOS, ord("b")]
    assert (train.bytes, train.words, train.documents) == (20, 7, 2)
    assert corpus.splits["validation"].tokens.tolist() == [EOS, ord("c")]
    assert corpus.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert corpus.description == "a corpus"
    with pytest.raises(ValueError):
        train.tokens[0] = 0


@needs_file_pages
def test_reading_a_corpus_does_not_fill_memory(tmp_path):
    """64 MB of tokens, of which nearly every page is read."""

    def file_pages():
        return memory_of(os.getpid())["RssFile"]

    tokens = np.memmap(tmp_path / "train.bin", np.uint16, "w+", shape=(2**25,))
    tokens[::2048] = np.arange(2**14)
    tokens.flush()
    del tokens
    windows = ShuffledWindows(
        np.memmap(tmp_path / "train.bin", np.uint16, "r", shape=(2**25,)), 128, 16, 0
    )
    initial, nonzero = file_pages(), 0
    for index in range(4000):
        nonzero += int((windows.batch(index)[0] > 0).sum())
        assert file_pages() - initial < 4 * 2**20
    assert nonzero > 3000


@needs_file_pages
def test_comparing_a_long_document_does_not_fill_memory(tmp_path, monkeypatch):
    """One document of 64 MB, as a text file without an end-of-text token is."""
    tokens = np.memmap(tmp_path / "train.bin", np.uint16, "w+", shape=(2**25,))
    tokens[:] = 1
    tokens[0] = EOS
    tokens.flush()
    del tokens
    train = np.memmap(tmp_path / "train.bin", np.uint16, "r", shape=(2**25,))
    initial, most = memory_of(os.getpid())["RssFile"], 0

    def release_and_watch(tokens):
        nonlocal most
        most = max(most, memory_of(os.getpid())["RssFile"] - initial)
        release_pages(tokens)

    monkeypatch.setattr(duplicates, "release_pages", release_and_watch)
    splits = {"train": train, "validation": np.array([EOS, 2], np.uint16)}
    duplicates.find_duplicates(splits, TOKENIZER, sentence_pairs=False, near=False)
    assert 2**22 < most < 2**25
    assert memory_of(os.getpid())["RssFile"] - initial < 2**22


def test_unknown_tokens_and_lost_text_are_recorded(tmp_path):
    writer = CorpusWriter(tmp_path, train_words([" the cat\n"], 10))
    writer.write("train", [TextChunk(" the cat\n", True), TextChunk(" the dog\n", True)])
    writer.write("validation", [TextChunk(" the cat\n", True)])
    writer.close("a corpus")
    splits = open_corpus(tmp_path).splits
    assert (splits["train"].unknown, splits["validation"].unknown) == (1, 0)
    assert splits["train"].lost == "' the dog\\n' becomes ' the <unk>\\n'"
    assert splits["validation"].lost == ""


def test_tokens_of_another_tokenizer_are_refused(folder):
    assert open_corpus(folder, tokenizer=TOKENIZER).splits.keys() == {"train", "validation"}
    with pytest.raises(
        ValueError, match=r"another tokenizer than the one given \(257 ids, not 5\)"
    ):
        open_corpus(folder, tokenizer=train_words(["the cat\n"], 10))


def test_fingerprint_depends_on_the_content_only(folder, tmp_path_factory):
    fingerprints = []
    for text in ("c", "c", "d"):
        writer = CorpusWriter(other := tmp_path_factory.mktemp("other"), TOKENIZER)
        writer.write("train", [TextChunk(text, True)])
        writer.close(f"another {len(fingerprints)}")
        fingerprints.append(open_corpus(other).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_damaged_corpus_is_rejected(folder):
    with pytest.raises(ValueError, match="no prepared tokens here"):
        open_corpus(folder / "nowhere")
    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=f"{len(whole) - 2} bytes, expected {len(whole)}"):
        open_corpus(folder)
    (folder / "train.bin").write_bytes(whole)
    manifest = json.loads((folder / "corpus.json").read_text())
    for content, message in (
        ('{"format"', "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        (json.dumps(manifest | {"format": 99}), "format 99 is newer"),
        (json.dumps(manifest | {"format": 1}), "format 1 is of an older tinygpt; delete"),
        (
            json.dumps(
                manifest | {"splits": {"train": manifest["splits"]["train"] | {"tokens": 0}}}
            ),
            "the train split is empty",
        ),
    ):
        (folder / "corpus.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            open_corpus(folder)


SIZES = given(
    length=st.integers(2, 200), context_length=st.integers(1, 20), batch_size=st.integers(1, 9), seed=st.integers(0, 9)
)  # fmt: skip


def windows_of(length, context_length, batch_size, seed):
    tokens = np.arange(length, dtype=np.uint16)
    return ShuffledWindows(tokens, min(context_length, length - 1), batch_size, seed)


@SIZES
def test_each_epoch_has_every_window_once(length, context_length, batch_size, seed):
    windows = windows_of(length, context_length, batch_size, seed)
    batches = [windows.batch(k)[0] for k in range(-(-3 * windows.windows_per_epoch // batch_size))]
    starts = np.concatenate(batches)[:, 0]
    for epoch in range(3):
        size = windows.windows_per_epoch
        epoch_starts = np.sort(starts[epoch * size : (epoch + 1) * size])
        assert len(epoch_starts) == size
        assert (np.diff(epoch_starts) == windows.context_length).all()
        # The grid leaves out less than two windows at both ends together.
        covered = epoch_starts[-1] - epoch_starts[0] + windows.context_length
        assert length - 1 - covered < 2 * windows.context_length


@SIZES
def test_targets_are_the_next_tokens(length, context_length, batch_size, seed):
    windows = windows_of(length, context_length, batch_size, seed)
    tokens, targets = windows.batch(1)
    assert tokens.shape == targets.shape == (batch_size, windows.context_length)
    assert tokens.dtype == targets.dtype == np.int64
    assert (targets == tokens + 1).all()


@SIZES
def test_batch_depends_on_seed_and_index_only(length, context_length, batch_size, seed):
    batches = [windows_of(length, context_length, batch_size, seed).batch(k)[0] for k in range(5)]
    resumed = windows_of(length, context_length, batch_size, seed)
    for k in (4, 0, 3, 1, 2):
        assert (resumed.batch(k)[0] == batches[k]).all()


def test_epochs_and_seeds_have_different_orders():
    windows = windows_of(1000, 10, 98, 0)
    assert windows.windows_per_epoch == 98
    first, second = windows.batch(0)[0], windows.batch(1)[0]
    assert not (first == second).all()
    assert first[0, 0] % 10 != second[0, 0] % 10
    assert not (first == windows_of(1000, 10, 98, 1).batch(0)[0]).all()


def test_text_shorter_than_a_window_is_rejected():
    with pytest.raises(ValueError, match=r"has 64 tokens.*window of 64 needs 65.*--context-length"):
        ShuffledWindows(np.zeros(64, np.uint16), 64, 1, 0)
