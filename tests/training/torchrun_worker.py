"""The program that test_distributed.py starts with torchrun, and its configs and tasks."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import numpy as np

from tests.training.helpers import make_trainer
from training import cli, distributed
from training.checkpointing import newest_checkpoint
from training.config import TrainingConfig
from training.data.corpus import open_corpus
from training.tasks.text import Text
from training.trainer import Stopped, Trainer

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
FLOAT16 = dataclasses.replace(TINY, precision="float16")
DROPOUT = dataclasses.replace(TINY, model_args=TINY.model_args | {"dropout": 0.3})
SGD = dataclasses.replace(TINY, optimizer="sgd", learning_rate=1.0)
CONFIGS = {
    "muon": TINY,
    "adamw": dataclasses.replace(
        TINY, optimizer="adamw", learning_rate=1e-3, gradient_accumulation_steps=1
    ),
    "tied": dataclasses.replace(SGD, model="gpt2"),
    "translation": dataclasses.replace(SGD, model="transformer", grad_clip=0.01),
    "stateful": dataclasses.replace(
        SGD,
        model="lstm",
        model_args={"width": 16},
        stateful=True,
        gradient_accumulation_steps=1,
        batch_size=6,
    ),
}
"""Without random numbers, so that any number of processes should train equally."""
ONE_SGD_STEP = dataclasses.replace(
    SGD,
    steps=1,
    warmup_steps=0,
    cooldown_fraction=0.0,
    grad_clip=0.0,
    embedding_lr=1.0,
    unembedding_lr=1.0,
    vector_lr=1.0,
)
"""Its update is the negative gradient."""


class HalfWindowPairs(Text):
    """Sentence pairs: the first and the second half of each window."""

    def batch(self, index):
        tokens_BT, targets_BT = super().batch(index)
        half = tokens_BT.shape[1] // 2
        lengths_B = np.full(len(tokens_BT), half)
        return tokens_BT[:, :half], lengths_B, tokens_BT[:, half:], targets_BT[:, half:]


TASKS = {"translation": HalfWindowPairs}
"""The tasks of CONFIGS that are not Text."""


class UnevenTargets(Text):
    """Text that ignores most targets of the first rows and few of the last."""

    def batch(self, index):
        tokens_BT, targets_BT = super().batch(index)
        rows, length = targets_BT.shape
        random_BT = np.random.default_rng(index).random((rows, length))
        threshold_B1 = np.linspace(0.05, 1, rows)[:, None]
        return tokens_BT, np.where(random_BT < threshold_B1, targets_BT, -100)


def train_until_signal(trainer, step):
    """Train until rank 1 alone receives a signal within a step; return the exit code."""
    train_step = trainer.train_step

    def train_step_with_signal(objective):
        if trainer.step == step - 1 and trainer.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(objective)

    trainer.train_step = train_step_with_signal
    try:
        trainer.train()
    except Stopped as stop:
        return stop.exit_code
    return 0


def train_all(folder):
    """Train every config with DDP and FSDP. `folder` contains the corpus and a run of one process."""
    world = distributed.init_process_group("cpu")
    corpus = open_corpus(folder / "corpus")

    def trainer(mode, name, config, task_class=Text):
        config = dataclasses.replace(config, fsdp=mode == "fsdp")
        return make_trainer(config, folder / mode / name, corpus, task_class, world)

    for mode in ("ddp", "fsdp"):
        for name, config in CONFIGS.items():
            trainer(mode, name, config, TASKS.get(name, Text)).train()
        trainer(mode, "gradient", ONE_SGD_STEP, UnevenTargets).train()
        trainer(mode, "float16", FLOAT16).train()

        trainer(mode, "uninterrupted", DROPOUT).train()
        assert train_until_signal(trainer(mode, "resumed", DROPOUT), 5) == 128 + signal.SIGTERM
        resumed = trainer(mode, "resumed", DROPOUT)
        resumed.load_checkpoint(newest_checkpoint(folder / mode / "resumed"))
        assert resumed.step == 5
        resumed.train()

        started_by_one = trainer(mode, "started-by-one", TINY)
        started_by_one.load_checkpoint(newest_checkpoint(folder / mode / "started-by-one"))
        started_by_one.train()


def run_command_and_die_once(step):
    """Run the `training` command; the first time, rank 1 is killed in this step."""
    train_step = Trainer.train_step

    def train_step_or_die(self, objective):
        first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if self.world.rank == 1 and self.step == step and first_start:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, objective)

    Trainer.train_step = train_step_or_die
    cli.main()


if __name__ == "__main__":
    if sys.argv[1] == "train-all":
        train_all(Path(sys.argv[2]))
    else:
        run_command_and_die_once(int(sys.argv.pop(1)))
