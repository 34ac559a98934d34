import bz2
import csv
import dataclasses
import gzip
import itertools
import json
import lzma
import os
import re
import threading
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tokenizer as tokenizer_module
from tests.corpora import ROWS, STORY, run_python, text_lines
from tokenizer import Tokenizer, byte_tokenizer, train_bpe
from training.config import TrainingConfig
from training.data import files, prepare
from training.data import rows as rows_module
from training.data.corpus import CorpusWriter, TextChunk
from training.data.prepare import prepare_corpus
from training.data.sources import ReadInterrupted, Source, assign_splits, hash_split
from training.tasks.text import load_corpus

pytestmark = pytest.mark.usefixtures("cache")


def prepare_bytes(path, **options):
    return prepare_corpus(Source(str(path), **options), "bytes", 0)


def read_tokens(path, tokenizer="bytes", **options):
    corpus = prepare_corpus(Source(str(path), **options), tokenizer, 300)
    return {name: split.tokens.tolist() for name, split in corpus.splits.items()}


def all_documents(path, **options):
    return list(itertools.chain.from_iterable(read_documents(path, **options).values()))


def read_documents(path, **options):
    """The documents of each split."""
    tokenizer = byte_tokenizer()
    documents = {}
    for name, ids in read_tokens(path, **options).items():
        starts = [i for i, token in enumerate(ids) if token == tokenizer.eos_token]
        ends = [*starts[1:], len(ids)]
        documents[name] = [
            tokenizer.decode(ids[start + 1 : end]) for start, end in zip(starts, ends, strict=True)
        ]
    return documents


def test_last_tenth_of_a_text_file_is_the_validation_split(tmp_path):
    (tmp_path / "a.txt").write_text(STORY, "utf-8")
    border = int(0.9 * len(STORY))
    assert read_documents(tmp_path / "a.txt") == {
        "train": [STORY[:border]],
        "validation": [STORY[border:]],
    }


def test_only_line_ends_are_normalized(tmp_path):
    text = "a\r\nb\rc\n\n\td \x01\x0c\u2028 é👍 <|endoftext|>  \n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    joined = "".join(all_documents(tmp_path / "a.txt"))
    assert joined == text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("opener", [gzip, bz2, lzma])
def test_compressed_files_give_the_same_tokens(tmp_path, opener):
    extension = {gzip: "gz", bz2: "bz2", lzma: "xz"}[opener]
    (tmp_path / "a.txt").write_text(STORY, "utf-8")
    (tmp_path / f"a.txt.{extension}").write_bytes(opener.compress(STORY.encode()))
    assert read_tokens(tmp_path / f"a.txt.{extension}") == read_tokens(tmp_path / "a.txt")


def test_every_format_gives_one_document_per_row(tmp_path):
    rows = [*ROWS, None, ""]
    lines = "".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps([{"text": row} for row in rows], indent=2))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "text"], *([1, row] for row in rows)])
    pq.write_table(pa.table({"text": rows, "n": [1] * len(rows)}), tmp_path / "a.parquet")
    splits = read_documents(tmp_path / "a.jsonl")
    assert sorted(splits["train"] + splits["validation"]) == sorted(ROWS)
    assert 2 <= len(splits["validation"]) <= 25
    for name in ("a.jsonl.gz", "a.json", "a.csv", "a.parquet"):
        assert read_documents(tmp_path / name) == splits


def test_added_documents_do_not_change_which_are_held_out(tmp_path):
    for name, rows in (("a", ROWS[:100]), ("b", ROWS[50:])):
        (tmp_path / f"{name}.jsonl").write_text(text_lines(rows, "t"))
    before, after = read_documents(tmp_path / "a.jsonl"), read_documents(tmp_path / "b.jsonl")
    assert not set(before["validation"]) & set(after["train"])
    assert not set(before["train"]) & set(after["validation"])


def test_csv_does_not_read_na_and_null_as_missing(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "NA\nNone\nnull\n" * 10)
    assert sorted(set(all_documents(tmp_path / "a.csv"))) == ["NA", "None", "null"]


