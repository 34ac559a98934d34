import json
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.growth import memory_of
from tokenizer import byte_tokenizer
from training.data.corpus import CorpusWriter, ShuffledWindows, TextChunk, open_corpus

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token


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


def test_tokens_and_counts_come_back(folder):
    corpus = open_corpus(folder)
    train = corpus.splits["train"]
    assert train.tokens.tolist() == [END, *"one two\nthrée\nmore".encode(), END, ord("b")]
    assert (train.bytes, train.words, train.documents) == (20, 7, 2)
    assert corpus.splits["validation"].tokens.tolist() == [END, ord("c")]
    assert corpus.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert corpus.description == "a corpus"
    with pytest.raises(ValueError):
        train.tokens[0] = 0


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process's pages of files (RssFile)"
)
def test_a_long_corpus_takes_no_room_in_memory(tmp_path):
    """64 MB of tokens, of which nearly every page is looked at."""

    def in_memory():
        return memory_of(os.getpid())["RssFile"]

    tokens = np.memmap(tmp_path / "train.bin", np.uint16, "w+", shape=(2**25,))
    tokens[::2048] = np.arange(2**14)
    tokens.flush()
    del tokens
    order = ShuffledWindows(
        np.memmap(tmp_path / "train.bin", np.uint16, "r", shape=(2**25,)), 128, 16, 0
    )
    begun, seen = in_memory(), 0
    for index in range(4000):
        seen += int((order.batch(index)[0] > 0).sum())
        assert in_memory() - begun < 4 * 2**20
    assert seen > 3000


def test_fingerprint_is_of_the_content(folder, tmp_path_factory):
    prints = []
    for text in ("c", "c", "d"):
        writer = CorpusWriter(other := tmp_path_factory.mktemp("other"), TOKENIZER)
        writer.write("train", [TextChunk(text, True)])
        writer.close(f"another {len(prints)}")
        prints.append(open_corpus(other).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_what_is_damaged_is_refused(folder):
    with pytest.raises(ValueError, match="no prepared tokens here"):
        open_corpus(folder / "nowhere")
    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=f"{len(whole) - 2} bytes where {len(whole)} belong"):
        open_corpus(folder)
    (folder / "train.bin").write_bytes(whole)
    facts = json.loads((folder / "corpus.json").read_text())
    for damaged, why in (
        ('{"format"', "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        (json.dumps(facts | {"format": 99}), "format 99 is newer"),
    ):
        (folder / "corpus.json").write_text(damaged)
        with pytest.raises(ValueError, match=why):
            open_corpus(folder)


SIZES = given(
    length=st.integers(2, 200), window=st.integers(1, 20), rows=st.integers(1, 9), seed=st.integers(0, 9)
)  # fmt: skip


def windows_of(length, window, rows, seed):
    return ShuffledWindows(np.arange(length, dtype=np.uint16), min(window, length - 1), rows, seed)


@SIZES
def test_every_window_once_an_epoch(length, window, rows, seed):
    windows = windows_of(length, window, rows, seed)
    batches = [windows.batch(k)[0] for k in range(-(-3 * windows.epoch // rows))]
    starts = np.concatenate(batches)[:, 0]
    for epoch in range(3):
        some = np.sort(starts[epoch * windows.epoch : (epoch + 1) * windows.epoch])
        assert len(some) == windows.epoch
        assert (np.diff(some) == windows.window).all()
        # What the grid leaves out at both ends together is less than two windows.
        assert length - 1 - (some[-1] - some[0] + windows.window) < 2 * windows.window


@SIZES
def test_targets_are_the_next_tokens(length, window, rows, seed):
    windows = windows_of(length, window, rows, seed)
    tokens, targets = windows.batch(1)
    assert tokens.shape == targets.shape == (rows, windows.window)
    assert tokens.dtype == targets.dtype == np.int64
    assert (targets == tokens + 1).all()


@SIZES
def test_a_batch_depends_on_seed_and_index_only(length, window, rows, seed):
    straight = [windows_of(length, window, rows, seed).batch(k)[0] for k in range(5)]
    again = windows_of(length, window, rows, seed)
    for k in (4, 0, 3, 1, 2):
        assert (again.batch(k)[0] == straight[k]).all()


def test_epochs_and_seeds_differ():
    windows = windows_of(1000, 10, 98, 0)
    assert windows.epoch == 98
    first, second = windows.batch(0)[0], windows.batch(1)[0]
    assert not (first == second).all()
    assert first[0, 0] % 10 != second[0, 0] % 10
    assert not (first == windows_of(1000, 10, 98, 1).batch(0)[0]).all()


def test_less_than_a_window_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"has 64 tokens.*window of 64 needs 65.*--context-length"):
        ShuffledWindows(np.zeros(64, np.uint16), 64, 1, 0)
