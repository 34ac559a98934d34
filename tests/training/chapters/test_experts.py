"""Chapter 6: what its examples and figures claim."""

import pytest
import torch

from gpt.summary import count_parameters
from training.chapters import experts
from training.chapters.fitting import predict
from training.tasks.tables import GRAINS, grain_rows


def test_gates_of_the_darkness_mix_lines_into_the_line_of_each_grain():
    best = experts.lowest(experts.split_starts())
    assert experts.slopes(best.model) == pytest.approx([2, 3, 1], abs=1e-3)
    assert best.error_at_ten < 1e-2


def test_no_expert_holds_the_law_of_a_grain_alone():
    model = experts.lowest(experts.split_starts()).model
    slopes = model.mixture.experts.weight[:, 0].tolist()
    assert slopes == pytest.approx([1.87, -1.00, 5.59], abs=0.02)
    gates_BE = model.gate_weights(torch.tensor([[0, g.darkness] for g in GRAINS]).double())
    assert gates_BE[1:].amax(-1).max() < 0.7


def test_seven_of_eight_starts_are_stuck():
    errors = [start.error_at_ten for start in experts.split_starts()]
    assert sum(error > 4 for error in errors) == 7


def test_gates_that_see_the_cups_fit_and_do_not_extrapolate():
    starts = experts.joint_starts()
    assert sum(start.loss < 0.05 for start in starts) >= 6
    assert min(start.error_at_ten for start in starts) > 3


def test_the_documents_trained_layer_gives_the_documents_numbers():
    model = experts.documents_layer()

    def water(cups):
        x_BD, _ = grain_rows(torch.tensor([float(cups)]), *GRAINS)
        return predict(model, *x_BD.t()).tolist()

    assert water(1)[1] == pytest.approx(2.84, abs=0.01)
    assert water(5)[1] == pytest.approx(14.9, abs=0.1)
    assert water(10)[1] < 27  # 30 are needed
    score_E = model.mixture.gates(torch.tensor([[1.0, 0.5], [5.0, 0.5]]).double())
    expected = torch.tensor([[-1.1, 0.1, 1.0], [-1.1, 0.9, -2.2]]).double()
    torch.testing.assert_close(score_E, expected, atol=1e-6, rtol=0)
    # At z = 0.5 the second expert is 2.1x + 5.7.
    lines_E = model.mixture.experts(torch.tensor([[0.0, 0.5], [1.0, 0.5]]).double())[:, 1]
    assert lines_E.tolist() == pytest.approx([5.7, 7.8])


def test_experts_extrapolate_random_lines_and_networks_of_their_size_do_not():
    sizes = [count_parameters(experts.line_fits(name)[0][0]) for name in experts.LINES]
    assert sizes == [30, 29, 31]
    layer, *networks = (experts.median_error(name) for name in experts.LINES)
    assert layer < 0.35
    assert min(networks) > 1


def test_a_convolution_gates_where_a_line_of_the_pixels_cannot():
    assert experts.photo_error(convolution=True) < 0.3
    assert experts.photo_error(convolution=False) > 3


def test_all_photos_are_equally_dark():
    _, photos_BCHW, _ = experts.photos(0, 20)
    assert set(photos_BCHW.sum((1, 2, 3)).tolist()) == {4}
