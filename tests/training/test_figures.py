"""The figures of docs/chapters/: what each one shows, and that all are drawn."""

import runpy
import sys

import pytest
import torch

from training.chapters import FIGURES
from training.chapters.products import WIDE_CUPS
from training.plots.drawing import draw_figure
from training.tasks.tables import BROWN, FRANKEN, WHITE

TRAINED = {"alignment", "bottleneck", "cross_attention"}
"""Figures of models that train for half a minute: tests/training/chapters/test_translators.py."""


@pytest.fixture(scope="module")
def panels_by_figure():
    """The panels of every other figure, each computed once."""
    return {name: panels() for name, panels in FIGURES.items() if name not in TRAINED}


def by_label(panel):
    return {series.label: series for series in getattr(panel, "series", [])}


def test_line_approaches_its_target_at_every_step(panels_by_figure):
    panel = panels_by_figure["line"][0]
    ends = [series.y[-1].item() for series in panel.series[:-1]]
    assert ends == sorted(ends)
    assert ends[0] == 0
    assert ends[-1] == pytest.approx(4.5 * 9 + 5, abs=0.1)


@pytest.mark.parametrize(
    ("name", "kinds"), [("rice", [WHITE, BROWN]), ("experts", [WHITE, BROWN, FRANKEN])]
)
def test_linear_law_extrapolates_and_relu_network_does_not(panels_by_figure, name, kinds):
    law, network, *_ = map(by_label, panels_by_figure[name])
    in_training_range = (WIDE_CUPS >= 1) & (WIDE_CUPS <= 5)
    errors = []
    for kind in kinds:
        needed = kind.water * WIDE_CUPS
        assert law[kind.name].y[-1].item() == pytest.approx(10 * kind.water, abs=0.05)
        assert (network[kind.name].y - needed)[in_training_range].abs().max() < 0.1
        errors.append((network[kind.name].y - needed)[-1].abs().item())
    assert max(errors) > 1


def test_gates_sum_to_one(panels_by_figure):
    torch.testing.assert_close(
        sum(series.y for series in panels_by_figure["experts"][2].series), torch.ones(81).double()
    )


def test_decision_boundary_separates_the_kinds_of_rice(panels_by_figure):
    plane, score = panels_by_figure["border"]
    white, brown = (score.series[index].x for index in (1, 2))
    assert (white < 0).double().mean() > 0.9
    assert (brown > 0).double().mean() > 0.9
    assert by_label(plane)["p = 0.9"].y[0] > by_label(plane)["p = 0.1"].y[0]


def test_higher_temperature_flattens_a_softmax(panels_by_figure):
    cold, mild, hot = (panel.values for panel in panels_by_figure["temperature"])
    assert cold[0] > mild[0] > hot[0] > hot[2] > mild[2] > cold[2]


def test_more_units_fit_a_curve_better(panels_by_figure):
    for index in (0, 2, 4):
        errors = []
        for panel in panels_by_figure["curves"]:
            curve, fitted = panel.series[index : index + 2]
            errors.append((curve.y - fitted.y).square().mean().item())
        assert errors[0] > 2 * errors[1] > 2 * errors[2]


def test_words_of_one_kind_are_most_similar(panels_by_figure):
    cosines = panels_by_figure["words"][0].values
    kind = torch.arange(16) // 4
    same_kind = kind.unsqueeze(1) == kind
    assert cosines[same_kind].min() > cosines[~same_kind].max() + 0.1


def test_gradient_vanishes_fastest_in_the_rnn(panels_by_figure):
    remaining = {
        label: series.y[60].item()
        for label, series in by_label(panels_by_figure["memory"][0]).items()
    }
    assert remaining["RNN"] < 1e-19 < 1e-13 < remaining["GRU"] < 1e-11
    assert 1e-7 < remaining["LSTM"] < 1e-5


def test_equal_scores_attend_evenly_to_past_tokens(panels_by_figure):
    mask, positions = panels_by_figure["mask"]
    assert mask.cell_labels[0] == ["1", "0", "0", "0", "0"]
    assert mask.cell_labels[2] == ["1/3", "1/3", "1/3", "0", "0"]
    assert positions.values[0].tolist() == [0, 1] * 16


def test_two_thirds_of_gpt3_are_feed_forward_weights(panels_by_figure):
    (bars,) = panels_by_figure["gpt3"]
    counts = dict(zip(bars.names, bars.values, strict=True))
    assert sum(counts.values()) == pytest.approx(175.18129152)
    assert (counts["up"] + counts["down"]) / sum(counts.values()) == pytest.approx(2 / 3, abs=0.01)


def test_every_figure_is_drawn_with_all_its_labels(panels_by_figure, tmp_path):
    for name, panels in panels_by_figure.items():
        assert_drawn(name, panels, tmp_path)


def assert_drawn(name, panels, folder):
    draw_figure(panels, folder / "figure.svg")
    svg = (folder / "figure.svg").read_text("utf-8")
    for panel in panels:
        for text in (panel.x_label, panel.title, *by_label(panel)):
            assert text in svg, name


@pytest.mark.parametrize("name", ["border", "words", "memory", "gpt3"])
def test_figures_are_deterministic(panels_by_figure, tmp_path, name):
    files = tmp_path / "first.svg", tmp_path / "second.svg"
    for file, panels in zip(files, (panels_by_figure[name], FIGURES[name]()), strict=True):
        draw_figure(panels, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_command_draws_the_named_figures(tmp_path, capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["training", "figures", *map(str, arguments)])
        runpy.run_module("training", run_name="__main__")

    run("mask", "temperature", "--output", tmp_path / "pictures")
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == {
        "mask.svg",
        "temperature.svg",
    }
    printed = capsys.readouterr().out.split()
    assert printed == [
        str(tmp_path / "pictures" / f"{name}.svg") for name in ("temperature", "mask")
    ]
    with pytest.raises(SystemExit, match="2"):
        run("maks")
    error = capsys.readouterr().err
    assert "no figure is named 'maks' (did you mean mask?)" in error
    assert len(error.splitlines()) == 1
