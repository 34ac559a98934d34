r"""Text from anywhere, made into prepared tokens: the only file that imports `datasets`.

`prepare` finds the text, makes a validation split where there is none, trains the
tokenizer if asked to, and writes the tokens once into a cache; the next call with the
same data and options opens what is there. Nothing grows with the corpus but its file.

What a document is: a .txt file (its line ends read as `\n`), a source file of the
standard library, a row of anything else. Files are read by streaming, so nothing is
copied; a data set of the hub is downloaded first unless it is to be streamed. Where pairs of
sentences are asked for, a row is two documents: a sentence and its translation.
"""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import platform
import re
import shutil
import sysconfig
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa
from tqdm import tqdm

from gpt.checkpoint import cache_dir
from tokenizer import BPE_PATTERN, Tokenizer, decode_utf8
from training.data.corpus import (
    FORMAT,
    LEARNED,
    MANIFEST,
    Corpus,
    CorpusWriter,
    TextChunk,
    load_given_tokenizer,
    open_corpus,
)

KINDS = {"txt": "text", "jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
"""Endings that are read, and the builder of `datasets` for each."""
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
EXPECTED = ".txt, .jsonl, .json, .csv or .parquet, also with .gz, .bz2, .xz or .zst behind"

OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"sample_by": "document"},
    # Else pandas takes the texts "NA", "None" and "null" for missing.
    "csv": {"keep_default_na": False},
}
"""What the builders need to give back text as it was."""

WHOLE = 16_000_000
"""Bytes up to which a .txt file is read at once; a larger one goes through in pieces."""
TOKENIZER_BYTES = 100_000_000
"""Text that a BPE tokenizer is trained on, at most."""
BATCH = 2**20
"""Characters that are tokenised between two writes."""
LAST_LINE = re.compile(r".*\S\n(?=\S)", re.DOTALL)
"""Up to the last place where a cut changes no token."""
HELD_OUT = 20
"""One document in so many is held out for validation."""
HUB_SECONDS = 4.0
"""How long the hub may take to answer at all."""
PAIR_COLUMN = "translation"
"""The column that holds the pairs; a data set of translations on the hub calls it so."""
PAIR = '{"translation": {"en": "A dog runs.", "fr": "Un chien court."}}'
"""What a row of pairs looks like."""

# Else every reading of a local file first asks a server to count it, for seconds where none answers.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
datasets.disable_progress_bars()
datasets.logging.set_verbosity(logging.CRITICAL)
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Source:
    """Where text comes from."""

    data: str = "stdlib"
    """`stdlib`, prepared tokens, a file, a folder, or the name of a data set on the hub."""
    config: str | None = None
    """Which configuration of a hub data set."""
    split: str | None = None
    """The one split to read."""
    column: str | None = None
    """The column that holds the text; else "text", else the only one of strings."""
    streaming: bool = False
    """Read a hub data set as it arrives, and keep no copy."""
    limit: int | None = None
    """Read at most so many bytes of text of each split."""
    languages: str | None = None
    """Of pairs: from which to which, like "en-fr"; else the first two, in the data's own order."""


Rows = Callable[[Iterable[pa.Table], str], Iterator[TextChunk]]
"""Makes documents of the rows of a file, whose name is for complaints."""
Parts = Callable[[], Iterator[TextChunk]]
Located = Iterator[tuple[str, TextChunk]]


@dataclass(frozen=True)
class Found:
    """What a source turned out to be."""

    splits: dict[str, Parts]
    identity: Any
    """Different for different data: part of the key of the cache."""
    name: str
    size: int | None = None
    """Bytes of text, if known before reading."""
    held_out: str = ""
    """How its validation split came to be, if that was not the data's own doing."""


