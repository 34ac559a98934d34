"""Chapter 8: three days of prices, heads, and powers of a weight and of a matrix."""

import math

import pytest
import torch

from training.chapters import rnn


def test_one_cell_reads_three_days_with_the_same_weights():
    first, second, third = rnn.three_days_by_hand(0.1, 0.2, 0.3)
    assert first == pytest.approx(math.tanh(0.1))
    assert second == pytest.approx(math.tanh(0.2 + 0.5 * first))
    assert third == pytest.approx(math.tanh(0.3 + 0.5 * second))


def test_rnn_predicts_the_fourth_day_from_three_better_than_a_weighted_sum():
    same, weighted_sum, recurrent = rnn.forecast_errors().values()
    assert recurrent < weighted_sum / 2 < same / 4
    assert recurrent < 0.08


def test_two_days_do_not_determine_the_third():
    """Waves of 5 and of 12 days agree on two days and not on the fourth."""
    x_BTD, y_B = rnn.waves(5000, seed=2)
    days_BD = x_BTD.squeeze(-1)
    near = (days_BD[:, 1:] - days_BD[:1, 1:]).abs().max(1).values < 0.05
    assert y_B[near].max() - y_B[near].min() > 0.3


def test_heads_of_a_cell_are_for_a_number_a_probability_and_classes():
    x_BTD, y_B = rnn.waves(8, seed=1)
    wanted = rnn.targets(x_BTD, y_B)
    assert torch.equal(wanted["probability"], (y_B > x_BTD[:, 2, 0]).double())
    probability_B = rnn.forecaster("probability")(x_BTD)
    assert ((probability_B > 0) & (probability_B < 1)).all()
    classes_BV = rnn.forecaster("classes")(x_BTD)
    assert classes_BV.shape == (8, 3)
    torch.testing.assert_close(classes_BV.sum(-1), torch.ones(8).double())
    right = rnn.accuracies()
    assert right["probability"] > 0.95
    assert right["classes"] > 0.9


@pytest.mark.parametrize(
    ("weight", "steps", "left"), [(0.2, 5, 0.00032), (0.5, 100, 7.9e-31), (2.0, 100, 1.3e30)]
)
def test_powers_of_a_weight(weight, steps, left):
    gradients_T = rnn.scalar_gradients(weight, steps)
    assert gradients_T[-1].item() == pytest.approx(weight**steps)
    assert gradients_T[-1].item() == pytest.approx(left, rel=0.03)


@pytest.mark.parametrize("radius", [0.9, 1.0, 1.1])
def test_gradient_through_a_matrix_is_its_power_and_its_largest_eigenvalue_decides(radius):
    norms_T = rnn.matrix_gradients(radius, 200)
    torch.manual_seed(0)
    weight_DD = torch.randn(16, 16, dtype=torch.float64)
    weight_DD = weight_DD * radius / torch.linalg.eigvals(weight_DD).abs().max()
    power = torch.linalg.matrix_power(weight_DD.t(), 100) @ torch.ones(16).double()
    assert norms_T[100].item() == pytest.approx(power.norm().item() / 4, rel=1e-9)
    assert (norms_T[200] / norms_T[100]).item() ** 0.01 == pytest.approx(radius, rel=0.01)


def test_clipping_shortens_an_exploded_gradient():
    before, after = rnn.clipped_gradient(1.0)
    assert before > 100
    assert after == pytest.approx(1)


def test_powers_figure_shows_them():
    scalar, matrix = rnn.powers()
    for series in scalar.series:
        weight = float(series.label.removeprefix("w = "))
        assert series.y[40].item() == pytest.approx(weight**40)
    exploding, steady, vanishing = (series.y[-1].item() for series in matrix.series)
    assert vanishing < 1e-4 < 0.01 < steady < 100 < 1000 < exploding
