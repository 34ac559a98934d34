"""The style and file formats of all plots."""

from pathlib import Path
from typing import Any

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

FIGURE_WIDTH = 5.4
"""Inches: what a phone shows without shrinking the text beyond reading. Panels stand one below the other."""


def check_output(output: Path) -> None:
    """Raise a ValueError unless the file's suffix is that of a supported format."""
    if output.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"--output must end in .svg, .png or .pdf, not {output.name!r}")


def save_figure(figure: Figure, output: Path, dpi: float = 150) -> None:
    """Write a figure; equal figures give equal SVG files."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=dpi, metadata={"Date": None} if output.suffix == ".svg" else None)