def prepare(
    source: Source,
    tokenizer: str | Tokenizer,
    vocabulary: int,
    hold_out: bool = True,
    pairs: bool = False,
) -> Corpus:
    """Open the prepared tokens of a source, made now if they are not in the cache.

    Args:
        source: Where the text comes from.
        tokenizer: "bpe", "words" or "characters" to train one on the training split, "bytes",
            the path of a tokenizer.json or of a run directory, or a tokenizer.
        vocabulary: Ids of a tokenizer that is trained.
        hold_out: Make a validation split if there is none; else take the splits as found.
        pairs: Rows are pairs of sentences rather than text.

    Raises:
        ValueError: The data is absent, unreachable, unreadable or holds no text, or no pairs.
        OSError: The cache cannot be written, as when the disk is full.
    """
    if source.limit is not None and source.limit < 1:
        raise ValueError(f"--data-limit must be at least one byte, not {source.limit}")
    if source.languages is not None and not pairs:
        raise ValueError("--languages goes with pairs of sentences, not with text: leave it out")
    given = load_given_tokenizer(tokenizer)
    if (Path(source.data).expanduser() / MANIFEST).is_file() and source.data:
        return _prepared(source, given, pairs)
    reader = _Pairs(source) if pairs else None
    found = _find(source, reader or functools.partial(_rows, source.column))
    if source.limit is not None:
        found = _limited(found, source.limit)
    options = {**asdict(source), "data": found.identity, "hold_out": hold_out}
    if not pairs:
        del options["languages"]
    recipe = given.fingerprint if given else [tokenizer, vocabulary, BPE_PATTERN, TOKENIZER_BYTES]
    identity = json.dumps([FORMAT, options, recipe])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", Path(source.data).name)[:40]
    directory = cache_dir() / f"{name}-{key}"
    if not (directory / MANIFEST).is_file():
        located, rule = _arranged(source, found, hold_out)
        with _whole_or_absent(directory) as beside:
            made = given or _trained(source, located, LEARNED[str(tokenizer)], vocabulary)
            writer = CorpusWriter(beside, made)
            _tokenise(located(), writer, found.size)
            for split in ("train", "validation") if hold_out else ():
                if split not in writer.counts:
                    raise ValueError(f"{source.data}: too little text, none for the {split} split")
            if not writer.counts:
                raise ValueError(f"{source.data}: there is no text in it")
            capped = not given and writer.counts["train"].bytes > TOKENIZER_BYTES
            description = (
                found.name
                + f", split {source.split}" * bool(source.split)
                + f"; validation: {rule}" * bool(rule)
                + f"; tokenizer: trained on the first {TOKENIZER_BYTES:,} bytes" * capped
            )
            writer.close(description, reader.languages if reader else None)
    return open_corpus(directory, pairs)


def _prepared(source: Source, tokenizer: Tokenizer | None, pairs: bool) -> Corpus:
    """Tokens that the user prepared before, as they are."""
    if source != Source(source.data):
        raise ValueError(
            f"{source.data} holds prepared tokens, which are used as they are: only --data and "
            "--tokenizer go with them"
        )
    corpus = open_corpus(Path(source.data).expanduser(), pairs)
    if tokenizer and tokenizer.fingerprint != corpus.tokenizer.fingerprint:
        raise ValueError(
            f"{source.data} was tokenised by another tokenizer than the one given: leave out "
            "--tokenizer, or give the text itself as --data"
        )
    return corpus


# Where the text is


def _find(source: Source, rows: Rows) -> Found:
    """Follow the order in the README: stdlib, a file, a folder, a mistyped path, the hub."""
    data = source.data
    path = Path(data).expanduser()
    if data == "stdlib":
        found = _stdlib(source, rows)
    elif data and path.is_file():
        if not (kind := _kind(path)):
            raise ValueError(f"{data}: not a kind of file that is read; expected {EXPECTED}")
        found = _files(source, rows, kind, {"train": [str(path.resolve())]})
    elif data and path.is_dir():
        found = _folder(source, rows, path.resolve())
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", data) or _kind(path):
        raise ValueError(f"{data}: no such file or folder")
    else:
        return _hub(source, rows)
    if source.config is not None:
        raise ValueError(f"--data-config chooses among those of a hub data set; {data} has none")
    return replace(found, splits=_chosen(source, found.splits))


