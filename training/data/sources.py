"""Datasets before tokenization: where they come from, their splits and limits, their tokenizer."""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizer import Tokenizer, byte_tokenizer, train_bpe, train_characters, train_words
from training.config import TrainingConfig
from training.data.corpus import TextChunk

TOKENIZER_TRAINERS = {"bpe": train_bpe, "words": train_words, "characters": train_characters}
"""Tokenizers that are trained on the training split."""
HOLD_OUT_EVERY = 20
"""One document in this many is held out for validation."""
HELD_OUT_SHARES = (0.01, 0.2)
"""Lowest and highest share of the text that may be held out in this way."""
TRAIN_FRACTION = 0.9
"""Share of the text that is trained on where whole documents cannot be held out."""
LONG_DOCUMENT = 10_000
"""Mean characters of documents from which on each is cut in two, not all together."""
OWN_SPLIT = "its own"
"""The validation rule of datasets that come with a validation split."""
SURVEYED_DOCUMENTS = 1000
"""Documents that are read to see how much a hash holds out; of more, chance is even enough."""

Documents = Callable[[], Iterator[TextChunk]]
"""Reads the documents of a split; each call starts from the first."""
SplitDocuments = Iterator[tuple[str, TextChunk]]
"""Documents, each with the name of its split."""


@dataclass(frozen=True)
class Source:
    """The location of a dataset and how to read it."""

    data: str = "stdlib"
    """`stdlib`, `toy-pairs`, `known-truth`, a directory of prepared tokens, a file, a folder, or the name of a hub dataset."""
    config: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str | None = None
    """Read only this split, or slices such as train[:10%]."""
    column: str | None = None
    """Column of the text (None: "text", or the only one of strings) or of the sentence pairs."""
    streaming: bool = False
    """Read a hub dataset as it is downloaded, without keeping a copy."""
    shuffle_buffer: int | None = None
    """Stream files in random order, and documents through a buffer of this many; None: in their order."""
    limit: int | None = None
    """Read at most this many bytes of text from each split."""
    languages: str | None = None
    """Source and target language of sentence pairs, like "en-fr"; None: the first two of the first row."""
    drop_duplicates: bool = False
    """Drop from train the documents that are in validation or test too."""


def source_of(config: TrainingConfig, data: str) -> Source:
    """Return the source that `data` names, read as a run's options say."""
    return Source(
        data,
        config=config.data_config,
        revision=config.data_revision,
        split=config.data_split,
        column=config.text_column,
        streaming=config.streaming,
        shuffle_buffer=config.shuffle_buffer,
        limit=config.data_limit,
        languages=config.languages,
        drop_duplicates=config.drop_duplicates,
    )


class ReadInterrupted(ValueError):
    """A dataset on another machine could not be read to its end; later it may be."""


@dataclass
class ReadReport:
    """What was left out of a dataset; complete once all of it was read."""

    blank_rows: dict[str, int] = field(default_factory=dict)
    """Rows without text, by file."""
    blank_files: set[str] = field(default_factory=set)
    """Names of files without text."""
    skipped: list[str] = field(default_factory=list)
    """Files that were not opened."""

    def __str__(self) -> str:
        rows, files = sum(self.blank_rows.values()), sorted(self.blank_files)
        parts = [f"{rows:,} {'row' if rows == 1 else 'rows'} without text"] if rows else []
        if files:
            parts.append(f"{len(files):,} {'file' if len(files) == 1 else 'files'} without text")
            parts[-1] += f" ({', '.join(files[:3])}{', …' * (len(files) > 3)})"
        parts += self.skipped[:3]
        if len(self.skipped) > 3:
            parts.append(f"{len(self.skipped) - 3:,} other files")
        return ", ".join(parts)


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
    report: ReadReport = field(default_factory=ReadReport)


