"""The tasks by name, and which model learns from which."""

import dataclasses

from gpt.checkpoint import did_you_mean, model_class
from tokenizer import Tokenizer
from training.config import TrainingConfig
from training.tasks.base import Task
from training.tasks.tables import TABLES
from training.tasks.text import Text, Vectors
from training.tasks.translation import Pairs

TASKS: dict[str, type[Task]] = {
    "text": Text,
    "word-vectors": Vectors,
    "translation": Pairs,
    **TABLES,
}
"""What `--task` can be."""


def check(run: TrainingConfig) -> None:
    """A ValueError if the run's model cannot learn its task, or an option has no meaning in it."""
    if run.task not in TASKS:
        raise ValueError(
            f"no task is named {run.task!r}{did_you_mean(run.task, TASKS)}; there are {', '.join(TASKS)}"
        )
    task, model = TASKS[run.task], model_class(run.model)
    if task.kind not in model.supported_tasks:
        fitting = [name for name, other in TASKS.items() if other.kind in model.supported_tasks]
        raise ValueError(
            f"the model {run.model} cannot learn the task {run.task}: "
            f"its --task can be {', '.join(fitting)}"
        )
    for field in dataclasses.fields(TrainingConfig):
        if field.name in task.unsupported_options and getattr(run, field.name) != field.default:
            option = field.name.replace("_", "-")
            raise ValueError(f"--{option} has no meaning in the task {run.task}: leave it out")


def open_task(
    run: TrainingConfig, tokenizer: Tokenizer | None = None, to_train: bool = True
) -> Task:
    """The run's task with its data.

    Args:
        run: What to train on, and how.
        tokenizer: The one that the run was begun with, where it is gone on with or judged.
        to_train: Whether batches will be asked for; else the data's splits are taken as found.
    """
    check(run)
    return TASKS[run.task].open(run, tokenizer, to_train)