def _chosen(source: Source, splits: dict[str, Parts]) -> dict[str, Parts]:
    """The splits, or only the one asked for."""
    if source.split is None:
        return splits
    if source.split not in splits:
        raise ValueError(
            f"{source.data} has no split {source.split!r}; --data-split can be {', '.join(splits)}"
        )
    return {source.split: splits[source.split]}


def _kind(path: Path) -> str | None:
    """The builder that reads a file, by its ending."""
    endings = path.name.lower().split(".")[1:]
    if endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    return KINDS.get(endings[-1]) if endings else None


def _stdlib(source: Source, rows: Rows) -> Found:
    """The sources of the Python that runs this, without their tests."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if left_out.isdisjoint(place.parts) and _is_utf8(path):
            splits[_side(place.as_posix())].append(str(path))
    if not all(splits.values()):
        raise ValueError(f"the standard library's sources are not in {root}: give text as --data")
    found = _files(source, rows, "text", splits)
    name = f"standard library of Python {platform.python_version()}"
    return replace(found, name=name, held_out=f"one file in {HELD_OUT}, by a hash of its path")


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _folder(source: Source, rows: Rows, folder: Path) -> Found:
    """A folder's files, in splits by `datasets`' own rules of naming."""
    _refuse_patterns(str(folder))
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        and not path.name.upper().startswith(("README", "LICENSE"))
    ]
    kinds = {_kind(path) for path in files}
    if len(kinds) != 1 or None in kinds:
        endings = Counter("".join(path.suffixes[-2:]) or path.name for path in files)
        listed = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(8))
        if kinds <= {None}:
            raise ValueError(
                f"{source.data}: no text in this folder ({listed or 'empty'}); expected {EXPECTED}"
            )
        raise ValueError(
            f"{source.data} mixes kinds of files ({listed}): name one of them, or leave one kind"
        )
    kind = str(kinds.pop())
    builder = datasets.load_dataset_builder(kind, data_dir=str(folder))
    wanted = set(map(str, files))
    splits = {
        str(name): [file for file in sorted(chosen) if file in wanted]
        for name, chosen in builder.config.data_files.items()
    }
    unread = wanted.difference(*splits.values())
    if unread:
        raise ValueError(
            f"{source.data}: {Path(min(unread)).name} belongs to no split by its name, but others "
            f"do ({', '.join(splits)}): rename it, or give one file as --data"
        )
    return _files(source, rows, kind, {name: chosen for name, chosen in splits.items() if chosen})


def _refuse_patterns(path: str) -> None:
    """Refuse what `datasets` would read as a pattern, and so perhaps read other files for."""
    if found := re.search(r"[*?[\]]|::", path):
        raise ValueError(f"{path}: {found[0]!r} cannot be in the path of a data file: rename it")


def _files(source: Source, rows: Rows, kind: str, splits: dict[str, list[str]]) -> Found:
    """Local files of one kind."""
    if kind == "text" and isinstance(rows, _Pairs):
        raise ValueError(
            f"{source.data} is plain text, not pairs of sentences: expected a .jsonl, .json or "
            f".parquet file with rows like {PAIR}"
        )
    if kind == "text" and source.column is not None:
        raise ValueError(f"{source.data} is plain text: there is no --text-column to choose")
    zipped = any(Path(file).suffix == ".zst" for files in splits.values() for file in files)
    if zipped and not importlib.util.find_spec("zstandard"):
        raise ValueError(f"{source.data}: .zst needs one more package: pip install zstandard")
    for file in itertools.chain.from_iterable(splits.values()):
        _refuse_patterns(file)
    stats = {file: Path(file).stat() for files in splits.values() for file in files}
    compressed = any(file.endswith(COMPRESSIONS) for file in stats)
    return Found(
        splits={
            name: functools.partial(_read_files, kind, files, rows)
            for name, files in splits.items()
        },
        identity=[
            [name, [[file, stats[file].st_size, stats[file].st_mtime_ns] for file in files]]
            for name, files in splits.items()
        ],
        name=source.data,
        size=None if compressed or kind != "text" else sum(s.st_size for s in stats.values()),
    )


def _hub(source: Source, rows: Rows) -> Found:
    """A data set of the hub."""
    name = source.data
    builder = _builder(source)
    files = builder.config.data_files or builder.info.splits or {}

    @functools.cache
    def load(split: str) -> datasets.IterableDataset | datasets.Dataset:
        if source.streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)

    def read(split: str) -> Iterator[TextChunk]:
        yield from rows(_hub_tables(lambda: load(split), name), f"{name}, split {split}")

    splits: dict[str, Parts] = {str(split): functools.partial(read, str(split)) for split in files}
    return Found(
        splits=_chosen(source, splits),
        identity=["hub", name, builder.config.name, builder.hash],
        name=name + (f" ({source.config})" if source.config else ""),
    )


def _hub_tables(load: Callable[[], Any], name: str) -> Iterator[pa.Table]:
    """The rows of a split, downloaded now or as they are read."""
    try:
        yield from _tables(load())
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, OSError) and cause.errno:
            raise cause from error
        raise ValueError(f"{name}: {_reason(error)}") from error


def _builder(source: Source) -> datasets.DatasetBuilder:
    """The builder of a hub data set, which knows its files but has downloaded none."""
    name, config = source.data, source.config
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        _reach_hub(name)
    try:
        builder = datasets.load_dataset_builder(name, config)
        # In `datasets` a line is a document, without its end; here a file is one.
        return builder if builder.name != "text" else _text_builder(name, config)
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            raise ValueError(
                f"{name} is a gated data set: accept its terms on its page, then `hf auth login`"
            ) from None
        raise ValueError(
            f"{name}: no such file or folder, and the hub has no data set of that name "
            "that is open to you"
        ) from None
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no text in this data set: {_reason(error)}") from None
    except ConnectionError:
        raise ValueError(
            f"{name} is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub: unset it, "
            "or give a local file or folder as --data"
        ) from None
    except Exception as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            with contextlib.suppress(Exception):
                return _text_builder(name, config)
        if listed := re.search(r"(?:[Aa]vailable[^\[]*)(\[.*?\])", str(error)):
            raise ValueError(
                f"{name} has several configurations: --data-config can be one of {listed[1]}"
            ) from None
        raise ValueError(f"{name}: {_reason(error)}") from error


def _text_builder(name: str, config: str | None) -> datasets.DatasetBuilder:
    return datasets.load_dataset_builder(name, config, **OPTIONS["text"])


def _reach_hub(name: str) -> None:
    """Refuse within seconds where `datasets` would try for half a minute."""
    endpoint = huggingface_hub.constants.ENDPOINT
    answers: list[object] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            answers.append(huggingface_hub.get_session().head(endpoint, timeout=HUB_SECONDS))

    # A thread, because looking up a name has no deadline of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if not answers:
        raise ValueError(
            f"{name} is no file or folder here, and the hub ({endpoint}) cannot be reached to look "
            "for it: give a local file or folder as --data, or set HF_HUB_OFFLINE=1 if it has been "
            "downloaded before"
        )


# Reading


def _read_files(kind: str, files: Sequence[str], rows: Rows) -> Iterator[TextChunk]:
    """The documents of local files."""
    if kind != "text":
        for file in files:
            yield from rows(_file_tables(kind, [file]), file)
        return
    for large, some in itertools.groupby(files, key=lambda file: Path(file).stat().st_size > WHOLE):
        if not large:
            yield from rows(_file_tables(kind, list(some), size=1), files[0])
            continue
        for file in some:
            tables = _file_tables(kind, [file], 1000, sample_by="line", keep_linebreaks=True)
            yield from _joined_lines(tables)


def _load(kind: str, files: Sequence[str], **options: str | bool) -> datasets.IterableDataset:
    """Local files as a stream of rows: nothing is read yet, nothing will be copied."""
    return datasets.load_dataset(
        kind,
        data_files=list(files),
        split="train",
        streaming=True,
        **OPTIONS.get(kind, {}) | options,
    )


def _tables(dataset: datasets.IterableDataset, size: int = 100) -> Iterator[pa.Table]:
    for table in dataset.with_format("arrow").iter(batch_size=size):
        table.validate(full=True)  # A JSON or parquet file can hold strings that are not UTF-8.
        yield table


def _file_tables(
    kind: str, files: Sequence[str], size: int = 100, **options: str | bool
) -> Iterator[pa.Table]:
    """The rows of local files, some at a time; what is wrong with a file is said with its line."""
    try:
        yield from _tables(_load(kind, files, **options), size)
    except Exception as error:
        raise _complaint(kind, files, error) from error


def _rows(column: str | None, tables: Iterable[pa.Table], name: str) -> Iterator[TextChunk]:
    """One document for each row with text."""
    chosen = None
    for table in tables:
        chosen = chosen or _text_column(table.schema, column, name)
        yield from (TextChunk(text, True) for text in table[chosen].to_pylist() if text)


class _Pairs:
    """Makes a pair of each row; which language to which, the first row read decides if nobody did."""

    def __init__(self, source: Source) -> None:
        self.column = source.column or PAIR_COLUMN
        self.languages: tuple[str, str] | None = None
        if source.languages is not None:
            names = source.languages.split("-")
            if len(names) != 2 or not all(names) or names[0] == names[1]:
                raise ValueError(
                    f"--languages must be two names like en-fr, not {source.languages!r}"
                )
            self.languages = names[0], names[1]

    def __call__(self, tables: Iterable[pa.Table], name: str) -> Iterator[TextChunk]:
        """A pair for each row; a ValueError names the row where a side is missing."""
        before = 0
        for table in tables:
            if self.column not in table.column_names:
                raise ValueError(
                    f"{name}: no column {self.column!r} of pairs, only: {_columns(table.schema)}; "
                    f"expected rows like {PAIR}"
                )
            kind = table.schema.field(self.column).type
            for number, value in enumerate(table[self.column].to_pylist(), before + 1):
                yield self._pair(_decoded(value, kind), f"{name}, row {number}")
            before += table.num_rows

    def _pair(self, sides: object, place: str) -> TextChunk:
        if not isinstance(sides, dict):
            raise ValueError(f"{place}: no pair of sentences: expected a row like {PAIR}")
        texts = {
            language: text
            for language, text in sides.items()
            if isinstance(text, str) and text.strip()
        }
        there = ", ".join(texts) or "nothing"
        if self.languages is None:
            if len(sides) < 2:
                raise ValueError(
                    f"{place}: expected two languages, found {there}, not as in {PAIR}"
                )
            first, second, *_ = sides
            self.languages = first, second
        for language in self.languages:
            if language not in texts:
                raise ValueError(
                    f"{place}: no {language!r} side, only {there}: give it text, leave the row "
                    "out, or choose two others with --languages"
                )
        source, target = (texts[language] for language in self.languages)
        return TextChunk(source, True, target)


def _decoded(value: Any, kind: pa.DataType) -> Any:  # noqa: ANN401 (a JSON value)
    """A value of a column; `datasets` keeps as JSON text what is not of one type in all rows."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if isinstance(kind, pa.StructType):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    return value


