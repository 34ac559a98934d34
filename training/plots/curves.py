"""Plots of runs: loss curves, the ladder, and BLEU by sentence length."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from training.plots.style import STYLE, check_output, save_figure


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Read a run's metrics.jsonl; a ValueError if it is absent or empty."""
    path = run / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    if not lines:
        raise ValueError(f"{run}: nothing to draw: it has no metrics.jsonl, or an empty one")
    return [json.loads(line) for line in lines]


def plot_losses(runs: Sequence[Path], output: Path) -> None:
    """Plot each run's training and validation loss against tokens seen."""
    check_output(output)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            metrics, color = read_metrics(run), f"C{number}"
            millions = {line["step"]: line["tokens"] / 1e6 for line in metrics if "tokens" in line}
            for split, key, style in (
                ("training", "loss", {"alpha": 0.45, "linewidth": 1.2}),
                ("validation", "validation_loss", {"marker": "o", "markersize": 4}),
            ):
                lines = [line for line in metrics if key in line]
                x = [millions[line["step"]] for line in lines]
                y = [line[key] for line in lines]
                axes.plot(x, y, color=color, label=f"{run.name}: {split}", **style)
        axes.set_xlabel("tokens seen (millions)")
        axes.set_ylabel("loss (nats per token)")
        axes.legend()
        save_figure(figure, output)


def plot_ladder(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Plot each rung's bits per byte against its parameters, and against its training time.

    Where the tokenizer loses text, so that there are no bits per byte, plot the loss.
    """
    has_bits = all(row["bits_per_byte"] is not None for row in rows)
    y, y_label = ("bits_per_byte", "bits per byte") if has_bits else ("loss", "nats per token")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        x_labels = {"parameters": "parameters", "seconds": "seconds of training"}
        for axes, (key, label) in zip(panels, x_labels.items(), strict=True):
            axes.plot([row[key] for row in rows], [row[y] for row in rows], "o")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(label)
            axes.margins(x=0.25)
        panels[0].set_ylabel(y_label)
        figure.draw_without_rendering()  # fixes the layout, which the labels' places depend on
        figure.set_layout_engine("none")
        for axes, key in zip(panels, x_labels, strict=True):
            _label_points(axes, {row["rung"]: (row[key], row[y]) for row in rows})
        save_figure(figure, output)


def _label_points(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Write each point's name beside it, on the side with the fewest overlaps."""
    sides = ("left", "center"), ("right", "center"), ("center", "bottom"), ("center", "top")
    offset = {"left": 6, "right": -6, "bottom": 6, "top": -6, "center": 0}
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}
    dots = axes.transData.transform(list(points.values()))
    occupied = [Bbox.from_extents(*(dot - 5), *(dot + 5)) for dot in dots]
    for name, point in points.items():
        labels = [
            axes.annotate(name, point, (offset[ha], offset[va]), ha=ha, va=va, **style)
            for ha, va in sides
        ]
        best = min(labels, key=lambda label: label.get_window_extent().count_overlaps(occupied))
        occupied.append(best.get_window_extent())
        for label in labels:
            if label is not best:
                label.remove()


def plot_bleu(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Plot each translation run's BLEU on short, middle and long sentences."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.add_subplot()
        buckets = rows[0]["buckets"]
        for number, row in enumerate(rows):
            scores = [bucket["bleu"] for bucket in row["buckets"]]
            axes.plot(range(len(scores)), scores, "o-", color=f"C{number}", label=row["run"])
        names = [f"{b['name']}\n{b['shortest']} to {b['longest']} words" for b in buckets]
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("BLEU")
        axes.legend()
        save_figure(figure, output)
