"""Two processes train as one does, and runs can be resumed by more or fewer processes."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt.checkpoint import load_model, load_tensors, save_config
from tests.training.helpers import make_trainer, read_log, write_corpus
from tests.training.torchrun_worker import (
    CONFIGS,
    FLOAT16,
    ONE_SGD_STEP,
    TASKS,
    TINY,
    UnevenTargets,
)
from training.checkpointing import list_checkpoints, newest_checkpoint
from training.config import TrainingConfig, model_arguments
from training.data.corpus import open_corpus
from training.distributed import World
from training.launch import start_run
from training.run_directory import check_batch_size, create_run
from training.tasks.text import Text

pytestmark = pytest.mark.long
MODES = ("ddp", "fsdp")
WORKER = Path(__file__).with_name("torchrun_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that contains the corpus; the runs are written next to it."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def corpus(folder):
    return open_corpus(folder / "corpus")


def torchrun(request, *arguments, max_restarts=0):
    environment = os.environ | {
        "PYTHONPATH": str(request.config.rootpath),
        "PYTHONFAULTHANDLER": "1",  # where a process aborted
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--nproc-per-node", "2", "--max-restarts", str(max_restarts)]
    return subprocess.Popen(
        [*launcher, *options, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(folder, corpus, request):
    """Folder of the runs: of two processes under `ddp` and `fsdp`, of one process under `single`."""
    make_trainer(TINY, folder / "single" / "muon", corpus).train()
    for mode in MODES:
        unfinished = folder / mode / "started-by-one"
        shutil.copytree(folder / "single" / "muon", unfinished)
        shutil.rmtree(unfinished / "checkpoints" / "step-6")
    process = torchrun(request, WORKER, "train-all", folder)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder


def losses_of(directory, name="loss"):
    return [line[name] for line in read_log(directory) if name in line]


def checkpoint_tensors(directory, files=("model", "optimizer", "sequence_state")):
    newest = newest_checkpoint(directory)
    return {
        f"{file} {name}": tensor
        for file in files
        for name, tensor in load_tensors(newest / f"{file}.safetensors").items()
    }


def assert_close(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], msg=name, **tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_two_processes_equals_that_of_one(mode, runs, corpus, tmp_path):
    """Also with unevenly distributed targets: the mean is over all of them."""
    trainer = make_trainer(ONE_SGD_STEP, tmp_path / "single", corpus, UnevenTargets)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = checkpoint_tensors(runs / mode / "gradient", ["model"])
    for name, tensor in trainer.model.state_dict().items():
        expected = before[name] - tensor
        gradient = before[name] - after[f"model {name}"]
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5, msg=name)
    assert losses_of(runs / mode / "gradient") == pytest.approx(losses_of(tmp_path / "single"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_train_as_one(name, mode, runs, corpus):
    single, double = runs / "single" / name, runs / mode / name
    if not single.exists():
        make_trainer(CONFIGS[name], single, corpus, TASKS.get(name, Text)).train()
    assert [line.keys() for line in read_log(double)] == [line.keys() for line in read_log(single)]
    assert losses_of(double) == pytest.approx(losses_of(single), rel=1e-5)
    expected = losses_of(single, "validation_loss")
    assert losses_of(double, "validation_loss") == pytest.approx(expected, rel=1e-5)
    assert read_log(double)[-2]["tokens"] == read_log(single)[-2]["tokens"]
    assert_close(checkpoint_tensors(double), checkpoint_tensors(single), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_scale_gradients_in_float16_as_one(mode, runs, corpus):
    single, double = runs / "single" / "float16", runs / mode / "float16"
    if not single.exists():
        make_trainer(FLOAT16, single, corpus).train()
    assert losses_of(double) == pytest.approx(losses_of(single), rel=1e-2)
    for name in ("loss_scale", "skipped_steps"):
        assert losses_of(double, name) == losses_of(single, name)


@pytest.mark.parametrize("mode", MODES)
def test_run_of_two_processes_resumed_after_a_signal_to_one_equals_uninterrupted(mode, runs):
    """With dropout, for which each process has its own random numbers."""
    resumed, uninterrupted = runs / mode / "resumed", runs / mode / "uninterrupted"
    assert read_log(resumed) == read_log(uninterrupted)
    files = ("model", "optimizer", "rng_state")
    expected = checkpoint_tensors(uninterrupted, files)
    actual = checkpoint_tensors(resumed, files)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
    assert not torch.equal(actual["rng_state cpu"], actual["rng_state cpu.1"])


@pytest.mark.parametrize("mode", MODES)
def test_one_process_resumes_a_run_of_two(mode, runs, corpus, tmp_path):
    shutil.copytree(runs / mode / "muon", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    trainer = make_trainer(TINY, tmp_path / "run", corpus)
    trainer.load_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert trainer.step == 3
    trainer.train()
    assert losses_of(tmp_path / "run") == pytest.approx(
        losses_of(runs / "single" / "muon"), rel=1e-5
    )


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_resume_a_run_of_one(mode, runs):
    double, single = runs / mode / "started-by-one", runs / "single" / "muon"
    assert losses_of(double) == pytest.approx(losses_of(single), rel=1e-5)
    assert_close(checkpoint_tensors(double), checkpoint_tensors(single), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_one_process_reproduces_the_validation_loss_of_two(mode, runs, corpus):
    directory = runs / mode / "muon"
    task = Text(TINY, corpus)
    save_config(directory, TINY.model, model_arguments(TINY, task.model_args))
    best = min(losses_of(directory, "validation_loss"))
    assert task.validate(load_model(directory)) == pytest.approx(best, rel=1e-6)


def command_options(folder, steps):
    return (
        "train gpt-nano --width 16 --depth 2 --heads 2 --dropout 0.1 --batch-size 4 "
        f"--context-length 16 --steps {steps} --log-interval 1 --checkpoint-interval 3 "
        "--eval-interval 6 --eval-tokens 64 --device cpu --precision float32 "
        f"--data {folder / 'corpus'}"
    ).split()


@pytest.mark.long
def test_lost_worker_is_restarted_and_the_run_is_resumed(folder, request, tmp_path):
    options = command_options(folder, 12)
    uninterrupted, broken = tmp_path / "uninterrupted", tmp_path / "broken"
    process = torchrun(
        request, "-m", "--", "training", *options, "--tensorboard", "--run", uninterrupted
    )
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(list((uninterrupted / "tensorboard").iterdir())) == 1  # of the main process
    assert output.count("step 12: validation loss") == output.count("2 processes") == 1

    process = torchrun(
        request, "--", WORKER, 7, *options, "--run", broken, "--fsdp", max_restarts=3
    )
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "continues at step 6 of 12" in output
    assert losses_of(broken) == pytest.approx(losses_of(uninterrupted), 1e-5)
    assert "final_loss" in read_log(broken)[-1]


def test_signal_to_torchrun_saves_one_checkpoint(folder, request, tmp_path):
    options = [*command_options(folder, 100_000), "--checkpoint-interval", 90_000]
    process = torchrun(request, "-m", "--", "training", *options, "--run", tmp_path / "run")
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate()
    assert errors.count("stopped by SIGTERM, saved") == 1
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert read_log(tmp_path / "run")[-1]["step"] <= int(checkpoint.name.removeprefix("step-"))


def test_options_that_do_not_fit_the_processes_are_refused(folder, tmp_path, monkeypatch):
    world = World(1, 3, 1)
    with pytest.raises(ValueError, match=r"--batch-size 16 .* 3 processes, .* a multiple of 6"):
        check_batch_size(TrainingConfig(gradient_accumulation_steps=2), world)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        create_run(TrainingConfig(fsdp=True), tmp_path / "run")
    cuda = torch.device("cuda")
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: cuda)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    with pytest.raises(ValueError, match="--device cuda:0 is one device and the processes are 3"):
        world.device("cuda:0")
    with pytest.raises(ValueError, match="choose --nproc-per-node 1"):
        world.device("cuda")
    assert World(0, 3).device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="--run DIR"):
        start_run(dataclasses.replace(TINY, data=str(folder / "corpus")), None)


def test_local_slices_divide_the_batch():
    for batch_size in (1, 7, 12):
        slices = [World(rank, 3).local_slice(batch_size) for rank in range(3)]
        rows = list(range(batch_size))
        assert [row for local_slice in slices for row in rows[local_slice]] == rows
