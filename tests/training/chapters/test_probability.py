"""Chapter 3: the sigmoid, its threshold, its loss and its gradient."""

import math

import pytest
import torch

from training.chapters.probability import (
    accuracy,
    gradient_by_autograd,
    gradient_by_chain_rule,
    probabilities,
    switch,
    white_or_brown,
)


def test_sigmoid_is_near_0_far_left_and_near_1_far_right():
    left, middle, right = probabilities(switch(1, 0), -10, 0, 10)
    assert (left, middle, right) == pytest.approx((0.00005, 0.5, 0.99995), abs=1e-5)
    assert left + right == pytest.approx(1)


def test_bias_is_a_threshold_of_10():
    assert probabilities(switch(1, -10), 8, 9, 10, 11, 12) == pytest.approx(
        [0.119, 0.269, 0.5, 0.731, 0.881], abs=5e-4
    )
    x_BD = torch.tensor([[9.0], [9.99], [10.0], [11.0]])
    assert switch(1, -10).classify(x_BD).tolist() == [0, 0, 1, 1]


def test_a_sharper_switch_has_the_same_threshold():
    model = switch(10, -100)
    assert probabilities(model, 9, 10, 11) == pytest.approx([0.00005, 0.5, 0.99995], abs=1e-5)
    at_9 = torch.tensor([[9.0]]), torch.tensor([1.0])
    assert model.loss(*at_9).item() == pytest.approx(10, abs=1e-3)
    assert switch(1, -10).loss(*at_9).item() == pytest.approx(1.3, abs=0.02)


@pytest.mark.parametrize(
    ("p", "nats"), [(0.99, 0.010), (0.9, 0.105), (0.5, 0.693), (0.1, 2.303), (0.01, 4.605)]
)
def test_loss_is_the_surprise_at_the_true_answer(p, nats):
    x_BD = torch.tensor([[math.log(p / (1 - p))]])
    assert switch(1, 0).loss(x_BD, torch.ones(1)).item() == pytest.approx(nats, abs=5e-4)
    assert switch(1, 0).loss(-x_BD, torch.zeros(1)).item() == pytest.approx(nats, abs=5e-4)


@pytest.mark.parametrize("example", [(0, 0, 3, 1), (0.5, -1, 2, 0), (-1, 0.3, 1.5, 1)])
def test_three_slopes_of_the_chain_rule_are_error_times_input(example):
    p, by_p, by_score, by_weight = gradient_by_chain_rule(*example)
    *_, x, y = example
    assert by_p * by_score * by_weight == pytest.approx((p - y) * x)
    assert gradient_by_autograd(*example) == pytest.approx((p - y) * x)


def test_gradient_of_the_worked_example():
    assert gradient_by_chain_rule(0, 0, 3, 1) == (0.5, -2, 0.25, 3)
    assert gradient_by_autograd(0, 0, 3, 1) == -1.5


def test_border_between_the_rices_is_near_two_and_a_half_cups():
    model = white_or_brown()
    cups, water = model.score.weight.tolist()
    assert -cups / water == pytest.approx(2.55, abs=0.01)
    assert model.score.bias.item() / water == pytest.approx(0, abs=0.02)
    assert accuracy(model, "validation") == pytest.approx(0.976, abs=0.002)
