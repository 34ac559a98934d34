"""`eval` with several texts and figures, `compare`, and the commands of docs/evaluation.md."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest

from gpt.checkpoint import load_tensors, save_tensors
from tests.corpora import text_lines
from tokenizer import Tokenizer
from training import cli

DOCS = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text("utf-8")
TINY = shlex.split("""
    --steps 1 --batch-size 2 --context-length 16 --width 16 --depth 1 --heads 1 --warmup-steps 0
    --eval-interval 1 --sample-tokens 0 --device cpu
""")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two runs of one text with different tokenizers, one of another text, one of a table; texts to score."""
    folder = tmp_path_factory.mktemp("workdir")
    (folder / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(200)))
    (folder / "short.txt").write_text("short\n")
    (folder / "other.txt").write_text("".join(f"{i} is another text\n" for i in range(200)))
    splits = folder / "books"
    splits.mkdir()
    documents = [f"document {i}, {'so ' * (i % 7)}it ends\n" for i in range(30)]
    (splits / "test.jsonl").write_text(text_lines(documents))
    (splits / "validation.jsonl").write_text(text_lines(documents[:3]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TINYGPT_CACHE", str(folder / "cache"))
        for run, data, tokenizer in (
            ("wide", "text.txt", "bytes"),
            ("narrow", "text.txt", "bpe"),
            ("other", "other.txt", "bytes"),
        ):
            options = ["--data", data, "--tokenizer", tokenizer, "--vocab-size", "280"]
            cli.main("tinygpt", ["train", *TINY, *options, "--run", run])
        options = ["--task", "square", "--steps", "1", "--device", "cpu", "--run", "table"]
        cli.main("tinygpt", ["train", "linear", *options])
    shutil.copytree(folder / "runs" / "wide", folder / "runs" / "diverged")
    weights = folder / "runs" / "diverged" / "model.safetensors"
    save_tensors(weights, {k: v * math.nan for k, v in load_tensors(weights).items()})
    return folder


@pytest.fixture(autouse=True)
def in_workdir(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("TINYGPT_CACHE", str(workdir / "cache"))


@pytest.fixture
def printed(capsys):
    """Return what a command prints."""

    def printed(*arguments):
        capsys.readouterr()
        cli.main("tinygpt", [str(argument) for argument in arguments])
        return capsys.readouterr().out

    return printed


def test_several_texts_and_splits_in_one_call(printed):
    arguments = ("--data", "books", "--split", "validation", "test")
    reports = json.loads(printed("eval", "wide", *arguments, "--json"))
    assert [(report["data"], report["split"]) for report in reports] == [
        ("books", "validation"),
        ("books", "test"),
    ]
    for report in reports:
        arguments = ("--data", "books", "--split", report["split"])
        assert json.loads(printed("eval", "wide", *arguments, "--json")) == report
    arguments = ("--data", "other.txt", "books")
    reports = json.loads(printed("eval", "wide", *arguments, "--json"))
    assert [report["data"] for report in reports] == ["other.txt", "books"]
    assert [report["resampled"] for report in reports] == [
        f"{-(-reports[0]['bytes'] // 100)} blocks of 100 bytes",
        "30 documents",
    ]
    for report in reports:
        for name, (low, high) in report["intervals"].items():
            assert low < report[name] < high
    text = printed("eval", "wide", *arguments)
    assert text.count("\n  loss ") == 2
    assert re.search(r"loss +\d\.\d{4} \[\d\.\d{4}, \d\.\d{4}\] nats per token", text)
    assert "in brackets: 95% intervals, bootstrapped over 30 documents" in text


def test_markdown_is_a_table_with_a_row_for_each_text(printed):
    header, rule, *rows = printed(
        "eval", "wide", "--data", "other.txt", "books", "--markdown"
    ).splitlines()
    names = [name.strip() for name in header.strip("|").split("|")]
    assert len(names) == rule.count("---") == len(set(names))
    assert len(rows) == 2
    [score] = [json.loads(printed("eval", "wide", "--data", "books", "--json"))]
    cells = dict(zip(names, map(str.strip, rows[1].strip("|").split("|")), strict=True))
    low, high = score["intervals"]["bits_per_byte"]
    assert cells["bits per byte"] == f"{score['bits_per_byte']:.4f} [{low:.4f}, {high:.4f}]"
    assert cells["tokens"] == f"{score['tokens']:,}"


def test_loss_by_position_and_document_accuracy_and_their_plot(printed, workdir):
    options = ("--data", "books", "--by", "position", "document", "--accuracy")
    output = workdir / "plots" / "both.svg"
    text = printed("eval", "wide", *options, "--output", output)
    assert text.splitlines()[-1] == str(output)
    svg = output.read_text()
    assert "tokens of context" in svg
    assert "share of hits" in svg
    assert "bits per byte of the best and the worst of 30" in text
    assert len(re.findall(r"^    \d+ +\d\.\d{4} \(\d+ tokens\) 'document", text, re.MULTILINE)) == 6
    report = json.loads(printed("eval", "wide", *options, "--json"))
    assert sum(row["tokens"] for row in report["by_position"]) == report["tokens"]
    assert [row["context_from"] for row in report["by_position"]] == [1, 2, 3, 5, 9]
    assert len(report["by_document"]) == 30
    assert 0 <= report["accuracy_at_1"] <= report["accuracy_at_5"] <= 1
    bins = report["calibration_bins"]
    hits = sum(each["tokens"] * each["accuracy"] for each in bins)
    assert hits == pytest.approx(report["tokens"] * report["accuracy_at_1"])
    plain = json.loads(printed("eval", "wide", "--data", "books", "--json"))
    assert plain.keys() & {"by_position", "by_document", "accuracy_at_1"} == set()
    assert plain["loss"] == pytest.approx(report["loss"], rel=1e-6)


def test_runs_with_different_tokenizers_are_compared_per_byte(printed):
    rows = json.loads(printed("compare", "wide", "narrow", "other", "--data", "books", "--json"))
    for row in rows:
        report = json.loads(printed("eval", row["run"], "--data", "books", "--json"))
        assert row["bits_per_byte"] == pytest.approx(report["bits_per_byte"], rel=1e-9)
        assert (row["loss"], row["stride"]) == (pytest.approx(report["loss"]), 16)
    assert "difference" not in rows[0]
    for row in rows[1:]:
        difference = row["bits_per_byte"] - rows[0]["bits_per_byte"]
        assert row["difference"] == pytest.approx(difference)
        low, high = row["interval"]
        assert low < difference < high
        assert 1e-4 <= row["p"] <= 1
    assert Tokenizer.load("runs/narrow").vocab_size > 257
    text = printed("compare", "wide", "narrow")
    header, rule, first, second = text.splitlines()[:4]
    assert len({line.count("|") for line in (header, rule, first, second)}) == 1
    assert "Differences from runs/wide in bits per byte; 95% intervals and p over" in text
    [_, same] = json.loads(printed("compare", "wide", "wide", "--json"))
    assert (same["difference"], same["interval"], same["p"]) == (0, [0, 0], 1)


def test_every_command_of_the_docs_runs(printed, workdir):
    [block] = re.findall(r"^```sh\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    assert len(block.splitlines()) == 9
    for command in block.splitlines():
        assert printed(*shlex.split(command)[1:])
    assert (workdir / "wide.svg").exists()
    assert (workdir / "samples.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "two formats": (
            ["eval", "wide", "--json", "--markdown"],
            "--json or --markdown, not both",
        ),
        "nothing to draw": (
            ["eval", "wide", "--output", "x.svg"],
            "--output draws --by position and --accuracy: give one of them",
        ),
        "an unknown format": (
            ["eval", "wide", "--accuracy", "--output", "x.doc"],
            "--output must end in .svg",
        ),
        "positions of a table": (
            ["eval", "table", "--by", "position"],
            "--by has no meaning in the task square",
        ),
        "an unknown split among others": (
            ["eval", "wide", "--data", "books", "--split", "test", "dev"],
            "no split is named 'dev'; there are test, validation",
        ),
        "a text that is not there": (
            ["eval", "wide", "--data", "other.txt", "absent.txt"],
            "absent.txt: no such file",
        ),
        "one run": (["compare", "wide"], "Two at least"),
        "no run": (["compare"], "Two at least"),
        "runs of other texts": (
            ["compare", "wide", "other"],
            "runs/other and runs/wide have other texts in their validation split",
        ),
        "a run of another task": (
            ["compare", "wide", "table"],
            "runs/table: its task is square, and `compare` is for the task text",
        ),
        "a mixture": (
            ["compare", "wide", "narrow", "--data", "other.txt:1 text.txt:1"],
            "compare scores one text: give one source of the mixture as --data",
        ),
        "samples of a mixture": (
            ["sample-quality", "wide", "--data", "other.txt:1 text.txt:1"],
            "sample-quality scores one text: give one source of the mixture as --data",
        ),
        "samples of a text of one line": (
            ["sample-quality", "wide", "--data", "short.txt"],
            "the text has room for 0 prompts with --tokens 10",
        ),
        "samples of a table": (
            ["sample-quality", "table"],
            "runs/table: its task is square, and `sample-quality` is for the task text",
        ),
        "a judge of another task": (
            ["sample-quality", "wide", "--judge", "table"],
            "runs/table: a judge is a run of the task text, not square",
        ),
        "a text of one line": (
            ["compare", "wide", "narrow", "--data", "short.txt"],
            "the train split of short.txt is too short to compare runs on: give more than 100 bytes",
        ),
        "a loss that is not finite": (
            ["compare", "wide", "diverged"],
            "runs/diverged: its loss is not finite",
        ),
        "a stride of 0": (
            ["compare", "wide", "narrow", "--stride", "0"],
            "--stride must be between 1 and 16",
        ),
        "a stride that is too large": (
            ["compare", "wide", "narrow", "--stride", "17"],
            "--stride must be between 1 and 16",
        ),
    }.values(),
)
def test_mistakes_are_one_line_and_nothing_is_scored(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main("tinygpt", arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err
