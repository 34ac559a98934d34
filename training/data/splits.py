"""Division of a dataset into training and validation documents, and limits on its size."""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from training.data.corpus import TextChunk
from training.data.sources import DatasetSplits, Documents, Source

HOLD_OUT_EVERY = 20
"""One document in this many is held out for validation."""
TRAIN_FRACTION = 0.9
"""Share of the text that is trained on where documents are too few to be divided."""

SplitDocuments = Iterator[tuple[str, TextChunk]]
"""Documents, each with the name of its split."""


def assign_splits(
    source: Source, dataset: DatasetSplits, hold_out: bool
) -> tuple[Callable[[], SplitDocuments], str]:
    """Return a reader of all documents with their splits, and how the validation split was made.

    Args:
        source: The source of the dataset, for its `split` and for error messages.
        dataset: Its splits, only that one if the source names one.
        hold_out: Make a validation split if there is none; else keep the splits as they are.
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
    used: dict[str, Documents] = {
        name: splits[name] for name in ("train", "validation", "test") if name in splits
    }
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
            if sentence_pairs:
                rule = f"one pair in {HOLD_OUT_EVERY}, by a hash of its source"
            else:
                rule = f"one document in {HOLD_OUT_EVERY}, by a hash of its text"
            return lambda: _divide_by_hash(documents()), rule
    if not characters:
        raise ValueError(f"{source.data}: there is no text in it")
    unit = "pairs" if sentence_pairs else "characters"
    train_characters = int(TRAIN_FRACTION * characters)
    return (
        lambda: _divide_by_position(documents(), train_characters),
        f"the last {1 - TRAIN_FRACTION:.0%} of the {unit}",
    )


def _divide_by_hash(chunks: Iterable[TextChunk]) -> SplitDocuments:
    split = "train"
    for chunk in chunks:
        if chunk.starts_document:
            split = hash_split(chunk.text)
        yield split, chunk


def _divide_by_position(chunks: Iterable[TextChunk], train_characters: int) -> SplitDocuments:
    """Train on the first `train_characters`; the document across the border is cut in two.

    A sentence pair is not cut: it is trained on if its source ends before the border.
    """
    remaining = train_characters
    for text, starts_document, target in chunks:
        cut = max(remaining, 0)
        if target is not None and cut < len(text):
            cut = 0
        if text[:cut]:
            yield "train", TextChunk(text[:cut], starts_document, target)
        if text[cut:]:
            yield "validation", TextChunk(text[cut:], starts_document or remaining >= 0, target)
        # -1: the validation split has begun.
        remaining = remaining - len(text) if remaining >= len(text) else -1


def limit_splits(dataset: DatasetSplits, max_bytes: int) -> DatasetSplits:
    """Return the dataset with at most `max_bytes` bytes of text in each split."""
    splits: dict[str, Documents] = {
        name: functools.partial(limit_bytes, documents, max_bytes)
        for name, documents in dataset.splits.items()
    }
    name = f"{dataset.name}, at most {max_bytes:,} bytes of each split"
    return replace(dataset, splits=splits, size=None, name=name)


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
