"""Curves of runs, drawn from their metrics.jsonl; the only file that imports matplotlib."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "tinygpt",
}


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; a ValueError if it has none yet."""
    path = run / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    if not lines:
        raise ValueError(f"{run}: nothing to draw: it has no metrics.jsonl, or an empty one")
    return [json.loads(line) for line in lines]


def plot_losses(runs: Sequence[Path], output: Path) -> None:
    """Training and validation loss of each run against the tokens it has seen, as SVG, PNG or PDF."""
    if output.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"--output must end in .svg, .png or .pdf, not {output.name!r}")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            metrics, color = read_metrics(run), f"C{number}"
            seen = {line["step"]: line["tokens"] / 1e6 for line in metrics if "tokens" in line}
            trained = [line for line in metrics if "loss" in line]
            validated = [line for line in metrics if "validation_loss" in line]
            axes.plot(
                [seen[line["step"]] for line in trained],
                [line["loss"] for line in trained],
                color=color,
                alpha=0.45,
                linewidth=1.2,
                label=f"{run.name}: training",
            )
            axes.plot(
                [seen[line["step"]] for line in validated],
                [line["validation_loss"] for line in validated],
                "o-",
                color=color,
                markersize=4,
                label=f"{run.name}: validation",
            )
        axes.set_xlabel("tokens seen (millions)")
        axes.set_ylabel("loss (nats per token)")
        axes.legend()
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            output, dpi=150, metadata={"Date": None} if output.suffix == ".svg" else None
        )


def plot_ladder(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Bits per byte of each rung against its parameters, and against its training time."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        units = {"parameters": "parameters", "seconds": "training time (seconds)"}
        for axes, (key, label) in zip(panels, units.items(), strict=True):
            for number, row in enumerate(rows):
                axes.plot(row[key], row["bits_per_byte"], "o", color=f"C{number % 10}")
                place = (row[key], row["bits_per_byte"])
                axes.annotate(row["rung"], place, (5, 4), textcoords="offset points", fontsize=9)
            axes.set_xscale("log")
            axes.set_xlabel(label)
            axes.margins(x=0.18)
        panels[0].set_ylabel("bits per byte")
        figure.savefig(output, dpi=150, metadata={"Date": None})
