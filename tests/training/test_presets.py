"""Presets, and how the rates of one follow what is changed in it."""

import dataclasses

import pytest

from training.config import RATES, scale_learning_rates
from training.presets import PRESETS

FAMILY = ("gpt-nano", "gpt-micro", "gpt-small")


def changed(name, **changes):
    run = PRESETS[name]
    arguments = run.model_args | {"width": changes.pop("width")} if "width" in changes else None
    run = dataclasses.replace(run, model_args=arguments or run.model_args, **changes)
    return scale_learning_rates(run, PRESETS[name])


def ratios(name, **changes):
    run = changed(name, **changes)
    return {rate: getattr(run, rate) / getattr(PRESETS[name], rate) for rate in RATES}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_as_it_is_keeps_its_rates(name):
    assert scale_learning_rates(PRESETS[name], PRESETS[name]) == PRESETS[name]


@pytest.mark.parametrize(
    "changes", [{"batch_size": 4}, {"context_length": 64}, {"batch_size": 32, "context_length": 32}]
)
def test_a_quarter_of_the_tokens_takes_half_the_rates(changes):
    assert set(ratios("gpt-nano", **changes).values()) == {0.5}


def test_twice_the_width_halves_the_rate_of_what_adds_up_over_it():
    assert ratios("gpt-nano", width=384) == dict.fromkeys(RATES, 1) | {"unembedding_lr": 0.5}
    halved = {"unembedding_lr": 0.5, "learning_rate": 0.5}
    assert ratios("nanogpt-cpu", width=256) == dict.fromkeys(RATES, 1) | halved


def test_the_presets_of_one_family_follow_the_rule_of_the_width():
    rates = {PRESETS[name].model_args["width"]: PRESETS[name].unembedding_lr for name in FAMILY}
    assert {width * rate for width, rate in rates.items()} == {192 * 0.008}


def test_a_rate_that_was_given_stays():
    run = changed("gpt-nano", batch=4, learning_rate=0.3)
    assert (run.learning_rate, run.vector_lr) == (0.3, 0.005)


def test_rates_of_sgd_stay():
    assert changed("zaremba", batch=5) == dataclasses.replace(PRESETS["zaremba"], batch_size=5)
