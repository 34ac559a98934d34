"""Tokenize a dataset once into a cache of prepared tokens; later calls open the cached copy.

`prepare_corpus` finds the dataset, makes a validation split if there is none, trains the
tokenizer if requested, and writes the tokens. Nothing grows with the corpus but its file.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from gpt.checkpoint import cache_dir
from tokenizer import BPE_PATTERN, Tokenizer
from training.data.corpus import FORMAT, MANIFEST, Corpus, CorpusWriter, TextChunk, open_corpus
from training.data.lookup import find_dataset
from training.data.rows import SentencePairs, read_text_rows
from training.data.sources import TOKENIZER_TRAINERS, Source, resolve_tokenizer
from training.data.splits import SplitDocuments, assign_splits, limit_bytes, limit_splits

MAX_TOKENIZER_BYTES = 100_000_000
"""Train a tokenizer on at most this many bytes of text."""
WRITE_CHARS = 2**20
"""Characters that are tokenized between two writes."""
STALE_SECONDS = 24 * 3600
"""Age at which a temporary directory belongs to a process that was killed."""


def prepare_corpus(
    source: Source,
    tokenizer: str | Tokenizer,
    vocab_size: int,
    hold_out: bool = True,
    sentence_pairs: bool = False,
) -> Corpus:
    """Open the prepared tokens of a source, making them first if they are not in the cache.

    Args:
        source: The dataset.
        tokenizer: "bpe", "words" or "characters" to train one on the training split, "bytes",
            the path of a tokenizer.json or of a run directory, or a tokenizer.
        vocab_size: Vocabulary size of a tokenizer that is trained.
        hold_out: Make a validation split if there is none; else keep the splits as they are.
        sentence_pairs: Rows are sentence pairs rather than text.

    Raises:
        ValueError: The data is missing, unreachable, unreadable, or holds no text or no sentence pairs.
        OSError: The cache cannot be written, for example because the disk is full.
    """
    if source.limit is not None and source.limit < 1:
        raise ValueError(f"--data-limit must be at least one byte, not {source.limit}")
    if source.languages is not None and not sentence_pairs:
        raise ValueError("--languages is for sentence pairs, not for text: leave it out")
    existing_tokenizer = resolve_tokenizer(tokenizer)
    if source.data and (Path(source.data).expanduser() / MANIFEST).is_file():
        return _open_prepared(source, existing_tokenizer, sentence_pairs)
    pairs = SentencePairs(source) if sentence_pairs else None
    dataset = find_dataset(source, pairs or functools.partial(read_text_rows, source.column))
    if source.limit is not None:
        dataset = limit_splits(dataset, source.limit)

    options = {**asdict(source), "data": dataset.identity, "hold_out": hold_out}
    if not sentence_pairs:
        del options["languages"]
    recipe = (
        existing_tokenizer.fingerprint
        if existing_tokenizer
        else [tokenizer, vocab_size, BPE_PATTERN, MAX_TOKENIZER_BYTES]
    )
    key = hashlib.sha256(json.dumps([FORMAT, options, recipe]).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", Path(source.data).name)[:40]
    directory = cache_dir() / f"{name}-{key}"
    if not (directory / MANIFEST).is_file():
        read_splits, validation_rule = assign_splits(source, dataset, hold_out)
        with _atomic_directory(directory) as temporary:
            writer = CorpusWriter(
                temporary,
                existing_tokenizer
                or _train_tokenizer(source, read_splits(), str(tokenizer), vocab_size),
            )
            _tokenize(read_splits(), writer, dataset.size)
            for split in ("train", "validation") if hold_out else ():
                if split not in writer.counts:
                    raise ValueError(f"{source.data}: too little text, none for the {split} split")
            if not writer.counts:
                raise ValueError(f"{source.data}: there is no text in it")
            description = dataset.name
            if source.split:
                description += f", split {source.split}"
            if validation_rule:
                description += f"; validation: {validation_rule}"
            if not existing_tokenizer and writer.counts["train"].bytes > MAX_TOKENIZER_BYTES:
                description += f"; tokenizer: trained on the first {MAX_TOKENIZER_BYTES:,} bytes"
            writer.close(description, pairs.languages if pairs else None)
    return open_corpus(directory, sentence_pairs)


def _open_prepared(source: Source, tokenizer: Tokenizer | None, sentence_pairs: bool) -> Corpus:
    """Open tokens that the user has already prepared; other options must agree with them."""
    if source != Source(source.data):
        raise ValueError(
            f"{source.data} holds prepared tokens, which are used as they are: only --data and "
            "--tokenizer go with them"
        )
    corpus = open_corpus(Path(source.data).expanduser(), sentence_pairs)
    if tokenizer and tokenizer.fingerprint != corpus.tokenizer.fingerprint:
        raise ValueError(
            f"{source.data} was tokenized by another tokenizer than the one given: leave out "
            "--tokenizer, or give the text itself as --data"
        )
    return corpus


def _train_tokenizer(
    source: Source, documents: SplitDocuments, name: str, vocab_size: int
) -> Tokenizer:
    """Train a tokenizer on the first `MAX_TOKENIZER_BYTES` of the training split."""
    chunks = (
        document for split, chunk in documents if split == "train" for document in chunk.documents()
    )
    texts = (chunk.text for chunk in limit_bytes(lambda: chunks, MAX_TOKENIZER_BYTES))
    if (first := next(texts, None)) is None:
        raise ValueError(f"{source.data}: there is no text in a train split to train a tokenizer")
    return TOKENIZER_TRAINERS[name](itertools.chain([first], texts), vocab_size)


def _tokenize(documents: SplitDocuments, writer: CorpusWriter, size: int | None) -> None:
    """Tokenize and write all documents, about `WRITE_CHARS` characters at a time."""
    with tqdm(
        total=size, desc="tokenizing", unit="B", unit_scale=True, delay=1, leave=False, disable=None
    ) as progress:
        pending: dict[str, list[TextChunk]] = {}
        characters = 0
        for split, chunk in documents:
            pending.setdefault(split, []).append(chunk)
            characters += len(chunk.text)
            if characters >= WRITE_CHARS:
                progress.update(_flush(pending, writer))
                characters = 0
        _flush(pending, writer)


def _flush(pending: dict[str, list[TextChunk]], writer: CorpusWriter) -> int:
    """Write the pending chunks of each split, clear them, and return their size in bytes."""
    size = sum(writer.write(split, chunks) for split, chunks in pending.items())
    pending.clear()
    return size


@contextlib.contextmanager
def _atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `directory` on success and is removed on failure."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    for leftover in directory.parent.glob("*.part-*"):
        if leftover.stat().st_mtime < time.time() - STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{directory.name}.part-", dir=directory.parent))
    try:
        yield temporary
        try:
            temporary.rename(directory)
        except OSError:
            # The target is not empty: another process was faster, and its tokens are the same.
            if not (directory / MANIFEST).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
