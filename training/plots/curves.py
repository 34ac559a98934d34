"""Plots of runs: loss curves, the ladder, and BLEU by sentence length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from training.plots.style import FIGURE_WIDTH, STYLE, check_output, save_figure
from training.progress import read_metrics


def plot_losses(runs: Sequence[Path], output: Path) -> None:
    """Plot each run's training and validation loss against the tokens, or table rows, seen."""
    check_output(output)
    units = set()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            metrics = [{"step": 0, "tokens": 0, "rows": 0}, *read_metrics(run)]
            unit = "rows" if any("rows" in line for line in metrics[1:]) else "tokens"
            logged = [line for line in metrics if unit in line]
            if len(logged) == 1:
                raise ValueError(f"{run}: nothing to draw: its metrics.jsonl has no loss yet")
            units.add(unit)
            for split, key, style in (
                ("training", "loss", {"alpha": 0.45, "linewidth": 1.2}),
                ("validation", "validation_loss", {"marker": "o", "markersize": 4}),
            ):
                lines = [line for line in metrics if key in line]
                # A validation may be between two steps whose tokens are logged.
                x = np.interp(
                    [line["step"] for line in lines],
                    [line["step"] for line in logged],
                    [line[unit] for line in logged],
                )
                y = [line[key] for line in lines]
                axes.plot(x, y, color=f"C{number}", label=f"{run.name}: {split}", **style)
        names = " or ".join(sorted(units))
        axes.set_xlabel(f"{names} seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        # That of a table may be a squared error.
        axes.set_ylabel("loss (nats per token)" if units == {"tokens"} else "loss")
        axes.legend()
        save_figure(figure, output)


def plot_ladder(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Plot each rung's bits per byte against its parameters, and against its training time.

    Where the tokenizer loses text, so that there are no bits per byte, plot the loss. Where the
    entropy of the text is known, a line shows it.
    """
    has_bits = all(row["bits_per_byte"] is not None for row in rows)
    y, y_label = ("bits_per_byte", "bits per byte") if has_bits else ("loss", "nats per token")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH, 9), layout="constrained")
        panels = figure.subplots(2, 1)
        x_labels = {"parameters": "parameters", "seconds": "seconds of training"}
        for axes, (key, label) in zip(panels, x_labels.items(), strict=True):
            axes.plot([row[key] for row in rows], [row[y] for row in rows], "o")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(label)
            axes.margins(x=0.15)
            axes.set_ylabel(y_label)
            if (truth := rows[0].get("truth")) is not None:
                level = truth * rows[0][y] / rows[0]["loss"]
                axes.axhline(level, color="C1", linestyle="--", label="the truth")
                axes.legend()
        figure.draw_without_rendering()  # fixes the layout, which the labels' places depend on
        figure.set_layout_engine("none")
        for axes, key in zip(panels, x_labels, strict=True):
            _label_points(axes, {row["rung"]: (row[key], row[y]) for row in rows})
        save_figure(figure, output)


def _label_points(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Write each point's name beside it, inside the axes, where it overlaps the others least."""

    def overlap(label: Annotation) -> float:
        box = label.get_window_extent()
        shared = filter(None, (Bbox.intersection(box, other) for other in occupied))
        return sum(each.width * each.height for each in shared)

    sides = [("left", "center"), ("right", "center"), ("center", "bottom"), ("center", "top")]
    sides += [(ha, va) for ha in ("left", "right") for va in ("bottom", "top")]
    offset = {"left": 6, "right": -6, "bottom": 3, "top": -3, "center": 0}
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}
    dots = axes.transData.transform(list(points.values()))
    frame = axes.bbox
    occupied = [
        *(Bbox.from_extents(*(dot - 5), *(dot + 5)) for dot in dots),
        Bbox.from_extents(0, frame.y0, frame.x0, frame.y1),
        Bbox.from_extents(frame.x1, frame.y0, 2 * frame.x1, frame.y1),
    ]
    for name, point in points.items():
        labels = [
            axes.annotate(name, point, (offset[ha], offset[va]), ha=ha, va=va, **style)
            for ha, va in sides
        ]
        best = min(labels, key=overlap)
        occupied.append(best.get_window_extent())
        for label in labels:
            if label is not best:
                label.remove()


def plot_bleu(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Plot each translation run's BLEU on short, middle and long sentences."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH, 3.6), layout="constrained")
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
