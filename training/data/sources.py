"""Descriptions of a corpus before it is tokenized: its source, its splits and its tokenizer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer import Tokenizer, byte_tokenizer, train_bpe, train_characters, train_words
from training.data.corpus import TextChunk

TOKENIZER_TRAINERS = {"bpe": train_bpe, "words": train_words, "characters": train_characters}
"""Tokenizers that are trained on the training split."""

Documents = Callable[[], Iterator[TextChunk]]
"""Reads the documents of a split; each call starts from the first."""


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
