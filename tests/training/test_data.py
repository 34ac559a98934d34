import bz2
import csv
import gzip
import itertools
import json
import lzma
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import hub
from tokenizer import byte_tokenizer, train_bpe
from training.data import sources
from training.data.corpus import open_corpus
from training.data.sources import Source, prepare

STORY = "".join(f"Chapter {i}.\n\n  It was {'very ' * (i % 7)}late.\nThe end.\n" for i in range(40))
ROWS = [f"Row {i}, she said:\n“{'ha ' * (i % 5)}ha”" for i in range(200)]
PAIRS = [(f"{i} dogs{' run' * (i % 4)}.", f"{i} chiens{' courent' * (i % 4)}.") for i in range(200)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tokens(path, tokenizer="bytes", **options):
    corpus = prepare(Source(str(path), **options), tokenizer, 300)
    return {name: split.tokens.tolist() for name, split in corpus.splits.items()}


def everything(path, **options):
    return list(itertools.chain.from_iterable(texts(path, **options).values()))


def texts(path, **options):
    """The documents of each split."""
    tokenizer = byte_tokenizer()
    found = {}
    for name, ids in tokens(path, **options).items():
        marks = [i for i, token in enumerate(ids) if token == tokenizer.eos_token]
        ends = [*marks[1:], len(ids)]
        found[name] = [tokenizer.decode(ids[a + 1 : b]) for a, b in zip(marks, ends, strict=True)]
    return found


def test_a_text_file_is_one_document_whose_last_tenth_validates(tmp_path):
    (tmp_path / "a.txt").write_text(STORY, "utf-8")
    border = int(0.9 * len(STORY))
    assert texts(tmp_path / "a.txt") == {"train": [STORY[:border]], "validation": [STORY[border:]]}


def test_line_ends_are_normalised_and_nothing_else(tmp_path):
    text = "a\r\nb\rc\n\n\td \x00\x0c\u2028 é👍 <|endoftext|>  \n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    joined = "".join(everything(tmp_path / "a.txt"))
    assert joined == text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("opener", [gzip, bz2, lzma])
def test_compressed_text_is_the_same(tmp_path, opener):
    ending = {gzip: "gz", bz2: "bz2", lzma: "xz"}[opener]
    (tmp_path / "a.txt").write_text(STORY, "utf-8")
    (tmp_path / f"a.txt.{ending}").write_bytes(opener.compress(STORY.encode()))
    assert tokens(tmp_path / f"a.txt.{ending}") == tokens(tmp_path / "a.txt")


def test_rows_are_documents_in_every_format(tmp_path):
    rows = [*ROWS, None, ""]
    lines = "".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps([{"text": row} for row in rows], indent=2))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "text"], *([1, row] for row in rows)])
    pq.write_table(pa.table({"text": rows, "n": [1] * len(rows)}), tmp_path / "a.parquet")
    found = texts(tmp_path / "a.jsonl")
    assert sorted(found["train"] + found["validation"]) == sorted(ROWS)
    assert 2 <= len(found["validation"]) <= 25
    for name in ("a.jsonl.gz", "a.json", "a.csv", "a.parquet"):
        assert texts(tmp_path / name) == found


def test_held_out_documents_stay_held_out_when_others_come(tmp_path):
    for name, rows in (("a", ROWS[:100]), ("b", ROWS[50:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"t": r}) + "\n" for r in rows))
    before, after = texts(tmp_path / "a.jsonl"), texts(tmp_path / "b.jsonl")
    assert not set(before["validation"]) & set(after["train"])
    assert not set(before["train"]) & set(after["validation"])


def test_words_that_csv_readers_take_for_missing_are_text(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "NA\nNone\nnull\n" * 10)
    assert sorted(set(everything(tmp_path / "a.csv"))) == ["NA", "None", "null"]


