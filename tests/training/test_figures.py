"""The figures of the chapters: what each picture claims, and that they are drawn."""

import runpy
import sys

import pytest
import torch

from training.plots import figures
from training.plots.plot import draw_figure
from training.tasks.tables import BROWN, FRANKEN, WHITE


@pytest.fixture(scope="module")
def made():
    """Every figure's panels by its name, each computed once."""
    return {name: panels() for name, panels in figures.FIGURES.items()}


def by_name(panel):
    return {series.name: series for series in getattr(panel, "series", [])}


def test_the_line_comes_nearer_with_every_step(made):
    panel = made["line"][0]
    ends = [series.y[-1].item() for series in panel.series[:-1]]
    assert ends == sorted(ends)
    assert ends[0] == 0
    assert ends[-1] == pytest.approx(4.5 * 9 + 5, abs=0.1)


@pytest.mark.parametrize(
    ("name", "kinds"), [("rice", [WHITE, BROWN]), ("experts", [WHITE, BROWN, FRANKEN])]
)
def test_a_law_holds_at_ten_cups_where_a_network_only_passes_through_the_points(made, name, kinds):
    law, network, *_ = map(by_name, made[name])
    seen = (figures.FAR >= 1) & (figures.FAR <= 5)
    off = []
    for kind in kinds:
        needed = kind.water * figures.FAR
        assert law[kind.name].y[-1].item() == pytest.approx(10 * kind.water, abs=0.05)
        assert (network[kind.name].y - needed)[seen].abs().max() < 0.1
        off.append((network[kind.name].y - needed)[-1].abs().item())
    assert max(off) > 1


def test_gates_share_one_unit(made):
    torch.testing.assert_close(
        sum(series.y for series in made["experts"][2].series), torch.ones(81).double()
    )


def test_the_border_divides_the_rices(made):
    plane, score = made["border"]
    white, brown = (score.series[place].x for place in (1, 2))
    assert (white < 0).double().mean() > 0.9
    assert (brown > 0).double().mean() > 0.9
    assert by_name(plane)["p = 0.9"].y[0] > by_name(plane)["p = 0.1"].y[0]


def test_heat_makes_a_softmax_even(made):
    cold, mild, hot = (panel.values for panel in made["temperature"])
    assert cold[0] > mild[0] > hot[0] > hot[2] > mild[2] > cold[2]


def test_more_units_follow_a_curve_better(made):
    for place in (0, 2, 4):
        errors = []
        for panel in made["curves"]:
            true, fitted = panel.series[place : place + 2]
            errors.append((true.y - fitted.y).square().mean().item())
        assert errors[0] > 2 * errors[1] > 2 * errors[2]


def test_words_of_one_kind_are_nearest_to_each_other(made):
    cosines = made["words"][0].values
    kind = torch.arange(16) // 4
    same = kind.unsqueeze(1) == kind
    assert cosines[same].min() > cosines[~same].max() + 0.1


def test_a_gradient_is_a_power_of_the_weight_and_the_rnns_falls_fastest(made):
    for name, series in by_name(made["powers"][0]).items():
        weight = float(name.removeprefix("w = "))
        assert series.y[40].item() == pytest.approx(weight**40)
    left = {name: series.y[60].item() for name, series in by_name(made["memory"][0]).items()}
    assert left["RNN"] < 1e-19 < 1e-13 < left["GRU"] < 1e-11 < 1e-7 < left["LSTM"] < 1e-5


def test_the_mask_shares_evenly_what_was_read(made):
    mask, positions = made["mask"]
    assert mask.labels[0] == ["1", "0", "0", "0", "0"]
    assert mask.labels[2] == ["1/3", "1/3", "1/3", "0", "0"]
    assert positions.values[0].tolist() == [0, 1] * 16


def test_two_thirds_of_gpt3_are_the_small_networks(made):
    (bars,) = made["gpt3"]
    of = dict(zip(bars.names, bars.values, strict=True))
    assert sum(of.values()) == pytest.approx(175.18129152)
    assert (of["up"] + of["down"]) / sum(of.values()) == pytest.approx(2 / 3, abs=0.01)


def test_every_figure_is_drawn_with_every_name_in_it(made, tmp_path):
    for name, panels in made.items():
        draw_figure(panels, tmp_path / "drawn.svg")
        drawn = (tmp_path / "drawn.svg").read_text("utf-8")
        for panel in panels:
            for written in (panel.x, panel.title, *by_name(panel)):
                assert written in drawn, name


@pytest.mark.parametrize("name", ["border", "words", "memory", "gpt3"])
def test_a_figure_is_the_same_file_twice(made, tmp_path, name):
    files = tmp_path / "first.svg", tmp_path / "second.svg"
    for file, panels in zip(files, (made[name], figures.FIGURES[name]()), strict=True):
        draw_figure(panels, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_command_draws_what_it_is_asked_for(tmp_path, capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["training", "figures", *map(str, arguments)])
        runpy.run_module("training", run_name="__main__")

    run("mask", "temperature", "--output", tmp_path / "pictures")
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == {
        "mask.svg",
        "temperature.svg",
    }
    drawn = capsys.readouterr().out.split()
    assert drawn == [str(tmp_path / "pictures" / f"{name}.svg") for name in ("temperature", "mask")]
    with pytest.raises(SystemExit, match="2"):
        run("maks")
    error = capsys.readouterr().err
    assert "no figure is named 'maks' (did you mean mask?)" in error
    assert len(error.splitlines()) == 1
