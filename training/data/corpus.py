"""Prepared tokens: a corpus as a directory of token files, read through memory maps.

    corpus.json      description, fingerprint, and the counts of each split
    <split>.bin      token ids, little-endian uint16 (uint32 for a large vocabulary)
    tokenizer.json   the tokenizer that made them

`<|endoftext|>` precedes every document, and nothing follows the last one: the first token of a split is
only context, and every other token is predicted once. A sentence pair is two documents: the
source, then the target. `training.data.prepare` makes such a directory from text. This file
needs only numpy, so that training from prepared tokens works where `datasets` is not installed.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer import Tokenizer

FORMAT = 1
"""Version of corpus.json; higher ones are refused."""

MANIFEST = "corpus.json"

Tokens = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Split:
    """One split of a corpus, with the sizes of its original text."""

    name: str
    tokens: Tokens
    """A read-only memory map."""
    bytes: int
    """Bytes of the documents' text in UTF-8."""
    words: int
    """Words between white space; line ends count as words (as Mikolov counted the Penn Treebank)."""
    documents: int


@dataclass(frozen=True)
class Corpus:
    """An opened directory of prepared tokens."""

    directory: Path
    fingerprint: str
    """A hash of the tokens of all splits."""
    description: str
    """One line: what the data is, and how the validation split was made."""
    splits: dict[str, Split]
    languages: tuple[str, str] | None = None
    """Source and target language of sentence pairs; None for text."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return Tokenizer.load(self.directory)


def open_corpus(directory: Path | str, sentence_pairs: bool = False) -> Corpus:
    """Open prepared tokens.

    Args:
        directory: The directory that holds them.
        sentence_pairs: Whether sentence pairs are expected rather than text.

    Raises:
        ValueError: A file is missing or damaged, or the data is not of the expected kind.
    """
    directory = Path(directory)
    file = directory / MANIFEST
    advice = f"delete {directory} and prepare it again"
    try:
        manifest = json.loads(file.read_text("utf-8"))
        if manifest["format"] > FORMAT:
            raise ValueError(
                f"{file}: format {manifest['format']} is newer than this tinygpt reads"
            )
        dtype = np.dtype(manifest["dtype"])
        splits = {}
        for name, counts in manifest["splits"].items():
            path = directory / f"{name}.bin"
            length = counts.pop("tokens")
            size = path.stat().st_size if path.is_file() else 0
            if size != length * dtype.itemsize:
                raise ValueError(
                    f"{path}: {size} bytes, expected {length * dtype.itemsize}; {advice}"
                )
            splits[name] = Split(name, np.memmap(path, dtype, "r", shape=(length,)), **counts)
        languages = tuple(manifest["languages"]) if "languages" in manifest else None
        corpus = Corpus(
            directory, manifest["fingerprint"], manifest["description"], splits, languages
        )
    except FileNotFoundError:
        raise ValueError(f"{directory}: no prepared tokens here: {MANIFEST} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error!r}); {advice}") from None
    if sentence_pairs and not languages:
        raise ValueError(f"{directory} holds text, not sentence pairs: choose another --data")
    if languages and not sentence_pairs:
        raise ValueError(
            f"{directory} holds sentence pairs ({'-'.join(languages)}), not text: "
            "choose another --data, or --task translation"
        )
    return corpus


class TextChunk(NamedTuple):
    """A document, a piece of a long document, or a sentence pair."""

    text: str
    starts_document: bool
    target: str | None = None
    """The translation of `text` if this is a sentence pair."""

    def documents(self) -> "list[TextChunk]":
        """Return the source and the target of a pair as documents; else the chunk itself."""
        if self.target is None:
            return [self]
        return [TextChunk(self.text, True), TextChunk(self.target, True)]


@dataclass
class SplitCounts:
    """Sizes and hash of what has been written to a split."""

    tokens: int = 0
    bytes: int = 0
    words: int = 0
    documents: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


class CorpusWriter:
    """Writes prepared tokens into an existing empty directory, which can be opened after `close`."""

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        self.directory = directory
        self.tokenizer = tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.counts: dict[str, SplitCounts] = {}

    def write(self, split: str, chunks: Sequence[TextChunk]) -> int:
        """Append text to a split and return its size in bytes."""
        counts = self.counts.setdefault(split, SplitCounts())
        bytes_before = counts.bytes
        ids: list[int] = []
        documents = [document for chunk in chunks for document in chunk.documents()]
        encoded = self.tokenizer.encode_batch([document.text for document in documents])
        for (text, starts_document, _), text_ids in zip(documents, encoded, strict=True):
            if starts_document:
                ids.append(self.tokenizer.eos_token)
            ids += text_ids
            counts.documents += starts_document
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
            # The error of a full disk comes from `write`, without the name of the file.
            raise OSError(error.errno, error.strerror, str(path)) from error
        return counts.bytes - bytes_before

    def close(self, description: str, languages: tuple[str, str] | None = None) -> None:
        """Write the tokenizer and then, as the last file, corpus.json.

        Args:
            description: See `Corpus.description`.
            languages: Source and target language of sentence pairs.
        """
        fingerprint = hashlib.sha256(str(self.dtype).encode())
        splits = {}
        for name, counts in sorted(self.counts.items()):
            fingerprint.update(name.encode() + counts.digest.digest())
            splits[name] = {key: value for key, value in vars(counts).items() if key != "digest"}
        manifest = {
            "format": FORMAT,
            "description": description,
            "fingerprint": fingerprint.hexdigest(),
            "dtype": self.dtype.str,
            "splits": splits,
        }
        if languages:
            manifest["languages"] = languages
        self.tokenizer.save(self.directory / "tokenizer.json")
        (self.directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
