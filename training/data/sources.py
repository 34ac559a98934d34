"""Datasets before tokenization: where they come from, their splits and limits, their tokenizer."""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer import Tokenizer, byte_tokenizer, train_bpe, train_characters, train_words
from training.data.corpus import TextChunk

TOKENIZER_TRAINERS = {"bpe": train_bpe, "words": train_words, "characters": train_characters}
"""Tokenizers that are trained on the training split."""
HOLD_OUT_EVERY = 20
"""One document in this many is held out for validation."""
TRAIN_FRACTION = 0.9
"""Share of the text that is trained on where documents are too few to be divided."""

Documents = Callable[[], Iterator[TextChunk]]
"""Reads the documents of a split; each call starts from the first."""
SplitDocuments = Iterator[tuple[str, TextChunk]]
"""Documents, each with the name of its split."""


@dataclass(frozen=True)
class Source:
    """The location of a dataset and how to read it."""

    data: str = "stdlib"
    """`stdlib`, a directory of prepared tokens, a file, a folder, or the name of a hub dataset."""
    config: str | None = None
    """Configuration of a hub dataset."""
    split: str | None = None
    """Read only this split."""
    column: str | None = None
    """Column of the text (None: "text", or the only one of strings) or of the sentence pairs."""
    streaming: bool = False
    """Read a hub dataset as it is downloaded, without keeping a copy."""
    limit: int | None = None
    """Read at most this many bytes of text from each split."""
    languages: str | None = None
    """Source and target language of sentence pairs, like "en-fr"; None: the first two of the first row."""


@dataclass(frozen=True)
class DatasetSplits:
    """The splits of a dataset, not yet read."""

    splits: dict[str, Documents]
    identity: Any
    """A JSON value that differs for different data; part of the cache key."""
    name: str
    size: int | None = None
    """Bytes of text, if known before reading."""
    validation_rule: str = ""
    """How the validation split was made, if the dataset did not come with it."""


def resolve_tokenizer(tokenizer: str | Tokenizer) -> Tokenizer | None:
    """Return the tokenizer named by `--tokenizer`, or None if it is to be trained."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer in TOKENIZER_TRAINERS:
        return None
    if tokenizer == "bytes":
        return byte_tokenizer()
    if not Path(tokenizer).exists():
        raise ValueError(
            f"{tokenizer}: no such tokenizer: --tokenizer can be {', '.join(TOKENIZER_TRAINERS)}, "
            "bytes, or the path of a tokenizer.json or of a run directory"
        )
    return Tokenizer.load(tokenizer)


def limit_bytes(documents: Documents, max_bytes: int) -> Iterator[TextChunk]:
    """Yield chunks of together at most `max_bytes` bytes; sentence pairs are not cut."""
    remaining = max_bytes
    for text, starts_document, target in documents():
        cut = text.encode()[:remaining].decode(errors="ignore")
        remaining -= len(text.encode()) + len((target or "").encode())
        if cut and (target is None or remaining >= 0):
            yield TextChunk(cut, starts_document, target)
        if remaining <= 0:
            return


def assign_splits(
    source: Source, dataset: DatasetSplits, hold_out: bool
) -> tuple[Callable[[], SplitDocuments], str]:
    """Return a reader of all documents with their splits, and how the validation split was made.

    If `hold_out`, there is a training split, and a validation split is made if there is none;
    else the splits stay as they are.
    """
    splits = dataset.splits
    if not hold_out:
        return functools.partial(_read_splits, splits), ""
    if source.split is not None:
        splits = {"train": splits[source.split]}
    for name in ("valid", "val", "dev"):
        if name in splits and "validation" not in splits:
            splits = {**splits, "validation": splits[name]}
    if "train" not in splits:
        raise ValueError(
            f"{source.data} has no split named train, only {', '.join(splits)}: choose the one to "
            "train on with --data-split"
        )
    names = "train", "validation", "test"
    used: dict[str, Documents] = {name: splits[name] for name in names if name in splits}
    if "validation" in used:
        return functools.partial(_read_splits, used), dataset.validation_rule or "its own"
    divide, rule = _hold_out_validation(source, used.pop("train"))
    return lambda: itertools.chain(divide(), _read_splits(used)), rule


def _read_splits(splits: dict[str, Documents]) -> SplitDocuments:
    for name, documents in splits.items():
        yield from ((name, chunk) for chunk in documents())


def hash_split(text: str) -> str:
    """Return the split of a document by a hash: it does not depend on other documents."""
    digest = hashlib.sha256(text[: 2**16].encode()).digest()
    return "train" if int.from_bytes(digest) % HOLD_OUT_EVERY else "validation"


def _hold_out_validation(
    source: Source, documents: Documents
) -> tuple[Callable[[], SplitDocuments], str]:
    """Divide documents by a hash of each; by position if that leaves one of the splits empty."""
    splits, characters, sentence_pairs = set(), 0, False
    for chunk in documents():
        characters += len(chunk.text)
        sentence_pairs = chunk.target is not None
        if chunk.starts_document:
            splits.add(hash_split(chunk.text))
        if len(splits) == 2:
            unit, hashed = ("pair", "source") if sentence_pairs else ("document", "text")
            rule = f"one {unit} in {HOLD_OUT_EVERY}, by a hash of its {hashed}"
            return functools.partial(_divide_by_hash, documents), rule
    if not characters:
        raise ValueError(f"{source.data}: there is no text in it")
    rule = f"the last {1 - TRAIN_FRACTION:.0%} of the {'pairs' if sentence_pairs else 'characters'}"
    return functools.partial(_divide_by_position, documents, int(TRAIN_FRACTION * characters)), rule


def _divide_by_hash(documents: Documents) -> SplitDocuments:
    split = "train"
    for chunk in documents():
        if chunk.starts_document:
            split = hash_split(chunk.text)
        yield split, chunk


def _divide_by_position(documents: Documents, train_characters: int) -> SplitDocuments:
    """Train on the first `train_characters`; the document across the border is cut in two.

    A sentence pair is not cut: it is trained on if its source ends before the border.
    """
    remaining = train_characters
    for text, starts_document, target in documents():
        cut = max(remaining, 0)
        if target is not None and cut < len(text):
            cut = 0
        if text[:cut]:
            yield "train", TextChunk(text[:cut], starts_document, target)
        if text[cut:]:
            yield "validation", TextChunk(text[cut:], starts_document or remaining >= 0, target)
        # -1: the validation split has begun.
        remaining = remaining - len(text) if remaining >= len(text) else -1
