"""Drawing of activation maps."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from gpt.models.base import ActivationMap
from tokenizer import END_OF_TEXT, Tokenizer
from training.plots.style import STYLE, save_figure

FONT = "DejaVu Sans Mono"
LABEL_POINTS = 7
"""Font size of token labels."""
LETTER_WIDTH = 0.6 * LABEL_POINTS / 72
"""Inches that one letter of a label takes in FONT."""
MAX_LABEL_LENGTH = 14
"""Letters of a label; a longer token is truncated."""
CELL_SIZE = 0.14
"""Inches of one token's row or column, which hold a letter of LABEL_POINTS."""
UNITS_WIDTH = 2.2
"""Inches of a map whose columns are units or experts."""
GAP, TITLE_HEIGHT = 0.12, 0.2
"""Inches between two maps, and of the title above each."""
MAX_PIXELS = 4000
"""Longest side of an image; a larger one gets fewer dots per inch."""


def draw_xray(maps: Sequence[ActivationMap], tokenizer: Tokenizer, output: Path) -> None:
    """Draw the first sequence of each activation map.

    Layers are stacked vertically and heads stand side by side. Gates over the same tokens share a
    grid, with the units of each map sorted on their own. Each map has its own color scale, which
    its title states; exact zeros are white.
    """
    groups = itertools.groupby(
        maps, lambda each: each.name if isinstance(each.columns, Tensor) else each.rows[0].tolist()
    )
    grids = [MapGrid(list(group), tokenizer) for _, group in groups]
    width, height = max(grid.width for grid in grids), sum(grid.height for grid in grids)
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": LABEL_POINTS + 1}):
        figure = Figure(figsize=(width, height))
        top = height
        for grid in grids:
            grid.draw(figure, top)
            top -= grid.height
        save_figure(figure, output, min(150, MAX_PIXELS / max(width, height)))


class MapGrid:
    """A grid of maps over the same tokens: a row for each layer, a column for each head of each kind."""

    def __init__(self, maps: Sequence[ActivationMap], tokenizer: Tokenizer) -> None:
        first = maps[0]
        self.row_labels = token_labels(first.rows[0].tolist(), tokenizer)
        self.column_labels: list[str] = []
        if isinstance(first.columns, Tensor):
            self.column_labels = token_labels(first.columns[0].tolist(), tokenizer)
        self.layers = first.weights.shape[1]
        self.heads = [(each, head) for each in maps for head in range(each.weights.shape[2])]
        self.left = 2 * GAP + LETTER_WIDTH * max(map(len, self.row_labels))
        bottom = 3 * GAP
        if self.column_labels:
            bottom = GAP + LETTER_WIDTH * max(map(len, self.column_labels))
        self.map_width = CELL_SIZE * len(self.column_labels) or UNITS_WIDTH
        self.map_height = CELL_SIZE * len(self.row_labels)
        self.width = self.left + len(self.heads) * (self.map_width + GAP) + GAP
        self.height = TITLE_HEIGHT + self.layers * (self.map_height + TITLE_HEIGHT) + bottom + GAP

    def draw(self, figure: Figure, top: float) -> None:
        """Draw all maps, the first row below `top` inches."""
        width, height = figure.get_size_inches()
        for column, (activation, head) in enumerate(self.heads):
            x = self.left + column * (self.map_width + GAP)
            if head == 0:
                low, high = _color_range(activation)
                scale = f"red {low:.2g}, blue {high:.2g}" if low else f"0 to {high:.2g}"
                title = f"{activation.name}: {scale}"
                figure.text(x / width, (top - GAP) / height, title, va="top")
            for layer in range(self.layers):
                y = top - TITLE_HEIGHT - (layer + 1) * (self.map_height + TITLE_HEIGHT)
                size = self.map_width / width, self.map_height / height
                axes = figure.add_axes((x / width, y / height, *size))
                _draw_map(axes, activation, layer, head)
                self._label(axes, activation, left=column == 0, bottom=layer == self.layers - 1)

    def _label(self, axes: Axes, activation: ActivationMap, *, left: bool, bottom: bool) -> None:
        """Label the rows of the leftmost maps and the columns of the lowest."""
        font: dict[str, Any] = {"family": FONT, "fontsize": LABEL_POINTS, "parse_math": False}
        axes.tick_params(length=0, pad=2, labelsize=LABEL_POINTS)
        row_labels = self.row_labels if left else []
        axes.set_yticks(range(len(row_labels)), row_labels, **font)
        if not bottom:
            axes.set_xticks([])
        elif isinstance(activation.columns, Tensor):
            axes.set_xticks(range(len(self.column_labels)), self.column_labels, rotation=90, **font)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            order = ", from the highest mean" * (activation.columns == "units")
            axes.set_xlabel(f"{activation.columns}{order}", fontsize=LABEL_POINTS, labelpad=1)


def _color_range(activation: ActivationMap) -> tuple[float, float]:
    """Return the values at the ends of the color scale; 0 is white in every map."""
    weights_LHTS = activation.weights[0]
    high = float(weights_LHTS.abs().max())
    return (-high if weights_LHTS.min() < 0 else 0.0), high


def _draw_map(axes: Axes, activation: ActivationMap, layer: int, head: int) -> None:
    """Draw one layer and head, with a title where there are several."""
    _, layers, heads, rows, columns = activation.weights.shape
    low, high = _color_range(activation)
    weights_TS = activation.weights[0, layer, head].float().cpu()
    if activation.columns == "units":
        weights_TS = weights_TS[:, weights_TS.mean(dim=0).argsort(descending=True)]
    # Tokens are numbered from 0, units and experts from 1.
    first = 0 if isinstance(activation.columns, Tensor) else 1
    axes.imshow(
        weights_TS.masked_fill(weights_TS == 0, torch.nan).numpy(),
        cmap="RdBu" if low else "Blues",
        vmin=low,
        vmax=high,
        extent=(first - 0.5, first + columns - 0.5, rows - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
    )
    title = [f"layer {layer + 1}"] * (layers > 1) + [f"head {head + 1}"] * (heads > 1)
    axes.set_title(", ".join(title), fontsize=LABEL_POINTS, pad=2)


def token_labels(ids: Iterable[int], tokenizer: Tokenizer) -> list[str]:
    """Return a printable label for each token: whitespace as symbols, letters absent from FONT escaped."""
    charmap = get_font(findfont(FONT)).get_charmap()
    symbols = {" ": "·", "\n": "↵", "\t": "⇥"}

    def label(token: int) -> str:
        text = tokenizer.token_bytes(token).decode(errors="backslashreplace") or END_OF_TEXT
        printable = "".join(
            symbols.get(letter, letter if ord(letter) in charmap else f"\\u{ord(letter):04x}")
            for letter in text
        )
        if len(printable) <= MAX_LABEL_LENGTH:
            return printable
        return printable[: MAX_LABEL_LENGTH - 1] + "…"

    return [label(token) for token in ids]
