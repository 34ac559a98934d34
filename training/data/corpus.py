"""Prepared tokens: a corpus as a folder of token files, read through memory maps.

    corpus.json      what it is, and each split's counts
    <split>.bin      token ids, little-endian uint16 (uint32 for a large vocabulary)
    tokenizer.json   what made them

`<|endoftext|>` stands before every document and nothing after the last: a split's first
token is only ever looked back on, and every other one is predicted once. Of sentence pairs,
each is two documents: the source, then the target. `training.data.sources` makes such a folder from
text; nothing here needs more than numpy, so it trains where `datasets` is not installed.
"""

import functools
import hashlib
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer import Tokenizer, byte_tokenizer, train_bpe, train_characters, train_words

FORMAT = 1
"""Of corpus.json; a reader refuses a higher one."""

MANIFEST = "corpus.json"

LEARNED = {"bpe": train_bpe, "words": train_words, "characters": train_characters}
"""Tokenizers that are made from the training split."""

Tokens = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Split:
    """One part of a corpus, and the sizes of the text that it came from."""

    name: str
    tokens: Tokens
    """Read-only; on the disk until looked at."""
    bytes: int
    """Of the documents' text in UTF-8."""
    words: int
    """Between white space, line ends counted as words (as Mikolov counted the Penn Treebank)."""
    documents: int


@dataclass(frozen=True)
class Corpus:
    """An opened folder of prepared tokens."""

    directory: Path
    fingerprint: str
    """A hash of the tokens of every split."""
    description: str
    """One line: what it is, and how the validation split came to be."""
    splits: dict[str, Split]
    languages: tuple[str, str] | None = None
    """Of sentence pairs: of the source and of the target; None for text."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return Tokenizer.load(self.directory)


def open_corpus(directory: Path | str, pairs: bool = False) -> Corpus:
    """Open prepared tokens; a ValueError says what is missing, damaged, or not of the kind wanted.

    Args:
        directory: Where they are.
        pairs: Whether they are to be pairs of sentences, or text.
    """
    directory = Path(directory)
    file = directory / MANIFEST
    again = f"delete {directory} and prepare it again"
    try:
        facts = json.loads(file.read_text("utf-8"))
        if facts["format"] > FORMAT:
            raise ValueError(f"{file}: format {facts['format']} is newer than this tinygpt reads")
        splits = {}
        for name, counts in facts["splits"].items():
            path = directory / f"{name}.bin"
            dtype, length = np.dtype(facts["dtype"]), counts.pop("tokens")
            found = path.stat().st_size if path.is_file() else 0
            if found != length * dtype.itemsize:
                raise ValueError(
                    f"{path}: {found} bytes where {length * dtype.itemsize} belong; {again}"
                )
            splits[name] = Split(name, np.memmap(path, dtype, "r", shape=(length,)), **counts)
        languages = tuple(facts["languages"]) if "languages" in facts else None
        corpus = Corpus(directory, facts["fingerprint"], facts["description"], splits, languages)
    except FileNotFoundError:
        raise ValueError(f"{directory}: no prepared tokens here: {MANIFEST} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error!r}); {again}") from None
    if pairs and not languages:
        raise ValueError(f"{directory} holds text, not pairs of sentences: choose another --data")
    if languages and not pairs:
        raise ValueError(
            f"{directory} holds pairs of sentences ({'-'.join(languages)}), not text: "
            "choose another --data, or --task pairs"
        )
    return corpus


def load_given_tokenizer(tokenizer: str | Tokenizer) -> Tokenizer | None:
    """The tokenizer that was asked for, or None for one to be trained."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer in LEARNED:
        return None
    if tokenizer == "bytes":
        return byte_tokenizer()
    if not Path(tokenizer).exists():
        raise ValueError(
            f"{tokenizer}: no such tokenizer: --tokenizer can be {', '.join(LEARNED)}, bytes, or the "
            "path of a tokenizer.json or of a run directory"
        )
    return Tokenizer.load(tokenizer)


class TextChunk(NamedTuple):
    """A document's text, or where that is long a piece of it; or a pair of sentences."""

    text: str
    begins: bool
    """Whether it begins a document."""
    target: str | None = None
    """Of a pair, what its text becomes: a document of its own, behind the other."""

    def documents(self) -> "list[TextChunk]":
        """It, or both sides of a pair."""
        if self.target is None:
            return [self]
        return [TextChunk(self.text, True), TextChunk(self.target, True)]


@dataclass
class Counts:
    """What has been written to a split."""

    tokens: int = 0
    bytes: int = 0
    words: int = 0
    documents: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