def resolve_tokenizer(
    tokenizer: str | Tokenizer, end_of_text: str | None = None
) -> Tokenizer | None:
    """Return the tokenizer named by `--tokenizer` and `--end-of-text`, or None if it is to be trained."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if end_of_text is not None and tokenizer in (*TOKENIZER_TRAINERS, "bytes"):
        raise ValueError(
            f"--end-of-text names a token of a tokenizer.json: leave it out with --tokenizer {tokenizer}"
        )
    if tokenizer in TOKENIZER_TRAINERS:
        return None
    if tokenizer == "bytes":
        return byte_tokenizer()
    if Path(tokenizer).exists():
        return Tokenizer.load(tokenizer, end_of_text)
    if is_hub_name(tokenizer):
        from training.hub import TOKENIZER_FILES, download

        folder = download(tokenizer, files=TOKENIZER_FILES)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{tokenizer}: the model on the hub has no tokenizer.json")
        return Tokenizer.load(folder, end_of_text)
    raise ValueError(
        f"{tokenizer}: no such tokenizer: --tokenizer can be {', '.join(TOKENIZER_TRAINERS)}, "
        "bytes, the path of a tokenizer.json or of a run directory, or the name of a model on the hub"
    )


def is_hub_name(text: str) -> bool:
    """Return whether a text has the form OWNER/NAME, and is not meant as the path of a file."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text)) and not text.endswith(".json")


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
        return functools.partial(_read_splits, used), dataset.validation_rule or OWN_SPLIT
    divide, rule = _hold_out_validation(source, used.pop("train"))
    return lambda: itertools.chain(divide(), _read_splits(used)), rule


def share_warning(validation_rule: str, sizes: dict[str, int]) -> str:
    """Return what to say of a validation split that is unexpectedly large or small, or "".

    `sizes` are the bytes of each split.
    """
    low, high = (0.0, 0.5) if validation_rule == OWN_SPLIT else HELD_OUT_SHARES
    share = sizes["validation"] / (sizes["train"] + sizes["validation"])
    if low <= share <= high:
        return ""
    return (
        f" (WARNING: it is {share:.1%} of the text; to choose it yourself, give a folder of files "
        "whose names start with train and validation as --data)"
    )


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
    """Divide documents by a hash of each, or by position if that holds out too much or nothing.

    Of long documents each is cut in two. Neither this nor a hash depends on other documents.
    """
    lengths: list[int] = []
    characters = {"train": 0, "validation": 0}
    split, sentence_pairs, is_large = "train", False, False
    for chunk in documents():
        if chunk.starts_document:
            is_large = len(lengths) >= SURVEYED_DOCUMENTS and all(characters.values())
            if is_large:
                break
            split = hash_split(chunk.text)
            lengths.append(0)
        sentence_pairs = chunk.target is not None
        lengths[-1] += len(chunk.text)
        characters[split] += len(chunk.text)
    total = sum(characters.values())
    if not total:
        raise ValueError(f"{source.data}: there is no text in it")
    low, high = HELD_OUT_SHARES
    if is_large or low <= characters["validation"] / total <= high:
        unit, hashed = ("pair", "source") if sentence_pairs else ("document", "text")
        rule = f"one {unit} in {HOLD_OUT_EVERY}, by a hash of its {hashed}"
        return functools.partial(_divide_by_hash, documents), rule
    rule = f"the last {1 - TRAIN_FRACTION:.0%} of the {'pairs' if sentence_pairs else 'characters'}"
    if 1 < len(lengths) <= total / LONG_DOCUMENT and not sentence_pairs:
        rule += " of each document"
        borders = [int(TRAIN_FRACTION * length) for length in lengths]
    else:
        borders = [int(TRAIN_FRACTION * total)]
    return functools.partial(_divide_by_position, documents, borders), rule


def _divide_by_hash(documents: Documents) -> SplitDocuments:
    split = "train"
    for chunk in documents():
        if chunk.starts_document:
            split = hash_split(chunk.text)
        yield split, chunk


def _divide_by_position(documents: Documents, borders: Sequence[int]) -> SplitDocuments:
    """Train on as many characters of each document as its border says; cut it in two there.

    One border is that of all documents together. A sentence pair is not cut: it is trained on if
    its source ends before the border.
    """
    remaining, next_border = 0, iter(borders)
    for text, starts_document, target in documents():
        if starts_document:
            remaining = next(next_border, remaining)
        cut = max(remaining, 0)
        if target is not None and cut < len(text):
            cut = 0
        if text[:cut]:
            yield "train", TextChunk(text[:cut], starts_document, target)
        if text[cut:]:
            yield "validation", TextChunk(text[cut:], starts_document or remaining >= 0, target)
        # -1: the validation split has begun.
        remaining = remaining - len(text) if remaining >= len(text) else -1
