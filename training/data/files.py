r"""Local files as streams of documents: text, JSON, CSV and Parquet, read by `datasets`.

A .txt file is one document, with its line ends read as `\n`; in other formats each row is one.
Files are streamed: nothing is copied, and memory does not grow with their size.
"""

import functools
import importlib.util
import itertools
import json
import logging
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa

from tokenizer import decode_utf8
from training.data.corpus import TextChunk
from training.data.rows import EXAMPLE_PAIR, RowReader, SentencePairs
from training.data.sources import DatasetSplits, Source

FORMATS = {"txt": "text", "jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
"""The `datasets` builder of each file extension."""
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
SUPPORTED_FILES = (
    ".txt, .jsonl, .json, .csv or .parquet, optionally followed by .gz, .bz2, .xz or .zst"
)

BUILDER_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"sample_by": "document"},
    # pandas would read the strings "NA", "None" and "null" as missing values.
    "csv": {"keep_default_na": False},
}
"""Options with which the builders return text unchanged."""

MAX_WHOLE_FILE_BYTES = 16_000_000
"""Read `.txt` files up to this many bytes in one piece."""
MIN_CHUNK_CHARS = 2**18
"""Characters of a larger `.txt` file that are collected before a safe cut is looked for."""
MAX_CHUNK_CHARS = 2**22
"""Characters after which it is cut anywhere."""
SAFE_CUT = re.compile(r".*\S\n(?=\S)", re.DOTALL)
"""Text up to the last position where a cut changes no token: before a line that is not indented."""

# By default every load of a local file contacts a server, which takes seconds without a network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
datasets.disable_progress_bars()
datasets.logging.set_verbosity(logging.CRITICAL)
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def detect_format(path: Path) -> str | None:
    """Return the `datasets` builder for a file by its extension, or None if it is not supported."""
    extensions = path.name.lower().split(".")[1:]
    if extensions and extensions[-1] in COMPRESSIONS:
        extensions.pop()
    return FORMATS.get(extensions[-1]) if extensions else None


def open_folder(source: Source, rows: RowReader, folder: Path) -> DatasetSplits:
    """Return the files of a folder in splits, by the naming rules of `datasets`."""
    _refuse_glob_patterns(str(folder))
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        and not path.name.upper().startswith(("README", "LICENSE"))
    ]
    formats = {detect_format(path) for path in files}
    if len(formats) != 1 or None in formats:
        extensions = Counter("".join(path.suffixes[-2:]) or path.name for path in files)
        listed = ", ".join(f"{count} {name}" for name, count in extensions.most_common(8))
        if formats <= {None}:
            raise ValueError(
                f"{source.data}: no text in this folder ({listed or 'empty'}); "
                f"expected {SUPPORTED_FILES}"
            )
        raise ValueError(
            f"{source.data} mixes file types ({listed}): name one of the files, or keep one type"
        )
    file_format = str(formats.pop())
    builder = datasets.load_dataset_builder(file_format, data_dir=str(folder))
    paths = set(map(str, files))
    splits = {
        str(name): [file for file in sorted(split_files) if file in paths]
        for name, split_files in builder.config.data_files.items()
    }
    unassigned = paths.difference(*splits.values())
    if unassigned:
        raise ValueError(
            f"{source.data}: {Path(min(unassigned)).name} belongs to no split by its name, but "
            f"others do ({', '.join(splits)}): rename it, or give one file as --data"
        )
    splits = {name: split_files for name, split_files in splits.items() if split_files}
    return open_files(source, rows, file_format, splits)


def open_files(
    source: Source, rows: RowReader, file_format: str, splits: dict[str, list[str]]
) -> DatasetSplits:
    """Return local files of one format as a dataset.

    Args:
        source: The source that they belong to.
        rows: Reader of their rows.
        file_format: A value of `FORMATS`.
        splits: Absolute paths of the files of each split.

    Raises:
        ValueError: An option does not apply to the format, or a path cannot be read.
    """
    if file_format == "text" and isinstance(rows, SentencePairs):
        raise ValueError(
            f"{source.data} is plain text, not sentence pairs: expected a .jsonl, .json or "
            f".parquet file with rows like {EXAMPLE_PAIR}"
        )
    if file_format == "text" and source.column is not None:
        raise ValueError(f"{source.data} is plain text: there is no --text-column to choose")
    files = list(itertools.chain.from_iterable(splits.values()))
    if any(file.endswith(".zst") for file in files) and not importlib.util.find_spec("zstandard"):
        raise ValueError(f"{source.data}: .zst needs one more package: pip install zstandard")
    for file in files:
        _refuse_glob_patterns(file)
    stats = {file: Path(file).stat() for file in files}
    size_is_known = file_format == "text" and not any(file.endswith(COMPRESSIONS) for file in files)
    return DatasetSplits(
        splits={
            name: functools.partial(_read_files, file_format, split_files, rows)
            for name, split_files in splits.items()
        },
        identity=[
            [name, [[file, stats[file].st_size, stats[file].st_mtime_ns] for file in split_files]]
            for name, split_files in splits.items()
        ],
        name=source.data,
        size=sum(stat.st_size for stat in stats.values()) if size_is_known else None,
    )


