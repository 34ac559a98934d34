"""Several processes train as one does, and one less or more goes on where they stopped."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt.checkpoint import load_model, load_tensors, save_config
from tests.training.torchrun_worker import EQUAL, GRADIENT, TASKS, TINY, Uneven, trainer_of
from tokenizer import byte_tokenizer
from training import distributed
from training.cli import start
from training.config import TrainingConfig
from training.data.corpus import CorpusWriter, TextChunk, open_corpus
from training.run_directory import check_world, create_run
from training.tasks.text import Text
from training.trainer import checkpoints, model_arguments, newest_checkpoint

KINDS = ("whole", "shard")
WORKER = Path(__file__).with_name("torchrun_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of a few words, in a folder of its own."""
    folder = tmp_path_factory.mktemp("far")
    (folder / "corpus").mkdir()
    words = ["the", "a", "cat", "dog", "mat", "sat", "ran", "on", "and", "saw", "that", "too"]
    chance = random.Random(0)
    writer = CorpusWriter(folder / "corpus", byte_tokenizer())
    for name, count in (("train", 200), ("validation", 20)):
        texts = [" ".join(chance.choices(words, k=12)) + "\n" for _ in range(count)]
        writer.write(name, [TextChunk(text, True) for text in texts])
    writer.close("cats and dogs")
    return folder


@pytest.fixture(scope="module")
def corpus(folder):
    return open_corpus(folder / "corpus")