def _joined_lines(tables: Iterable[pa.Table]) -> Iterator[TextChunk]:
    """One document in pieces, cut before lines that are not indented: its tokens stay the same."""
    held, begins = "", True
    for table in tables:
        held += "".join(table["text"].to_pylist())
        if len(held) > 2**18:
            cut = LAST_LINE.match(held)
            end = cut.end() if cut else len(held) if len(held) > 2**22 else 0
            if end:
                yield TextChunk(held[:end], begins)
                held, begins = held[end:], False
    if held:
        yield TextChunk(held, begins)


def _text_column(schema: pa.Schema, wanted: str | None, name: str) -> str:
    """The column to read."""
    strings = [
        field.name
        for field in schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    ]
    columns = _columns(schema)
    if wanted is not None:
        if wanted not in strings:
            raise ValueError(f"{name} has no column {wanted!r} of strings, only: {columns}")
        return wanted
    if "text" in strings:
        return "text"
    if not strings and PAIR_COLUMN in schema.names:
        raise ValueError(f"{name} holds pairs of sentences, not text: they are for --task pairs")
    if len(strings) != 1:
        raise ValueError(
            f"{name}: which column is the text? Choose with --text-column among: {columns}"
        )
    return strings[0]


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _complaint(kind: str, files: Sequence[str], error: Exception) -> ValueError:
    """Which of the files it was that gave this error, and if possible in which line."""
    for file in files:
        try:
            if kind != "parquet":
                _check_lines(kind, file)
            deque(_tables(_load(kind, [file])), maxlen=0)
        except Exception as wrong:
            reason = _reason(wrong)
            return ValueError(reason if reason.startswith(file) else f"{file}: {reason}")
    return ValueError(f"{files[0]}: {_reason(error)}")


