"""Chapter 13: what each part of a Transformer is for."""

import math

import pytest
import torch

from training.chapters import transformer


def test_weights_of_the_documents_scores():
    assert transformer.SCORES.softmax(0).tolist() == pytest.approx([0.214, 0.432, 0.354], abs=5e-4)


def test_two_matrices_make_scores_asymmetric():
    eat_bread_shared, bread_eat_shared, eat_bread, bread_eat = transformer.asymmetry()
    assert eat_bread_shared == pytest.approx(bread_eat_shared)
    assert eat_bread > bread_eat + 0.5


def test_masked_rows_are_weights_of_the_words_so_far():
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0.322, 0.322, 0.356]]
    torch.testing.assert_close(
        transformer.masked_weights(), torch.tensor(expected), atol=5e-4, rtol=0
    )
    assert (transformer.masked_weights().triu(1) == 0).all()


def test_division_by_the_root_of_the_width_keeps_variance_and_entropy():
    for width, (
        variance,
        entropy,
        scaled_variance,
        scaled_entropy,
    ) in transformer.score_statistics().items():
        assert variance == pytest.approx(width, rel=0.15)
        assert scaled_variance == pytest.approx(1, rel=0.15)
        assert scaled_entropy == pytest.approx(2.36, abs=0.05)
        assert entropy < scaled_entropy
    assert entropy < 0.1


def test_order_matters_only_with_positions():
    assert transformer.order_difference(positions=False) < 1e-12
    assert transformer.order_difference(positions=True) > 0.1


def test_no_gradient_comes_from_the_future():
    first, second, *later = transformer.future_gradients()
    assert min(first, second) > 0.1
    assert later == [0, 0]


@pytest.mark.long
def test_without_the_mask_a_decoder_copies_what_it_should_predict():
    """Only the last symbol, which is no input, must be guessed: ln 16 / 28."""
    uncertainty = math.log(transformer.SYMBOLS)
    assert transformer.loss_on_random_text(masked=True) == pytest.approx(uncertainty, rel=0.01)
    unmasked = transformer.loss_on_random_text(masked=False)
    assert uncertainty / transformer.RANDOM_LENGTH < unmasked < 0.13


def test_averages_in_a_row_are_one_unless_a_feed_forward_layer_is_between_them():
    assert transformer.two_layers_as_one(feed_forward=False) < 1e-12
    assert transformer.two_layers_as_one(feed_forward=True) > 0.1


def test_residual_connections_keep_gradients():
    """Each sigmoid layer divides a gradient by 4 or more."""
    without = transformer.gradient_through_layers(residual=False)
    assert without[0] < 4.0**-24 * 32**0.5
    assert without[0] == pytest.approx(5e-15, rel=0.1)
    assert transformer.gradient_through_layers(residual=True)[0] == pytest.approx(6.3, abs=0.1)


def test_layer_norm_keeps_the_residual_stream_small():
    assert transformer.stream_sizes("none")[-1] > 10_000
    assert max(transformer.stream_sizes("pre")) < 10
    assert transformer.stream_sizes("post") == pytest.approx([1] * 24, abs=1e-3)


def test_post_norm_gives_the_last_block_the_larger_gradient():
    pre, post = transformer.gradients_by_block("pre"), transformer.gradients_by_block("post")
    assert post[-1] > 2 * post[0]
    assert pre[-1] < pre[0]