def test_only_the_text_column_is_read(tmp_path):
    """The Pile, for example, has other columns whose type changes late in a file."""
    # `datasets` would take the types of the first 10 MiB for those of all rows.
    rows = [{"text": row, "meta": None, "padding": "x" * 40_000} for row in ROWS * 2]
    rows[350]["meta"] = {"set": "a"}
    rows[360] |= {"meta": "b", "new": [1]}
    rows[370]["meta"] = 7
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sorted(all_documents(tmp_path / "a.jsonl")) == sorted(ROWS * 2)
    assert sorted(all_documents(tmp_path / "a.jsonl", column="text")) == sorted(ROWS * 2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "n,text\n" + "".join(f"{i},b{i} \n" for i in range(60))),
        ("a.csv", "text,\n" + "".join(f'"b{i} ",x\n' for i in range(60))),
        ("a.csv", '\ufefftext\r\n' + "".join(f'"b{i} "\r\n' for i in range(60))),
        ("a.csv", "text\n\n" + "".join(f"b{i} \n\n" for i in range(60))),
        ("a.jsonl", "\ufeff\n" + "".join(f'{{"text": "b{i} "}}\r\n' for i in range(60))),
        ("a.jsonl", "".join(f'"b{i} "\n' for i in range(60))),
        ("a.json", json.dumps([f"b{i} " for i in range(60)])),
        ("a.json", "\n".join(json.dumps({"text": f"b{i} "}, indent=1) for i in range(60))),
    ],
)  # fmt: skip
def test_no_row_is_lost_or_shifted(tmp_path, name, content):
    (tmp_path / name).write_text(content, newline="")
    assert sorted(all_documents(tmp_path / name)) == sorted(f"b{i} " for i in range(60))


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text(STORY, "utf-8-sig")
    assert "".join(all_documents(tmp_path / "a.txt")) == STORY


def test_parquet_columns_that_are_not_text_are_not_read(tmp_path):
    strings = pa.array(ROWS).dictionary_encode()
    table = pa.table({"a.b": strings, "n": [None] * len(ROWS), "image": [b"\xff"] * len(ROWS)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert sorted(all_documents(tmp_path / "a.parquet")) == sorted(ROWS)
    (tmp_path / "a.parquet.xz").write_bytes(lzma.compress((tmp_path / "a.parquet").read_bytes()))
    assert sorted(all_documents(tmp_path / "a.parquet.xz")) == sorted(ROWS)


def test_what_is_left_out_is_counted_in_the_description(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    lines = [{"body": row} for row in [*ROWS, "", " \n", None]] + [{"other": "x"}]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "empty.jsonl").touch()
    (folder / "sub" / "blank.jsonl").write_text('\n{"body": ""}\n')
    (folder / "README.jsonl").write_text('{"body": "x"}')
    (folder / ".hidden.jsonl").write_text('{"body": "x"}')
    (folder / ".hidden.png").touch()
    assert sorted(all_documents(folder)) == sorted(ROWS)
    assert (
        "; text: column 'body'; left out: 5 rows without text, 2 files without text "
        "(blank.jsonl, empty.jsonl), .hidden.jsonl (hidden), README.jsonl; validation: one"
    ) in prepare_bytes(folder).description
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    (folder / ".hidden.jsonl").unlink()
    (folder / "linked.jsonl").symlink_to(folder / "a.jsonl")
    corpus = prepare_bytes(folder)
    assert (
        "README.jsonl, broken.jsonl (a broken link), link (a link to a folder)"
    ) in corpus.description
    assert sum(split.documents for split in corpus.splits.values()) == 2 * len(ROWS)


def test_empty_files_of_every_format_are_skipped(tmp_path):
    pq.write_table(pa.table({"text": ROWS}), tmp_path / "rows.parquet")
    for extension in ("txt", "csv", "jsonl", "json", "parquet", "jsonl.gz"):
        folder = tmp_path / extension
        folder.mkdir()
        (folder / f"a.{extension}").touch()
        (folder / f"c.{extension}").touch()
        full = folder / f"b.{extension}"
        if extension == "parquet":
            (tmp_path / "rows.parquet").rename(full)
        elif extension == "csv":
            full.write_text("text\n" + STORY.replace("\n", " "))
        elif extension == "txt":
            full.write_text(STORY)
        else:
            lines = text_lines(ROWS).encode()
            full.write_bytes(gzip.compress(lines) if "gz" in extension else lines)
        description = prepare_bytes(folder).description
        assert f"2 files without text (a.{extension}, c.{extension})" in description


def test_text_column_selection(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"body": f"b{i}", "title": f"t{i}", "n": i}) + "\n" for i in range(60))
    )
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"--text-column among: body \(string\), title \(string\)"):
        read_documents(path)
    with pytest.raises(ValueError, match=r"no column 'n' of strings, only: .*n \(number\)"):
        read_documents(path, column="n")
    assert "b1" in all_documents(path, column="body")
    (tmp_path / "b.jsonl").write_text('{"body": "x", "n": 1}\n' * 2)
    assert read_documents(tmp_path / "b.jsonl")["train"][0] == "x"