def _refuse_glob_patterns(path: str) -> None:
    """Raise a ValueError for a path that `datasets` would expand as a pattern, to other files too."""
    if match := re.search(r"[*?[\]]|::", path):
        raise ValueError(f"{path}: {match[0]!r} cannot be in the path of a data file: rename it")


def _read_files(file_format: str, files: Sequence[str], rows: RowReader) -> Iterator[TextChunk]:
    """Yield the documents of local files."""
    if file_format != "text":
        for file in files:
            yield from rows(_file_tables(file_format, [file]), file)
        return
    for is_large, group in itertools.groupby(
        files, key=lambda file: Path(file).stat().st_size > MAX_WHOLE_FILE_BYTES
    ):
        if not is_large:
            yield from rows(_file_tables(file_format, list(group), batch_size=1), files[0])
            continue
        for file in group:
            lines = _file_tables(file_format, [file], 1000, sample_by="line", keep_linebreaks=True)
            yield from _join_lines(lines)


def _join_lines(tables: Iterable[pa.Table]) -> Iterator[TextChunk]:
    """Yield one document in chunks whose tokens are those of the whole."""
    text, starts_document = "", True
    for table in tables:
        text += "".join(table["text"].to_pylist())
        if len(text) > MIN_CHUNK_CHARS:
            match = SAFE_CUT.match(text)
            cut = match.end() if match else len(text) if len(text) > MAX_CHUNK_CHARS else 0
            if cut:
                yield TextChunk(text[:cut], starts_document)
                text, starts_document = text[cut:], False
    if text:
        yield TextChunk(text, starts_document)


def _load(
    file_format: str, files: Sequence[str], **options: str | bool
) -> datasets.IterableDataset:
    """Open local files as a stream of rows; nothing is read yet, and nothing is copied."""
    return datasets.load_dataset(
        file_format,
        data_files=list(files),
        split="train",
        streaming=True,
        **BUILDER_OPTIONS.get(file_format, {}) | options,
    )


def iter_tables(dataset: datasets.IterableDataset, batch_size: int = 100) -> Iterator[pa.Table]:
    """Yield the rows of a dataset, `batch_size` at a time."""
    for table in dataset.with_format("arrow").iter(batch_size=batch_size):
        table.validate(full=True)  # A JSON or Parquet file can hold strings that are not UTF-8.
        yield table


def _file_tables(
    file_format: str, files: Sequence[str], batch_size: int = 100, **options: str | bool
) -> Iterator[pa.Table]:
    """Yield the rows of local files; a ValueError names the file and line of an error."""
    try:
        yield from iter_tables(_load(file_format, files, **options), batch_size)
    except Exception as error:
        raise _locate_error(file_format, files, error) from error


def _locate_error(file_format: str, files: Sequence[str], error: Exception) -> ValueError:
    """Return an error that names the file, and if possible the line, that raised `error`."""
    for file in files:
        try:
            if file_format != "parquet":
                _check_lines(file_format, file)
            deque(iter_tables(_load(file_format, [file])), maxlen=0)
        except Exception as file_error:
            reason = error_reason(file_error)
            return ValueError(reason if reason.startswith(file) else f"{file}: {reason}")
    return ValueError(f"{files[0]}: {error_reason(error)}")


def _check_lines(file_format: str, file: str) -> None:
    """Raise a ValueError for the first line that is not UTF-8 or, in a JSON file, not JSON."""
    with fsspec.open(file, "rb", compression="infer") as lines:
        for number, line in enumerate(lines, 1):
            text = decode_utf8(line, file, number)
            if file_format != "json" or not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                if number == 1:
                    break  # The file may be one value that spans many lines.
                raise ValueError(f"{file}, line {number}: not JSON: {error.msg}") from None
            if number > 1 and not isinstance(value, dict):
                raise ValueError(f"{file}, line {number}: expected an object in braces")
        else:
            return
    with fsspec.open(file, "rb", compression="infer") as stream:
        try:
            json.loads(decode_utf8(stream.read(), file))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from None


def error_cause(error: BaseException) -> BaseException:
    """Return the error that `datasets` wrapped in its generic "error occurred"."""
    if isinstance(error, datasets.exceptions.DatasetBuildError) and error.__cause__:
        return error_cause(error.__cause__)
    return error


def error_reason(error: BaseException) -> str:
    """Return the first line of an error's message."""
    cause = error_cause(error)
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
