import bz2
import csv
import dataclasses
import gzip
import itertools
import json
import lzma
import os
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpora import ROWS, STORY, run_python, text_lines
from tokenizer import Tokenizer, byte_tokenizer, train_bpe
from training.config import TrainingConfig
from training.data import prepare
from training.data.prepare import prepare_corpus
from training.data.sources import Source
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
    text = "a\r\nb\rc\n\n\td \x00\x0c\u2028 é👍 <|endoftext|>  \n\n"
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


def test_text_column_selection(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"body": f"b{i}", "title": f"t{i}", "n": i}) + "\n" for i in range(60))
    )
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"--text-column among: body \(string\), title \(string\)"):
        read_documents(path)
    with pytest.raises(ValueError, match=r"no column 'n' of strings, only: .*n \(int64\)"):
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
        ("a.csv", b"text\na\nb,c\n", "a.csv: .*line 3"),
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
