"""Presets, and how their learning rates scale with batch and width."""

import dataclasses
import re

import pytest

from training.config import LEARNING_RATES, scale_learning_rates
from training.presets import ABOUT, GPU_TIME, PRESETS, describe_preset


def scaled_config(name, width=None, **changes):
    preset = PRESETS[name]
    model_args = preset.model_args | ({"width": width} if width else {})
    config = dataclasses.replace(preset, model_args=model_args, **changes)
    return scale_learning_rates(config, preset)


def scales(name, **changes):
    config = scaled_config(name, **changes)
    before = PRESETS[name].peak_learning_rates()
    return {lr: rate / before[lr] for lr, rate in config.peak_learning_rates().items()}


@pytest.mark.parametrize("name", PRESETS)
def test_unchanged_preset_keeps_its_learning_rates(name):
    assert scale_learning_rates(PRESETS[name], PRESETS[name]) == PRESETS[name]


@pytest.mark.parametrize(
    "changes", [{"batch_size": 8}, {"context_length": 64}, {"batch_size": 64, "context_length": 32}]
)
def test_quarter_of_the_batch_tokens_halves_the_learning_rates(changes):
    assert set(scales("gpt-nano", **changes).values()) == {0.5}


def test_double_width_halves_the_learning_rates_of_sums_over_it():
    unchanged = dict.fromkeys(LEARNING_RATES, 1)
    assert scales("gpt-nano", width=384) == unchanged | {"unembedding_lr": 0.5}
    halved = {"unembedding_lr": 0.5, "learning_rate": 0.5}
    assert scales("nanogpt-cpu", width=256) == unchanged | halved


def test_gpt_presets_follow_the_width_rule():
    configs = (
        scaled_config("gpt-nano", batch_size=16),
        PRESETS["gpt-micro"],
        PRESETS["gpt-small"],
    )
    products = [config.model_args["width"] * config.unembedding_lr for config in configs]
    assert products == pytest.approx([192 * 0.008] * 3, rel=1e-3)


def test_explicit_learning_rate_is_not_scaled():
    config = scaled_config("gpt-nano", batch_size=8, learning_rate=0.3)
    assert (config.learning_rate, config.vector_lr) == (0.3, 0.00707)


def test_sgd_learning_rates_are_not_scaled():
    expected = dataclasses.replace(PRESETS["zaremba"], batch_size=5)
    assert scaled_config("zaremba", batch_size=5) == expected


@pytest.mark.parametrize("name", ["linear", "zaremba", "ptb-lstm", "nanogpt-cpu", "gpt2-124m"])
def test_explicit_learning_rate_is_that_of_all_parameters_where_a_preset_has_one_rate(name):
    rates = scaled_config(name, learning_rate=0.3).peak_learning_rates()
    assert rates == dict.fromkeys(LEARNING_RATES, 0.3)
    rates = scaled_config(name, learning_rate=0.3, vector_lr=0.2).peak_learning_rates()
    assert rates == dict.fromkeys(LEARNING_RATES, 0.3) | {"vector_lr": 0.2}


def test_every_preset_says_what_it_learns_and_how_long_it_takes():
    assert ABOUT.keys() == PRESETS.keys()
    assert all(
        about.time == GPU_TIME or re.fullmatch(r"\d+ (s|min|h)", about.time)
        for about in ABOUT.values()
    )
    assert describe_preset(PRESETS["linear"]).startswith("chapter 1: power = 4.5 x + 5")
    assert describe_preset(PRESETS["gpt-nano"]).endswith("(about 4 min on two cores)")
    assert describe_preset(PRESETS["gpt-small"]).endswith("(on a GPU)")
    short = dataclasses.replace(PRESETS["linear"], steps=5)
    assert "two cores" not in describe_preset(short)
