"""Conversion of table rows into documents: rows of text, and rows of sentence pairs."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from training.data.corpus import TextChunk
from training.data.sources import Source

RowReader = Callable[[Iterable[pa.Table], str], Iterator[TextChunk]]
"""Converts tables into documents; the second argument names the tables in error messages."""

TRANSLATION_COLUMN = "translation"
"""The column of sentence pairs, as translation datasets on the hub name it."""
EXAMPLE_PAIR = '{"translation": {"en": "A dog runs.", "fr": "Un chien court."}}'
"""A row with a sentence pair, for error messages."""


def read_text_rows(
    column: str | None, tables: Iterable[pa.Table], name: str
) -> Iterator[TextChunk]:
    """Yield one document for each row with text."""
    text_column = None
    for table in tables:
        text_column = text_column or _text_column(table.schema, column, name)
        yield from (TextChunk(text, True) for text in table[text_column].to_pylist() if text)


def _text_column(schema: pa.Schema, column: str | None, name: str) -> str:
    """Return the column to read: `column`, else "text", else the only column of strings."""
    string_columns = [
        field.name
        for field in schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    ]
    listed = _describe_columns(schema)
    if column is not None:
        if column not in string_columns:
            raise ValueError(f"{name} has no column {column!r} of strings, only: {listed}")
        return column
    if "text" in string_columns:
        return "text"
    if not string_columns and TRANSLATION_COLUMN in schema.names:
        raise ValueError(f"{name} holds sentence pairs, not text: use --task translation")
    if len(string_columns) != 1:
        raise ValueError(
            f"{name}: which column is the text? Choose with --text-column among: {listed}"
        )
    return string_columns[0]


def _describe_columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


class SentencePairs:
    """A `RowReader` of sentence pairs.

    Attributes:
        languages: Source and target language; None until the first row is read if the source
            does not name them.
    """

    def __init__(self, source: Source) -> None:
        self.column = source.column or TRANSLATION_COLUMN
        self.languages: tuple[str, str] | None = None
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
        sentences = {
            language: text
            for language, text in row.items()
            if isinstance(text, str) and text.strip()
        }
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
    if value is None:
        return None
    if isinstance(arrow_type, pa.JsonType):
        return json.loads(value)
    if isinstance(arrow_type, pa.StructType):
        return {field.name: _decode(value[field.name], field.type) for field in arrow_type}
    return value
