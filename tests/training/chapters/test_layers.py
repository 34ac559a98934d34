"""Chapter 5: what its examples and figures claim."""

import pytest
import torch

from gpt.models.mlp import MLP
from training.chapters import layers
from training.chapters.fitting import predict
from training.tasks.tables import GRAINS, digit_rows


def test_two_linear_layers_are_one():
    x = torch.linspace(-5, 5, 11).double()
    torch.testing.assert_close(predict(layers.two_linear_layers(), x), 6 * x + 7)


def test_a_sum_of_words_cannot_rate_not_good_and_a_hidden_layer_can():
    without, hidden = layers.reviews().values()
    torch.testing.assert_close(without, torch.full((4,), 0.5).double(), atol=1e-3, rtol=0)
    assert hidden.round().tolist() == [1, 0, 0, 1]


def test_gradients_shrink_along_a_chain_of_sigmoids():
    cost, gradients_L = layers.chain_gradients()
    assert cost.item() == pytest.approx(0.435, abs=1e-3)
    ratios = gradients_L[:-1] / gradients_L[1:]
    # A layer multiplies by w sigmoid', at most a quarter; the activations below it differ little.
    assert ((ratios > 0.2) & (ratios < 0.28)).all()


@pytest.mark.parametrize("depth", [10, 20])
def test_gradient_vanishes_through_sigmoids_and_not_through_relus(depth):
    assert layers.gradients_by_layer("sigmoid", depth)[0] < 0.4 ** (depth - 1)
    assert 0.3 < layers.gradients_by_layer("relu", depth)[0] < 3


def test_digits_are_scikit_learns_and_validation_comes_last():
    rows = digit_rows()
    assert [len(class_B) for _, class_B in rows.values()] == [1437, 360]
    x_BD, class_B = rows["train"]
    assert (x_BD.min(), x_BD.max()) == (0, 1)
    assert class_B[:10].tolist() == list(range(10))


def test_a_network_trained_by_hand_reads_digits():
    assert layers.accuracy(layers.digits_by_hand()) > 0.88


def test_hidden_units_read_more_digits_than_a_softmax_of_pixels():
    softmax, hidden = layers.softmax_of_pixels(), layers.digit_classifier()
    assert layers.accuracy(hidden) > layers.accuracy(softmax) > 0.87


def test_ten_layers_learn_with_relus_and_not_with_sigmoids():
    assert layers.accuracy(layers.deep_classifier("relu")) > 0.8
    assert layers.accuracy(layers.deep_classifier("sigmoid")) < 0.15


def test_larger_batches_agree_more_with_the_whole_gradient():
    one, eight, many = (layers.batch_agreement(size) for size in (1, 8, 64))
    assert one < 0.9 < eight < many
    assert many > 0.99


def test_pipeline_classifies_then_applies_the_line_of_the_class():
    for grain in GRAINS:
        water = layers.water_by_rule(4, grain.darkness)
        assert water == pytest.approx(4 * grain.water, abs=0.01)


def test_relu_switch_passes_its_grain_shuts_the_others_and_opens_again():
    cups = torch.tensor([4.0, 50.0, 60.0])
    assert layers.white_relu(cups, 0).tolist() == [8, 100, 120]
    assert layers.white_relu(cups, 1).tolist() == [0, 0, 20]
    assert layers.white_relu(cups, 0.05).tolist() == pytest.approx([3, 95, 115])


def test_relu_switch_is_a_network_that_adds_up_its_grains():
    switch = layers.relu_switch()
    assert isinstance(switch, MLP)
    for kind, grain in enumerate(GRAINS):
        p_V = torch.eye(3)[kind]
        water = predict(switch, torch.tensor(4), *p_V)
        assert water.item() == pytest.approx(4 * grain.water)


def test_relu_switch_takes_water_away_where_the_classifier_is_not_certain():
    for grain in GRAINS:
        assert layers.water_by_switch(4, grain.darkness) < layers.water_by_rule(4, grain.darkness)


def test_three_relus_have_three_kinks_and_sigmoids_none():
    _, panel = layers.activations()
    kinks = {
        s.label: (s.y.diff().diff().abs() > 0.05 * s.y.diff().abs().max() + 0.02).sum().item()
        for s in panel.series
    }
    assert kinks == {"relu": 3, "sigmoid": 0, "tanh": 0}
