"""Which precision a run on a CPU trains in."""

import dataclasses

import pytest
import torch

from tests.training.helpers import write_corpus
from tests.training.test_trainer import TINY
from training import autotune
from training.autotune import choose_precision, seconds_per_step
from training.tasks.text import Text
from training.trainer import Trainer

CPU = torch.device("cpu")
LONG = dataclasses.replace(TINY, precision="auto", steps=autotune.MIN_STEPS)


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