def _check_lines(kind: str, file: str) -> None:
    """Raise a ValueError for the first line that is not UTF-8, or in a JSON file not JSON."""
    with fsspec.open(file, "rb", compression="infer") as lines:
        for number, line in enumerate(lines, 1):
            text = decode_utf8(line, file, number)
            if kind != "json" or not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                if number == 1:
                    break  # Then it may be one value over many lines.
                raise ValueError(f"{file}, line {number}: not JSON: {error.msg}") from None
            if number > 1 and not isinstance(value, dict):
                raise ValueError(f"{file}, line {number}: expected an object in braces")
        else:
            return
    with fsspec.open(file, "rb", compression="infer") as whole:
        try:
            json.loads(decode_utf8(whole.read(), file))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from None


def _cause(error: BaseException) -> BaseException:
    """What lies behind the bare "error occurred" of `datasets`."""
    hidden = isinstance(error, datasets.exceptions.DatasetBuildError) and error.__cause__
    return _cause(hidden) if hidden else error


def _reason(error: BaseException) -> str:
    """One line."""
    cause = _cause(error)
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


# Splits


def _side(text: str) -> str:
    """The split that a document belongs to, whatever else is in the corpus."""
    digest = hashlib.sha256(text[: 2**16].encode()).digest()
    return "train" if int.from_bytes(digest) % HELD_OUT else "validation"


