"""What torchrun starts in test_distributed.py; its parts for one process are called from there."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from training import cli as command
from training import distributed
from training.config import TrainingConfig
from training.data.corpus import open_corpus
from training.tasks.text import Text
from training.trainer import Stopped, Trainer, newest_checkpoint

TINY = TrainingConfig(
    model_args={"width": 16, "depth": 2, "heads": 2},
    steps=6,
    batch_size=8,
    context_length=16,
    gradient_accumulation_steps=2,
    warmup_steps=2,
    eval_interval=3,
    eval_tokens=64,
    checkpoint_interval=3,
    log_interval=1,
    sample_tokens=4,
    device="cpu",
    precision="float32",
)
DROPPING = dataclasses.replace(TINY, model_args=TINY.model_args | {"dropout": 0.3})
SGD = dataclasses.replace(TINY, optimizer="sgd", learning_rate=1.0)
EQUAL = {
    "muon": TINY,
    "adamw": dataclasses.replace(
        TINY, optimizer="adamw", learning_rate=1e-3, gradient_accumulation_steps=1
    ),
    "tied": dataclasses.replace(SGD, model="gpt2"),
    "translator": dataclasses.replace(SGD, model="transformer", grad_clip=0.01),
    "carry": dataclasses.replace(
        SGD,
        model="lstm",
        model_args={"width": 16},
        stateful=True,
        gradient_accumulation_steps=1,
        batch_size=6,
    ),
}
"""Runs that mean the same at any number of processes."""
GRADIENT = dataclasses.replace(
    SGD,
    steps=1,
    warmup_steps=0,
    cooldown_fraction=0.0,
    grad_clip=0.0,
    embedding_lr=1.0,
    unembedding_lr=1.0,
    vector_lr=1.0,
)
"""Its one step takes the gradient from the weights."""


class Halves(Text):
    """Pairs: the first half of each window, and the second."""

    def batch(self, index):
        tokens_BT, targets_BT = super().batch(index)
        half = tokens_BT.shape[1] // 2
        lengths_B = np.full(len(tokens_BT), half)
        return tokens_BT[:, :half], lengths_B, tokens_BT[:, half:], targets_BT[:, half:]


TASKS = {"translator": Halves}
"""Of a run above, where it is not Text."""


class Uneven(Text):
    """Targets that count, a few in the first rows and nearly all in the last."""

    def batch(self, index):
        tokens_BT, targets_BT = super().batch(index)
        rows, length = targets_BT.shape
        chance_BT = np.random.default_rng(index).random((rows, length))
        return tokens_BT, np.where(
            chance_BT < np.linspace(0.05, 1, rows)[:, None], targets_BT, -100
        )


def trainer_of(run, directory, corpus, task=Text, world=distributed.SINGLE_PROCESS):
    if world.is_main_process:
        directory.mkdir(exist_ok=True, parents=True)
    world.barrier()
    run = dataclasses.replace(run, fsdp=run.shard and world.size > 1)
    return Trainer(run, directory, task(run, corpus), torch.device("cpu"), world=world)


def stopped_by_one(trainer, step):
    """Train until rank 1 alone gets a signal, in the midst of a step."""
    take_step = trainer.advance

    def step_then_signal(objective):
        if trainer.step == step - 1 and trainer.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(objective)

    trainer.advance = step_then_signal
    try:
        trainer.train()
    except Stopped as stop:
        return stop.exit_code
    return 0


def both_ways(folder):
    """All that two processes train: `folder` holds the corpus, and what one process began."""
    world = distributed.init_process_group("cpu")
    corpus = open_corpus(folder / "corpus")
    for kind in ("whole", "shard"):
        here, shard = folder / kind, kind == "shard"
        for name, run in EQUAL.items():
            run = dataclasses.replace(run, fsdp=shard)
            trainer_of(run, here / name, corpus, TASKS.get(name, Text), world).train()
        run = dataclasses.replace(GRADIENT, fsdp=shard)
        trainer_of(run, here / "gradient", corpus, Uneven, world).train()

        run = dataclasses.replace(DROPPING, fsdp=shard)
        trainer_of(run, here / "straight", corpus, world=world).train()
        first = trainer_of(run, here / "broken", corpus, world=world)
        assert stopped_by_one(first, 5) == 128 + signal.SIGTERM
        second = trainer_of(run, here / "broken", corpus, world=world)
        second.resume(newest_checkpoint(here / "broken"))
        assert second.step == 5
        second.train()

        begun = trainer_of(
            dataclasses.replace(TINY, fsdp=shard), here / "begun-by-one", corpus, world=world
        )
        begun.resume(newest_checkpoint(here / "begun-by-one"))
        begun.train()


def killed_once(step):
    """The command, of which rank 1 is killed in a step the first time."""
    take_step = Trainer.train_step

    def step_or_die(self, objective):
        first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if self.world.rank == 1 and self.step == step and first_time:
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(self, objective)

    Trainer.train_step = step_or_die
    command.main()


if __name__ == "__main__":
    if sys.argv[1] == "both-ways":
        both_ways(Path(sys.argv[2]))
    else:
        killed_once(int(sys.argv.pop(1)))
