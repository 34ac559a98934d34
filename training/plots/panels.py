"""Panels of a figure, as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

LineStyle = Literal["solid", "dashed", "dots"]
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#777777"
BLACK = "#000000"


@dataclass(frozen=True)
class Series:
    """A line or points, with an optional label beside one of the points."""

    x: Tensor
    y: Tensor
    color: str
    label: str = ""
    style: LineStyle = "solid"
    label_index: int = -1
    """Index of the point that the label stands beside."""
    label_offset: tuple[float, float] = (5, 0)
    """Offset of the label's left edge and vertical center from that point, in points."""
    alpha: float = 1.0


@dataclass(frozen=True)
class LinePlot:
    """Series on common axes."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    title: str = ""
    log_y: bool = False
    training_range: tuple[float, float] | None = None
    """Range of x in the training data, shaded."""
    y_limits: tuple[float, float] | None = None
    """Limits of the y axis; those of the data if None."""


@dataclass(frozen=True)
class BarChart:
    """A bar for each name, with a label at its end."""

    x_label: str
    names: Sequence[str]
    values: Sequence[float]
    labels: Sequence[str]
    title: str = ""
    max_value: float | None = None
    """Value of a full bar; the largest value if None."""


@dataclass(frozen=True)
class Heatmap:
    """A matrix as colors, with optional labels in the cells."""

    values: Tensor
    x_label: str = ""
    y_label: str = ""
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    cell_labels: Sequence[Sequence[str]] = ()
    title: str = ""
    colorbar_label: str = ""
    """What the colors mean; without it no color bar is drawn."""


Panel = LinePlot | BarChart | Heatmap
