"""`tinygpt figures`: recorded results are drawn again, and are those that the pages show."""

import itertools
import json
import re
import sys

import pytest

import tinygpt
from tests.test_docs import TEXTS
from training.chapters import FIGURES
from training.chapters.commands import RECORDS
from training.evaluation.ladder import score_table
from training.plots import curves
from training.plots.drawing import draw_figure
from training.tasks.translation import comparison_table

RECORDED = {
    "bleu": lambda rows: comparison_table(rows).partition("\n\n")[0],
    "ladder": lambda rows: "\n".join(score_table(rows)),
}
"""What makes the table of a page from a record."""


def read_record(name):
    return json.loads((RECORDS / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("name", RECORDED)
def test_table_of_a_page_is_that_of_the_record(name):
    table = RECORDED[name](read_record(name))
    assert any(f"\n\n{table}\n\n" in text for text in TEXTS.values())


def test_recorded_figures_are_drawn_with_every_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tinygpt", "figures", *RECORDED, "--output", str(tmp_path)])
    tinygpt.main()
    for name, key in {"bleu": "run", "ladder": "rung"}.items():
        svg = (tmp_path / f"{name}.svg").read_text("utf-8")
        assert all(f">{row[key]}<" in svg for row in read_record(name))


def test_every_drawing_of_the_pages_is_made_by_the_command():
    shown = {name for text in TEXTS.values() for name in re.findall(r"figures/([\w.-]+)", text)}
    assert shown <= {f"{name}.svg" for name in (*FIGURES, *RECORDED)}


def test_panels_stand_one_below_the_other_so_that_a_phone_shows_them_large(tmp_path):
    draw_figure(FIGURES["temperature"](), tmp_path / "figure.svg")
    width, height = re.findall(
        r'(?:width|height)="([\d.]+)pt"', (tmp_path / "figure.svg").read_text()
    )[:2]
    assert float(width) == pytest.approx(72 * 5.4)
    assert float(height) > float(width) * 0.8


def test_names_in_the_ladder_do_not_overlap(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, output: drawn.append(figure))
    curves.plot_ladder(read_record("ladder"), tmp_path / "ladder.svg")
    for axes in drawn[0].axes:
        boxes = [name.get_window_extent() for name in axes.texts]
        assert len(boxes) == 12
        assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
