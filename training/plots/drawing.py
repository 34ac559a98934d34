"""Drawing of panels with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.plots.panels import BLUE, GREY, BarChart, Heatmap, LinePlot, Panel
from training.plots.style import FIGURE_WIDTH, STYLE, save_figure

LINE_STYLES: dict[str, dict[str, Any]] = {
    "solid": {"linewidth": 2},
    "dashed": {"linestyle": (0, (4, 3)), "linewidth": 1.2},
    "dots": {"ls": "none", "marker": "o", "ms": 6, "mec": "white", "mew": 0.5},
}
MAX_LETTERS = 40
"""Letters below a heatmap for which there is room side by side."""


def draw_figure(panels: Sequence[Panel], output: Path) -> None:
    """Draw the panels one below the other."""
    with mpl.rc_context(STYLE):
        heights = [_height(panel) for panel in panels]
        figure = Figure(figsize=(FIGURE_WIDTH, sum(heights)), layout="constrained")
        all_axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, panel in zip(all_axes, panels, strict=True):
            axes.set_title(panel.title, fontsize=11)
            axes.set_xlabel(panel.x_label)
            match panel:
                case LinePlot():
                    _draw_lines(axes, panel)
                case BarChart():
                    _draw_bars(axes, panel)
                case Heatmap():
                    _draw_heatmap(axes, panel)
        save_figure(figure, output)


def _height(panel: Panel) -> float:
    """Return a panel's height in inches."""
    match panel:
        case BarChart():
            return 0.7 + 0.32 * len(panel.names)
        case Heatmap():
            return max(3.0, 1.2 + 0.18 * len(panel.rows))
        case LinePlot():
            return 3.0


def _draw_lines(axes: Axes, panel: LinePlot) -> None:
    """Draw each series with its label beside it, in its color."""
    axes.set_ylabel(panel.y_label)
    if panel.log_y:
        axes.set_yscale("log")
    if not any(series.x.is_floating_point() for series in panel.series):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.training_range:
        axes.axvspan(*panel.training_range, color=GREY, alpha=0.12, linewidth=0)
    for series in panel.series:
        x, y, index = series.x.numpy(), series.y.numpy(), series.label_index
        axes.plot(x, y, color=series.color, alpha=series.alpha, **LINE_STYLES[series.style])
        axes.annotate(
            series.label,
            (x[index], y[index]),
            series.label_offset,
            textcoords="offset points",
            color=series.color,
            va="center",
            fontsize=10,
            annotation_clip=False,
        )
    if panel.y_limits:
        axes.set_ylim(panel.y_limits)


def _draw_bars(axes: Axes, panel: BarChart) -> None:
    """Draw horizontal bars, the first at the top."""
    axes.invert_yaxis()
    axes.bar_label(axes.barh(panel.names, panel.values, color=BLUE), panel.labels, padding=3)
    axes.set_xlim(0, 1.45 * (panel.max_value or max(panel.values)))
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_heatmap(axes: Axes, panel: Heatmap) -> None:
    """Draw a matrix: 0 is white, negative values red, positive values blue."""
    largest = panel.max_value or panel.values.abs().max().item()
    matrix = panel.values.numpy()
    signed = bool((panel.values < 0).any())
    colors, lowest = ("RdBu", -largest) if signed else ("Blues", 0.0)
    image = axes.imshow(matrix, cmap=colors, vmin=lowest, vmax=largest, aspect="auto")
    axes.grid(visible=False)
    axes.set_ylabel(panel.y_label)
    if panel.rows:
        axes.set_yticks(range(len(panel.rows)), panel.rows)
        rotation = 90 if len(panel.columns) * max(map(len, panel.columns)) > MAX_LETTERS else 0
        axes.set_xticks(range(len(panel.columns)), panel.columns, rotation=rotation)
        axes.tick_params(length=0)
    for row, labels in enumerate(panel.cell_labels):
        for column, label in enumerate(labels):
            color = "white" if matrix[row, column] > 0.6 * largest else "black"
            axes.text(column, row, label, ha="center", va="center", color=color)
    if panel.colorbar_label:
        axes.figure.colorbar(image, ax=axes, label=panel.colorbar_label)