def _arranged(source: Source, found: Found, hold_out: bool) -> tuple[Callable[[], Located], str]:
    """All documents, each with the split it goes to, and the rule for those held out."""
    splits = found.splits
    if not hold_out:
        return functools.partial(_named, splits), ""
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
    kept: dict[str, Parts] = {
        name: splits[name] for name in ("train", "validation", "test") if name in splits
    }
    if "validation" in kept:
        return functools.partial(_named, kept), found.held_out or "its own"
    divide, rule = _division(source, kept.pop("train"))
    return lambda: itertools.chain(divide(), _named(kept)), rule


def _named(splits: dict[str, Parts]) -> Located:
    for name, parts in splits.items():
        yield from ((name, part) for part in parts())


def _division(source: Source, parts: Parts) -> tuple[Callable[[], Located], str]:
    """Training text divided in two: by a hash of each document, or where they are few, by place."""
    sides, characters, pairs = set(), 0, False
    for part in parts():
        characters += len(part.text)
        pairs = part.target is not None
        if part.begins:
            sides.add(_side(part.text))
        if len(sides) == 2:
            what = (
                "pair in {}, by a hash of its source"
                if pairs
                else "document in {}, by a hash of its text"
            )
            return lambda: _by_hash(parts()), "one " + what.format(HELD_OUT)
    if not characters:
        raise ValueError(f"{source.data}: there is no text in it")
    what = "pairs" if pairs else "characters"
    return lambda: _by_place(parts(), int(0.9 * characters)), f"the last 10% of the {what}"


