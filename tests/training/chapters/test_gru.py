"""Chapter 10: the cases of each gate, and both conventions."""

import math

import pytest
import torch

from training.chapters import gru, reviews
from training.chapters.gru import step_by_hand
from training.chapters.lstm import OPEN


def test_carry_gate_1_carries_everything_forward_and_0_takes_the_candidate():
    assert step_by_hand(r=OPEN, z=OPEN) == step_by_hand(r=-OPEN, z=OPEN) == pytest.approx(0.8)
    assert step_by_hand(r=OPEN, z=-OPEN) == pytest.approx(math.tanh(0.5 + 0.8))


def test_reset_gate_0_ignores_the_past():
    assert step_by_hand(r=-OPEN, z=-OPEN) == pytest.approx(math.tanh(0.5))


def test_the_weights_of_old_and_new_add_up_to_1():
    half = step_by_hand(r=OPEN, z=0)
    assert half == pytest.approx((0.8 + math.tanh(1.3)) / 2)
    assert reviews.share_between(reviews.reader("GRU"), "hidden") == 1


def test_z_written_the_other_way_is_the_same_model_with_its_weights_negated():
    flipped, cho = gru.conventions()
    assert flipped < 1e-12
    assert cho > 0.01


def test_a_gru_has_three_quarters_of_an_lstms_weights_and_three_times_an_rnns():
    sizes = gru.cell_sizes(512)
    assert sizes["GRU"] / sizes["LSTM"] == pytest.approx(0.75, abs=0.002)
    assert sizes["LSTM"] / sizes["RNN"] == pytest.approx(4, abs=0.01)


def test_carry_figure_mixes_the_state_of_the_word_before_with_the_candidate():
    carry, candidate, hidden = (panel.values for panel in gru.carry())
    expected = carry[1:] * hidden[:-1] + (1 - carry[1:]) * candidate[1:]
    torch.testing.assert_close(hidden[1:], expected)
