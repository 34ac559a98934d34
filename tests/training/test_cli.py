"""The training commands end to end, and one line of output for each invalid argument."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.checkpoint import find_run, load_tensors
from tests.tokenizer.kinds import KINDS, TEXT
from tests.training.helpers import save_lower_case_tokenizer
from tokenizer import Tokenizer, train_words
from training import cli
from training.checkpointing import list_checkpoints, newest_checkpoint
from training.data.corpus import CorpusWriter, TextChunk
from training.presets import PRESETS
from training.progress import read_metrics
from training.run_directory import run_lock

TRAINING_MD = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
TINY = shlex.split("""
    --tokenizer bytes --steps 6 --batch-size 4 --context-length 32 --width 16 --depth 1 --heads 1
    --warmup-steps 1 --eval-interval 3 --checkpoint-interval 3 --log-interval 1 --sample-tokens 5
    --device cpu
""")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A working directory with a text file and its own cache."""
    folder = tmp_path_factory.mktemp("workdir")
    (folder / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
    return folder


@pytest.fixture(autouse=True)
def in_workdir(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("TINYGPT_CACHE", str(workdir / "cache"))
    monkeypatch.delenv("TINYGPT_TRACEBACK", raising=False)


def training(*arguments):
    """Return the exit code, standard output and standard error of `python -m training ARGUMENTS`."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, ["training", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("training", run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(workdir):
    """A finished run."""
    os.environ["TINYGPT_CACHE"] = str(workdir / "cache")
    directory = workdir / "runs" / "done"
    code, out, err = training("train", *TINY, "--data", workdir / "text.txt", "--run", directory)
    assert code == 0, err
    return directory, out


def test_train_prints_its_config_metrics_and_next_commands(run):
    directory, out = run
    config = json.loads((directory / "run.json").read_text())
    assert "preset gpt-nano: gpt on cpu" in out
    assert f"run: {directory}, {config['parameters']:,} parameters" in out
    assert config["config"]["beta2"] == 0.95  # all settings are in run.json
    settings = re.findall(r"^  (\w+) = (\S+) \(preset: (\S+)\)$", out, re.MULTILINE)
    assert ("steps", "6", "500") in settings
    assert ("width", "16", "192") in settings
    assert ("embedding_lr", "0.01767", "0.1414") in settings  # follows --batch-size
    names = [name for name, _, _ in settings]
    assert not {"beta2", "optimizer", "hidden", "preset", "model_args", "languages"} & {*names}
    assert all(value != default for _, value, default in settings)
    assert "chapter 15: the next token, by today's GPT" in out
    assert "compile:" not in out  # never on a CPU, unless asked for
    assert "precision: float32 (auto: too few steps" in out  # instead of auto
    assert "last 10% of the characters" in out
    assert len(re.findall(r"step [36]: validation loss \d\.\d{4}, perplexity", out)) == 2
    for line in ("make sample", "make eval", "make serve"):
        assert f"{line} RUN={directory}" in out
    assert "\r" not in out


def test_table_run_ends_with_what_its_chapter_says(workdir):
    code, out, err = training("train", "linear", "--run", workdir / "runs" / "line")
    assert code == 0, err
    assert " = " not in out.partition("data:")[0].partition("4.5 x + 5")[2]  # no setting differs
    assert out.count("10 meters: 50 units of power (50)") == 2  # at step 500 and in the report
    assert "\n\n\n" not in out
    report = out.partition("with the best weights:")[2].splitlines()
    assert "  y = 4.50 x + 5.00" in report
    expected = "chapter 1 says: power = 4.5 x + 5, from eight throws; so ten meters need 50"
    assert expected in report
    options = ("--task", "square", "--steps", "2", "--run", workdir / "runs" / "bent")
    _, out, _ = training("train", "linear", *options)
    assert "  task = square (preset: basketball)" in out
    assert "chapter 1 says" not in out


def test_an_unchanged_sample_is_not_printed_again(workdir):
    options = ("--tokenizer", "words", "--data", workdir / "text.txt", "--batch-size", "1")
    options += ("--context-length", "8", "--width", "4", "--steps", "2", "--eval-interval", "1")
    options += ("--learning-rate", "1e-30", "--embedding-lr", "1e-30")
    directory = workdir / "runs" / "words"
    code, out, err = training("train", "word2vec", *options, "--run", directory)
    assert code == 0, err
    assert len(re.findall(r"^step [12]: validation loss", out, re.MULTILINE)) == 2
    assert out.count("a sample:") == 1
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    first, second = [line["sample"] for line in lines if "sample" in line]
    assert first == second != ""


def test_run_directory_is_complete(run):
    directory, out = run
    assert {path.name for path in directory.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "run.json", "metrics.jsonl"),
        "validation.safetensors",
        "checkpoints",
    }
    tokens = load_tensors(directory / "validation.safetensors")["tokens"]
    (count,) = re.findall(r"validation: [0-9,]+ bytes, ([0-9,]+) tokens", out)
    assert len(tokens) == min(int(count.replace(",", "")), 16_384) > 0
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 7)]
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]
    assert lines[-1]["final_bits_per_byte"] > 0
    assert [line["tokens"] for line in lines if "tokens" in line] == [128 * k for k in range(1, 7)]


def test_eval_counts_every_token_and_prints_its_settings(run, workdir):
    directory, out = run
    code, printed, _ = training("eval", directory)
    assert code == 0
    assert "context 32, stride 32" in printed
    assert "xz -9e" in printed
    reports = {}
    for stride in (32, 9):
        _, printed, _ = training("eval", directory, "--json", "--stride", stride)
        reports[stride] = json.loads(printed)
    text = (workdir / "text.txt").read_text()
    held_out = text[int(0.9 * len(text)) :]
    for stride, report in reports.items():
        assert (report["context_length"], report["stride"]) == (32, stride)
        assert report["tokens"] == report["bytes"] == len(held_out)
        assert report["words"] == len(held_out.split()) + held_out.count("\n")
        assert f"{report['bits_per_byte']:.4f}" in out or stride != 32


def test_eval_scores_all_of_another_text(run, workdir):
    other = workdir / "other.txt"
    other.write_text("something else\n")
    code, printed, _ = training("eval", run[0], "--data", other, "--json")
    assert code == 0
    assert json.loads(printed)["bytes"] == 15


@pytest.mark.parametrize(
    ("kind", "options", "eos"),
    [
        ("byte_fallback", [], "</s>"),
        ("unigram", [], "</s>"),
        ("word_piece", ["--end-of-text", "[CLS]"], "[CLS]"),
    ],
)
def test_runs_on_a_tokenizer_json_of_any_kind(workdir, tmp_path, kind, options, eos):
    """Train, evaluate, continue; a run knows its EOS token without the option or the file."""
    KINDS[kind]().save(str(tmp_path / "t.json"))
    (tmp_path / "text.txt").write_text(TEXT * 40)
    run, corpus = workdir / f"of-{kind}", ["--data", tmp_path / "text.txt"]
    options = ["--tokenizer", tmp_path / "t.json", *options]
    code, out, err = training("train", *TINY, *options, *corpus, "--steps", 5, "--run", run)
    assert code == 0, err
    tokenizer = Tokenizer.load(run)
    assert tokenizer.token_name(tokenizer.eos_token) == eos
    is_lossless = kind == "byte_fallback"
    assert ("no bits per byte" in out) == (not is_lossless)
    assert ("unknown)" in out) == (kind == "unigram")
    (tmp_path / "t.json").unlink()
    code, out, err = training("eval", run)
    assert code == 0, err
    assert ("bits per byte    " in out) == is_lossless
    child = ["--from", run, *corpus, "--steps", 2, "--run", workdir / f"from-{kind}"]
    code, _, err = training("train", *child)
    assert code == 0, err
    assert Tokenizer.load(workdir / f"from-{kind}").fingerprint == tokenizer.fingerprint


def test_bits_per_byte_are_not_printed_for_text_that_was_lost(workdir):
    save_lower_case_tokenizer(workdir / "lower.json")
    (workdir / "capitals.txt").write_text("The Cat Sat\n" * 200)
    directory = workdir / "runs" / "lower"
    options = ("--tokenizer", "lower.json", "--data", "capitals.txt", "--run", directory)
    code, out, err = training("train", *TINY, *options)
    assert code == 0, err
    assert out.count("no bits per byte of train, validation: the tokenizer loses text: 'The") == 1
    assert "\n  bits per byte" not in out
    assert "final_bits_per_byte" not in (directory / "metrics.jsonl").read_text()
    assert "bits_per_byte" not in json.loads(training("eval", directory, "--json")[1])
    (workdir / "small.txt").write_text("the cat sat\n")
    _, printed, _ = training("eval", directory, "--data", "small.txt", "--json")
    assert json.loads(printed)["bits_per_byte"] > 0


def test_eval_prefers_the_test_split(run, workdir):
    folder = workdir / "splits"
    folder.mkdir()
    for name in ("train", "validation", "test"):
        (folder / f"{name}.txt").write_text(f"this is {name}\n")
    for arguments, split in (((), "test"), (("--split", "train"), "train")):
        _, printed, _ = training("eval", run[0], "--data", folder, "--json", *arguments)
        report = json.loads(printed)
        assert report["split"] == split
        assert report["bytes"] == len(f"this is {split}\n")
    code, _, err = training("eval", run[0], "--data", folder, "--split", "dev")
    assert code == 2
    assert "there are test, train, validation" in err


def test_train_from_prepared_tokens(run, workdir):
    name = json.loads((run[0] / "run.json").read_text())["data"]["fingerprint"]
    files = (workdir / "cache").glob("text.txt-*/corpus.json")
    prepared = next(file.parent for file in files if name in file.read_text())
    code, _, err = training(
        "train", *TINY, "--data", prepared, "--run", workdir / "runs" / "prepared"
    )
    assert code == 0, err
    weights = "model.safetensors"
    assert (workdir / "runs" / "prepared" / weights).read_bytes() == (run[0] / weights).read_bytes()


def test_train_and_eval_on_a_mixture(workdir):
    (workdir / "other.txt").write_text("".join(f"{i} other lines\n" for i in range(300)))
    directory = workdir / "runs" / "mixture"
    two = ("--data", "text.txt:3", "--data", "other.txt:1")
    code, out, err = training("train", *TINY, *two, "--run", directory)
    assert code == 0, err
    assert "mixture by weight of tokens: 75.00% text.txt, 25.00% other.txt" in out
    run = json.loads((directory / "run.json").read_text())
    assert run["config"]["data"] == "text.txt:3 other.txt:1"
    (last,) = [line for line in read_metrics(directory) if "final_loss" in line]
    code, out, err = training("eval", directory, "--json")
    report = json.loads(out)
    assert report["split"] == "validation"
    assert report["loss"] == pytest.approx(last["final_loss"], rel=1e-6)
    by_source = {name: score["loss"] for name, score in report["sources"].items()}
    assert by_source.keys() == {"text.txt", "other.txt"}
    for name, loss in by_source.items():
        alone = training("eval", directory, "--data", name, "--split", "train", "--json")[1]
        assert json.loads(alone)["loss"] == pytest.approx(loss, rel=0.1)
    code, out, err = training("eval", directory, *two, "--json", "--split", "train")
    assert json.loads(out)["sources"].keys() == by_source.keys()
    code, _, err = training("train", "--data", "text.txt", "--data", "other.txt:1")
    assert (code, err.count("\n")) == (2, 1)
    assert "text.txt: no such file, or no weight" in err
    # What run.json says repeats the run, and one value says what two options do.
    again = workdir / "runs" / "mixture-again"
    code, _, err = training("train", "--config", directory / "run.json", "--run", again)
    assert code == 0, err
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (directory / weights).read_bytes()


def test_prepare_writes_a_folder_to_train_on(run, workdir):
    code, out, err = training("prepare", "text.txt", "tokens", "--tokenizer", "bytes")
    assert code == 0, err
    assert "train: " in out
    assert "next: tinygpt train --data tokens" in out
    example = re.findall(r"^```py\n(.*?)^```$", TRAINING_MD, re.MULTILINE | re.DOTALL)[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example)
    assert printed.getvalue() == (workdir / "text.txt").read_text()[:99] + "\n"
    directory = workdir / "runs" / "from-tokens"
    code, _, err = training("train", *TINY, "--data", "tokens", "--run", directory)
    assert code == 0, err
    weights = "model.safetensors"
    assert (directory / weights).read_bytes() == (run[0] / weights).read_bytes()
    for arguments, message in {
        ("text.txt", "tokens"): "tokens exists and is not empty: choose another folder",
        ("tokens", "more"): "tokens holds prepared tokens already",
        ("text.txt:1 a.txt:2", "more"): "prepare each source of the mixture alone",
        ("text.txt", "more", "--vocab-size", "0"): "--vocab-size must be at least 1",
        ("text.txt", "more", "--languages", "en-fr"): "add --task translation",
        ("text.txt", "more", "--shuffle-buffer", "9"): "--shuffle-buffer is of a stream",
        ("text.txt", "more", "--shuffle-buffer", "9", "--streaming"): "text.txt is local",
        ("text.txt", "more", "--data-revision", "v1"): "--data-revision is only for hub datasets",
        ("text.txt", "more", "--end-of-text", "</s>"): "leave it out with --tokenizer bpe",
        ("no.txt", "more"): "no.txt: no such file or folder",
    }.items():
        code, out, err = training("prepare", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert not (workdir / "more").exists()
    assert not (workdir / "more.part").exists()


def test_validation_documents_in_train_are_told_and_dropped(workdir):
    (workdir / "leaky").mkdir()
    rows = [json.dumps({"text": f"{i} is a number of {i} letters. " * 20}) for i in range(40)]
    (workdir / "leaky" / "train.jsonl").write_text("\n".join(rows[:35]))
    (workdir / "leaky" / "validation.jsonl").write_text("\n".join(rows[34:]))
    note = "  1 of 6 validation documents has a duplicate in train (1 exact); "
    code, out, err = training("prepare", "leaky", "leaky-tokens", "--tokenizer", "bytes")
    assert code == 0, err
    assert note in out
    for data in ("leaky", "leaky-tokens"):
        code, out, err = training("train", *TINY, "--data", data, "--run", workdir / f"of-{data}")
        assert code == 0, err
        assert note in out
    code, out, err = training("train", "--data", "leaky-tokens", "--drop-duplicates")
    assert code == 2
    assert "prepared tokens, which are used as they are: leave out --drop-duplicates" in err
    directory, options = workdir / "dropped", ["--data", "leaky", "--drop-duplicates"]
    code, out, err = training("train", *TINY, *options, "--run", directory)
    assert code == 0, err
    assert "duplicates dropped from train: 1 of 35 documents\n" in out
    assert ", 34 documents\n" in out
    assert "a duplicate in train" not in out
    # Whatever opens the run again uses the same tokens.
    before = sorted((workdir / "cache").iterdir())
    shutil.rmtree(newest_checkpoint(directory))
    for arguments in (["train", "--resume", directory], ["eval", directory]):
        code, out, err = training(*arguments)
        assert code == 0, err
    assert sorted((workdir / "cache").iterdir()) == before
    code, out, err = training("prepare", "leaky", "clean-tokens", *TINY[:2], "--drop-duplicates")
    assert code == 0, err
    assert "dropped from train: 1 of 35 documents\n  train: " in out


def test_signals_save_a_checkpoint_that_resume_continues(workdir, request):
    directory = workdir / "runs" / "stopped"
    environment = os.environ | {"PYTHONPATH": str(request.config.rootpath)}
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        command = [sys.executable, "-m", "training", "train"]
        options = [*TINY, "--data", workdir / "text.txt", "--run", directory, "--steps", "100000"]
        process = subprocess.Popen(
            command + (["--resume", directory] if directory.exists() else options),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout:
            if line.startswith("step "):
                break
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        assert process.returncode == code
        saved = newest_checkpoint(directory)
        assert f"saved {saved}" in err
        assert f"--resume {directory}" in err
        assert "Traceback" not in err


def flip_bit(path):
    """Change one bit in the middle of a file's last third."""
    content = bytearray(path.read_bytes())
    content[len(content) * 5 // 6] ^= 1
    path.write_bytes(content)


@pytest.fixture
def copied_run(run, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(run[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "rng_state.safetensors"]
)
def test_resume_from_the_checkpoint_before_a_damaged_one(file, run, copied_run):
    flip_bit(copied_run / "checkpoints" / "step-6" / file)
    code, out, err = training("train", "--resume", copied_run)
    assert code == 0
    assert f"step-6/{file}: damaged" in err
    assert "continuing from step-3 instead" in err
    assert "continues at step 3 of 6" in out
    assert [path.name for path in list_checkpoints(copied_run)] == ["step-3", "step-6"]
    for name in ("model.safetensors", "checkpoints/step-6/optimizer.safetensors"):
        assert (copied_run / name).read_bytes() == (run[0] / name).read_bytes()


def test_resume_from_before_a_damaged_trainer_state(copied_run):
    path = copied_run / "checkpoints" / "step-6" / "trainer_state.json"
    path.write_text(path.read_text().replace('"step": 6', '"step": 4'))
    code, out, _ = training("train", "--resume", copied_run)
    assert code == 0
    assert "continues at step 3 of 6" in out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "the run's checkpoints are gone"),
        (
            lambda run: [shutil.rmtree(path) for path in list_checkpoints(run)],
            "the run's checkpoints are gone",
        ),
        (
            lambda run: [(path / "model.safetensors").unlink() for path in list_checkpoints(run)],
            "every checkpoint is damaged",
        ),
        (lambda run: flip_bit(run / "model.safetensors"), "model.safetensors: damaged"),
    ],
)
def test_resume_of_a_run_without_whole_files_is_refused(damage, message, copied_run):
    damage(copied_run)
    before = sorted(copied_run.rglob("*"))
    code, out, err = training("train", "--resume", copied_run)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(copied_run.rglob("*")) == before


def test_a_locked_run_is_neither_resumed_nor_begun(run, workdir):
    with run_lock(run[0]):
        for arguments in (
            ("--resume", run[0]),
            (*TINY, "--data", workdir / "text.txt", "--run", run[0]),
        ):
            code, _, err = training("train", *arguments)
            assert code == 2
            assert f"is being trained by process {os.getpid()}" in err


def test_a_bare_name_is_in_runs_and_printed_commands_are_quoted(workdir):
    options = (*TINY, "--steps", "1", "--data", workdir / "text.txt")
    code, out, err = training("train", *options, "--run", "it's mine")
    assert code == 0, err
    assert (workdir / "runs" / "it's mine" / "run.json").exists()
    commands = [line for line in out.splitlines() if line.startswith("  make")]
    assert len(commands) == 3
    assert all(shlex.split(line)[2] == "RUN=runs/it's mine" for line in commands)
    code, out, _ = training("eval", "it's mine", "--json")
    assert code == 0
    assert json.loads(out)["run"] == "runs/it's mine"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_that_is_not_utf8_ends_no_run(encoding, workdir, monkeypatch):
    (workdir / "greek.txt").write_text("μῆνιν ἄειδε θεά\n" * 99, "utf-8")
    options = (*TINY, "--data", workdir / "greek.txt", "--run", f"runs/{encoding}")
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    cli.main("tinygpt", ["train", *map(str, options)])
    assert b"a sample:" in stream.buffer.getvalue()


def test_nonfinite_loss_exits_with_code_1(workdir):
    options = ("--unembedding-lr", "1e38", "--grad-clip", "0", "--warmup-steps", "0")
    code, _, err = training(
        "train", *TINY, *options, "--data", workdir / "text.txt", "--run", workdir / "runs" / "nan"
    )
    assert code == 1
    assert re.search(r"the loss of step \d is not finite; the last good checkpoint is", err)
    assert "Traceback" not in err


def test_plot_draws_the_logged_losses(run, workdir):
    code, _, err = training("plot", run[0], "--output", workdir / "loss.svg")
    assert (code, err) == (0, "")
    svg = (workdir / "loss.svg").read_text()
    assert "done: validation" in svg
    assert "loss (nats per token)" in svg


INVALID = {
    "an unknown preset": (
        ["train", "gtp-nano"],
        "no preset is named 'gtp-nano' (did you mean gpt-nano?",
    ),
    "a mistyped option": (["train", "--stepz", "3"], "--stepz, 3 (did you mean --steps?)"),
    "a word for a number": (["train", "--steps", "many"], "--steps: invalid literal for int()"),
    "a number out of range": (["train", "--steps", "0"], "--steps must be at least 1, not 0"),
    "an infinite rate": (
        ["train", "--learning-rate", "inf"],
        "--learning-rate must be at most 1e38, not inf",
    ),
    "NaN": (["train", "--grad-clip", "nan"], "--grad-clip must be at least 0, not nan"),
    "no such choice": (["train", "--precision", "int4"], "invalid choice 'int4'"),
    "a batch that does not divide": (
        ["train", "--gradient-accumulation-steps", "5"],
        "--batch-size 32 cannot be divided",
    ),
    "an unknown command": (["trian"], "Available subcommands: train, plan, prepare, eval,"),
    "no command": ([], "Expected one of {train, plan, prepare, eval,"),
    "no such device": (["train", "--device", "tpu"], "--device must be auto, cpu, cuda"),
    "no card": (["train", "--device", "cuda:99"], "--device cuda:99: there is none"),
    "heads that do not divide": (
        ["train", "--width", "50"],
        "width must be a multiple of 2 * heads",
    ),
    "no heads": (["train", "--heads", "0"], "heads must be at least 1"),
    "a dropout above 1": (["train", "--dropout", "2"], "dropout probability"),
    "no such file": (["train", "--data", "./absent.txt"], "./absent.txt: no such file or folder"),
    "an EOS token for a tokenizer of our own": (
        ["train", "--end-of-text", "</s>"],
        "--end-of-text names a token of a tokenizer.json: leave it out with --tokenizer bpe",
    ),
    "no such tokenizer": (
        ["train", "--tokenizer", "absent.json"],
        "absent.json: no such tokenizer",
    ),
    "a text of one line": (["train", "--data", "short.txt"], "one window of 256 needs 257"),
    "not UTF-8": (["train", "--data", "latin.txt"], "latin.txt, line 2: byte 0xe9 is not UTF-8"),
    "not JSON": (["train", "--data", "bad.jsonl"], "bad.jsonl, line 2: not JSON"),
    "an empty folder": (["train", "--data", "empty"], "no text in this folder"),
    "mixed file types": (["train", "--data", "mixed"], "mixes file types"),
    "an existing run": (["train", "--run", "runs/done"], "already holds a run"),
    "an existing folder": (["train", "--run", "./mixed"], "already holds files and is no run"),
    "this folder": (["train", "--run", "."], "already holds files and is no run"),
    "a run without a name": (["train", "--run", ""], "the name of the run is empty"),
    "no name to resume": (["train", "--resume", ""], "the name of the run is empty"),
    "no name to score": (["eval", ""], "the name of the run is empty"),
    "a flipped bit": (["eval", "flipped"], "model.safetensors: damaged (its tensors are not"),
    "a stride that is huge": (["eval", "done", "--stride", f"{10**30}"], "between 1 and 32"),
    "no context": (["eval", "done", "--context-length", "0"], "context"),
    "a ladder of no tokens": (["ladder", "--tokens", "0"], "--tokens must be at least 1"),
    "a ladder of no time": (["ladder", "--seconds", "nan"], "--seconds above 0"),
    "a plan for no card": (["plan", "--num-gpus", "-1"], "--num-gpus must be at least 1"),
    "a plan without sense": (["plan", "--mfu", "nan"], "--mfu must be above 0"),
    "no such run": (["eval", "runs/dnoe"], "no such run directory (did you mean done?)"),
    "resume of nothing": (["train", "--resume", "./empty"], "not a training run"),
    "resume with options": (["train", "--resume", "runs/done", "--steps", "9"], "--steps, 9"),
    "a stride of 0": (
        ["eval", "runs/done", "--stride", "0"],
        "between 1 and 32",
    ),
    "an unknown split": (["eval", "runs/done", "--split", "dev"], "no split is named 'dev'"),
    "data options without data": (["eval", "runs/done", "--text-column", "a"], "need --data"),
    "tokens of another tokenizer": (
        ["eval", "runs/done", "--data", "words"],
        "words was tokenized by another tokenizer than the one given (5 ids, not 257)",
    ),
    "a limit of prepared tokens": (
        ["eval", "runs/done", "--data", "words", "--data-limit", "9"],
        "words holds prepared tokens, which are used as they are: leave out --data-limit",
    ),
    "a tokenizer for prepared tokens": (
        ["train", "--data", "words", "--tokenizer", "bytes"],
        "words holds prepared tokens, which are used as they are: leave out --tokenizer",
    ),
    "data that has changed": (
        ["eval", "runs/changed"],
        "text.txt has changed since runs/changed was trained on it",
    ),
    "weights cut short": (["eval", "runs/cut"], "model.safetensors: damaged"),
    "weights of another shape": (["eval", "runs/other"], "has shape"),
    "a newer format": (["eval", "runs/newer"], "format 99, this tinygpt reads format 2: upgrade"),
    "no weights yet": (["eval", "runs/young"], "has no model.safetensors"),
    "a config cut short": (["eval", "runs/half"], "config.json: not valid JSON"),
    "an unknown model": (["eval", "runs/martian"], "no model is named 'gtp' (did you mean gpt?)"),
    "an unknown argument": (["eval", "runs/odd"], "no argument 'widht' (did you mean width?)"),
    "an unknown image format": (
        ["plot", "runs/done", "--output", "loss.doc"],
        "must end in .svg, .png",
    ),
}


@pytest.fixture(scope="module")
def broken_inputs(run, workdir):
    """Invalid files and damaged runs."""
    (workdir / "short.txt").write_text("short\n")
    (workdir / "latin.txt").write_bytes(b"one\ncaf\xe9\n" * 99)
    (workdir / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (workdir / "empty").mkdir()
    (workdir / "mixed").mkdir()
    (workdir / "mixed" / "a.txt").write_text("a")
    (workdir / "mixed" / "b.jsonl").write_text('{"text": "b"}')
    (workdir / "words").mkdir()
    writer = CorpusWriter(workdir / "words", train_words(["a word\n"], 10))
    writer.write("train", [TextChunk("a word\n", True)])
    writer.close("words")
    shutil.copytree(run[0], workdir / "runs" / "changed")
    info = json.loads((run[0] / "run.json").read_text())
    info["data"]["fingerprint"] = "0"
    (workdir / "runs" / "changed" / "run.json").write_text(json.dumps(info))
    config = json.loads((run[0] / "config.json").read_text())
    weights = (run[0] / "model.safetensors").read_bytes()
    model_args = config["model_args"]
    flipped = bytearray(weights)
    flipped[-3] ^= 16
    for name, new_config, new_weights in (
        ("cut", config, weights[: len(weights) // 2]),
        ("flipped", config, bytes(flipped)),
        ("other", config | {"model_args": model_args | {"width": 32}}, weights),
        ("newer", config | {"format": 99}, weights),
        ("young", config, None),
        ("half", None, weights),
        ("martian", config | {"model": "gtp"}, weights),
        ("odd", config | {"model_args": model_args | {"widht": 1}}, weights),
    ):
        folder = workdir / "runs" / name
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps(new_config) if new_config else '{"format": 2, "mod'
        )
        (folder / "run.json").write_bytes((run[0] / "run.json").read_bytes())
        (folder / "tokenizer.json").write_bytes((run[0] / "tokenizer.json").read_bytes())
        if new_weights is not None:
            (folder / "model.safetensors").write_bytes(new_weights)


@pytest.mark.usefixtures("broken_inputs")
@pytest.mark.parametrize("case", INVALID)
def test_invalid_arguments_print_one_line_and_exit_with_code_2(case, workdir):
    arguments, expected = INVALID[case]
    before = sorted(path.name for path in (workdir / "runs").iterdir())
    code, _, err = training(*arguments)
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1
    assert err.startswith("python -m training: ")
    assert sorted(path.name for path in (workdir / "runs").iterdir()) == before


def test_missing_runs_are_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["eval"], ["train", "--resume"]):
        code, _, err = training(*arguments)
        assert code == 2
        assert "there is no run in" in err


def test_newest_run_is_the_default(run, workdir):
    newest = workdir / "runs" / "done" / "model.safetensors"
    later = max(path.stat().st_mtime for path in (workdir / "runs").glob("*/*.safetensors")) + 10
    os.utime(newest, (later, later))
    assert find_run(None).name == "done"
    code, out, _ = training("eval", "--json")
    assert code == 0
    assert json.loads(out)["run"].endswith("runs/done")


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["eval"], ["compare"], ["sample-quality"]],
)
def test_help_lists_every_option_in_lines_that_fit(command):
    code, out, _ = training(*command, "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 130
    if "train" in command:
        for name in ("--data", "--steps", "--width", "--learning-rate", "--tensorboard", "--run"):
            assert name in out
        assert "tinygpt presets" in out


def test_presets_lists_chapter_steps_time_and_aim_of_each():
    code, out, _ = training("presets")
    assert code == 0
    head, *lines = out.splitlines()
    assert head.split() == ["preset", "chapter", "steps", "time", "learns"]
    rows = [re.fullmatch(r"(\S+) +(\d+) +([\d,]+)  (.{9}) (.+)", line).groups() for line in lines]
    assert [int(chapter) for _, chapter, *_ in rows] == sorted(int(row[1]) for row in rows)
    by_name = {name: (chapter, steps, time.strip()) for name, chapter, steps, time, _ in rows}
    assert by_name.keys() == PRESETS.keys()
    assert by_name["linear"] == ("1", "1,000", "5 s")
    assert by_name["multi30k-gpt2"] == ("14", "1,500", "35 min")
    assert by_name["gpt-small"] == ("15", "5,000", "on a GPU")
    assert max(map(len, lines)) <= 130


def test_translators_writes_a_table_and_a_plot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        json.dumps({"translation": {"en": " ".join(["cat"] * n), "fr": " ".join(["chat"] * n)}})
        for n in (1, 2, 3, 4, 5, 6)
    ]
    (tmp_path / "pairs").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "pairs" / f"{split}.jsonl").write_text("\n".join(rows * 3) + "\n")

    small = "--tokenizer bytes --context-length 64 --batch-size 6 --steps 2 --width 16 --device cpu"
    for name in ("seq2seq", "attention"):
        command = f"train translate-{name} --data pairs --run runs/{name} {small}"
        code, out, _ = training(*command.split())
        assert code == 0
        assert "WARNING: the 2 steps end inside the warmup of 20" in out
    code, out, err = training("translators", "runs/seq2seq", "runs/attention", "--output", "b.svg")
    assert code == 0
    scores = json.loads((tmp_path / "b.json").read_text())
    assert [row["run"] for row in scores] == ["seq2seq", "attention"]
    assert [bucket["pairs"] for bucket in scores[0]["buckets"]] == [6, 6, 6]
    assert f"**{scores[1]['bleu']:.1f}**" in (tmp_path / "b.md").read_text()
    assert (tmp_path / "b.md").read_text() in out
    assert "attention" in (tmp_path / "b.svg").read_text()

    (tmp_path / "text.txt").write_text("no pairs here\n" * 99)
    for arguments, message in [
        (["translators"], "which runs?"),
        (["translators", "runs/attention", "--split", "dev"], "has no split named 'dev'"),
        (["eval", "runs/attention", "--data", "text.txt"], "translation"),
        (
            ["eval", "runs/attention", "--stride", "3"],
            "--stride has no meaning in the task translation",
        ),
        (["train", "lstm", "--task", "translation", "--data", "pairs"], "lstm cannot learn"),
    ]:
        code, out, err = training(*arguments)
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1