def test_the_text_column(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"body": f"b{i}", "title": f"t{i}", "n": i}) + "\n" for i in range(60))
    )
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"--text-column among: body \(string\), title \(string\)"):
        texts(path)
    with pytest.raises(ValueError, match=r"no column 'n' of strings, only: .*n \(int64\)"):
        texts(path, column="n")
    assert "b1" in everything(path, column="body")
    (tmp_path / "b.jsonl").write_text('{"body": "x", "n": 1}\n' * 2)
    assert texts(tmp_path / "b.jsonl")["train"][0] == "x"


def test_a_folder_in_splits_by_name(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text(f"the {name} text\n")
    (folder / "README.md").write_text("about")
    (folder / "LICENSE.txt").write_text("rights")
    (folder / ".hidden.csv").write_text("x")
    assert texts(folder) == {
        name: [f"the {file} text\n"]
        for name, file in (("train", "train"), ("validation", "valid"), ("test", "test"))
    }
    assert list(texts(folder, split="test")) == ["train", "validation"]
    found = prepare(Source(str(folder), split="test"), "bytes", 0, hold_out=False)
    assert list(found.splits) == ["test"]
    with pytest.raises(
        ValueError, match=r"no split 'dev'; --data-split can be train, validation, test"
    ):
        texts(folder, split="dev")
    (folder / "notes.txt").write_text("half read?")
    with pytest.raises(ValueError, match=r"notes.txt belongs to no split"):
        texts(folder)
    (folder / "notes.txt").unlink()
    (folder / "more.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"mixes kinds of files \(3 .txt, 1 .jsonl\)"):
        texts(folder)


def test_files_without_splits_are_all_read(tmp_path):
    folder = tmp_path / "many"
    for i in range(60):
        (folder / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"{i % 3}" / f"{i}.txt").write_text(f"document {i}")
    found = texts(folder)
    assert len(found["train"]) + len(found["validation"]) == 60
    assert len(found["validation"]) < 12


def test_without_holding_out_the_splits_are_as_found(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    corpus = prepare(Source(str(tmp_path / "a.txt")), byte_tokenizer(), 0, hold_out=False)
    assert {name: split.bytes for name, split in corpus.splits.items()} == {"train": len(STORY)}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.txt", b"fine\n\xff\n", "a.txt, line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "a.jsonl, line 2: byte 0xe9 is not UTF-8"),
        ("a.csv", b"text\nfine\n\xe9\n", "a.csv, line 3: byte 0xe9 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": b}\n', "a.jsonl, line 2: not JSON: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl, line 2: expected an object"),
        ("a.json", b'[{"text": "a"},\n {"text": "b"\n]', "a.json, line 3: not JSON"),
        ("a.parquet", b"PAR1", "a.parquet: "),
        ("a.txt.gz", gzip.compress(b"text" * 100)[:-9], r"a.txt.gz: "),
        ("a.csv", b"text\na\nb,c\n", "a.csv: .*line 3"),
        ("a.txt", b"", "there is no text in it"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', "there is no text in it"),
        ("a.md", b"# hi", "a.md: not a kind of file that is read; expected .txt"),
        ("a.png", b"", "a.png: not a kind of file"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_the_line(tmp_path, cache, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=why) as refusal:
        texts(tmp_path / name)
    assert len(str(refusal.value).splitlines()) == 1
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(
    "data",
    ["nope.txt", "./nope", "/no/where", "~/nope-nope", "a/b/c", "x/train.jsonl.gz", "", "a b"],
)
def test_a_mistyped_path_is_refused_at_once(data, monkeypatch):
    monkeypatch.setattr("training.data.sources._hub", lambda source: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="no such file or folder"):
        texts(data)


def test_local_data_needs_no_network(tmp_path, monkeypatch):
    looked_up = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *where, **_: looked_up.append(where))
    for name, content in (
        ("a.txt", STORY),
        ("a.jsonl", '{"text": "abc"}\n' * 9),
        ("a.csv", "text\nabc\nabc\n"),
    ):
        (tmp_path / name).write_text(content)
        texts(tmp_path / name)
    assert looked_up == []


def test_names_that_would_be_read_as_patterns_are_refused(tmp_path):
    for name in ("a[1].txt", "a*.txt", "many*/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(STORY)
        with pytest.raises(ValueError, match="rename it"):
            texts(tmp_path / name)
    with pytest.raises(ValueError, match="rename it"):
        texts(tmp_path / "many*")


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="too little text, none for the train split"):
        texts(tmp_path / "a.txt")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/train.txt").write_text("x")
    (tmp_path / "b/validation.txt").touch()
    with pytest.raises(ValueError, match="none for the validation split"):
        texts(tmp_path / "b")
    with pytest.raises(ValueError, match="--data-limit must be at least one byte, not 0"):
        texts(tmp_path / "a.txt", limit=0)


def test_folders_without_text_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no text in this folder \(empty\)"):
        texts(tmp_path / "empty")
    (tmp_path / "empty" / "a.png").touch()
    with pytest.raises(ValueError, match=r"no text in this folder \(1 .png\)"):
        texts(tmp_path / "empty")


def test_options_that_do_not_apply_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    with pytest.raises(ValueError, match="no --text-column to choose"):
        texts(tmp_path / "a.txt", column="text")
    with pytest.raises(ValueError, match="--data-config chooses among those of a hub data set"):
        texts(tmp_path / "a.txt", config="en")


def test_a_tokenizer_is_trained_on_the_training_split(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TOKENIZER_BYTES", 50)
    (tmp_path / "a.txt").write_text("ab" * 40 + "\n" + "xyz" * 200)
    corpus = prepare(Source(str(tmp_path / "a.txt")), "bpe", 300)
    assert corpus.tokenizer.vocab_size > 257
    assert len(corpus.tokenizer.encode("abab")) < 4
    assert len(corpus.tokenizer.encode("xyzxyz")) == 6
    assert "first 50 bytes" in corpus.description


def test_a_tokenizer_from_a_file_or_an_object(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    tokenizer = train_bpe([STORY], 290)
    tokenizer.save(tmp_path / "tokenizer.json")
    expected = tokens(tmp_path / "a.txt", tokenizer)
    assert expected["train"] == [
        tokenizer.eos_token,
        *tokenizer.encode(STORY[: int(0.9 * len(STORY))]),
    ]
    assert tokens(tmp_path / "a.txt", str(tmp_path / "tokenizer.json")) == expected
    assert tokens(tmp_path / "a.txt", str(tmp_path)) == expected
    with pytest.raises(ValueError, match="no such tokenizer: --tokenizer can be bpe"):
        tokens(tmp_path / "a.txt", "bits")


def test_prepared_tokens_are_used_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    made = prepare(Source(str(tmp_path / "a.txt")), "bytes", 0)
    again = prepare(Source(str(made.directory)), "bpe", 300)
    assert again.directory == made.directory
    assert again.fingerprint == made.fingerprint
    with pytest.raises(ValueError, match="another tokenizer than the one given"):
        prepare(Source(str(made.directory)), train_bpe([STORY], 300), 0)
    with pytest.raises(ValueError, match="only --data and --tokenizer"):
        prepare(Source(str(made.directory), limit=5), "bytes", 0)


def test_the_cache_is_used_until_the_data_or_an_option_changes(tmp_path, monkeypatch, cache):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    first = prepare(Source(str(path)), "bpe", 300)
    monkeypatch.setattr(sources, "_tokenise", lambda *_: pytest.fail("tokenised again"))
    assert prepare(Source(str(path)), "bpe", 300).directory == first.directory
    monkeypatch.undo()
    monkeypatch.setenv("TINYGPT_CACHE", str(cache))
    assert prepare(Source(str(path)), "bpe", 301).directory != first.directory
    assert prepare(Source(str(path)), "bytes", 300).directory != first.directory
    assert prepare(Source(str(path), limit=500), "bpe", 300).directory != first.directory
    os.utime(path, ns=(1, 1))
    touched = prepare(Source(str(path)), "bpe", 300)
    assert touched.directory != first.directory
    assert touched.fingerprint == first.fingerprint


def pairs_of(path, **options):
    """The pairs of each split."""
    corpus = prepare(Source(str(path), **options), "bytes", 300, pairs=True)
    assert open_corpus(corpus.directory, pairs=True).languages == corpus.languages
    found = {}
    for name, split in corpus.splits.items():
        _, *documents = bytes(np.where(split.tokens == 256, 0, split.tokens).tolist()).split(b"\0")
        texts = [document.decode() for document in documents]
        found[name] = list(zip(texts[::2], texts[1::2], strict=True))
    return corpus.languages, found


def lines_of(pairs, languages=("en", "fr")):
    rows = ({"translation": dict(zip(languages, pair, strict=True)), "id": 1} for pair in pairs)
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_pairs_in_every_format_are_held_out_together(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines_of(PAIRS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines_of(PAIRS).encode()))
    rows = [{"translation": {"en": en, "fr": fr}} for en, fr in PAIRS]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    languages, found = pairs_of(tmp_path / "a.jsonl")
    assert languages == ("en", "fr")
    assert found["train"] + found["validation"] != PAIRS
    assert sorted(found["train"] + found["validation"]) == sorted(PAIRS)
    assert 2 <= len(found["validation"]) <= 25
    for name in ("a.jsonl.gz", "a.json", "a.parquet"):
        assert pairs_of(tmp_path / name) == (languages, found)
    other = [(en, fr + " Vite !") for en, fr in PAIRS[:100]]
    (tmp_path / "b.jsonl").write_text(lines_of(other))
    _, again = pairs_of(tmp_path / "b.jsonl")
    held_out = {en for en, _ in found["validation"]}
    assert {en for en, _ in again["validation"]} == held_out & {en for en, _ in other}


def test_which_language_to_which(tmp_path):
    pairs = [(en, fr, f"{i} Hunde.") for i, (en, fr) in enumerate(PAIRS)]
    folder = tmp_path / "three"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines_of(pairs, ("en", "fr", "de")))
    # Another order in another file does not turn the pairs around.
    turned = [(fr, de, en) for en, fr, de in pairs[:3]]
    (folder / "valid.jsonl").write_text(lines_of(turned, ("fr", "de", "en")))
    (folder / "test.jsonl").write_text(lines_of(turned, ("fr", "de", "en")))
    languages, found = pairs_of(folder)
    assert languages == ("en", "fr")
    assert found == {"train": PAIRS, "validation": PAIRS[:3], "test": PAIRS[:3]}
    languages, found = pairs_of(folder, languages="de-en")
    assert languages == ("de", "en")
    assert found["train"][7] == ("7 Hunde.", PAIRS[7][0])
    made = {path.name for path in (tmp_path / "cache").iterdir()}
    assert len(made) == 2
    for wrong in ("en", "en-fr-de", "en-", "fr-fr"):
        with pytest.raises(ValueError, match=f"two names like en-fr, not '{wrong}'"):
            pairs_of(folder, languages=wrong)
    with pytest.raises(ValueError, match=r"train.jsonl, row 1: no 'es' side, only en, fr, de"):
        pairs_of(folder, languages="en-es")
    with pytest.raises(ValueError, match="--languages goes with pairs"):
        texts(folder, languages="en-fr")


def test_few_pairs_are_held_out_from_the_end_and_a_limit_cuts_none(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines_of([("aa", "b" * 9)] * 4))
    assert {name: len(pairs) for name, pairs in pairs_of(tmp_path / "a.jsonl")[1].items()} == {
        "train": 3,
        "validation": 1,
    }
    _, found = pairs_of(tmp_path / "a.jsonl", limit=32)
    assert found == {"train": [("aa", "b" * 9)], "validation": [("aa", "b" * 9)]}


def test_a_tokenizer_learns_both_sides(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines_of(PAIRS))
    tokenizer = prepare(Source(str(tmp_path / "a.jsonl")), "bpe", 300, pairs=True).tokenizer
    assert len(tokenizer.encode(" run")) == len(tokenizer.encode(" courent")) == 1


GOOD = '{"translation": {"en": "a", "fr": "b"}}\n'


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", GOOD * 16 + '{"translation": {"en": "a"}}', "a.jsonl, row 17: no 'fr' side, only en"),
        ("a.jsonl", GOOD * 299 + '{"translation": {"en": "a", "fr": null}}', "row 300: no 'fr' side, only en"),
        ("a.jsonl", GOOD + '{"translation": {"en": " \\n", "fr": "b"}}', "row 2: no 'en' side, only fr"),
        ("a.jsonl", GOOD + '{"translation": {"en": 3, "fr": "b"}}', "row 2: no 'en' side, only fr"),
        ("a.jsonl", GOOD + '{"translation": {"de": "a", "fr": "b"}}', "row 2: no 'en' side, only de, fr"),
        ("a.jsonl", GOOD + '{"translation": null}', "row 2: no pair of sentences: expected a row like {"),
        ("a.jsonl", GOOD + '{"translation": "a - b"}', "row 2: no pair of sentences: expected a row like {"),
        ("a.jsonl", GOOD + '{"text": "a"}', "row 2: no pair of sentences: expected a row like {"),
        ("a.jsonl", '{"translation": {"en": "a"}}\n' * 3, "row 1: expected two languages, found en,"),
        ("a.jsonl", '{"text": "a"}\n', r"no column 'translation' of pairs, only: text \(string\); expected rows like {"),
        ("a.jsonl", GOOD + "{", "a.jsonl, line 2: not JSON"),
        ("a.jsonl", GOOD, "too little text, none for the train split"),
        ("a.csv", "translation\na\n", "row 1: no pair of sentences: expected a row like {"),
        ("a.txt", "a\tb\n", "a.txt is plain text, not pairs of sentences: expected a .jsonl"),
    ],
)  # fmt: skip
def test_bad_pairs_are_named_with_the_row(tmp_path, cache, name, content, why):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=why) as refusal:
        pairs_of(tmp_path / name)
    assert len(str(refusal.value).splitlines()) == 1
    assert not cache.exists() or not list(cache.iterdir())


def test_the_file_with_a_bad_pair_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / f"a/{i}.jsonl").write_text(
            GOOD * 5 + '{"translation": {"fr": "b"}}\n' * (i == 1)
        )
    with pytest.raises(ValueError, match=r"a/1.jsonl, row 6: no 'en' side, only fr"):
        pairs_of(tmp_path / "a")


