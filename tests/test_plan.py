"""What a plan says of a run, held against real steps on this CPU."""

import dataclasses
import json

import pytest
import torch
from test_training_cli import training
from torch.profiler import ProfilerActivity, profile

from gpt.checkpoint import BY_NAME
from gpt.device import Card, find_card
from training import plan as planning
from training.loop import Objective, new_model
from training.optimizer import Optimizers
from training.plan import Place, measure, plan
from training.presets import PRESETS
from training.tasks import TASKS

GIB = 2**30
CPU = torch.device("cpu")
ROWS = 4
SMALL = {"width": 32, "depth": 2, "heads": 2}


def small(name, **changes):
    """The preset at a tiny shape."""
    run = PRESETS[name]
    known = {field.name for field in dataclasses.fields(planning_options(run))}
    arguments = {**run.arguments, **{k: v for k, v in SMALL.items() if k in known}}
    if run.model == "seq2seq" or run.model in ("rnn", "lstm", "gru"):
        arguments.pop("depth", None)
    sizes = {} if run.task in TABLES else {"vocabulary": 300, "window": 32, "batch": ROWS}
    return dataclasses.replace(run, arguments=arguments, **(sizes | changes))
