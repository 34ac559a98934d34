"""Tokenize a dataset once into a cache of prepared tokens; later calls open the cached copy.

`prepare_corpus` finds the dataset, makes a validation split if there is none, trains the
tokenizer if requested, and writes the tokens. Nothing grows with the corpus but its file.

    <name>-<key>.json   a trained tokenizer; the key is of the data and of what it was trained with
    <name>-<key>/       prepared tokens; the key is of the data and of the tokenizer itself, so that
                        a run that trained its tokenizer and later ones that load it share them
"""

import contextlib
import functools
import hashlib
import itertools
import json
import platform
import re
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from gpt.checkpoint import cache_dir
from tokenizer import WORD_PATTERN, Tokenizer
from training.data import files, hub
from training.data.corpus import (
    FORMAT,
    MANIFEST,
    Corpus,
    CorpusWriter,
    TextChunk,
    is_prepared,
    open_corpus,
)
from training.data.known_truth import KNOWN_TRUTH, SPLIT_SIZES, documents
from training.data.rows import TRANSLATION_COLUMN, RowReader, SentencePairs, Texts, read_rows
from training.data.slices import select_split
from training.data.sources import (
    HOLD_OUT_EVERY,
    TOKENIZER_TRAINERS,
    DatasetSplits,
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
    used = resolve_tokenizer(tokenizer)
    if source.data and is_prepared(source.data):
        if source != Source(source.data):
            raise ValueError(
                f"{source.data} holds prepared tokens, which are used as they are: only --data and "
                "--tokenizer go with them"
            )
        return open_corpus(source.data, sentence_pairs, used)
    pairs = SentencePairs(source) if sentence_pairs else None
    rows = pairs or Texts(source)
    dataset = find_dataset(source, rows)

    options = {**asdict(source), "data": dataset.identity, "hold_out": hold_out}
    del options["revision"]  # The identity of a hub dataset has its commit, of any revision.
    if not sentence_pairs:
        del options["languages"]

    def cached(recipe: object) -> Path:
        key = hashlib.sha256(json.dumps([FORMAT, options, recipe]).encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.-]+", "-", Path(source.data).name)[:40]
        return cache_dir() / f"{name}-{key}"

    splits = functools.cache(lambda: assign_splits(source, dataset, hold_out))  # reads the data
    if is_trained := used is None:
        file = cached([tokenizer, vocab_size, "gpt2", WORD_PATTERN, MAX_TOKENIZER_BYTES])
        file = file.with_name(f"{file.name}.json")
        if not file.is_file():
            with _cache_writes() as temporary:
                trained = _train_tokenizer(source, splits()[0](), str(tokenizer), vocab_size)
                trained.save(temporary / file.name)
                (temporary / file.name).replace(file)
        used = Tokenizer.load(file)
    directory = cached(used.fingerprint)
    if (directory / MANIFEST).is_file():
        return open_corpus(directory, sentence_pairs)

    read_splits, validation_rule = splits()
    with _cache_writes() as temporary:
        writer = CorpusWriter(temporary, used)
        _tokenize(read_splits(), writer, dataset.size)
        for split in ("train", "validation") if hold_out else ():
            if split not in writer.counts:
                raise ValueError(f"{source.data}: too little text, none for the {split} split")
        if not writer.counts:
            raise ValueError(f"{source.data}: there is no text in it")
        description = dataset.name
        if source.split:
            description += f", split {source.split}"
        if isinstance(rows, Texts) and rows.guessed_column:
            description += f"; text: column {rows.guessed_column!r}"
        if str(dataset.report):
            description += f"; left out: {dataset.report}"
        if validation_rule:
            sizes = {name: counts["bytes"] for name, counts in writer.counts.items()}
            description += f"; validation: {validation_rule}{share_warning(validation_rule, sizes)}"
        if is_trained and writer.counts["train"]["bytes"] > MAX_TOKENIZER_BYTES:
            description += f"; tokenizer: trained on the first {MAX_TOKENIZER_BYTES:,} bytes"
        writer.close(description, pairs.languages if pairs else None)
        # One by one, corpus.json last: the folder may hold files of an earlier tinygpt that was
        # interrupted, or another process may write the same tokens at the same time.
        directory.mkdir(exist_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == MANIFEST):
            path.replace(directory / path.name)
    return open_corpus(directory, sentence_pairs)


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
        return (TextChunk(text, True) for text in documents(split))

    first = {split: list(itertools.islice(documents(split), 100)) for split in SPLIT_SIZES}
    return DatasetSplits(
        splits={split: functools.partial(read, split) for split in SPLIT_SIZES},
        identity=[KNOWN_TRUTH, SPLIT_SIZES, first],
        name="known-truth: documents of a hidden Markov model",
    )


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
    pending: dict[str, list[TextChunk]] = defaultdict(list)

    def flush() -> None:
        for split, chunks in pending.items():
            writer.write(split, chunks)
        pending.clear()

    with tqdm(
        total=size, desc="tokenizing", unit="B", unit_scale=True, delay=1, leave=False, disable=None
    ) as progress:
        characters = 0
        for split, chunk in documents:
            pending[split].append(chunk)
            characters += len(chunk.text)
            if characters >= WRITE_CHARS:
                flush()
                progress.update(
                    sum(counts["bytes"] for counts in writer.counts.values()) - progress.n
                )
                characters = 0
        flush()


@contextlib.contextmanager
def _cache_writes() -> Iterator[Path]:
    """Yield a temporary directory in the cache; what is not moved out of it is removed."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="part-", dir=cache_dir()) as temporary:
        yield Path(temporary)