def test_pairs_and_text_are_not_taken_for_each_other(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(lines_of(PAIRS))
    (tmp_path / "text.txt").write_text(STORY)
    with pytest.raises(ValueError, match=r"holds pairs of sentences, not text"):
        texts(tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match="stdlib is plain text"):
        pairs_of("stdlib")
    text = prepare(Source(str(tmp_path / "text.txt")), "bytes", 0).directory
    pairs = prepare(Source(str(tmp_path / "pairs.jsonl")), "bytes", 0, pairs=True).directory
    assert prepare(Source(str(pairs)), "bytes", 0, pairs=True).languages == ("en", "fr")
    with pytest.raises(ValueError, match="holds text, not pairs"):
        prepare(Source(str(text)), "bytes", 0, pairs=True)
    with pytest.raises(ValueError, match=r"holds pairs of sentences \(en-fr\), not text"):
        prepare(Source(str(pairs)), "bytes", 0)


@pytest.mark.parametrize(
    "interruption", [KeyboardInterrupt, OSError(28, "No space left on device")]
)
def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch, cache, interruption):
    (tmp_path / "a.txt").write_text(STORY)

    def interrupt(*_):
        raise interruption

    monkeypatch.setattr("training.data.corpus.CorpusWriter.close", interrupt)
    with pytest.raises((KeyboardInterrupt, OSError)):
        texts(tmp_path / "a.txt")
    assert list(cache.iterdir()) == []