def torchrun(request, *arguments, restarts=0):
    environment = os.environ | {"PYTHONPATH": str(request.config.rootpath)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--nproc-per-node", "2", "--max-restarts", str(restarts)]
    return subprocess.Popen(
        [*launcher, *options, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def two(folder, corpus, request):
    """What two processes made of every run; each run of one process lies in `one`."""
    begun = trainer_of(TINY, folder / "one" / "begun", corpus)
    begun.train()
    for kind in KINDS:
        half = folder / kind / "begun-by-one"
        shutil.copytree(folder / "one" / "begun", half)
        shutil.rmtree(half / "checkpoints" / "step-6")
    process = torchrun(request, WORKER, "both-ways", folder)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return folder


def log_of(directory):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds")}
        for line in lines
    ]


def losses_of(directory, name="loss"):
    return [line[name] for line in log_of(directory) if name in line]


def newest_of(directory, files=("model", "optimizer", "carried")):
    newest = newest_checkpoint(directory)
    return {
        f"{file} {name}": tensor
        for file in files
        for name, tensor in load_tensors(newest / f"{file}.safetensors").items()
    }


def assert_close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=name, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_two_processes_is_that_of_one(kind, two, corpus, tmp_path):
    """Also where the targets that count are unevenly spread: the mean is over all of them."""
    trainer = trainer_of(GRADIENT, tmp_path / "one", corpus, Uneven)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = newest_of(two / kind / "gradient", ["model"])
    for name, tensor in trainer.model.state_dict().items():
        gradient = before[name] - tensor
        found = before[name] - after[f"model {name}"]
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-5, msg=name)
    assert losses_of(two / kind / "gradient") == pytest.approx(losses_of(tmp_path / "one"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_train_as_one(name, kind, two, corpus):
    one = two / "one" / name
    if not one.exists():
        trainer_of(EQUAL[name], one, corpus, TASKS.get(name, Text)).train()
    both = two / kind / name
    assert [line.keys() for line in log_of(both)] == [line.keys() for line in log_of(one)]
    assert losses_of(both) == pytest.approx(losses_of(one), rel=1e-5)
    validation = losses_of(one, "validation_loss")
    assert losses_of(both, "validation_loss") == pytest.approx(validation, rel=1e-5)
    assert log_of(both)[-2]["tokens"] == log_of(one)[-2]["tokens"]
    assert_close(newest_of(both), newest_of(one), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_by_one_and_resumed_by_two_equals_undisturbed(kind, two):
    """With dropout, whose random numbers each process has its own of."""
    straight, broken = two / kind / "straight", two / kind / "broken"
    assert log_of(broken) == log_of(straight)
    files = ("model", "optimizer", "random")
    one, other = newest_of(straight, files), newest_of(broken, files)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["random cpu"], one["random cpu.1"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_goes_on_where_two_stopped(kind, two, corpus, tmp_path):
    shutil.copytree(two / kind / "muon", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    trainer = trainer_of(TINY, tmp_path / "run", corpus)
    trainer.resume(newest_checkpoint(tmp_path / "run"))
    assert trainer.step == 3
    trainer.train()
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(two / "one" / "begun"), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_go_on_where_one_stopped(kind, two):
    both, one = two / kind / "begun-by-one", two / "one" / "begun"
    assert losses_of(both) == pytest.approx(losses_of(one), rel=1e-5)
    assert_close(newest_of(both), newest_of(one), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_scores_what_two_trained_as_they_did(kind, two, corpus):
    directory = two / kind / "muon"
    task = Text(TINY, corpus)
    save_config(directory, TINY.model, model_arguments(TINY, task.model_args))
    best = min(losses_of(directory, "validation_loss"))
    assert task.validate(load_model(directory)) == pytest.approx(best, rel=1e-6)


def options_of(folder, steps):
    """Of the command, for a run of dropout and Muon."""
    return (
        "train gpt-nano --width 16 --depth 2 --heads 2 --dropout 0.1 --batch-size 4 --context-length 16 "
        f"--steps {steps} --log-interval 1 --checkpoint-interval 3 --eval-interval 6 "
        f"--eval-tokens 64 --device cpu --precision float32 --data {folder / 'corpus'}"
    ).split()


@pytest.mark.long
def test_a_lost_worker_is_restarted_and_the_run_goes_on(folder, request, tmp_path):
    options = options_of(folder, 12)
    process = torchrun(request, "-m", "--", "training", *options, "--run", tmp_path / "straight")
    said, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert said.count("step 12: validation loss") == said.count("2 processes") == 1

    process = torchrun(
        request, "--", WORKER, 7, *options, "--run", tmp_path / "broken", "--fsdp", restarts=3
    )
    said, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert "continues at step 6 of 12" in said
    assert losses_of(tmp_path / "broken") == pytest.approx(losses_of(tmp_path / "straight"), 1e-5)
    assert "final_loss" in log_of(tmp_path / "broken")[-1]


def test_a_signal_to_torchrun_saves_one_checkpoint(folder, request, tmp_path):
    options = options_of(folder, 100_000)
    process = torchrun(
        request,
        "-m",
        "--",
        "training",
        *options,
        "--checkpoint-interval",
        90_000,
        "--run",
        tmp_path / "r",
    )
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate()
    assert errors.count("stopped by SIGTERM, saved") == 1
    (saved,) = checkpoints(tmp_path / "r")
    assert log_of(tmp_path / "r")[-1]["step"] <= int(saved.name.removeprefix("step-"))


def test_what_does_not_fit_the_processes_is_one_line(folder, tmp_path, monkeypatch):
    three = distributed.World(1, 3, 1)
    with pytest.raises(ValueError, match=r"--batch-size 16 .* 3 processes, .* a multiple of 6"):
        check_world(TrainingConfig(gradient_accumulation_steps=2), three)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        create_run(TrainingConfig(fsdp=True), tmp_path / "run")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="--device cuda:0 is one device and the processes are 3"):
        three.device("cuda:0")
    with pytest.raises(ValueError, match="choose --nproc-per-node 1"):
        three.device("cuda")
    assert distributed.World(0, 3).device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="--run DIR"):
        start(dataclasses.replace(TINY, data=str(folder / "corpus")), None)


def test_every_row_is_one_processs():
    for rows in (1, 7, 12):
        shares = [distributed.World(rank, 3).local_rows(rows) for rank in range(3)]
        assert [i for share in shares for i in range(rows)[share]] == list(range(rows))