def test_folder_splits_follow_file_names(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text(f"the {name} text\n")
    (folder / "README.md").write_text("about")
    (folder / "LICENSE.txt").write_text("rights")
    (folder / ".hidden.csv").write_text("x")
    assert read_documents(folder) == {
        name: [f"the {file} text\n"]
        for name, file in (("train", "train"), ("validation", "valid"), ("test", "test"))
    }
    assert list(read_documents(folder, split="test")) == ["train", "validation"]
    corpus = prepare_corpus(Source(str(folder), split="test"), "bytes", 0, hold_out=False)
    assert list(corpus.splits) == ["test"]
    with pytest.raises(
        ValueError, match=r"no split 'dev'; --data-split can be train, validation, test"
    ):
        read_documents(folder, split="dev")
    (folder / "notes.txt").write_text("half read?")
    with pytest.raises(ValueError, match=r"notes.txt belongs to no split"):
        read_documents(folder)
    (folder / "notes.txt").unlink()
    (folder / "more.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"mixes file types \(3 .txt, 1 .jsonl\)"):
        read_documents(folder)


def test_folder_without_split_names_is_read_whole(tmp_path):
    folder = tmp_path / "many"
    for i in range(60):
        (folder / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"{i % 3}" / f"{i}.txt").write_text(f"document {i}")
    splits = read_documents(folder)
    assert len(splits["train"]) + len(splits["validation"]) == 60
    assert len(splits["validation"]) < 12


BOOKS = {"I": 900_000, "c": 30_000}
"""Names and characters of files of which the larger one would be held out by its hash."""


def write_books(folder, books):
    folder.mkdir(exist_ok=True)
    for name, length in books.items():
        (folder / f"{name}.txt").write_text(f"{name} " * (length // 2))


def test_long_documents_are_cut_where_a_hash_would_hold_out_too_much(tmp_path):
    books = {name: f"{name} " * (length // 2) for name, length in BOOKS.items()}
    assert [hash_split(text) for text in books.values()] == ["validation", "train"]
    folder = tmp_path / "books"
    write_books(folder, BOOKS)
    splits = read_documents(folder)
    assert splits["train"] == [text[: int(0.9 * len(text))] for text in books.values()]
    assert splits["validation"] == [text[int(0.9 * len(text)) :] for text in books.values()]
    description = prepare_bytes(folder).description
    assert "the last 10% of the characters of each document" in description
    assert "WARNING" not in description
    # Another book changes nothing about the others.
    write_books(folder, {"A": 50_000})
    more = read_documents(folder)
    assert {split: texts[1:] for split, texts in more.items()} == splits


def test_few_short_documents_are_held_out_from_the_end(tmp_path):
    rows = [row for row in ROWS if hash_split(row) == "train"][:20]
    (tmp_path / "a.jsonl").write_text(text_lines(rows))
    splits = read_documents(tmp_path / "a.jsonl")
    assert splits["train"][:18] == rows[:18]
    assert splits["validation"][-1] == rows[-1]
    assert len(splits["validation"]) <= 3


def test_validation_split_of_unexpected_size_is_told(tmp_path, monkeypatch):
    # A book that comes after more documents than are surveyed.
    monkeypatch.setattr("training.data.sources.SURVEYED_DOCUMENTS", 100)
    rows = [*ROWS, "I " * 50_000]
    assert hash_split(rows[-1]) == "validation"
    (tmp_path / "a.jsonl").write_text(text_lines(rows))
    description = prepare_bytes(tmp_path / "a.jsonl").description
    assert re.search(
        r"WARNING: it is 9\d\.\d% of the text; .* start with train and val", description
    )
    (tmp_path / "own").mkdir()
    for name, size in (("train", 100), ("validation", 300)):
        (tmp_path / f"own/{name}.txt").write_text("x" * size)
    assert (
        "its own (WARNING: it is 75.0% of the text" in prepare_bytes(tmp_path / "own").description
    )


def test_slices_of_a_split(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(text_lines(ROWS))

    def rows(spec):
        corpus = prepare_corpus(Source(str(path), split=spec), "bytes", 0, hold_out=False)
        text = corpus.tokenizer.decode(corpus.splits[spec].tokens)
        assert spec in corpus.description
        return [int(number) for number in re.findall(r"Row (\d+),", text)]

    assert rows("train[:10%]") == list(range(20))
    assert rows("train[5:8]") == [5, 6, 7]
    assert rows("train[-3:]+train[:2]") == [197, 198, 199, 0, 1]
    assert len(all_documents(path, split="train[:50%]")) == 100
    for spec in ("test[:10%]", "train[:10", "train[:10%", "test"):
        with pytest.raises(ValueError, match="--data-split can be train, or a part of one such as"):
            read_documents(path, split=spec)
    (tmp_path / "a.txt").write_text(STORY)
    with pytest.raises(ValueError, match=r"split train\[:10%\].* none of its 1 document"):
        read_documents(tmp_path / "a.txt", split="train[:10%]")


def test_work_grows_with_the_corpus_and_no_faster(tmp_path, monkeypatch):
    """Counts the characters that are searched, split and encoded, and the documents that are read."""
    work = Counter()

    class CountingPattern:
        def __init__(self, pattern, name):
            self.pattern, self.name = pattern, name

        def match(self, text):
            work[self.name] += len(text)
            return self.pattern.match(text)

        def search(self, text, start, end):
            work[self.name] += min(end, len(text)) - start
            return self.pattern.search(text, start, end)

    def encode_batch(self, texts, continues=()):
        work["encode"] += sum(map(len, texts))
        return original(self, texts, continues)

    original = tokenizer_module.Tokenizer.encode_batch
    monkeypatch.setattr(files, "CHUNK_CHARS", 2**12)
    monkeypatch.setattr(files, "SAFE_CUT", CountingPattern(files.SAFE_CUT, "cut"))
    safe_cut = CountingPattern(tokenizer_module._SAFE_CUT, "split")
    monkeypatch.setattr(tokenizer_module, "_SAFE_CUT", safe_cut)
    monkeypatch.setattr(tokenizer_module.Tokenizer, "encode_batch", encode_batch)
    for unit in ("A line of words.\n", "A line of words.\n\n", "no\n\n", "!\n\n", "\n", "x", "x "):
        text = unit * (2**18 // len(unit)) + "end"
        (tmp_path / "a.txt").write_text(text)
        work.clear()
        prepare_bytes(tmp_path / "a.txt")
        # The file is read twice: to see how long it is, and to encode it.
        assert work["encode"] == len(text), unit
        assert work["cut"] <= 2 * 2.1 * len(text), unit
        assert work["split"] <= 1.1 * len(text), unit


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "folder"])
def test_each_file_is_opened_and_each_document_read_a_fixed_number_of_times(
    tmp_path, monkeypatch, name
):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        for i, row in enumerate(ROWS):
            (path / f"{i}.txt").write_text(row)
    elif name == "a.parquet":
        pq.write_table(pa.table({"text": ROWS}), path)
    else:
        path.write_text(
            "text\n" + "".join(f"row {i}\n" for i in range(200))
            if name == "a.csv"
            else text_lines(ROWS)
        )
    opened, read = Counter(), Counter()
    fsspec_open, text_chunk = files.fsspec.open, files.TextChunk

    def counting_open(file, *arguments, **options):
        opened[file] += 1
        return fsspec_open(file, *arguments, **options)

    def counting_chunk(text, *arguments):
        read[text] += 1
        return text_chunk(text, *arguments)

    monkeypatch.setattr(files.fsspec, "open", counting_open)
    for module in (files, rows_module):
        monkeypatch.setattr(module, "TextChunk", counting_chunk)
    prepare_bytes(path)
    assert set(opened.values()) == set(read.values()) == {2}  # to survey and to encode
    assert len(read) == 200


def test_hold_out_false_keeps_the_splits(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    corpus = prepare_corpus(Source(str(tmp_path / "a.txt")), byte_tokenizer(), 0, hold_out=False)
    assert {name: split.bytes for name, split in corpus.splits.items()} == {"train": len(STORY)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\xff\n", "a.txt, line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "a.jsonl, line 2: byte 0xe9 is not UTF-8"),
        ("a.csv", b"text\nfine\n\xe9\n", "a.csv, line 3: byte 0xe9 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": b}\n', "a.jsonl, line 2: not JSON: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl, line 2: expected an object"),
        ("a.json", b'[{"text": "a"},\n {"text": "b"\n]', "a.json, line 3: not JSON"),
        ("a.parquet", b"PAR1", "a.parquet: "),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], r"a.txt.gz: "),
        ("a.txt", b"fine\n\xff\n", r"\(at offset 5\); .*iconv -f LATIN1 -t UTF-8"),
        ("a.txt", "text".encode("utf-16"), r"0xff is not UTF-8 \(at offset 0\); .*iconv -f UTF-16 "),
        ("a.txt", b"x\ny\x00z", r"a.txt, line 2: byte 0x00 is not text \(at offset 3\); .*iconv"),
        ("a.csv", b"text\na\x00\n", r"a.csv, line 2: byte 0x00 is not text \(at offset 6\)"),
        ("a.csv", b"text\na\nb,c\n", r"a.csv, line 3: 2 fields, but the header has 1 \(text\): put"),
        ("a.csv", b"text\na long, end\nb, c\n", "a.csv, line 2: 2 fields, but the header has 1"),
        ("a.csv", b"n,text\n1,a\n2\n", r"a.csv, line 3: 1 fields, but the header has 2 \(n, text\)"),
        ("a.csv", b'text\n"a\nb\n', "a.csv, line 2: .*must end with one"),
        ("a.csv", b"id;text\n1;a\n", "a.csv: its header 'id;text' is one column: .*separated by ';'"),
        ("a.csv", b"text,text\na,b\n", "a.csv: its header names the column 'text' twice"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 42}\n', "a.jsonl, line 2: the text is a number, 42: write it as a string"),
        ("a.jsonl", b'{"text": 4}\n{"text": 42}\n', "a.jsonl: its column 'text' does not hold strings: write them"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: .*surrogate"),
        ("a.json", b'[{"text": "a"}, 7]', "a.json, row 2: expected an object"),
        ("a.txt", b" \n\t\n", "there is no text in it"),
        ("a.csv", b"text\n", "there is no text in it"),
        ("a.txt", b"", "there is no text in it"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', "there is no text in it"),
        ("a.md", b"# hi", "a.md: unsupported file type; expected .txt"),
        ("a.png", b"", "a.png: unsupported file type"),
    ],
)  # fmt: skip
def test_errors_name_the_file_and_line(tmp_path, cache, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_documents(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(
    "data",
    ["nope.txt", "./nope", "/no/where", "~/nope-nope", "a/b/c", "x/train.jsonl.gz", "", "a b"],
)
def test_mistyped_path_is_rejected_without_asking_the_hub(data, monkeypatch):
    monkeypatch.setattr(
        "training.data.hub.open_hub_dataset", lambda *_: pytest.fail("asked the hub")
    )
    with pytest.raises(ValueError, match="no such file or folder"):
        read_documents(data)


def test_local_data_needs_no_network(tmp_path, monkeypatch):
    lookups = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *where, **_: lookups.append(where))
    for name, content in (
        ("a.txt", STORY),
        ("a.jsonl", '{"text": "abc"}\n' * 9),
        ("a.csv", "text\nabc\nabc\n"),
    ):
        (tmp_path / name).write_text(content)
        read_documents(tmp_path / name)
    assert lookups == []


def test_glob_patterns_in_paths_are_rejected(tmp_path):
    for name in ("a[1].txt", "a*.txt", "many*/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(STORY)
        with pytest.raises(ValueError, match="rename it"):
            read_documents(tmp_path / name)
    with pytest.raises(ValueError, match="rename it"):
        read_documents(tmp_path / "many*")


def test_too_little_text_is_rejected(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="too little text, none for the train split"):
        read_documents(tmp_path / "a.txt")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/train.txt").write_text("x")
    (tmp_path / "b/validation.txt").touch()
    with pytest.raises(ValueError, match="none for the validation split"):
        read_documents(tmp_path / "b")


def test_folder_without_text_is_rejected(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no text in this folder \(empty\)"):
        read_documents(tmp_path / "empty")
    (tmp_path / "empty" / "a.png").touch()
    with pytest.raises(ValueError, match=r"no text in this folder \(1 .png\)"):
        read_documents(tmp_path / "empty")


def test_options_that_do_not_apply_are_rejected(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    with pytest.raises(ValueError, match="no --text-column to choose"):
        read_documents(tmp_path / "a.txt", column="text")
    with pytest.raises(ValueError, match="--data-config is only for hub datasets"):
        read_documents(tmp_path / "a.txt", config="en")


def test_tokenizer_is_trained_on_the_training_split(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_TOKENIZER_BYTES", 50)
    (tmp_path / "a.txt").write_text("ab" * 40 + "\n" + "xyz" * 200)
    corpus = prepare_corpus(Source(str(tmp_path / "a.txt")), "bpe", 300)
    assert corpus.tokenizer.vocab_size > 257
    assert len(corpus.tokenizer.encode("abab")) < 4
    assert len(corpus.tokenizer.encode("xyzxyz")) == 6
    assert "first 50 bytes" in corpus.description


def test_existing_tokenizer_from_a_file_or_an_object(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    tokenizer = train_bpe([STORY], 290)
    tokenizer.save(tmp_path / "tokenizer.json")
    expected = read_tokens(tmp_path / "a.txt", tokenizer)
    assert expected["train"] == [
        tokenizer.eos_token,
        *tokenizer.encode(STORY[: int(0.9 * len(STORY))]),
    ]
    assert read_tokens(tmp_path / "a.txt", str(tmp_path / "tokenizer.json")) == expected
    assert read_tokens(tmp_path / "a.txt", str(tmp_path)) == expected
    with pytest.raises(ValueError, match="no such tokenizer: --tokenizer can be bpe"):
        read_tokens(tmp_path / "a.txt", "bits")


def test_prepared_tokens_are_used_unchanged(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    corpus = prepare_bytes(tmp_path / "a.txt")
    again = prepare_corpus(Source(str(corpus.directory)), "bpe", 300)
    assert again.directory == corpus.directory
    assert again.fingerprint == corpus.fingerprint
    with pytest.raises(ValueError, match="another tokenizer than the one given"):
        prepare_corpus(Source(str(corpus.directory)), train_bpe([STORY], 300), 0)
    with pytest.raises(ValueError, match="only --data and --tokenizer"):
        prepare_bytes(corpus.directory, limit=5)


def test_cache_is_used_until_data_or_options_change(tmp_path, monkeypatch, cache):
    path = tmp_path / "a.jsonl"
    path.write_text(text_lines(ROWS))
    first = prepare_corpus(Source(str(path)), "bpe", 260)
    monkeypatch.setattr(prepare, "_tokenize", lambda *_: pytest.fail("tokenized again"))
    assert prepare_corpus(Source(str(path)), "bpe", 260).directory == first.directory
    monkeypatch.undo()
    monkeypatch.setenv("TINYGPT_CACHE", str(cache))
    assert prepare_corpus(Source(str(path)), "bpe", 261).directory != first.directory
    assert prepare_corpus(Source(str(path)), "bytes", 260).directory != first.directory
    assert prepare_corpus(Source(str(path), limit=500), "bpe", 260).directory != first.directory
    os.utime(path, ns=(1, 1))
    touched = prepare_corpus(Source(str(path)), "bpe", 260)
    assert touched.directory != first.directory
    assert touched.fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["bpe", "words", "characters", "bytes"])
def test_a_run_with_its_tokenizer_shares_the_tokens_it_was_trained_on(tmp_path, cache, name):
    """`train`, then `eval` and `train --resume`, then `train --tokenizer RUN`."""
    (tmp_path / "a.txt").write_text(STORY)
    config = TrainingConfig(data=str(tmp_path / "a.txt"), tokenizer=name, vocab_size=290)
    with pytest.MonkeyPatch.context() as patch:
        calls, tokenize = [], prepare._tokenize
        patch.setattr(prepare, "_tokenize", lambda *args: (calls.append(args), tokenize(*args)))
        trained = load_corpus(config, None, True)
        trained.tokenizer.save(tmp_path / "tokenizer.json")
        loaded = load_corpus(config, Tokenizer.load(tmp_path), True)
        again = load_corpus(dataclasses.replace(config, tokenizer=str(tmp_path)), None, True)
    assert len(calls) == 1
    assert trained.directory == loaded.directory == again.directory
    assert [path for path in cache.iterdir() if path.is_dir()] == [trained.directory]


def test_a_folder_without_corpus_json_is_completed(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    first = prepare_bytes(tmp_path / "a.txt")
    expected = first.splits["train"].tokens.tolist()
    (first.directory / "corpus.json").unlink()
    (first.directory / "train.bin").write_bytes(b"cut")
    again = prepare_bytes(tmp_path / "a.txt")
    assert again.directory == first.directory
    assert again.splits["train"].tokens.tolist() == expected


def test_text_that_spells_the_eos_token_ends_no_document(tmp_path):
    text = "one <|endoftext|>\n<|endoftext|> two<|endoftext|>\n" * 9
    (tmp_path / "a.txt").write_text(text)
    for name in ("words", "characters", "bpe", "bytes"):
        corpus = prepare_corpus(Source(str(tmp_path / "a.txt")), name, 300)
        tokens = [split.tokens.tolist() for split in corpus.splits.values()]
        assert [ids.count(corpus.tokenizer.eos_token) for ids in tokens] == [1, 1]
        assert "".join(map(corpus.tokenizer.decode, tokens)) == text


@pytest.mark.parametrize(
    "interruption", [KeyboardInterrupt, OSError(28, "No space left on device")]
)
def test_interrupted_preparation_leaves_no_files(tmp_path, monkeypatch, cache, interruption):
    (tmp_path / "a.txt").write_text(STORY)

    def interrupt(*_):
        raise interruption

    monkeypatch.setattr("training.data.corpus.CorpusWriter.close", interrupt)
    with pytest.raises((KeyboardInterrupt, OSError)):
        read_documents(tmp_path / "a.txt")
    assert list(cache.iterdir()) == []


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Interrupt the preparation of a.jsonl, which has 6,000 documents, by an error after 4,000.

    Progress is saved after every few hundred documents.
    """
    monkeypatch.setattr(prepare, "WRITE_CHARS", 1000)
    monkeypatch.setattr(prepare, "WRITES_BETWEEN_PROGRESS", 5)
    (tmp_path / "a.jsonl").write_text(text_lines(f"document number {i}\n" for i in range(6000)))

    def interrupt(error):
        def broken_off(*arguments):
            read, rule = assign_splits(*arguments)

            def broken():
                yield from itertools.islice(read(), 4000)
                raise error

            return broken, rule

        with monkeypatch.context() as patch:
            patch.setattr(prepare, "assign_splits", broken_off)
            with pytest.raises(type(error)):
                prepare_corpus(Source(str(tmp_path / "a.jsonl")), "bytes", 0)

    return interrupt


def test_the_next_documents_of_an_interrupted_preparation_are_those_of_an_undisturbed_one(
    tmp_path, monkeypatch, cache, interrupted
):
    texts = []
    write = CorpusWriter.write

    def recorded(self, split, chunks):
        texts.extend((split, chunk.text) for chunk in chunks)
        write(self, split, chunks)

    monkeypatch.setattr(CorpusWriter, "write", recorded)
    source = Source(str(tmp_path / "a.jsonl"))
    with monkeypatch.context() as patch:
        patch.setenv("TINYGPT_CACHE", str(tmp_path / "undisturbed"))
        expected = prepare_corpus(source, "bytes", 0)
        undisturbed = list(texts)
    texts.clear()
    interrupted(KeyboardInterrupt())
    [unfinished] = cache.iterdir()
    saved = json.loads((unfinished / "progress.json").read_text())["num_chunks"]
    assert len(texts) - 500 < saved < len(texts)  # what came after the progress is written again
    texts.clear()
    corpus = prepare_corpus(source, "bytes", 0)
    assert texts == undisturbed[saved:]
    assert len(texts) > 1000
    assert corpus.fingerprint == expected.fingerprint
    assert corpus.splits.keys() == expected.splits.keys()
    for name, split in corpus.splits.items():
        other = expected.splits[name]
        assert split.tokens.tolist() == other.tokens.tolist()
        assert (split.bytes, split.words, split.documents) == (other.bytes, other.words, other.documents)  # fmt: skip
    assert list(cache.iterdir()) == [corpus.directory]
    assert {path.name for path in corpus.directory.iterdir()} == {
        *("corpus.json", "tokenizer.json", "train.bin", "validation.bin")
    }


def test_a_dataset_that_breaks_off_is_continued_and_one_that_is_wrong_is_not(
    tmp_path, cache, interrupted
):
    interrupted(ValueError("a row that is no text"))
    assert list(cache.iterdir()) == []
    interrupted(ReadInterrupted("the connection is lost"))
    [unfinished] = cache.iterdir()
    assert (unfinished / "progress.json").is_file()


def test_what_another_recipe_has_left_unfinished_is_not_continued(tmp_path, interrupted):
    (tmp_path / "folder.part").mkdir()
    tokenizer = byte_tokenizer()
    writer = CorpusWriter(tmp_path / "folder.part", tokenizer, "another recipe")
    for split in ("train", "test"):
        writer.write(split, [TextChunk("another text", True)])
    writer.save_progress()
    source = Source(str(tmp_path / "a.jsonl"))
    corpus = prepare_corpus(source, "bytes", 0, directory=tmp_path / "folder")
    assert corpus.directory == tmp_path / "folder"
    assert corpus.fingerprint == prepare_corpus(source, "bytes", 0).fingerprint
    assert {path.name for path in corpus.directory.iterdir()} == {
        *("corpus.json", "tokenizer.json", "train.bin", "validation.bin")
    }


def test_full_disk_error_names_the_file(tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 20)
    code = f"""
import resource
from training.data.prepare import Source, prepare_corpus
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try: prepare_corpus(Source({str(tmp_path / "a.txt")!r}), "bytes", 0)
except OSError as error: print(error)
"""
    printed = run_python(code)
    assert "File too large" in printed
    assert "train.bin" in printed
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@pytest.mark.parametrize("leftover", [False, True])
def test_concurrent_preparation_of_the_same_corpus(tmp_path, leftover, name):
    (tmp_path / "a.txt").write_text(STORY)
    if leftover:
        first = prepare_corpus(Source(str(tmp_path / "a.txt")), name, 300)
        (first.directory / "corpus.json").unlink()
    barrier = threading.Barrier(2)
    tokenize, corpora = prepare._tokenize, []

    def tokenize_together(*arguments):
        barrier.wait(60)
        tokenize(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_tokenize", tokenize_together)
        threads = [
            threading.Thread(
                target=lambda: corpora.append(
                    prepare_corpus(Source(str(tmp_path / "a.txt")), name, 300)
                )
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert corpora[0].directory == corpora[1].directory
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert folders == [corpora[0].directory]


@pytest.mark.parametrize("text", [STORY, STORY.replace("\n", " ")], ids=["lines", "one line"])
def test_large_file_in_chunks_gives_the_same_tokens(tmp_path, monkeypatch, text):
    (tmp_path / "a.txt").write_text(text * 300)
    tokenizer = train_bpe([STORY], 400)
    whole = read_tokens(tmp_path / "a.txt", tokenizer)
    monkeypatch.setattr("training.data.files.CHUNK_CHARS", 1000)
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "other"))
    assert read_tokens(tmp_path / "a.txt", tokenizer) == whole


def test_limit_bounds_the_bytes_of_each_split(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 1000)
    corpus = prepare_bytes(tmp_path / "a.txt", limit=101)
    assert sum(split.bytes for split in corpus.splits.values()) == 100
    assert "at most 101 bytes" in corpus.description


def test_standard_library_is_the_default_corpus():
    corpus = prepare_corpus(Source(limit=200_000), "bytes", 0)
    assert corpus.splits["train"].documents > 5
    assert "a hash of its path" in corpus.description
    text = corpus.tokenizer.decode(corpus.splits["train"].tokens)
    assert "import" in text


def test_tinyshakespeare_has_the_usual_validation_split(real_data):
    corpus = prepare_bytes(real_data / "tinyshakespeare/input.txt")
    assert corpus.splits["train"].bytes == 1_003_854
    assert corpus.splits["validation"].bytes == 111_540


def test_penn_treebank_has_the_published_word_counts(real_data):
    corpus = prepare_bytes(real_data / "ptb")
    words = {name: split.words for name, split in corpus.splits.items()}
    assert words == {"train": 929_589, "validation": 73_760, "test": 82_430}


@pytest.mark.long
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    code = """
import resource
from training.data import prepare
prepare.prepare_corpus(prepare.Source({path!r}), "bytes", 0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    peaks = []
    for times in (6_000, 16_000):
        path = tmp_path / f"{times}.txt"
        path.write_text(STORY * times + "x")
        peaks.append(int(run_python(code.format(path=str(path)))))
    assert peaks[1] - peaks[0] < 100