def _by_hash(parts: Iterable[TextChunk]) -> Located:
    side = "train"
    for part in parts:
        if part.begins:
            side = _side(part.text)
        yield side, part


def _by_place(parts: Iterable[TextChunk], border: int) -> Located:
    """The first `border` characters train; the document that goes on behind it begins anew.

    Of pairs those that end, with their source, before the border.
    """
    for part in parts:
        text, begins, target = part
        cut = max(border, 0)
        if target is not None and cut < len(text):
            cut = 0
        here, there = text[:cut], text[cut:]
        if here:
            yield "train", TextChunk(here, begins, target)
        if there:
            yield "validation", TextChunk(there, begins or border >= 0, target)
        border = border - len(text) if border >= len(text) else -1


def _limited(found: Found, limit: int) -> Found:
    splits: dict[str, Parts] = {
        name: functools.partial(_limit, parts, limit) for name, parts in found.splits.items()
    }
    name = f"{found.name}, at most {limit:,} bytes of each split"
    return replace(found, splits=splits, size=None, name=name)


def _limit(parts: Parts, limit: int) -> Iterator[TextChunk]:
    """Parts of at most `limit` bytes together; a pair is not cut."""
    left = limit
    for text, begins, target in parts():
        cut = text.encode()[:left].decode(errors="ignore")
        left -= len(text.encode()) + len((target or "").encode())
        if cut and (target is None or left >= 0):
            yield TextChunk(cut, begins, target)
        if left <= 0:
            return


# Tokens


def _trained(
    source: Source,
    located: Callable[[], Located],
    learn: Callable[[Iterable[str], int], Tokenizer],
    vocabulary: int,
) -> Tokenizer:
    """A tokenizer learned from the beginning of the training split."""
    parts = (
        document for split, part in located() if split == "train" for document in part.documents()
    )
    texts = (part.text for part in _limit(lambda: parts, TOKENIZER_BYTES))
    if (first := next(texts, None)) is None:
        raise ValueError(f"{source.data}: there is no text in a train split to make a tokenizer of")
    return learn(itertools.chain([first], texts), vocabulary)


def _tokenise(located: Located, writer: CorpusWriter, size: int | None) -> None:
    """Write all documents, some megabytes at a time."""
    with tqdm(
        total=size, desc="tokenising", unit="B", unit_scale=True, delay=1, leave=False, disable=None
    ) as progress:
        held: dict[str, list[TextChunk]] = {}
        characters = 0
        for split, part in located:
            held.setdefault(split, []).append(part)
            characters += len(part.text)
            if characters >= BATCH:
                progress.update(_flush(held, writer))
                characters = 0
        _flush(held, writer)


def _flush(held: dict[str, list[TextChunk]], writer: CorpusWriter) -> int:
    """Write what is held, and hold it no longer; the bytes of its text."""
    size = sum(writer.write(split, parts) for split, parts in held.items())
    held.clear()
    return size


@contextlib.contextmanager
def _whole_or_absent(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` to fill, which then takes its place or is removed."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    for old in directory.parent.glob("*.part-*"):
        if old.stat().st_mtime < time.time() - 24 * 3600:  # Of a process that was killed.
            shutil.rmtree(old, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{directory.name}.part-", dir=directory.parent))
    try:
        yield beside
        try:
            beside.rename(directory)
        except OSError:
            # Not empty: another process was first, and its tokens are the same.
            if not (directory / MANIFEST).is_file():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
