"""Every number on the command line is used or refused in one sentence."""

import dataclasses
import math

import pytest
import torch

from training.config import TrainingConfig, model_options, new_model, resolve_config
from training.presets import PRESETS
from training.tasks import TASKS

NUMBERS = {int: (0, -1, 10**30), float: (0.0, -1.0, math.nan, math.inf, 1e300)}
MODELS = {preset.model: preset for preset in reversed(PRESETS.values())}


def numeric_fields(options):
    return {
        field.name: value
        for field in dataclasses.fields(options)
        if type(value := getattr(options, field.name)) in NUMBERS
    }


def refusal(make_config):
    """Build a config and its model from shapes alone; return the message of the ValueError, or None."""
    try:
        config = make_config()
        model_args = TASKS[config.task].expected_model_args(config)
        with torch.device("meta"):
            new_model(config, model_args)
    except ValueError as error:
        return str(error)
    return None


def check(name, value, message):
    if not (-1 < value < 1e200):  # also of NaN
        assert message, f"{name} {value} is accepted"
    if message:
        assert name in message.replace("-", "_"), f"{name} {value}: {message}"
        assert "\n" not in message


@pytest.mark.parametrize("model", MODELS)
def test_every_number_of_a_model(model):
    preset = MODELS[model]
    options = model_options(preset)
    for name, default in numeric_fields(options()).items():
        for value in NUMBERS[type(default)]:
            check(
                name,
                value,
                refusal(lambda: resolve_config(preset, options(**{name: value}), preset)),  # noqa: B023
            )


def test_every_number_of_a_run():
    preset = PRESETS["gpt-nano"]
    numbers = numeric_fields(preset) | {"data_limit": 1}
    assert len(numbers) > 20
    for name, default in numbers.items():
        for value in NUMBERS[type(default)]:
            check(name, value, refusal(lambda: dataclasses.replace(preset, **{name: value})))  # noqa: B023


def test_tokens_of_a_large_corpus_fit():
    assert TrainingConfig(data_limit=10**12, eval_tokens=10**11, seed=2**40)
