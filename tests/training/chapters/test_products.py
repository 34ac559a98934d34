"""Chapter 2: a plane, networks of ReLUs and a product, for rice and franken-grain."""

import pytest
import torch

from training.chapters.products import (
    BAGS,
    RICES,
    mean_squared_error,
    models,
    networks,
    plane,
    product,
    surface,
    water,
)
from training.tasks.tables import GRAINS


def test_best_plane_for_both_rices():
    weights = [*plane(*RICES).weight.tolist(), plane(*RICES).bias.item()]
    assert weights == pytest.approx([2.5, 6, -1.5], abs=1e-4)
    assert mean_squared_error(plane(*RICES), *RICES) == pytest.approx(0.4167, abs=1e-4)


@pytest.mark.parametrize("darkness", [0.0, 0.5])
def test_the_plane_s_lines_are_parallel_and_wrong_at_both_ends(darkness):
    assert water(plane(*RICES), 5, darkness) - water(plane(*RICES), 1, darkness) == pytest.approx(
        10, abs=1e-3
    )
    for cups in (1, 5):
        truth = (2 * darkness + 2) * cups
        assert abs(water(plane(*RICES), cups, darkness) - truth) == pytest.approx(1, abs=1e-3)


def test_the_plane_is_right_midway_between_the_rices():
    assert [water(plane(*RICES), cups, 0.25) for cups in (1, 4, 10)] == pytest.approx(
        [2.5, 10, 25], abs=1e-3
    )


def test_product_finds_the_law():
    torch.testing.assert_close(
        product(*RICES).weight.data, torch.tensor([2.0, 2.0, 0.0]).double(), rtol=0, atol=1e-4
    )


def test_product_knows_ten_cups_and_the_bag_with_a_little_bran():
    values = [water(product(*RICES), *row) for row in ((10, 0), (10, 0.5), (4, 0.25))]
    assert values == pytest.approx([20, 30, 10], abs=1e-3)


@pytest.mark.parametrize("units", [2, 10])
def test_relus_fit_both_rices_and_miss_ten_cups_and_the_bag(units):
    network = models(*RICES)[f"{units} ReLUs"]
    assert mean_squared_error(network, *RICES) < 1e-6
    assert water(network, 10, 0) == pytest.approx(25, abs=0.1)
    assert water(network, 4, 0.25) == pytest.approx(9.5, abs=0.05)


def test_more_starts_of_ten_relus_than_of_two_find_a_fit():
    fitted = [sum(loss < 1e-4 for loss, _ in networks(units, *RICES)) for units in (2, 10)]
    assert fitted == [1, 4]


def test_two_relus_beat_the_plane_ten_beat_two_and_the_product_all_on_five_bags():
    errors = {name: mean_squared_error(model, *BAGS) for name, model in models(*BAGS).items()}
    assert errors == pytest.approx(
        {"plane": 0.2083, "2 ReLUs": 0.0527, "10 ReLUs": 0.0064, "product": 0}, rel=0.02, abs=1e-6
    )


def test_parameters_of_the_models():
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in models(*RICES).items()}
    assert counts == {"plane": 3, "2 ReLUs": 9, "10 ReLUs": 41, "product": 3}


def test_product_gives_franken_grain_four_times_what_it_needs():
    assert water(product(*RICES), 1, 1) == pytest.approx(4, abs=1e-3)


def test_product_for_all_three_grains_misses_brown_rice_most():
    assert product(*GRAINS).weight.tolist() == pytest.approx([-1, 2.5, 0], abs=1e-3)
    assert mean_squared_error(product(*GRAINS), *GRAINS) == pytest.approx(5.33, abs=0.01)
    errors = [abs(water(product(*GRAINS), 1, grain.darkness) - grain.water) for grain in GRAINS]
    assert errors == pytest.approx([0.5, 1, 0.5], abs=1e-3)


def test_surface_shows_parallel_lines():
    white, brown = (series for series in surface()[0].series if series.label)
    torch.testing.assert_close(brown.y - white.y, torch.full_like(white.y, 3), rtol=0, atol=1e-3)
