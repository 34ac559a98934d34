"""The training tasks by name, and which models can learn them."""

import dataclasses

from gpt.checkpoint import did_you_mean, model_class
from tokenizer import Tokenizer
from training.config import TrainingConfig
from training.tasks.base import Task
from training.tasks.tables import TABULAR_TASKS
from training.tasks.text import Text, WordVectors
from training.tasks.translation import Translation

TASKS: dict[str, type[Task]] = {
    "text": Text,
    "word-vectors": WordVectors,
    "translation": Translation,
    **TABULAR_TASKS,
}
"""The values of `--task`."""


def check_task(config: TrainingConfig) -> None:
    """Raise a ValueError if the model cannot learn the task, or an option does not apply to it."""
    if config.task not in TASKS:
        hint = did_you_mean(config.task, TASKS)
        raise ValueError(f"no task is named {config.task!r}{hint}; there are {', '.join(TASKS)}")
    task, model = TASKS[config.task], model_class(config.model)
    if task.kind not in model.supported_tasks:
        names = [name for name, other in TASKS.items() if other.kind in model.supported_tasks]
        raise ValueError(
            f"the model {config.model} cannot learn the task {config.task}: "
            f"its --task can be {', '.join(names)}"
        )
    for field in dataclasses.fields(TrainingConfig):
        if field.name in task.unsupported_options and getattr(config, field.name) != field.default:
            option = field.name.replace("_", "-")
            raise ValueError(f"--{option} has no meaning in the task {config.task}: leave it out")


def open_task(
    config: TrainingConfig, tokenizer: Tokenizer | None = None, for_training: bool = True
) -> Task:
    """Open the task of a run with its data.

    The tokenizer is the run's, when it is resumed or evaluated; None for a new run. If not
    `for_training`, there are no batches, and the data needs no validation split.
    """
    check_task(config)
    return TASKS[config.task].open(config, tokenizer, for_training)
