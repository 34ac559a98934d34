"""Parts of splits in the notation of `datasets`, such as train[:10%]+test."""

import functools
import sys
from collections.abc import Iterator

from datasets import ReadInstruction

from training.data.corpus import TextChunk
from training.data.sources import DatasetSplits, Documents


def select_split(dataset: DatasetSplits, spec: str) -> Documents:
    """Return the documents of a split or of slices in the notation of `datasets`: train[:10%]+test.

    A slice counts documents. A ValueError names the splits that there are.
    """
    splits = dataset.splits
    if spec in splits:
        return splits[spec]
    try:
        instruction = ReadInstruction.from_spec(spec)
        # Validate names and numbers now, and count documents only when they are read.
        slices = instruction.to_absolute(dict.fromkeys(splits, sys.maxsize))
    except (ValueError, AssertionError):
        raise ValueError(
            f"{dataset.name} has no split {spec!r}; --data-split can be {', '.join(splits)}, or a "
            f"part of one such as {next(iter(splits), 'train')}[:10%]"
        ) from None

    @functools.cache
    def count(name: str) -> int:
        return sum(chunk.starts_document for chunk in splits[name]())

    def read() -> Iterator[TextChunk]:
        absolute = slices
        if "%" in spec or "-" in spec:
            absolute = instruction.to_absolute(
                {part.splitname: count(part.splitname) for part in slices}
            )
        if not any(part.from_ < part.to for part in absolute):
            counts = " and ".join(f"{count(name):,}" for name in {p.splitname: 0 for p in slices})
            raise ValueError(
                f"{dataset.name}, split {spec} selects none of its {counts} documents (a .txt file "
                "is one document; --data-limit reads the first bytes)"
            )
        for part in absolute:
            yield from _slice_documents(splits[part.splitname], part.from_, part.to)

    return read


def _slice_documents(documents: Documents, start: int, stop: int) -> Iterator[TextChunk]:
    number = -1
    for chunk in documents():
        number += chunk.starts_document
        if number >= stop:
            return
        if number >= start:
            yield chunk
