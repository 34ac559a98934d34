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
from matplotlib.image import AxesImage
from torch import Tensor

from gpt.models.base import ActivationMap
from tokenizer import Tokenizer
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
MAX_UNITS = 10
"""Units or experts of a map that are drawn."""
UNIT_SIZE = 0.25
"""Inches of the column of a unit or expert."""
GAP, TITLE_HEIGHT = 0.12, 0.2
"""Inches between two maps, and of the title above each."""
TITLE_LETTER_WIDTH = 0.65 * (LABEL_POINTS + 1) / 72
"""Inches that one letter of a title takes at most, on average."""
SCALE_WIDTH, SCALE_HEIGHT, SCALE_ROOM = 1.0, 0.07, 0.25
"""Inches of a color bar, and of the bar with its numbers."""
MAX_PIXELS = 4000
"""Longest side of an image; a larger one gets fewer dots per inch."""


def draw_xray(maps: Sequence[ActivationMap], tokenizer: Tokenizer, output: Path) -> None:
    """Draw the first sequence of each activation map.

    Layers are stacked vertically and heads stand side by side. Gates over the same tokens share a
    grid: of each layer the ten units that vary most, the same ones in every map. Each map has its
    own color scale, above it; exact zeros are white.
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
        self.units = [] if self.column_labels else most_varying_units(maps)
        self.left = 2 * GAP + LETTER_WIDTH * max(map(len, self.row_labels))
        bottom = 2 * GAP
        if self.column_labels:
            bottom = GAP + LETTER_WIDTH * max(map(len, self.column_labels))
        columns = len(self.units[0]) if self.units else 0
        self.map_width = CELL_SIZE * len(self.column_labels) or UNIT_SIZE * columns
        self.map_height = CELL_SIZE * len(self.row_labels)
        unit_labels = GAP if self.units else 0.0
        self.layer_height = TITLE_HEIGHT + self.map_height + unit_labels
        # Heads of one map share a title; maps side by side each have one.
        title = max(SCALE_WIDTH, TITLE_LETTER_WIDTH * max(len(each.name) for each in maps))
        self.pitch = max(self.map_width, 0.0 if self.column_labels else title) + GAP
        self.width = self.left + max(len(self.heads) * self.pitch, title) + GAP
        top = TITLE_HEIGHT + SCALE_ROOM
        self.height = top + self.layers * self.layer_height + bottom + GAP

    def draw(self, figure: Figure, top: float) -> None:
        """Draw all maps, the first row below `top` inches."""
        width, height = figure.get_size_inches()

        def add_axes(x: float, y: float, size: tuple[float, float]) -> Axes:
            """Add axes whose lower left corner and size are given in inches."""
            return figure.add_axes((x / width, y / height, size[0] / width, size[1] / height))

        for column, (activation, head) in enumerate(self.heads):
            x = self.left + column * self.pitch
            for layer in range(self.layers):
                y = (
                    top
                    - SCALE_ROOM
                    - 2 * TITLE_HEIGHT
                    - layer * self.layer_height
                    - self.map_height
                )
                axes = add_axes(x, y, (self.map_width, self.map_height))
                image = self._draw_map(axes, activation, layer, head)
                self._label(axes, activation, layer, left=column == 0)
            if head == 0:
                figure.text(x / width, (top - GAP) / height, activation.name, va="top")
                y = top - TITLE_HEIGHT - GAP - SCALE_HEIGHT
                scale = add_axes(x, y, (SCALE_WIDTH, SCALE_HEIGHT))
                figure.colorbar(image, cax=scale, orientation="horizontal")
                scale.tick_params(length=2, pad=1, labelsize=LABEL_POINTS)
                ticks = sorted({0.0, *_color_range(activation)})
                scale.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])

    def _draw_map(self, axes: Axes, activation: ActivationMap, layer: int, head: int) -> AxesImage:
        """Draw one layer and head, with a title where there are several."""
        _, layers, heads, _, _ = activation.weights.shape
        low, high = _color_range(activation)
        weights_TS = activation.weights[0, layer, head].float().cpu()
        if self.units:
            weights_TS = weights_TS[:, self.units[layer]]
        title = [f"layer {layer + 1}"] * (layers > 1) + [f"head {head + 1}"] * (heads > 1)
        axes.set_title(", ".join(title), fontsize=LABEL_POINTS, pad=2)
        return axes.imshow(
            weights_TS.masked_fill(weights_TS == 0, torch.nan).numpy(),
            cmap="RdBu" if low else "Blues",
            vmin=low,
            vmax=high,
            aspect="auto",
            interpolation="nearest",
        )

    def _label(self, axes: Axes, activation: ActivationMap, layer: int, *, left: bool) -> None:
        """Label the rows of the leftmost maps, the columns of the lowest, and units everywhere."""
        font: dict[str, Any] = {"family": FONT, "fontsize": LABEL_POINTS, "parse_math": False}
        axes.tick_params(length=0, pad=2, labelsize=LABEL_POINTS)
        row_labels = self.row_labels if left else []
        axes.set_yticks(range(len(row_labels)), row_labels, **font)
        lowest = layer == self.layers - 1
        if self.units:
            units = [unit + 1 for unit in self.units[layer]]
            axes.set_xticks(range(len(units)), [str(unit) for unit in units], **font)
            if lowest:
                some = f"the {len(units)} that vary most of {activation.weights.shape[-1]} "
                some *= len(units) < activation.weights.shape[-1]
                axes.set_xlabel(f"{some}{activation.columns}", fontsize=LABEL_POINTS, labelpad=1)
        elif lowest:
            axes.set_xticks(range(len(self.column_labels)), self.column_labels, rotation=90, **font)
        else:
            axes.set_xticks([])


def most_varying_units(maps: Sequence[ActivationMap]) -> list[list[int]]:
    """Return the units of each layer that vary most over the tokens, in all maps together.

    At most MAX_UNITS; each map counts relative to its color range.
    """
    variation_LS = sum(
        each.weights[0].std(dim=-2, correction=0).mean(dim=1) / (_color_range(each)[1] or 1.0)
        for each in maps
    )
    assert isinstance(variation_LS, Tensor)
    count = min(MAX_UNITS, variation_LS.shape[-1])
    return variation_LS.topk(count, dim=-1).indices.sort(dim=-1).values.tolist()


def _color_range(activation: ActivationMap) -> tuple[float, float]:
    """Return the values at the ends of the color scale; 0 is white in every map."""
    weights_LHTS = activation.weights[0]
    high = float(weights_LHTS.abs().max())
    return (-high if weights_LHTS.min() < 0 else 0.0), high


def token_labels(ids: Iterable[int], tokenizer: Tokenizer) -> list[str]:
    """Return a printable label for each token: whitespace as symbols, letters absent from FONT escaped."""
    charmap = get_font(findfont(FONT)).get_charmap()
    symbols = {" ": "·", "\n": "↵", "\t": "⇥"}

    def label(token: int) -> str:
        text = tokenizer.special_tokens.get(token)
        text = text or tokenizer.token_bytes(token).decode(errors="backslashreplace")
        printable = "".join(
            symbols.get(letter, letter if ord(letter) in charmap else f"\\u{ord(letter):04x}")
            for letter in text
        )
        if len(printable) <= MAX_LABEL_LENGTH:
            return printable
        return printable[: MAX_LABEL_LENGTH - 1] + "…"

    return [label(token) for token in ids]
