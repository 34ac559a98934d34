"""Chapter 1: the numbers of the basketball throw, rice, and the rates that learn or diverge."""

import pytest
import torch
from torch import nn

from gpt.checkpoint import build_model
from gpt.models.linear import Linear, gradient_step
from training.chapters.line import (
    THROW,
    both_rices,
    first_throw,
    gradient_without_reset,
    white_rice,
)
from training.tasks.tables import BROWN, CUPS, REGRESSION_TABLES, WHITE, grain_rows


def test_a_throw_of_45_misses_50_by_5():
    x_BD, y_B = THROW
    assert (first_throw()(x_BD) - y_B).item() == -5
    assert first_throw().loss(x_BD, y_B).item() == 25


def test_one_step_at_a_rate_of_0_001_makes_the_next_throw_harder():
    model = first_throw()
    results = model.gradient_step_by_hand(0.001, *THROW)
    assert [result.item() for result in results] == [45, 25, -100, -10]
    assert model.weight.item() == pytest.approx(4.1)
    assert model.bias.item() == pytest.approx(5.01)
    assert model(THROW[0]).item() == pytest.approx(46.01)


def test_gradient_without_reset_doubles():
    assert gradient_without_reset() == (-100, -200)


@pytest.mark.parametrize(("rate", "power"), [(0.01, 55.1), (0.02, 65.2)])
def test_a_rate_of_0_01_overshoots_by_as_much_and_0_02_by_three_times(rate, power):
    model = first_throw()
    gradient_step(model, rate, *THROW)
    assert model(THROW[0]).item() == pytest.approx(power)


def test_throws_from_1_to_8_meters_are_learned_at_0_02_and_diverge_at_0_04():
    """The limit is 2 / the largest eigenvalue of the Hessian, near 1 / mean(x^2 + 1)."""
    x_BD, y_B = REGRESSION_TABLES["basketball"](0).splits["train"]
    design = torch.cat([x_BD, torch.ones_like(x_BD)], 1)
    hessian = 2 * design.T @ design / len(design)
    limit = (2 / torch.linalg.eigvalsh(hessian).max()).item()
    assert limit == pytest.approx(0.038, abs=5e-4)
    assert 1 / (x_BD.square().mean().item() + 1) == pytest.approx(limit, rel=0.02)
    for rate, learns in ((0.02, True), (0.04, False)):
        model = Linear(1)
        nn.init.zeros_(model.weight)
        losses = [gradient_step(model, rate, x_BD, y_B).item() for _ in range(50)]
        if learns:
            assert losses == sorted(losses, reverse=True)
            assert losses[-1] < 3
        else:
            assert losses[-1] > 1e6


def test_gradient_descent_finds_white_rice():
    assert white_rice().weight.item() == pytest.approx(2, abs=1e-3)
    assert white_rice().bias.item() == pytest.approx(0, abs=1e-3)


def test_white_rice_s_line_undercooks_brown_rice():
    x_BD, y_B = grain_rows(CUPS, BROWN)
    torch.testing.assert_close(y_B, 3 * CUPS)
    assert (white_rice()(x_BD[:, :1]) < y_B).all()


def test_one_line_for_both_rices_is_2_5_x_and_wrong_for_both():
    slope, affine = both_rices()
    assert slope == pytest.approx(2.5)
    assert affine.weight.item() == pytest.approx(2.5)
    assert affine.bias.item() == pytest.approx(0, abs=1e-5)
    assert 4 * slope - grain_rows(torch.tensor([4.0]), WHITE)[1].item() == pytest.approx(2)
    assert 4 * slope - grain_rows(torch.tensor([4.0]), BROWN)[1].item() == pytest.approx(-2)


@pytest.mark.parametrize(("bias", "is_linear"), [(0.0, True), (1.0, False)])
def test_linear_doubles_and_affine_does_not(bias, is_linear):
    model = Linear(1)
    nn.init.constant_(model.bias, bias)
    x_BD = torch.tensor([[3.0]])
    assert (model(2 * x_BD) == 2 * model(x_BD)).item() == is_linear
    assert (model(0 * x_BD) == 0).item() == is_linear


def test_the_same_step_trains_a_line_and_a_gpt():
    torch.manual_seed(0)
    args = {"vocab_size": 11, "context_length": 8, "width": 16, "depth": 1, "heads": 2}
    gpt = build_model("gpt", args)
    tokens_BT = torch.randint(11, (2, 9))
    losses = [gradient_step(gpt, 0.1, tokens_BT[:, :-1], tokens_BT[:, 1:]) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1
