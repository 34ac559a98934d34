r"""Local files as streams of documents: text, JSON, CSV and Parquet.

A .txt file is one document, with its line ends read as `\n`; in other formats each row is one, as
text or as a sentence pair. Files are streamed: nothing is copied, and memory does not grow with
their size.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa

from tokenizer import decode_utf8
from training.data.corpus import TextChunk
from training.data.sources import DatasetSplits, Source

FORMATS = {"txt": "text", "jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
"""The `datasets` builder of each file extension."""
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
SUPPORTED_FILES = (
    ".txt, .jsonl, .json, .csv or .parquet, optionally followed by .gz, .bz2, .xz or .zst"
)

CHUNK_CHARS = 2**20
"""Characters of a `.txt` file that are read at once."""
SAFE_CUT = re.compile(r".*(?:\S\n(?=\S)|[^\W_](?=\s))", re.DOTALL)
"""Text up to the last position where a cut changes no token: before a line that is not indented,
or after a word."""

TRANSLATION_COLUMN = "translation"
"""The column of sentence pairs, as translation datasets on the hub name it."""
EXAMPLE_PAIR = '{"translation": {"en": "A dog runs.", "fr": "Un chien court."}}'
"""A row with a sentence pair, for error messages."""

RowReader = Callable[[Iterable[pa.Table], str], Iterator[TextChunk]]
"""Converts tables into documents; the second argument names the tables in error messages."""

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
        str(name): sorted(paths.intersection(split_files))
        for name, split_files in builder.config.data_files.items()
    }
    if unassigned := paths.difference(*splits.values()):
        raise ValueError(
            f"{source.data}: {Path(min(unassigned)).name} belongs to no split by its name, but "
            f"others do ({', '.join(splits)}): rename it, or give one file as --data"
        )
    splits = {name: split_files for name, split_files in splits.items() if split_files}
    return open_files(source, rows, file_format, splits)


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
    for file in files:
        if file_format == "text":
            yield from _read_text_file(file)
        else:
            yield from rows(_file_tables(file_format, file), file)


def _read_text_file(file: str) -> Iterator[TextChunk]:
    """Yield one document in chunks whose tokens are those of the whole."""
    with (
        _locate_errors("text", file),
        fsspec.open(file, "r", encoding="utf-8", compression="infer") as stream,
    ):
        text, starts_document = stream.read(CHUNK_CHARS), True
        while text:
            following = stream.read(CHUNK_CHARS)
            match = SAFE_CUT.match(text) if following else None
            cut = match.end() if match else len(text)
            yield TextChunk(text[:cut], starts_document)
            text, starts_document = text[cut:] + following, False


def _file_tables(file_format: str, file: str) -> Iterator[pa.Table]:
    # pandas would read the strings "NA", "None" and "null" as missing values.
    options: dict[str, Any] = {"keep_default_na": False} if file_format == "csv" else {}
    with _locate_errors(file_format, file):
        yield from iter_tables(
            datasets.load_dataset(
                file_format, data_files=file, split="train", streaming=True, **options
            )
        )


def iter_tables(dataset: datasets.IterableDataset | datasets.Dataset) -> Iterator[pa.Table]:
    """Yield the rows of a dataset, some at a time."""
    for table in dataset.with_format("arrow").iter(batch_size=100):
        table.validate(full=True)  # A JSON or Parquet file can hold strings that are not UTF-8.
        yield table


@contextlib.contextmanager
def _locate_errors(file_format: str, file: str) -> Iterator[None]:
    """Raise any error as a ValueError that names the file and, if possible, the line."""
    try:
        yield
    except Exception as error:
        reason = error_reason(error)
        try:
            if file_format != "parquet":
                _check_lines(file_format, file)
        except Exception as line_error:
            reason = error_reason(line_error)
        raise ValueError(reason if reason.startswith(file) else f"{file}: {reason}") from error


def _check_lines(file_format: str, file: str) -> None:
    """Raise a ValueError for the first line that is not UTF-8 or, in a JSON file, not JSON."""
    with fsspec.open(file, "rb", compression="infer") as stream:
        for number, line in enumerate(stream, 1):
            text = decode_utf8(line, file, number)
            if file_format != "json" or not text.strip():
                continue
            try:
                if not isinstance(json.loads(text), dict) and number > 1:
                    raise ValueError(f"{file}, line {number}: expected an object in braces")
            except json.JSONDecodeError as error:
                if number > 1:
                    raise ValueError(f"{file}, line {number}: not JSON: {error.msg}") from None
                break  # The file may be one value that spans many lines.
        else:
            return
        try:
            json.loads(decode_utf8(line + stream.read(), file))
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


def read_texts(column: str | None, tables: Iterable[pa.Table], name: str) -> Iterator[TextChunk]:
    """Yield one document for each row with text."""
    text_column = None
    for table in tables:
        text_column = text_column or _text_column(table.schema, column, name)
        yield from (TextChunk(text, True) for text in table[text_column].to_pylist() if text)


def _text_column(schema: pa.Schema, column: str | None, name: str) -> str:
    """Return the column to read: `column`, else "text", else the only column of strings."""
    strings = [f.name for f in schema if f.type in (pa.string(), pa.large_string())]
    listed = _describe_columns(schema)
    if column is not None:
        if column not in strings:
            raise ValueError(f"{name} has no column {column!r} of strings, only: {listed}")
        return column
    if "text" in strings:
        return "text"
    if not strings and TRANSLATION_COLUMN in schema.names:
        raise ValueError(f"{name} holds sentence pairs, not text: use --task translation")
    if len(strings) != 1:
        raise ValueError(
            f"{name}: which column is the text? Choose with --text-column among: {listed}"
        )
    return strings[0]


def _describe_columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


class SentencePairs:
    """A `RowReader` of sentence pairs."""

    languages: tuple[str, str] | None = None
    """Source and target language; those of the first row if the source does not name them."""

    def __init__(self, source: Source) -> None:
        self.column = source.column or TRANSLATION_COLUMN
        if source.languages is not None:
            names = source.languages.split("-")
            if len(names) != 2 or not all(names) or names[0] == names[1]:
                raise ValueError(
                    f"--languages must be two names like en-fr, not {source.languages!r}"
                )
            self.languages = names[0], names[1]

    def __call__(self, tables: Iterable[pa.Table], name: str) -> Iterator[TextChunk]:
        """Yield a sentence pair for each row; a ValueError names a row where a side is missing."""
        rows_before = 0
        for table in tables:
            if self.column not in table.column_names:
                raise ValueError(
                    f"{name}: no column {self.column!r} of sentence pairs, only: "
                    f"{_describe_columns(table.schema)}; expected rows like {EXAMPLE_PAIR}"
                )
            arrow_type = table.schema.field(self.column).type
            for number, value in enumerate(table[self.column].to_pylist(), rows_before + 1):
                yield self._read_pair(_decode(value, arrow_type), f"{name}, row {number}")
            rows_before += table.num_rows

    def _read_pair(self, row: object, location: str) -> TextChunk:
        if not isinstance(row, dict):
            raise ValueError(f"{location}: no sentence pair: expected a row like {EXAMPLE_PAIR}")
        sentences = {k: v for k, v in row.items() if isinstance(v, str) and v.strip()}
        present = ", ".join(sentences) or "none"
        if self.languages is None:
            if len(row) < 2:
                raise ValueError(
                    f"{location}: expected two languages, found {present}; expected a row like "
                    f"{EXAMPLE_PAIR}"
                )
            first, second, *_ = row
            self.languages = first, second
        for language in self.languages:
            if language not in sentences:
                raise ValueError(
                    f"{location}: no {language!r} sentence, only {present}: add it, leave the row "
                    "out, or choose two other languages with --languages"
                )
        source, target = (sentences[language] for language in self.languages)
        return TextChunk(source, True, target)


def _decode(value: Any, arrow_type: pa.DataType) -> Any:  # noqa: ANN401 (a JSON value)
    """Decode a value of a column: `datasets` keeps as JSON text what has no one type in all rows."""
    if value is not None and isinstance(arrow_type, pa.JsonType):
        return json.loads(value)
    if value is not None and isinstance(arrow_type, pa.StructType):
        return {field.name: _decode(value[field.name], field.type) for field in arrow_type}
    return value
