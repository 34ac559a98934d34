"""Tokenize a dataset once into a cache of prepared tokens; later calls open the cached copy.

`prepare_corpus` finds the dataset, makes a validation split if there is none, trains the
tokenizer if requested, and writes the tokens. Nothing grows with the corpus but its file.
What was interrupted continues at the very next document.

    <name>-<key>.json   a trained tokenizer; the key is of the data and of what it was trained with
    <name>-<key>/       prepared tokens; the key is of the data and of the tokenizer itself, so that
                        a run that trained its tokenizer and later ones that load it share them
    <name>-<key>.part/  prepared tokens that are not finished
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gpt.checkpoint import cache_dir
from tokenizer import WORD_PATTERN, Tokenizer
from training.data import files, hub
from training.data.corpus import (
    FORMAT,
    MANIFEST,
    PROGRESS,
    Corpus,
    CorpusWriter,
    TextChunk,
    is_prepared,
    open_corpus,
)
from training.data.known_truth import KNOWN_TRUTH, SPLIT_SIZES, split_documents
from training.data.rows import TRANSLATION_COLUMN, RowReader, SentencePairs, Texts, read_rows
from training.data.slices import select_split
from training.data.sources import (
    HOLD_OUT_EVERY,
    TOKENIZER_TRAINERS,
    DatasetSplits,
    ReadInterrupted,
    ReadReport,
    Source,
    SplitDocuments,
    assign_splits,
    hash_split,
    limit_bytes,
    resolve_tokenizer,
    share_warning,
)
from training.data.toy_pairs import TOY_PAIRS, toy_pairs

MAX_TOKENIZER_BYTES = 100_000_000
"""Train a tokenizer on at most this many bytes of text."""
WRITE_CHARS = 2**20
"""Characters that are tokenized between two writes."""
WRITES_BETWEEN_PROGRESS = 64
"""Writes, each of some tenths of a second, after which an interrupted call can continue."""


class _Dataset:
    """A dataset that was found but not read, and what its tokens depend on besides the tokenizer."""

    def __init__(self, source: Source, hold_out: bool, sentence_pairs: bool) -> None:
        self.source, self.hold_out = source, hold_out
        self.pairs = SentencePairs(source) if sentence_pairs else None
        self.rows = self.pairs or Texts(source)
        self.found = find_dataset(source, self.rows)
        self.options = {**asdict(source), "data": self.found.identity, "hold_out": hold_out}
        # The identity of a hub dataset has its commit, of any revision.
        # A tokenizer is the same whatever is dropped from train, so that losses can be compared.
        del self.options["revision"], self.options["drop_duplicates"]
        if not sentence_pairs:
            del self.options["languages"]
        if source.shuffle_buffer is None:
            del self.options["shuffle_buffer"]

    @functools.cached_property
    def splits(self) -> tuple[Callable[[], SplitDocuments], str]:
        """What `assign_splits` returns; this reads the data."""
        return assign_splits(self.source, self.found, self.hold_out)

    def training_documents(self, max_bytes: int) -> Iterator[TextChunk]:
        """Yield the first documents of the training split, to train a tokenizer on."""
        documents = (
            document
            for split, chunk in self.splits[0]()
            if split == "train"
            for document in chunk.documents()
        )
        return limit_bytes(lambda: documents, max_bytes)

    def describe(self, writer: CorpusWriter) -> str:
        """Return one line about the dataset, which was read to its end by the writer."""
        description = self.found.name
        if self.source.split:
            description += f", split {self.source.split}"
        if self.source.shuffle_buffer:
            description += f", shuffled with a buffer of {self.source.shuffle_buffer:,}"
        if isinstance(self.rows, Texts) and self.rows.guessed_column:
            description += f"; text: column {self.rows.guessed_column!r}"
        if str(self.found.report):
            description += f"; left out: {self.found.report}"
        if rule := self.splits[1]:
            sizes = {name: counts["bytes"] for name, counts in writer.counts.items()}
            description += f"; validation: {rule}{share_warning(rule, sizes)}"
        return description


def prepare_corpus(
    source: Source,
    tokenizer: str | Tokenizer,
    vocab_size: int,
    hold_out: bool = True,
    sentence_pairs: bool = False,
    directory: Path | None = None,
) -> Corpus:
    """Open the prepared tokens of a source, making them first if they are not in the cache.

    If this is interrupted, the next call continues with the next document.

    Args:
        source: The dataset.
        tokenizer: "bpe", "words" or "characters" to train one on the training split, "bytes",
            the path of a tokenizer.json or of a run directory, or a tokenizer.
        vocab_size: Vocabulary size of a tokenizer that is trained.
        hold_out: Make a validation split if there is none; else keep the splits as they are.
        sentence_pairs: Rows are sentence pairs rather than text.
        directory: Where to write the tokens; None for the cache.

    Raises:
        ValueError: The data is missing, unreachable, unreadable, or holds no text or no sentence pairs.
        OSError: The cache cannot be written, for example because the disk is full.
    """
    used = resolve_tokenizer(tokenizer)
    if source.data and is_prepared(source.data):
        if source != Source(source.data):
            raise ValueError(
                f"{source.data} holds prepared tokens, which are used as they are: only --data and "
                "--tokenizer go with them"
            )
        return open_corpus(source.data, sentence_pairs, used)
    dataset = _Dataset(source, hold_out, sentence_pairs)
    if is_trained := used is None:
        used = _trained_tokenizer([(dataset, MAX_TOKENIZER_BYTES)], str(tokenizer), vocab_size)
    recipe = [dataset.options, used.fingerprint, *["drop duplicates"] * source.drop_duplicates]
    directory = directory or _cached(source.data, recipe)
    if (directory / MANIFEST).is_file():
        return open_corpus(directory, sentence_pairs)

    from training.data.duplicates import MAX_NEAR_BYTES, find_duplicates

    documents, is_dropped = dataset.splits[0], bytearray()
    if source.drop_duplicates:
        everything = replace(source, drop_duplicates=False)
        whole = prepare_corpus(everything, used, vocab_size, hold_out, sentence_pairs)
        tokens = {name: split.tokens for name, split in whole.splits.items()}
        if "train" in tokens:
            is_dropped = find_duplicates(tokens, used, sentence_pairs, near=True).is_dropped
    with _unfinished(directory) as unfinished:
        writer = CorpusWriter(unfinished, used, _key(recipe))
        _tokenize(_drop(documents(), is_dropped), writer, dataset.found.size)
        for split in ("train", "validation") if hold_out else ():
            if split not in writer.counts:
                cause = "all of it is in validation too" if is_dropped else "too little text"
                raise ValueError(f"{source.data}: {cause}, none for the {split} split")
        if not writer.counts:
            raise ValueError(f"{source.data}: there is no text in it")
        description = dataset.describe(writer)
        if is_trained and writer.counts["train"]["bytes"] > MAX_TOKENIZER_BYTES:
            description += f"; tokenizer: trained on the first {MAX_TOKENIZER_BYTES:,} bytes"
        duplicates = {}
        if source.drop_duplicates:
            unit = "pairs" if sentence_pairs else "documents"
            dropped = f"{sum(is_dropped):,} of {len(is_dropped):,} {unit}"
            description += f"; duplicates dropped from train: {dropped}"
        elif "train" in writer.counts and len(writer.counts) > 1:
            near = writer.counts["train"]["bytes"] <= MAX_NEAR_BYTES
            duplicates = find_duplicates(writer.tokens(), used, sentence_pairs, near).held_out
        languages = dataset.pairs.languages if dataset.pairs else None
        writer.close(description, languages, duplicates)
        # One by one, corpus.json last: the folder may hold files of an earlier tinygpt that was
        # interrupted, or another process may write the same tokens at the same time.
        directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == MANIFEST):
            path.replace(directory / path.name)
    return open_corpus(directory, sentence_pairs)


def mixture_tokenizer(
    sources: Sequence[tuple[Source, Fraction]], tokenizer: str, vocab_size: int
) -> Tokenizer:
    """Train a tokenizer on texts that are mixed in these shares, or return the cached one.

    It reads of each source as many bytes of the training split as its share says, or all that there
    are. The other arguments are those of `prepare_corpus`.
    """
    datasets = [
        (_Dataset(source, hold_out=True, sentence_pairs=False), int(MAX_TOKENIZER_BYTES * share))
        for source, share in sources
    ]
    return _trained_tokenizer(datasets, tokenizer, vocab_size)


def _trained_tokenizer(
    datasets: Sequence[tuple[_Dataset, int]], name: str, vocab_size: int
) -> Tokenizer:
    """Return a tokenizer trained on the first bytes of datasets, each with the most bytes to read."""
    of_one = len(datasets) == 1
    options = [[dataset.options, max_bytes] for dataset, max_bytes in datasets]
    recipe = [name, vocab_size, "gpt2", WORD_PATTERN, MAX_TOKENIZER_BYTES]
    file = _cached(
        datasets[0][0].source.data if of_one else "mixture",
        [datasets[0][0].options if of_one else options, recipe],
    )
    file = file.with_name(f"{file.name}.json")
    if not file.is_file():
        texts = (
            document.text
            for dataset, max_bytes in datasets
            for document in dataset.training_documents(max_bytes)
        )
        if (first := next(texts, None)) is None:
            names = ", ".join(dataset.source.data for dataset, _ in datasets)
            raise ValueError(f"{names}: there is no text in a train split to train a tokenizer")
        trained = TOKENIZER_TRAINERS[name](itertools.chain([first], texts), vocab_size)
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="part-", dir=cache_dir()) as temporary:
            trained.save(Path(temporary, file.name))
            Path(temporary, file.name).replace(file)
    return Tokenizer.load(file)


def _key(recipe: list[Any]) -> str:
    """Return a name of all that prepared tokens, or a trained tokenizer, depend on."""
    return hashlib.sha256(json.dumps([FORMAT, *recipe]).encode()).hexdigest()[:16]


def _cached(data: str, recipe: list[Any]) -> Path:
    """Return the path in the cache of what is made of data by a recipe."""
    name = re.sub(r"[^\w.-]+", "-", Path(data).name)[:40]
    return cache_dir() / f"{name}-{_key(recipe)}"


@contextlib.contextmanager
def _unfinished(directory: Path) -> Iterator[Path]:
    """Yield the directory in which the files of `directory` are written, and locked meanwhile.

    It stays if the process is killed, if the user stops it, or if a dataset on another machine
    cannot be read further, so that the next call can continue; otherwise it is removed. If another
    process has locked it, a directory of its own is yielded.
    """
    unfinished = directory.with_name(f"{directory.name}.part")
    unfinished.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(unfinished, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Unless the process that had locked it has just finished, and removed it.
            is_own = os.path.samestat(os.fstat(descriptor), unfinished.stat())
        except OSError:
            is_own = False
        if not is_own:
            with tempfile.TemporaryDirectory(prefix="part-", dir=directory.parent) as own:
                yield Path(own)
            return
        try:
            yield unfinished
        except (KeyboardInterrupt, ReadInterrupted):
            if not (unfinished / PROGRESS).is_file():
                shutil.rmtree(unfinished)
            raise
        except BaseException:
            shutil.rmtree(unfinished)
            raise
        unfinished.rmdir()
    finally:
        os.close(descriptor)


def find_dataset(source: Source, rows: RowReader) -> DatasetSplits:
    """Find the standard library, a generated dataset, a file, a folder or a hub dataset, in this order.

    A ValueError tells a mistyped path from an unknown dataset.
    """
    data = source.data
    path = Path(data).expanduser()
    if data not in ("stdlib", TOY_PAIRS, KNOWN_TRUTH) and not (data and path.exists()):
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", data) or files.detect_format(path):
            raise ValueError(f"{data}: no such file or folder")
        dataset = hub.open_hub_dataset(source, rows)
    elif source.shuffle_buffer is not None:
        raise ValueError(f"--shuffle-buffer is only for streams of hub datasets; {data} is local")
    elif source.config is not None:
        raise ValueError(f"--data-config is only for hub datasets; {data} has no configurations")
    elif source.revision is not None:
        raise ValueError(f"--data-revision is only for hub datasets; {data} has no revisions")
    elif data == "stdlib":
        dataset = _standard_library(source, rows)
    elif data == TOY_PAIRS:
        dataset = _open_toy_pairs(source, rows)
    elif data == KNOWN_TRUTH:
        dataset = _open_known_truth(rows)
    elif path.is_dir():
        dataset = files.open_folder(source, rows, path.resolve())
    elif file_format := files.detect_format(path):
        dataset = files.open_files(source, rows, file_format, {"train": [str(path.resolve())]})
    else:
        raise ValueError(f"{data}: unsupported file type; expected {files.SUPPORTED_FILES}")

    splits, limit = dataset.splits, source.limit
    if source.split is not None:
        splits = {source.split: select_split(dataset, source.split)}
    if limit is None:
        return replace(dataset, splits=splits)
    return replace(
        dataset,
        splits={
            name: functools.partial(limit_bytes, documents, limit)
            for name, documents in splits.items()
        },
        name=f"{dataset.name}, at most {limit:,} bytes of each split",
        size=None,
    )


def _standard_library(source: Source, rows: RowReader) -> DatasetSplits:
    """Return the sources of the running Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if excluded.isdisjoint(relative.parts):
            with contextlib.suppress(UnicodeDecodeError):
                path.read_bytes().decode()
                splits[hash_split(relative.as_posix())].append(str(path))
    if not all(splits.values()):
        raise ValueError(f"the standard library's sources are not in {root}: give text as --data")
    return replace(
        files.open_files(source, rows, "text", splits),
        name=f"standard library of Python {platform.python_version()}",
        validation_rule=f"one file in {HOLD_OUT_EVERY}, by a hash of its path",
    )


