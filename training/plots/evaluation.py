"""Plots of `eval`: loss by position, reliability of probabilities; and of `sample-quality`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from training.plots.style import FIGURE_WIDTH, STYLE, save_figure


def plot_evaluation(reports: Sequence[dict[str, Any]], output: Path) -> None:
    """Plot each report's loss by position and its reliability, as far as it has them.

    A report is the JSON of `eval`.
    """
    panels = {"by_position": _draw_positions, "calibration_bins": _draw_reliability}
    drawn = [draw for name, draw in panels.items() if name in reports[0]]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH, 3.6 * len(drawn)), layout="constrained")
        all_axes = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
        for axes, draw in zip(all_axes, drawn, strict=True):
            draw(axes, reports)
        if len(reports) > 1:
            all_axes[0].legend()
        save_figure(figure, output)


def _draw_positions(axes: Axes, reports: Sequence[dict[str, Any]]) -> None:
    for report in reports:
        rows = report["by_position"]
        x = [(row["context_from"] * row["context_to"]) ** 0.5 for row in rows]  # the middle
        axes.plot(x, [row["loss"] for row in rows], "o-", label=_name(report))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("loss (nats per token)")


def _draw_reliability(axes: Axes, reports: Sequence[dict[str, Any]]) -> None:
    axes.plot([0, 1], [0, 1], color="#777777", linestyle=(0, (4, 3)), linewidth=1.2)
    for report in reports:
        rows = report["calibration_bins"]
        x, y = ([row[name] for row in rows] for name in ("confidence", "accuracy"))
        axes.plot(x, y, "o-", label=_name(report))
    axes.set_xlabel("probability of the likeliest token")
    axes.set_ylabel("share of hits")


def plot_sample_quality(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Plot figures by temperature and, as dashed lines, those of the text itself.

    The rows are those of the JSON of `sample-quality`: the first is of the text itself.
    """
    own, samples = rows[0], sorted(rows[1:], key=lambda row: row["temperature"])
    has_bits = all("bits_per_byte" in row for row in rows)
    loss, unit = ("bits_per_byte", "bits per byte") if has_bits else ("loss", "nats per token")
    panels = {
        "distinct-n": ["distinct_1", "distinct_2", "distinct_3"],
        "repetition": ["repetition"],
        f"{unit} under the judge": [loss],
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH, 3 * len(panels)), layout="constrained")
        all_axes = figure.subplots(len(panels), 1, sharex=True)
        x = [row["temperature"] for row in samples]
        for axes, (title, names) in zip(all_axes, panels.items(), strict=True):
            for number, name in enumerate(names):
                color = f"C{number}"
                label = name.replace("_", "-") if len(names) > 1 else "samples"
                axes.plot(x, [row[name] for row in samples], "o-", color=color, label=label)
                text = own["text"] if name == names[-1] else None
                axes.axhline(own[name], color=color, linestyle="--", label=text)
                if name in own["intervals"]:
                    bounds = zip(*(row["intervals"][name] for row in samples), strict=True)
                    axes.fill_between(x, *bounds, color=color, alpha=0.2, linewidth=0)
            axes.set_ylabel(title)
            axes.legend(frameon=True)  # dashed lines cross the whole panel
        all_axes[-1].set_xlabel("temperature")
        save_figure(figure, output)


def _name(report: dict[str, Any]) -> str:
    """Return the split and the beginning of the data's description."""
    return f"{report['split']} of {report['data'].partition(',')[0][:30]}"