def test_a_disk_that_is_full_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 20)
    code = f"""
import resource
from training.data.sources import Source, prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try: prepare(Source({str(tmp_path / "a.txt")!r}), "bytes", 0)
except OSError as error: print(error)
"""
    printed = python(code)
    assert "File too large" in printed
    assert "train.bin" in printed
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_at_once_do_not_clash(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    barrier = threading.Barrier(2)
    real, made = sources._tokenise, []

    def together(*arguments):
        barrier.wait(60)
        real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_tokenise", together)
        threads = [
            threading.Thread(
                target=lambda: made.append(prepare(Source(str(tmp_path / "a.txt")), "bytes", 0))
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert made[0].directory == made[1].directory
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [made[0].directory.name]


def test_a_large_file_in_pieces_gives_the_same_tokens(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(STORY * 300)
    tokenizer = train_bpe([STORY], 400)
    whole = tokens(tmp_path / "a.txt", tokenizer)
    monkeypatch.setattr(sources, "WHOLE", 1000)
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "other"))
    assert tokens(tmp_path / "a.txt", tokenizer) == whole


def test_a_limit_bounds_the_bytes_of_every_split(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 1000)
    corpus = prepare(Source(str(tmp_path / "a.txt"), limit=101), "bytes", 0)
    assert sum(split.bytes for split in corpus.splits.values()) == 100
    assert "at most 101 bytes" in corpus.description


def test_the_standard_library_is_always_there():
    first = prepare(Source(limit=200_000), "bytes", 0)
    assert first.splits["train"].documents > 5
    assert "a hash of its path" in first.description
    text = first.tokenizer.decode(first.splits["train"].tokens)
    assert "import" in text


def test_shakespeare_has_the_customary_validation_split(real_data):
    corpus = prepare(Source(str(real_data / "tinyshakespeare/input.txt")), "bytes", 0)
    assert corpus.splits["train"].bytes == 1_003_854
    assert corpus.splits["validation"].bytes == 111_540


def test_penn_treebank_has_mikolovs_counts(real_data):
    corpus = prepare(Source(str(real_data / "ptb")), "bytes", 0)
    words = {name: split.words for name, split in corpus.splits.items()}
    assert words == {"train": 929_589, "validation": 73_760, "test": 82_430}


def test_multi30k_has_its_pairs(real_data):
    languages, found = pairs_of(real_data / "multi30k-en-fr")
    assert languages == ("en", "fr")
    counts = {name: len(pairs) for name, pairs in found.items()}
    assert counts == {"train": 29_000, "validation": 1_014, "test": 1_000}
    assert found["validation"][0] == (
        "A group of men are loading cotton onto a truck",
        "Un groupe d'hommes chargent du coton dans un camion",
    )


def python(code, **environment):
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def hub_folder(tmp_path):
    stories, plain = tmp_path / "hub/some/stories", tmp_path / "hub/some/plain"
    (stories / "data").mkdir(parents=True)
    plain.mkdir()
    for split, rows in (("train", ROWS[:150]), ("validation", ROWS[150:])):
        table = pa.table({"text": rows, "id": range(len(rows))})
        pq.write_table(table, stories / f"data/{split}-00000-of-00001.parquet")
    (plain / "train.txt").write_text(STORY)
    for language in ("en", "fr"):
        (tmp_path / "hub/some/tongues" / language).mkdir(parents=True)
        (tmp_path / "hub/some/tongues" / language / "a.jsonl").write_text('{"text": "x"}\n' * 9)
    (tmp_path / "hub/some/tongues/README.md").write_text(
        "---\nconfigs:\n- {config_name: en, data_files: en/*}\n"
        "- {config_name: fr, data_files: fr/*}\n---\n"
    )
    (tmp_path / "hub/some/pairs").mkdir()
    (tmp_path / "hub/some/pairs/train.jsonl").write_text(lines_of(PAIRS))
    (tmp_path / "hub/some/pairs/test.jsonl").write_text(lines_of([("a", "b"), ("a", "")]))
    return tmp_path / "hub"


ASK = """
from training.data.sources import Source, prepare
for source in {sources}:
    try: print(prepare(source, "bytes", 0, pairs=source.data == "some/pairs").directory)
    except ValueError as error: print(error)
"""


def test_the_hub_plain_and_streaming(tmp_path, hub_folder):
    sources = """[Source("some/stories"), Source("some/stories", streaming=True),
        Source("some/plain"), Source("some/plain", streaming=True),
        Source("some/none"), Source("none"), Source("some/stories", split="test"),
        Source("some/tongues"), Source("some/tongues", config="de"),
        Source("some/tongues", config="fr"), Source("some/stories", column="id"),
        Source("some/pairs", split="train"), Source("some/pairs", split="train", streaming=True),
        Source("some/pairs", languages="fr-en")]"""
    with hub.running(hub_folder) as address:
        home = {"HF_HOME": str(tmp_path / "home")}
        answers = python(ASK.format(sources=sources), HF_ENDPOINT=address, **home).splitlines()
    stories, streamed, plain, plain_streamed, none, none_either, split, *rest = answers
    expected = tmp_path / "expected"
    expected.mkdir()
    for name, rows in (("train", ROWS[:150]), ("validation", ROWS[150:])):
        (expected / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": r}) + "\n" for r in rows)
        )
    (tmp_path / "plain.txt").write_text(STORY)
    fingerprint = prepare(Source(str(expected)), "bytes", 0).fingerprint
    assert open_corpus(stories).fingerprint == open_corpus(streamed).fingerprint == fingerprint
    fingerprint = prepare(Source(str(tmp_path / "plain.txt")), "bytes", 0).fingerprint
    assert open_corpus(plain).fingerprint == open_corpus(plain_streamed).fingerprint == fingerprint
    assert "the hub has no data set of that name" in none
    assert "the hub has no data set of that name" in none_either
    assert "--data-split can be train, validation" in split
    configs, wrong, french, column, pairs, pairs_streamed, bad_pair = rest
    assert "--data-config can be one of ['en', 'fr']" in configs
    assert "--data-config can be one of ['en', 'fr']" in wrong
    assert open_corpus(french).splits["train"].documents
    assert "no column 'id' of strings" in column
    (tmp_path / "pairs.jsonl").write_text(lines_of(PAIRS))
    fingerprint = prepare(Source(str(tmp_path / "pairs.jsonl")), "bytes", 0, pairs=True).fingerprint
    for directory in (pairs, pairs_streamed):
        assert open_corpus(directory, pairs=True).fingerprint == fingerprint
    assert "some/pairs, split test, row 2: no 'fr' side, only en" in bad_pair
    # Now offline: what was downloaded is still there, and tokenised already.
    sources = '[Source("some/stories"), Source("some/plain"), Source("some/none")]'
    answers = python(ASK.format(sources=sources), HF_HUB_OFFLINE="1", **home).splitlines()
    assert answers[0] == stories
    assert open_corpus(answers[1]).fingerprint == open_corpus(plain).fingerprint
    assert "HF_HUB_OFFLINE forbids" in answers[2]


def test_an_unreachable_hub_is_said_soon(tmp_path):
    with hub.running(tmp_path) as address:
        pass  # The port is free again, and nobody answers there.
    ask = ASK.format(sources='[Source("some/stories")]')
    answer = python(ask, HF_ENDPOINT=address, HF_HOME=str(tmp_path))
    assert "cannot be reached" in answer
    assert "give a local file" in answer


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    code = """
import resource
from training.data import sources
sources.WHOLE = 1_000_000
sources.prepare(sources.Source({path!r}), "bytes", 0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    peaks = []
    for times in (6_000, 16_000):
        path = tmp_path / f"{times}.txt"
        path.write_text(STORY * times + "x")
        peaks.append(int(python(code.format(path=str(path)))))
    assert peaks[1] - peaks[0] < 100
