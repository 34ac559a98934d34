"""Runs that begin with the weights of another: `train --from RUN`."""

import json
import random
import shutil

import pytest

from gpt.checkpoint import load_tensors
from tests.training.helpers import read_log
from tokenizer import Tokenizer
from training import cli
from training.config import TrainingConfig
from training.finetuning import RATE_FRACTION, finetune_config

OPTIONS = [
    "--steps",
    "30",
    "--warmup-steps",
    "2",
    "--batch-size",
    "4",
    "--eval-interval",
    "10",
    "--log-interval",
    "1",
    "--eval-tokens",
    "512",
    "--device",
    "cpu",
]
SIZES = [
    "--width",
    "32",
    "--depth",
    "1",
    "--heads",
    "2",
    "--context-length",
    "32",
    "--vocab-size",
    "300",
]


def make_text(path, words):
    rng = random.Random(0)
    path.write_text("".join(rng.choice(words.split()) + rng.choice(" \n") for _ in range(4000)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two texts, and a run that was trained on the first."""
    folder = tmp_path_factory.mktemp("finetuning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYGPT_CACHE", str(folder / "cache"))
        text = make_text(folder / "first.txt", "the cat sat on the mat and saw the dog")
        make_text(folder / "second.txt", "dog dog dog saw saw the cat mat mat mat mat")
        train("gpt-nano", "--data", text, "--run", folder / "parent", *SIZES, steps=100)
        yield folder


def train(*arguments, steps=30, options=OPTIONS):
    arguments = *map(str, arguments), "--steps", str(steps)
    cli.main("tinygpt", ["train", *arguments, *options])


def train_child(folder, run, *arguments):
    train("--from", folder / "parent", "--data", folder / "second.txt", "--run", run, *arguments)
    return json.loads((run / "run.json").read_text())


def losses(run):
    return [line["loss"] for line in read_log(run) if "loss" in line]


def test_child_begins_with_its_parent_and_learns(folder, tmp_path):
    run = train_child(folder, tmp_path / "child")
    parent = json.loads((folder / "parent" / "run.json").read_text())
    start = losses(tmp_path / "child")[0]
    assert start < losses(folder / "parent")[0] - 1  # not from the beginning
    assert losses(tmp_path / "child")[-1] < start - 0.2
    assert run["config"]["learning_rate"] == pytest.approx(
        parent["config"]["learning_rate"] * RATE_FRACTION, rel=1e-3
    )
    assert run["parent"]["run"] == str(folder / "parent")
    assert run["parent"]["data"] == parent["data"]
    assert run["parent"]["final"]["final_loss"] == read_log(folder / "parent")[-1]["final_loss"]
    fingerprints = {
        Tokenizer.load(each).fingerprint for each in (tmp_path / "child", folder / "parent")
    }
    assert len(fingerprints) == 1


def test_first_step_is_taken_from_the_parents_weights(folder, tmp_path):
    train_child(
        folder,
        tmp_path / "child",
        "--learning-rate",
        "1e-9",
        "--embedding-lr",
        "1e-9",
        "--unembedding-lr",
        "1e-9",
        "--vector-lr",
        "1e-9",
    )
    child, parent = (
        load_tensors(run / "model.safetensors") for run in (tmp_path / "child", folder / "parent")
    )
    for name, tensor in parent.items():
        assert (child[name] - tensor).abs().max() < 1e-5, name


def test_options_of_the_parents_data_and_machine_are_not_inherited(folder, tmp_path):
    run = tmp_path / "parent"
    shutil.copytree(folder / "parent", run)
    content = json.loads((run / "run.json").read_text())
    theirs = {"data": "a/b", "text_column": "story", "data_split": "train[:1%]", "streaming": True}
    content["config"] |= {**theirs, "threads": 7, "precision": "float16", "batch_size": 9}
    (run / "run.json").write_text(json.dumps(content))
    child = finetune_config(run)
    default = TrainingConfig()
    for name in (*theirs, "threads", "precision"):
        assert getattr(child, name) == getattr(default, name)
    assert child.batch_size == 9


def test_a_line_continues_from_another_line(tmp_path):
    train("linear", "--device", "cpu", "--run", tmp_path / "parent", options=(), steps=400)
    train("--from", tmp_path / "parent", "--run", tmp_path / "child", options=())
    first, *_ = losses(tmp_path / "child")
    assert first < losses(tmp_path / "parent")[0] / 10


def test_a_longer_context_than_the_parents(folder, tmp_path):
    run = train_child(
        folder, tmp_path / "child", "--context-length", "64", "--rotary-base", "40000"
    )
    assert run["config"]["context_length"] == 64
    assert losses(tmp_path / "child")[-1] < losses(tmp_path / "child")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "64"], "Leave out the options that change its sizes"),
        (["--tokenizer", "bytes"], "its weights only fit its own; leave out --tokenizer"),
    ],
)
def test_what_does_not_fit_the_parent_is_one_line(arguments, message, folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_child(folder, tmp_path / "child", *arguments)
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "child" / "run.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "nowhere"], "runs/nowhere: no such run directory"),
        (["gpt-nano", "--from", "nowhere"], "leave out the preset gpt-nano"),
        (["--from"], "the name of the run is empty"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main("tinygpt", ["train", *arguments])
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
