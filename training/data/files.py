r"""Local files as streams of documents: text, JSON, CSV and Parquet.

A .txt file is one document, with its line ends read as `\n`; in other formats each row is one, as
text or as a sentence pair. Of a row only the column with the text is read, so that the others may
hold anything. Files are streamed: nothing is copied, and memory does not grow with their size (but
a .json file that is one value is read at once).
"""

import contextlib
import csv
import functools
import importlib.util
import io
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow.parquet as pq

from tokenizer import decode_utf8
from training.data.corpus import TextChunk
from training.data.rows import (
    EXAMPLE_PAIR,
    JSON_TYPES,
    SAMPLE_ROWS,
    RowReader,
    SentencePairs,
    arrow_columns,
    read_rows,
    table_values,
)
from training.data.sources import DatasetSplits, ReadReport, Source

FORMATS = {"txt": "text", "jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
"""The format of each file extension."""
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
SUPPORTED_FILES = (
    ".txt, .jsonl, .json, .csv or .parquet, optionally followed by .gz, .bz2, .xz or .zst"
)

CHUNK_CHARS = 2**20
"""Characters of a `.txt` file that are read at once."""
SAFE_CUT = re.compile(r".*(?:\S\n(?=\S)|[^\W_](?=\s))", re.DOTALL)
"""Text up to the last position where a cut changes no token: before a line that is not indented,
or after a word."""

Row = tuple[str, dict[str, Any]]
"""A row with its location in the file, such as "line 3"."""

# The library's limit of a CSV field is 128 KiB.
csv.field_size_limit(2**31 - 1)

# By default every load of a local folder contacts a server, which takes seconds without a network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
datasets.disable_progress_bars()
datasets.logging.set_verbosity(logging.CRITICAL)


def detect_format(path: Path) -> str | None:
    """Return the format of a file by its extension, or None if it is not supported."""
    extensions = path.name.lower().split(".")[1:]
    if extensions and extensions[-1] in COMPRESSIONS:
        extensions.pop()
    return FORMATS.get(extensions[-1]) if extensions else None


def open_folder(source: Source, rows: RowReader, folder: Path) -> DatasetSplits:
    """Return the files of a folder in splits, by the naming rules of `datasets`."""
    _refuse_glob_patterns(str(folder))
    files, skipped = _list_folder(folder)
    formats = {detect_format(path) for path in files}
    if len(formats) != 1 or None in formats:
        extensions = Counter("".join(path.suffixes[-2:]) or path.name for path in files)
        listed = ", ".join(f"{count} {name}" for name, count in extensions.most_common(8))
        if formats <= {None}:
            found = "; skipped: ".join(filter(None, [listed or "empty", ", ".join(skipped)]))
            raise ValueError(
                f"{source.data}: no text in this folder ({found}); expected {SUPPORTED_FILES}"
            )
        raise ValueError(
            f"{source.data} mixes file types ({listed}): name one of the files, or keep one type"
        )
    file_format = str(formats.pop())
    builder = datasets.load_dataset_builder("text", data_dir=str(folder))
    paths = set(map(str, files))
    splits = {
        str(name): sorted(paths.intersection(split_files))
        for name, split_files in builder.config.data_files.items()
    }
    if unassigned := paths.difference(*splits.values()):
        raise ValueError(
            f"{source.data}: {Path(min(unassigned)).name} belongs to no split by its name, but "
            f"others do ({', '.join(splits)}): rename it, or give one file as --data"
        )
    splits = {name: split_files for name, split_files in splits.items() if split_files}
    dataset = open_files(source, rows, file_format, splits)
    dataset.report.skipped += skipped
    return dataset


def _list_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the files of a folder, and what a user may miss among them, with the reason.

    Hidden files and README are nobody's text, and not mentioned unless their format is.
    """
    files, skipped = [], []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        is_hidden = any(part.startswith((".", "__")) for part in relative.parts)
        if path.is_symlink() and not path.is_file():
            if not is_hidden:
                kind = "a link to a folder" if path.is_dir() else "a broken link"
                skipped.append(f"{relative} ({kind})")
        elif not path.is_file():
            continue
        elif not is_hidden and not path.name.upper().startswith(("README", "LICENSE")):
            files.append(path)
        elif detect_format(path):
            skipped.append(f"{relative}{' (hidden)' * is_hidden}")
    return files, skipped


def open_files(
    source: Source, rows: RowReader, file_format: str, splits: dict[str, list[str]]
) -> DatasetSplits:
    """Return local files of one format, given as the absolute paths of each split, as a dataset.

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
    files = [file for split_files in splits.values() for file in split_files]
    if any(file.endswith(".zst") for file in files) and not importlib.util.find_spec("zstandard"):
        raise ValueError(f"{source.data}: .zst needs one more package: pip install zstandard")
    for file in files:
        _refuse_glob_patterns(file)
    stats = {file: Path(file).stat() for file in files}
    size_is_known = file_format == "text" and not any(file.endswith(COMPRESSIONS) for file in files)
    report = ReadReport()
    return DatasetSplits(
        splits={
            name: functools.partial(_read_files, file_format, split_files, rows, report)
            for name, split_files in splits.items()
        },
        identity=[
            [name, [[file, stats[file].st_size, stats[file].st_mtime_ns] for file in split_files]]
            for name, split_files in splits.items()
        ],
        name=source.data,
        size=sum(stat.st_size for stat in stats.values()) if size_is_known else None,
        report=report,
    )


def _refuse_glob_patterns(path: str) -> None:
    """Raise a ValueError for a path that `datasets` would expand as a pattern, to other files too."""
    if match := re.search(r"[*?[\]]|::", path):
        raise ValueError(f"{path}: {match[0]!r} cannot be in the path of a data file: rename it")


def _read_files(
    file_format: str, files: Sequence[str], rows: RowReader, report: ReadReport
) -> Iterator[TextChunk]:
    for file in files:
        has_text = False
        with _locate_errors(file):
            if file_format == "text":
                documents = _read_text_file(file)
            else:
                documents = read_rows(VALUES[file_format](file, rows), rows, file, report)
            for chunk in documents:
                has_text = True
                yield chunk
        if not has_text:
            report.blank_files.add(Path(file).name)


def _open_text(file: str, newline: str | None = None) -> contextlib.AbstractContextManager[Any]:
    # utf-8-sig: editors on Windows write a byte order mark, which is no text.
    opened: contextlib.AbstractContextManager[Any] = fsspec.open(
        file, "rt", encoding="utf-8-sig", newline=newline, compression="infer"
    )
    return opened


def _read_text_file(file: str) -> Iterator[TextChunk]:
    """Yield one document in chunks whose tokens are those of the whole; none if it is blank."""
    with _open_text(file) as stream:
        text, starts_document = stream.read(CHUNK_CHARS), True
        while text:
            if "\0" in text:
                _check_bytes(file)
            following = stream.read(CHUNK_CHARS)
            if starts_document and not following and text.isspace():
                return
            match = SAFE_CUT.match(text) if following else None
            cut = match.end() if match else len(text)
            yield TextChunk(text[:cut], starts_document)
            text, starts_document = text[cut:] + following, False


def _csv_rows(file: str) -> Iterator[Row]:
    """Yield the rows of a CSV file; a ValueError names the first line that does not fit the header."""
    with _open_text(file, newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header: list[str] = []
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise ValueError(
                    f"{file}, line {number}: {error}: text in double quotes must end with one, and "
                    "a double quote inside it must be doubled"
                ) from None
            if fields is None:
                return
            if not fields:
                continue  # an empty line
            if any("\0" in field for field in fields):
                _check_bytes(file)
            if not header:
                header = fields
                _check_header(file, header)
            elif len(fields) != len(header):
                raise ValueError(
                    f"{file}, line {number}: {len(fields)} fields, but the header has "
                    f"{len(header)} ({', '.join(header)[:100]}): put text that contains a comma "
                    'between double quotes ("so, like this")'
                )
            else:
                yield f"line {number}", dict(zip(header, fields, strict=True))


def _check_header(file: str, header: list[str]) -> None:
    """Raise a ValueError for a header that does not tell one column from another."""
    if len(header) == 1 and (match := re.search(r"[;\t|]", header[0])):
        raise ValueError(
            f"{file}: its header {header[0]!r} is one column: is the file separated by "
            f"{match[0]!r}? Save it with commas as separators"
        )
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise ValueError(f"{file}: its header names the column {twice[0]!r} twice: rename one")


def _json_rows(file: str) -> Iterator[Row]:
    """Yield the rows of JSON lines, of a JSON list, or of JSON values one after the other."""
    with _open_text(file, newline="\n") as stream:
        is_first = True
        for number, line in enumerate(stream, 1):
            if line.isspace():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                # A first line that only lacks its end begins a value that spans many lines.
                if is_first and error.pos >= len(line.rstrip()):
                    yield from _number_rows(file, _json_values(file, line + stream.read(), number))
                    return
                raise ValueError(f"{file}, line {number}: not JSON: {error.msg}") from None
            if is_first and isinstance(value, list):
                yield from _number_rows(file, [value])
            else:
                yield f"line {number}", _as_row(value, f"{file}, line {number}")
            is_first = False


def _json_values(file: str, text: str, first_line: int) -> Iterator[Any]:
    decoder, end = json.JSONDecoder(), 0
    try:
        while match := re.compile(r"\S").search(text, end):
            value, end = decoder.raw_decode(text, match.start())
            yield value
    except json.JSONDecodeError as error:
        line = first_line - 1 + error.lineno
        raise ValueError(f"{file}, line {line}: not JSON: {error.msg}") from None


def _number_rows(file: str, values: Iterable[Any]) -> Iterator[Row]:
    """Yield the rows in JSON values: a list is as many rows as it has elements."""
    rows = (row for value in values for row in (value if isinstance(value, list) else [value]))
    for number, row in enumerate(rows, 1):
        yield f"row {number}", _as_row(row, f"{file}, row {number}")


def _as_row(value: Any, location: str) -> dict[str, Any]:  # noqa: ANN401 (a JSON value)
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f'{location}: expected an object in braces, such as {{"text": "…"}}')
    return value


def _csv_type(value: str) -> str:
    if not value.strip():
        return "null"
    with contextlib.suppress(ValueError):
        float(value)
        return "number"
    return "string"


def _json_type(value: Any) -> str:  # noqa: ANN401 (a JSON value)
    return "null" if value is None else JSON_TYPES[type(value)]


def _row_values(
    type_of: Callable[[Any], str],
    read_file: Callable[[str], Iterator[Row]],
    file: str,
    rows: RowReader,
) -> Iterator[tuple[str, Any]]:
    """Yield the values of the column to read, which is chosen by the first rows."""
    table = read_file(file)
    first = list(itertools.islice(table, SAMPLE_ROWS))
    if not first:
        return
    types: dict[str, set[str]] = {}
    for _, row in first:
        for name, value in row.items():
            types.setdefault(name, set()).add(type_of(value))
    columns = {
        name: " or ".join(sorted(found - {"null"})) or "null" for name, found in types.items()
    }
    column = rows.choose_column(columns, file)
    for location, row in itertools.chain(first, table):
        yield location, row.get(column)


def _parquet_values(file: str, rows: RowReader) -> Iterator[tuple[str, Any]]:
    if not Path(file).stat().st_size:
        return
    with fsspec.open(file, "rb", compression="infer") as stream:
        # Parquet is read from its end, where not every decompressor can seek to.
        is_compressed = file.endswith(COMPRESSIONS)
        parquet = pq.ParquetFile(io.BytesIO(stream.read()) if is_compressed else stream)
        column = rows.choose_column(arrow_columns(parquet.schema_arrow), file)
        batches = parquet.iter_batches(SAMPLE_ROWS, columns=[column])
        yield from table_values(batches, rows, file)


VALUES: dict[str, Callable[[str, RowReader], Iterator[tuple[str, Any]]]] = {
    "csv": functools.partial(_row_values, _csv_type, _csv_rows),
    "json": functools.partial(_row_values, _json_type, _json_rows),
    "parquet": _parquet_values,
}
"""Readers of a file's column, by format."""


@contextlib.contextmanager
def _locate_errors(file: str) -> Iterator[None]:
    """Raise any error as a ValueError that names the file and, if possible, the line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UnicodeDecodeError):
            _check_bytes(file)
        reason = error_reason(error)
        raise ValueError(reason if reason.startswith(file) else f"{file}: {reason}") from error


def _check_bytes(file: str) -> None:
    """Raise a ValueError for the first byte that is not UTF-8, or NUL, which is in no text."""
    offset = 0
    with fsspec.open(file, "rb", compression="infer") as stream:
        for number, line in enumerate(stream, 1):
            decode_utf8(line, file, number, offset)
            if (position := line.find(b"\0")) >= 0:
                raise ValueError(
                    f"{file}, line {number}: byte 0x00 is not text (at offset {offset + position}); "
                    f"if the file is UTF-16, convert it: iconv -f UTF-16LE -t UTF-8 FILE > NEW; "
                    f"else remove these bytes: tr -d '\\000' < FILE > NEW"
                )
            offset += len(line)


def error_cause(error: BaseException) -> BaseException:
    """Return the error that `datasets` wrapped in its generic "error occurred"."""
    if isinstance(error, datasets.exceptions.DatasetBuildError) and error.__cause__:
        return error_cause(error.__cause__)
    return error


def error_reason(error: BaseException) -> str:
    """Return the first line of an error's message."""
    cause = error_cause(error)
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