class CorpusWriter:
    """Writes prepared tokens into an existing empty folder; they are readable after `close`."""

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        self.directory = directory
        self.tokenizer = tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.counts: dict[str, Counts] = {}

    def write(self, split: str, parts: Sequence[TextChunk]) -> int:
        """Add text to a split; returns its bytes."""
        counts = self.counts.setdefault(split, Counts())
        before = counts.bytes
        ids: list[int] = []
        documents = [document for part in parts for document in part.documents()]
        encoded = self.tokenizer.encode_batch([document.text for document in documents])
        for (text, begins, _), more in zip(documents, encoded, strict=True):
            if begins:
                ids.append(self.tokenizer.eos_token)
            ids += more
            counts.documents += begins
            counts.bytes += len(text.encode())
            counts.words += len(text.split()) + text.count("\n")
        raw = np.array(ids, self.dtype).tobytes()
        counts.tokens += len(ids)
        counts.digest.update(raw)
        path = self.directory / f"{split}.bin"
        try:
            with path.open("ab") as file:
                file.write(raw)
        except OSError as error:
            # A full disk is noticed by write, which does not know the file's name.
            raise OSError(error.errno, error.strerror, str(path)) from error
        return counts.bytes - before

    def close(self, description: str, languages: tuple[str, str] | None = None) -> None:
        """Write the tokenizer, and last of all corpus.json; `languages` are those of pairs."""
        whole = hashlib.sha256(str(self.dtype).encode())
        splits = {}
        for name, counts in sorted(self.counts.items()):
            whole.update(name.encode() + counts.digest.digest())
            splits[name] = {key: value for key, value in vars(counts).items() if key != "digest"}
        facts = {
            "format": FORMAT,
            "description": description,
            "fingerprint": whole.hexdigest(),
            "dtype": self.dtype.str,
            "splits": splits,
        }
        if languages:
            facts["languages"] = languages
        self.tokenizer.save(self.directory / "tokenizer.json")
        (self.directory / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def _copied(tokens: Tokens, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The tokens at these places, and no more of their file in this process's memory than before.

    The system keeps the pages that it has read for as long as nobody else needs the room. Left in
    the map they would count as this process's own, and in the end be as many as the corpus has.
    """
    found = tokens[places].astype(np.int64)
    if isinstance(tokens.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        tokens.base.madvise(mmap.MADV_DONTNEED)
    return found


class StatefulBatches:
    """Training order for a state that is carried on: each row reads a part of the text in order.

    Args:
        tokens: What to cut into as many streams as there are rows.
        window: Tokens that a row is trained on at once.
        rows: Streams side by side.
        seed: Of nothing: the order is the text's own.
    """

    def __init__(self, tokens: Tokens, window: int, rows: int, seed: int) -> None:  # noqa: ARG002
        self.tokens, self.window = tokens, window
        self.length = (len(tokens) - 1) // rows
        if self.length < window:
            raise ValueError(
                f"the training split has {len(tokens):,} tokens, and {rows} rows of {window:,} need "
                f"{rows * window + 1:,}: give it more text, or a smaller --context-length or --batch-size"
            )
        self.starts = np.arange(rows) * self.length
        self.epoch = self.length // window
        """Batches in an epoch."""

    def batch(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(tokens_BT, targets_BT) of step `index`: the targets are the tokens shifted by one."""
        starts = self.starts + index % self.epoch * self.window
        windows = _copied(self.tokens, starts[:, None] + np.arange(self.window + 1))
        return windows[:, :-1], windows[:, 1:]


class ShuffledWindows:
    """Training order: every window of a shuffled epoch once, then another shuffle.

    Each epoch lays its grid of windows at another offset, so that their borders differ.
    A batch depends on the seed and its index only: a resumed run needs no more.

    Args:
        tokens: What to cut into windows.
        window: Tokens that a row is trained on.
        rows: Windows in a batch.
        seed: Of the order.
    """

    def __init__(self, tokens: Tokens, window: int, rows: int, seed: int) -> None:
        if len(tokens) <= window:
            raise ValueError(
                f"the training split has {len(tokens):,} tokens, and one window of {window:,} "
                f"needs {window + 1:,}: give it more text, or a smaller --context-length"
            )
        self.tokens, self.window, self.rows, self.seed = tokens, window, rows, seed
        # One window less than fits leaves room to shift the grid by a whole window.
        self.epoch = max(1, (len(tokens) - 1) // window - 1)
        """Windows in an epoch."""
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> tuple[int, NDArray[np.uint32]]:
        """Where the grid of an epoch begins, and its windows in order of use."""
        random = np.random.default_rng([self.seed, epoch])
        spare = len(self.tokens) - 1 - self.epoch * self.window
        offset = int(random.integers(spare, endpoint=True))
        # All that grows with the corpus: 4 bytes a window.
        order = np.arange(self.epoch, dtype=np.uint32)
        random.shuffle(order)
        return offset, order

    def _start(self, place: int) -> int:
        """Where the window begins that is used at a place, counted through all epochs."""
        epoch, number = divmod(place, self.epoch)
        offset, order = self._order(epoch)
        return offset + self.window * int(order[number])

    def batch(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(tokens_BT, targets_BT) of step `index`: the targets are the tokens shifted by one."""
        places = range(index * self.rows, (index + 1) * self.rows)
        starts = np.array([self._start(place) for place in places])
        windows = _copied(self.tokens, starts[:, None] + np.arange(self.window + 1))
        return windows[:, :-1], windows[:, 1:]
