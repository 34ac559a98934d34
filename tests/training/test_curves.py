"""Loss curves of runs of every kind."""

import json

import pytest

from training.plots.curves import plot_losses

TOKENS = [
    {"step": 10, "loss": 3.0, "tokens": 1000},
    {"step": 15, "validation_loss": 2.5, "sample": "a\u2028b\x85c"},  # between two logged steps
    {"step": 20, "loss": 2.0, "tokens": 2000},
]
ROWS = [
    {"step": 5, "validation_loss": 0.75, "sample": ""},  # before the first
    {"step": 10, "loss": 0.5, "rows": 640},
]


def write_run(run, lines, end=""):
    run.mkdir()
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + end, "utf-8")
    return run


@pytest.mark.parametrize(
    ("names", "x_label", "y_label"),
    [
        (["text"], "tokens seen", "loss (nats per token)"),
        (["table"], "rows seen", "loss"),
        (["text", "table"], "rows or tokens seen", "loss"),
    ],
)
def test_plot_of_runs_of_text_and_of_tables(names, x_label, y_label, tmp_path):
    write_run(tmp_path / "text", TOKENS, end='{"step": 30, "lo')  # it is still training
    write_run(tmp_path / "table", ROWS)
    plot_losses([tmp_path / name for name in names], tmp_path / "loss.svg")
    svg = (tmp_path / "loss.svg").read_text("utf-8")
    assert f">{x_label}<" in svg
    assert f">{y_label}<" in svg
    assert all(f"{name}: validation" in svg for name in names)


def test_validations_are_drawn_at_the_tokens_seen(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot",
        lambda self, x, y, **style: drawn.update({style["label"]: (list(x), list(y))}),
    )
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda self: None)
    runs = [write_run(tmp_path / "text", TOKENS), write_run(tmp_path / "table", ROWS)]
    plot_losses(runs, tmp_path / "loss.svg")
    assert drawn["text: training"] == ([1000, 2000], [3.0, 2.0])
    assert drawn["text: validation"] == ([1500], [2.5])
    assert drawn["table: validation"] == ([320], [0.75])


@pytest.mark.parametrize("lines", [[], [{"step": 1, "validation_loss": 1.0, "sample": ""}]])
def test_run_without_a_logged_loss_is_refused(lines, tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_losses([write_run(tmp_path / "young", lines)], tmp_path / "loss.svg")