def _open_toy_pairs(source: Source, rows: RowReader) -> DatasetSplits:
    """Return the generated pairs as a dataset."""
    rows.choose_column({TRANSLATION_COLUMN: "object"}, TOY_PAIRS)
    report, splits = ReadReport(), toy_pairs()

    def read(name: str) -> Iterator[TextChunk]:
        values = ({"en": en, "fr": fr} for en, fr in splits[name])
        located = ((f"pair {number}", value) for number, value in enumerate(values, 1))
        return read_rows(located, rows, source.data, report)

    text = json.dumps(splits)
    return DatasetSplits(
        splits={name: functools.partial(read, name) for name in splits},
        identity=[TOY_PAIRS, hashlib.sha256(text.encode()).hexdigest()],
        name="toy-pairs: generated English-French sentences",
        report=report,
    )


def _open_known_truth(rows: RowReader) -> DatasetSplits:
    """Return the documents of the language of known entropy as a dataset."""
    rows.choose_column({"text": "string"}, KNOWN_TRUTH)

    def read(split: str) -> Iterator[TextChunk]:
        return (TextChunk(text, True) for text in split_documents(split))

    first = {split: list(itertools.islice(split_documents(split), 100)) for split in SPLIT_SIZES}
    return DatasetSplits(
        splits={split: functools.partial(read, split) for split in SPLIT_SIZES},
        identity=[KNOWN_TRUTH, SPLIT_SIZES, first],
        name="known-truth: documents of a hidden Markov model",
    )


