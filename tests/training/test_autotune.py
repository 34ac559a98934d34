"""With which threads and in which precision a run on a CPU trains."""

import dataclasses

import pytest
import torch

from tests.training.helpers import write_corpus
from tests.training.test_trainer import TINY
from training import autotune
from training.autotune import choose_precision, choose_threads, seconds_per_step
from training.tasks.text import Text
from training.trainer import Trainer

CPU = torch.device("cpu")
LONG = dataclasses.replace(TINY, precision="auto", steps=autotune.MIN_STEPS)


@pytest.fixture
def eight_threads():
    """Eight threads, and no more after the test than before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("seconds", "threads", "reason"),
    [
        ({8: 1.0, 4: 1.1}, 8, "8 (auto: fewer are not faster)"),
        ({8: 1.0, 4: 0.9}, 8, "8 (auto: fewer are not faster)"),  # a near tie
        ({8: 4.0, 4: 2.0, 2: 1.0, 1: 3.0}, 2, "2 (auto: steps are 4.00 times as fast as on all)"),
        ({8: 4.0, 4: 2.0, 2: 1.0, 1: 0.5}, 1, "1 (auto: steps are 8.00 times as fast as on all)"),
    ],
)
@pytest.mark.usefixtures("eight_threads")
def test_fewer_threads_are_chosen_where_steps_are_clearly_faster(
    seconds, threads, reason, monkeypatch
):
    monkeypatch.setattr(autotune, "seconds_per_step", lambda *_: seconds[torch.get_num_threads()])
    assert choose_threads(LONG, None, CPU) == (dataclasses.replace(LONG, threads=threads), reason)
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("eight_threads")
def test_threads_that_are_given_are_used_and_a_short_run_measures_nothing(monkeypatch):
    monkeypatch.delattr(autotune, "seconds_per_step")
    short = dataclasses.replace(LONG, steps=autotune.MIN_STEPS - 1)
    assert choose_threads(short, None, CPU) == (short, "")
    given = dataclasses.replace(LONG, threads=3)
    assert choose_threads(given, None, CPU) == (given, "")
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("speedup", "precision"), [(3.0, "bfloat16"), (1.05, "float32"), (0.1, "float32")]
)
def test_bfloat16_is_chosen_where_its_steps_are_clearly_faster(speedup, precision, monkeypatch):
    def seconds_per_step(config, *_):
        return 1 / speedup if config.precision == "bfloat16" else 1.0

    monkeypatch.setattr(autotune, "seconds_per_step", seconds_per_step)
    config, reason = choose_precision(LONG, None, CPU)
    assert config == dataclasses.replace(LONG, precision=precision)
    assert reason == (
        f"{precision} (auto: steps in bfloat16 are {speedup:.2f} times as fast as in float32)"
    )


@pytest.mark.parametrize(
    ("config", "device", "precision"),
    [
        (dataclasses.replace(LONG, precision="bfloat16"), "cpu", "bfloat16"),
        (dataclasses.replace(LONG, steps=autotune.MIN_STEPS - 1), "cpu", "float32"),
        (LONG, "mps", "auto"),  # it knows its fastest data type
    ],
)
def test_nothing_is_measured_where_it_would_not_pay(config, device, precision, monkeypatch):
    monkeypatch.delattr(autotune, "seconds_per_step")
    assert choose_precision(config, None, torch.device(device))[0].precision == precision


def test_measuring_changes_no_run(tmp_path):
    (tmp_path / "corpus").mkdir()
    corpus = write_corpus(tmp_path / "corpus")
    config = dataclasses.replace(LONG, precision="float32")

    def losses(measured):
        task = Text(config, corpus)
        if measured:
            assert seconds_per_step(config, task, CPU, num_steps=1) > 0
        trainer = Trainer(config, tmp_path, task, CPU)
        return [trainer.train_step(trainer.objective).item() for _ in range(3)]

    assert losses(measured=True) == losses(measured=False)
