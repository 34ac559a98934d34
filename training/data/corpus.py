"""Prepared tokens: a corpus as a directory of token files, and training batches from them.

    corpus.json      description, fingerprint, and the counts of each split
    <split>.bin      token ids, little-endian uint16 (uint32 for a large vocabulary)
    tokenizer.json   the tokenizer that made them

The EOS token precedes every document, and nothing follows the last one: the first token of a split is
only context, and every other token is predicted once. A sentence pair is two documents: the
source, then the target. `training.data.prepare` makes such a directory from text. This file
does not need `datasets`, so that training from prepared tokens works where it is not installed.
"""

import functools
import hashlib
import json
import mmap
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt.checkpoint import write_atomically
from tokenizer import Tokenizer

FORMAT = 2
"""Version of corpus.json; others are refused."""

MANIFEST = "corpus.json"
PROGRESS = "progress.json"
"""How far a writer has come, in a directory that is not finished."""

Tokens = NDArray[np.unsignedinteger[Any]]

Windows = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(tokens_BT, targets_BT): the targets are the tokens shifted by one."""


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
    unknown: int
    """Unknown tokens: words or characters that are not in the vocabulary."""
    lost: str
    """An example of text that the tokens do not hold; empty if they hold all of it."""


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
    duplicates: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of held-out splits the documents with an `exact` and those with a `near` duplicate in train."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return Tokenizer.load(self.directory)

    def size_lines(self) -> list[str]:
        """Return a line about each split, then the notes of duplicates."""
        return [
            f"{split.name}: {split.bytes:,} bytes, {len(split.tokens):,} tokens"
            + f" ({split.unknown:,} unknown)" * bool(split.unknown)
            + f", {split.documents:,} documents"
            for split in self.splits.values()
        ] + self.duplicate_notes()

    def duplicate_notes(self) -> list[str]:
        """Return a line about each held-out split of which documents are in train too."""
        notes, unit = [], "pairs" if self.languages else "documents"
        for name, counts in self.duplicates.items():
            if found := sum(counts.values()):
                documents = self.splits[name].documents // (2 if self.languages else 1)
                kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
                notes.append(
                    f"{found:,} of {documents:,} {name} {unit} {'has' if found == 1 else 'have'} "
                    f"a duplicate in train ({kinds}); --drop-duplicates drops such {unit} from train"
                )
        return notes

    @property
    def parts(self) -> "tuple[Part, ...]":
        """The corpus itself, as a mixture of one."""
        return (Part(self.description, Fraction(1), self),)


class Part(NamedTuple):
    """A corpus in a mixture, by the name of its source."""

    name: str
    share: Fraction
    """Its share of the tokens."""
    corpus: Corpus


def is_prepared(data: str) -> bool:
    """Return whether `--data` is a directory of prepared tokens."""
    return (Path(data).expanduser() / MANIFEST).is_file()


def open_corpus(
    directory: Path | str, sentence_pairs: bool = False, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Open prepared tokens of text or of sentence pairs.

    Raises:
        ValueError: A file is missing or damaged, or the data is not of the expected kind or not
            made by `tokenizer`.
    """
    directory = Path(directory).expanduser()
    file = directory / MANIFEST
    advice = f"delete {directory} and prepare it again"
    try:
        meta = json.loads(file.read_text("utf-8"))
        if (version := meta["format"]) > FORMAT:
            raise ValueError(f"{file}: format {version} is newer than this tinygpt reads")
        if version < FORMAT:
            raise ValueError(f"{file}: format {version} is of an older tinygpt; {advice}")
        dtype = np.dtype(meta["dtype"])
        splits = {}
        for name, counts in meta["splits"].items():
            path = directory / f"{name}.bin"
            length = counts.pop("tokens")
            if not length:
                raise ValueError(f"{file}: the {name} split is empty; {advice}")
            size = path.stat().st_size if path.is_file() else 0
            if size != (expected := length * dtype.itemsize):
                raise ValueError(f"{path}: {size} bytes, expected {expected}; {advice}")
            splits[name] = Split(name, np.memmap(path, dtype, "r", shape=(length,)), **counts)
        languages = tuple(meta["languages"]) if "languages" in meta else None
        duplicates = {
            splits[name].name: {kind: int(count) for kind, count in counts.items()}
            for name, counts in meta.get("duplicates", {}).items()
        }
        corpus = Corpus(
            directory, meta["fingerprint"], meta["description"], splits, languages, duplicates
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
    if tokenizer and tokenizer.fingerprint != corpus.tokenizer.fingerprint:
        raise ValueError(
            f"{directory} was tokenized by another tokenizer than the one given "
            f"({corpus.tokenizer.vocab_size:,} ids, not {tokenizer.vocab_size:,}): give the text "
            "itself as --data"
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


class CorpusWriter:
    """Writes prepared tokens into an existing directory, which can be opened after `close`.

    If the writing is interrupted after `save_progress`, another writer with the same `recipe`, in
    the same directory, continues: its `num_chunks` tells how many chunks it has.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, recipe: str | None = None) -> None:
        self.directory, self.tokenizer, self.recipe = directory, tokenizer, recipe
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.num_chunks = 0
        """Chunks of all splits that were written."""
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.digests: dict[str, Any] = defaultdict(hashlib.sha256)
        self.lost: dict[str, str] = defaultdict(str)
        if recipe is not None:
            self._restore_progress()

    def save_progress(self) -> None:
        """Let a writer continue from here, also after a power failure."""
        for name in self.counts:
            with (self.directory / f"{name}.bin").open("rb+") as file:
                os.fsync(file.fileno())
        progress = {
            "recipe": self.recipe,
            "num_chunks": self.num_chunks,
            "counts": self.counts,
            "lost": self.lost,
        }
        write_atomically(self.directory / PROGRESS, json.dumps(progress))

    def _restore_progress(self) -> None:
        """Continue after the last `save_progress`; without one of this recipe, begin anew."""
        file = self.directory / PROGRESS
        progress = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        counts = progress["counts"] if progress.get("recipe") == self.recipe else {}
        sizes = {name: count["tokens"] * self.dtype.itemsize for name, count in counts.items()}
        for path in self.directory.glob("*.bin"):
            if path.stem not in sizes:  # begun after the last progress, or of another recipe
                path.unlink()
        for name, size in sizes.items():
            path = self.directory / f"{name}.bin"
            os.truncate(path, size)
            with path.open("rb") as content:
                self.digests[name] = hashlib.file_digest(content, "sha256")
            self.counts[name].update(counts[name])
            self.lost[name] = progress["lost"][name]
        self.num_chunks = progress["num_chunks"] if counts else 0

    def write(self, split: str, chunks: Sequence[TextChunk]) -> None:
        """Append text to a split."""
        ids: list[int] = []
        documents = [document for chunk in chunks for document in chunk.documents()]
        texts = [document.text for document in documents]
        continues = [not document.starts_document for document in documents]
        encoded = self.tokenizer.encode_batch(texts, continues)
        for text, text_ids, continued in zip(texts, encoded, continues, strict=True):
            if not continued:
                ids.append(self.tokenizer.eos_token)
            ids += text_ids
            self.lost[split] = self.lost[split] or self.tokenizer.find_loss(
                text, text_ids, continues=continued
            )
        unk_token = self.tokenizer.unk_token
        self.num_chunks += len(chunks)
        self.counts[split].update(
            tokens=len(ids),
            bytes=sum(len(text.encode()) for text in texts),
            words=sum(len(text.split()) + text.count("\n") for text in texts),
            documents=sum(document.starts_document for document in documents),
            unknown=0 if unk_token is None else ids.count(unk_token),
        )
        raw = np.array(ids, self.dtype).tobytes()
        self.digests[split].update(raw)
        path = self.directory / f"{split}.bin"
        try:
            with path.open("ab") as file:
                file.write(raw)
        except OSError as error:
            # The error of a full disk comes from `write`, without the name of the file.
            raise OSError(error.errno, error.strerror, str(path)) from error

    def tokens(self) -> dict[str, Tokens]:
        """Return the tokens of each split that were written so far."""
        return {
            name: np.memmap(self.directory / f"{name}.bin", self.dtype, "r") for name in self.counts
        }

    def close(
        self,
        description: str,
        languages: tuple[str, str] | None = None,
        duplicates: dict[str, dict[str, int]] | None = None,
    ) -> None:
        """Write the tokenizer and then, as the last file, corpus.json.

        `languages` are the source and the target language of sentence pairs, `duplicates` those
        of `Corpus`.
        """
        fingerprint = hashlib.sha256(str(self.dtype).encode())
        for name, digest in sorted(self.digests.items()):
            fingerprint.update(name.encode() + digest.digest())
        manifest = {
            "format": FORMAT,
            "description": description,
            "fingerprint": fingerprint.hexdigest(),
            "dtype": self.dtype.str,
            "splits": {
                name: {**counts, "lost": self.lost[name]}
                for name, counts in sorted(self.counts.items())
            },
        }
        if languages:
            manifest["languages"] = languages
        if duplicates:
            manifest["duplicates"] = duplicates
        self.tokenizer.save(self.directory / "tokenizer.json")
        (self.directory / PROGRESS).unlink(missing_ok=True)
        (self.directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


def gather_windows(tokens: Tokens, starts_B: NDArray[np.int64], length: int) -> Windows:
    """Copy a window of `length` tokens from each start, without keeping pages of the file mapped.

    The operating system caches the pages that were read for as long as there is free memory.
    If they stayed in the memory map, they would count as memory of this process, in the end as
    much as the corpus is large.
    """
    windows = tokens[starts_B[:, None] + np.arange(length + 1)].astype(np.int64)
    release_pages(tokens)
    return windows[:, :-1], windows[:, 1:]


def release_pages(tokens: Tokens) -> None:
    """Unmap the pages of a memory map that were read, so that they are no memory of this process.

    The tokens may be any view of the map.
    """
    base: object = tokens
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


class StatefulBatches:
    """Batches for stateful training: each row reads its own part of the text from start to end."""

    def __init__(self, tokens: Tokens, context_length: int, batch_size: int) -> None:
        self.tokens, self.context_length = tokens, context_length
        part_length = (len(tokens) - 1) // batch_size
        if part_length < context_length:
            raise ValueError(
                f"the training split has {len(tokens):,} tokens, and {batch_size} rows of "
                f"{context_length:,} need {batch_size * context_length + 1:,}: give it more text, "
                "or a smaller --context-length or --batch-size"
            )
        self.starts_B = np.arange(batch_size) * part_length
        self.batches_per_epoch = part_length // context_length

    def batch(self, index: int) -> Windows:
        """Return (tokens_BT, targets_BT) of step `index`."""
        offset = index % self.batches_per_epoch * self.context_length
        return gather_windows(self.tokens, self.starts_B + offset, self.context_length)


class ShuffledWindows:
    """Batches of windows in random order; each epoch has every window once.

    Each epoch shifts its grid of windows by another offset, so that their borders differ.
    A batch depends on the seed and its index only, so that resuming needs no other state.
    """

    def __init__(self, tokens: Tokens, context_length: int, batch_size: int, seed: int) -> None:
        if len(tokens) <= context_length:
            raise ValueError(
                f"the training split has {len(tokens):,} tokens, and one window of "
                f"{context_length:,} needs {context_length + 1:,}: give it more text, or a "
                "smaller --context-length"
            )
        self.tokens, self.context_length = tokens, context_length
        self.batch_size, self.seed = batch_size, seed
        # One window less than fits, so that the grid can be shifted by a whole window.
        self.windows_per_epoch = max(1, (len(tokens) - 1) // context_length - 1)
        self._epoch_order = functools.lru_cache(maxsize=2)(self._shuffle_epoch)

    def _shuffle_epoch(self, epoch: int) -> tuple[int, NDArray[np.uint32]]:
        """Return the offset of an epoch's grid, and its windows in order of use."""
        random = np.random.default_rng([self.seed, epoch])
        max_offset = len(self.tokens) - 1 - self.windows_per_epoch * self.context_length
        offset = int(random.integers(max_offset, endpoint=True))
        # The only memory that grows with the corpus: 4 bytes per window.
        order = np.arange(self.windows_per_epoch, dtype=np.uint32)
        random.shuffle(order)
        return offset, order

    def batch(self, index: int) -> Windows:
        """Return (tokens_BT, targets_BT) of step `index`."""
        positions = range(index * self.batch_size, (index + 1) * self.batch_size)
        starts_B = np.array([self.start(position) for position in positions])
        return gather_windows(self.tokens, starts_B, self.context_length)

    def start(self, position: int) -> int:
        """Return where the window starts that is number `position` in the order of all epochs."""
        epoch, window = divmod(position, self.windows_per_epoch)
        offset, order = self._epoch_order(epoch)
        return offset + self.context_length * int(order[window])
