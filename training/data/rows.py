"""What of a row is read: a text, or a sentence pair, from one column.

Rows come from local files (`files.py`) and from datasets on the hub (`hub.py`).
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import pyarrow as pa

from training.data.corpus import TextChunk
from training.data.sources import ReadReport, Source

SAMPLE_ROWS = 100
"""Rows of a CSV or JSON file from which the types of its columns are inferred; rows of one batch of
Parquet."""
TRANSLATION_COLUMN = "translation"
"""The column of sentence pairs, as translation datasets on the hub name it."""
EXAMPLE_PAIR = '{"translation": {"en": "A dog runs.", "fr": "Un chien court."}}'
"""A row with a sentence pair, for error messages."""
JSON_TYPES = {
    str: "string",
    bool: "boolean",
    int: "number",
    float: "number",
    list: "array",
    dict: "object",
}
"""JSON's names of Python's types."""
Columns = dict[str, str]
"""Column names with the types of their values: "string", "number", "null or string", …"""


class RowReader(Protocol):
    """Reads one column of each row as a document or a sentence pair."""

    def choose_column(self, columns: Columns, name: str) -> str:
        """Return the column to read; a ValueError names the data and its columns."""

    def read(self, value: Any) -> TextChunk | None:  # noqa: ANN401 (a JSON value)
        """Convert a value of that column; None if it is blank. A ValueError tells what is wrong."""


def read_rows(
    values: Iterable[tuple[str, Any]], rows: RowReader, name: str, report: ReadReport
) -> Iterator[TextChunk]:
    """Yield a document or sentence pair for each value that is not blank; count those that are.

    A value comes with its location in the data called `name`, for error messages.
    """
    num_blank = 0
    try:
        for location, value in values:
            try:
                chunk = rows.read(value)
            except ValueError as error:
                raise ValueError(f"{name}, {location}: {error}") from None
            if chunk is None:
                num_blank += 1
            else:
                yield chunk
    finally:
        report.blank_rows[name] = num_blank


def table_values(
    tables: Iterable[pa.Table | pa.RecordBatch], rows: RowReader, name: str
) -> Iterator[tuple[str, Any]]:
    """Yield the values of the column to read, with their locations in the data called `name`."""
    number, column = 0, None
    for table in tables:
        column = column or rows.choose_column(arrow_columns(table.schema), name)
        values = table[column]
        values.validate(full=True)  # A Parquet file can hold strings that are not UTF-8.
        for value in values.to_pylist():
            number += 1
            yield f"row {number}", _decode(value, values.type)


def arrow_columns(schema: pa.Schema) -> Columns:
    """Return the columns of an Arrow table."""
    return {field.name: _arrow_type(field.type) for field in schema}


def _arrow_type(arrow_type: pa.DataType) -> str:
    if pa.types.is_dictionary(arrow_type):
        return _arrow_type(arrow_type.value_type)
    is_string = arrow_type in (pa.string(), pa.large_string(), pa.string_view())
    return "string" if is_string else str(arrow_type)


def _decode(value: Any, arrow_type: pa.DataType) -> Any:  # noqa: ANN401 (a JSON value)
    """Decode a value of a column: `datasets` keeps as JSON text what has no one type in all rows."""
    if value is not None and isinstance(arrow_type, pa.JsonType):
        return json.loads(value)
    if value is not None and isinstance(arrow_type, pa.StructType):
        return {field.name: _decode(value[field.name], field.type) for field in arrow_type}
    return value


class Texts:
    """A `RowReader` of text."""

    def __init__(self, source: Source) -> None:
        self.column = source.column
        self.guessed_column = ""
        """The column that is read although neither an option nor its name says so."""

    def choose_column(self, columns: Columns, name: str) -> str:
        """Return the column to read: `--text-column`, else "text", else the only one of strings."""
        strings = [column for column, kind in columns.items() if "string" in kind.split(" or ")]
        listed = _describe_columns(columns)
        named = self.column or "text"
        if named in strings or columns.get(named) == "null":
            return named
        if self.column is not None:
            raise ValueError(f"{name} has no column {named!r} of strings, only: {listed}")
        if named in columns:
            raise ValueError(
                f"{name}: its column 'text' does not hold strings: write them in double quotes, or "
                f"choose another column with --text-column among: {listed}"
            )
        if not strings and TRANSLATION_COLUMN in columns:
            raise ValueError(f"{name} holds sentence pairs, not text: use --task translation")
        if len(strings) != 1:
            raise ValueError(
                f"{name}: which column is the text? Choose with --text-column among: {listed}"
            )
        self.guessed_column = strings[0]
        return self.guessed_column

    def read(self, value: Any) -> TextChunk | None:  # noqa: ANN401 (a JSON value)
        """Return the text as a document; None if it is missing or only white space."""
        if value is None:
            return None
        if not isinstance(value, str):
            shown = json.dumps(value, ensure_ascii=False)
            kind = JSON_TYPES[type(value)]
            raise ValueError(
                f"the text is {'an' if kind[0] in 'ao' else 'a'} {kind}, {shown[:40]}: write it as "
                "a string in double quotes, leave the row out, or choose another --text-column"
            )
        value.encode()  # A ValueError for half of a surrogate pair, which JSON can spell.
        return TextChunk(value, True) if value and not value.isspace() else None


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

    def choose_column(self, columns: Columns, name: str) -> str:
        """Return the column to read."""
        if self.column not in columns:
            raise ValueError(
                f"{name}: no column {self.column!r} of sentence pairs, only: "
                f"{_describe_columns(columns)}; expected rows like {EXAMPLE_PAIR}"
            )
        return self.column

    def read(self, row: Any) -> TextChunk:  # noqa: ANN401 (a JSON value)
        """Return the sentence pair; a ValueError if a side is missing."""
        if not isinstance(row, dict):
            raise ValueError(f"no sentence pair: expected a row like {EXAMPLE_PAIR}")
        sentences = {k: v for k, v in row.items() if isinstance(v, str) and v.strip()}
        present = ", ".join(sentences) or "none"
        if self.languages is None:
            if len(row) < 2:
                raise ValueError(
                    f"expected two languages, found {present}; expected a row like {EXAMPLE_PAIR}"
                )
            first, second, *_ = row
            self.languages = first, second
        for language in self.languages:
            if language not in sentences:
                raise ValueError(
                    f"no {language!r} sentence, only {present}: add it, leave the row "
                    "out, or choose two other languages with --languages"
                )
        source, target = (sentences[language] for language in self.languages)
        return TextChunk(source, True, target)


def _describe_columns(columns: Columns) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())