def _drop(documents: SplitDocuments, is_dropped: bytearray) -> SplitDocuments:
    """Yield documents without those of train that are dropped; nothing is if this is empty."""
    number = -1
    for split, chunk in documents:
        if split == "train" and is_dropped:
            number += chunk.starts_document
            if is_dropped[number]:
                continue
        yield split, chunk


def _tokenize(documents: SplitDocuments, writer: CorpusWriter, size: int | None) -> None:
    """Tokenize and write all documents that are not written yet, `WRITE_CHARS` characters at a time.

    Documents that an interrupted call has written are read again, but not tokenized: that takes a
    small part of the time, and holds for every kind of source.
    """
    pending: dict[str, list[TextChunk]] = defaultdict(list)

    def flush() -> None:
        for split, chunks in pending.items():
            writer.write(split, chunks)
        pending.clear()

    with tqdm(
        total=size, desc="tokenizing", unit="B", unit_scale=True, delay=1, leave=False, disable=None
    ) as progress:
        characters, writes = 0, 0
        for split, chunk in itertools.islice(documents, writer.num_chunks, None):
            pending[split].append(chunk)
            characters += len(chunk.text)
            if characters >= WRITE_CHARS:
                flush()
                progress.update(
                    sum(counts["bytes"] for counts in writer.counts.values()) - progress.n
                )
                characters, writes = 0, writes + 1
                if writes % WRITES_BETWEEN_PROGRESS == 0:
                    writer.save_progress()
        flush()
