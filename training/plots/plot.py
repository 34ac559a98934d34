"""Curves of runs, drawn from their metrics.jsonl, and X-rays; the only file that imports matplotlib."""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from torch import Tensor

from gpt.models.base import ActivationMap
from tokenizer import END_OF_TEXT, Tokenizer
from training.plots.figures import BLUE, GREY, Bars, Curves, Map, Panel

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


def check_output(output: Path) -> None:
    """A ValueError if the file's name does not end as a picture's does."""
    if output.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"--output must end in .svg, .png or .pdf, not {output.name!r}")


def save(figure: Figure, output: Path, dpi: float = 150) -> None:
    """Write the figure; the same one gives the same file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=dpi, metadata={"Date": None} if output.suffix == ".svg" else None)


def plot_losses(runs: Sequence[Path], output: Path) -> None:
    """Training and validation loss of each run against the tokens it has seen, as SVG, PNG or PDF."""
    check_output(output)
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
        save(figure, output)


def plot_ladder(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Bits per byte of each rung against its parameters, and against its training time."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        units = {"parameters": "parameters", "seconds": "seconds of training"}
        for axes, (key, label) in zip(panels, units.items(), strict=True):
            axes.plot([row[key] for row in rows], [row["bits_per_byte"] for row in rows], "o")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(label)
            axes.margins(x=0.25)
        panels[0].set_ylabel("bits per byte")
        figure.draw_without_rendering()  # the names are laid out on what is then fixed
        figure.set_layout_engine("none")
        for axes, key in zip(panels, units, strict=True):
            _name(axes, {row["rung"]: (row[key], row["bits_per_byte"]) for row in rows})
        save(figure, output)


def _name(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Write each point's name beside it, on the side where the least is in the way."""
    dots = axes.transData.transform(list(points.values()))
    taken = [Bbox.from_extents(*(dot - 5), *(dot + 5)) for dot in dots]
    for name, point in points.items():
        written = [
            axes.annotate(
                name,
                point,
                (6 * right, 6 * up),
                textcoords="offset points",
                fontsize=9,
                ha={1: "left", 0: "center", -1: "right"}[right],
                va={1: "bottom", 0: "center", -1: "top"}[up],
            )
            for right, up in ((1, 0), (-1, 0), (0, 1), (0, -1))
        ]
        boxes = [text.get_window_extent() for text in written]
        best = min(range(len(boxes)), key=lambda i: boxes[i].count_overlaps(taken))
        taken.append(boxes[best])
        for text in written[:best] + written[best + 1 :]:
            text.remove()


def plot_bleu(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """BLEU of each translator on short, middle and long sentences."""
    check_output(output)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.add_subplot()
        buckets = rows[0]["buckets"]
        for number, row in enumerate(rows):
            scores = [bucket["bleu"] for bucket in row["buckets"]]
            axes.plot(range(len(scores)), scores, "o-", color=f"C{number}", label=row["run"])
        axes.set_xticks(
            range(len(buckets)),
            [f"{b['name']}\n{b['shortest']} to {b['longest']} words" for b in buckets],
        )
        axes.set_ylabel("BLEU")
        axes.legend()
        save(figure, output)


def draw_figure(panels: Sequence[Panel], output: Path) -> None:
    """The panels of a figure of the chapters side by side."""
    check_output(output)
    with mpl.rc_context(STYLE):
        width = {1: 5.4, 2: 8.4, 3: 10.8}[len(panels)]
        figure = Figure(figsize=(width, 3.3), layout="constrained")
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), place + 1)
            axes.set_title(panel.title, fontsize=11)
            axes.set_xlabel(panel.x)
            match panel:
                case Curves():
                    _draw_curves(axes, panel)
                case Bars():
                    _draw_bars(axes, panel)
                case Map():
                    _draw_numbers(axes, panel)
        save(figure, output)


LOOKS: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 2},
    "dashes": {"linestyle": (0, (4, 3)), "linewidth": 1.2},
    "dots": {
        "linestyle": "none",
        "marker": "o",
        "markersize": 6,
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
    },
}


def _draw_curves(axes: Axes, panel: Curves) -> None:
    """Every name in the colour of its series, beside it."""
    axes.set_ylabel(panel.y)
    if panel.log:
        axes.set_yscale("log")
    if panel.seen:
        axes.axvspan(*panel.seen, color=GREY, alpha=0.12, linewidth=0)
    for one in panel.series:
        axes.plot(
            one.x.numpy(), one.y.numpy(), color=one.color, alpha=one.strength, **LOOKS[one.look]
        )
        place = (one.x[one.at].item(), one.y[one.at].item())
        axes.annotate(
            one.name,
            place,
            one.shift,
            textcoords="offset points",
            color=one.color,
            va="center",
            fontsize=10,
            annotation_clip=False,
        )
    if panel.limits:
        axes.set_ylim(panel.limits)


def _draw_bars(axes: Axes, panel: Bars) -> None:
    """The first at the top."""
    axes.invert_yaxis()
    axes.bar_label(axes.barh(panel.names, panel.values, color=BLUE), panel.labels, padding=3)
    axes.set_xlim(0, 1.45 * (panel.whole or max(panel.values)))
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_numbers(axes: Axes, panel: Map) -> None:
    """0 is white: red below, blue above."""
    most = panel.values.abs().max().item()
    drawn = axes.imshow(panel.values.numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.grid(visible=False)
    axes.set_ylabel(panel.y)
    if panel.rows:
        axes.set_yticks(range(len(panel.rows)), panel.rows)
        turn = 90 if len(panel.columns) > 8 else 0
        axes.set_xticks(range(len(panel.columns)), panel.columns, rotation=turn)
        axes.tick_params(length=0)
    for row, labels in enumerate(panel.labels):
        for column, label in enumerate(labels):
            dark = panel.values[row, column] > 0.6 * most
            axes.text(
                column, row, label, ha="center", va="center", color="white" if dark else "black"
            )
    if panel.scale:
        axes.figure.colorbar(drawn, ax=axes, label=panel.scale)


CELL = 0.14
"""Inches of a token's row or column in a map: room for a letter of LABEL points."""
LABEL = 7
LETTER = 0.6 * LABEL / 72
"""Inches that a letter of a label is wide: the font is DejaVu Sans Mono."""
LONGEST = 14
"""Letters of a label; a longer token is cut."""
UNITS = 2.2
"""Inches of a map's width where its columns are no tokens."""
GAP, TITLE = 0.12, 0.2
"""Inches between two maps, and above each for what it is."""
PIXELS = 4000
"""The longest side of a picture: a larger one has fewer dots per inch."""


def draw_xray(found: Sequence[ActivationMap], tokenizer: Tokenizer, output: Path) -> None:
    """The first row of each map of an X-ray, as SVG, PNG or PDF.

    Layers go down and heads to the right; gates over the same tokens stand side by side, the
    units of each map in an order of its own. Each kind has its own scale, which its title
    tells; what is exactly 0 is left white.
    """
    check_output(output)
    together = itertools.groupby(
        found, lambda one: one.name if _of_tokens(one) else one.rows[0].tolist()
    )
    blocks = [Block(list(kinds), tokenizer) for _, kinds in together]
    width, height = max(block.width for block in blocks), sum(block.height for block in blocks)
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": LABEL + 1}):
        figure = Figure(figsize=(width, height))
        top = height
        for block in blocks:
            block.draw(figure, top)
            top -= block.height
        save(figure, output, min(150, PIXELS / max(width, height)))


class Block:
    """Maps over the same tokens, in a grid: the heads of one kind, or several kinds.

    Args:
        kinds: What is drawn.
        tokenizer: What tells the tokens' names.
    """

    def __init__(self, kinds: Sequence[ActivationMap], tokenizer: Tokenizer) -> None:
        first = kinds[0]
        self.rows = labels(first.rows[0].tolist(), tokenizer)
        self.columns: list[str] = []
        if isinstance(first.columns, Tensor):
            self.columns = labels(first.columns[0].tolist(), tokenizer)
        self.layers = first.weights.shape[1]
        self.across = [(one, head) for one in kinds for head in range(one.weights.shape[2])]
        self.left = 2 * GAP + LETTER * max(map(len, self.rows))
        below = GAP + LETTER * max(map(len, self.columns)) if self.columns else 3 * GAP
        self.map_width = CELL * len(self.columns) or UNITS
        self.map_height = CELL * len(self.rows)
        self.width = self.left + len(self.across) * (self.map_width + GAP) + GAP
        self.height = TITLE + self.layers * (self.map_height + TITLE) + below + GAP

    def draw(self, figure: Figure, top: float) -> None:
        """Draw all maps below `top` inches."""
        width, height = figure.get_size_inches()
        for place, (one, head) in enumerate(self.across):
            x = self.left + place * (self.map_width + GAP)
            if head == 0:
                low, high = _scale(one)
                scale = f"red {low:.2g}, blue {high:.2g}" if low else f"0 to {high:.2g}"
                figure.text(x / width, (top - GAP) / height, f"{one.name}: {scale}", va="top")
            for layer in range(self.layers):
                y = top - TITLE - (layer + 1) * (self.map_height + TITLE)
                axes = figure.add_axes(
                    (x / width, y / height, self.map_width / width, self.map_height / height)
                )
                _draw_map(axes, one, layer, head)
                self._label(axes, one, left=place == 0, below=layer == self.layers - 1)

    def _label(self, axes: Axes, one: ActivationMap, *, left: bool, below: bool) -> None:
        """Tokens at the left of a row of maps and below a column of them."""
        font: dict[str, Any] = {
            "family": "DejaVu Sans Mono",
            "fontsize": LABEL,
            "parse_math": False,
        }
        axes.tick_params(length=0, pad=2, labelsize=LABEL)
        rows = self.rows if left else []
        axes.set_yticks(range(len(rows)), rows, **font)
        if not below:
            axes.set_xticks([])
        elif isinstance(one.columns, Tensor):
            axes.set_xticks(range(len(self.columns)), self.columns, rotation=90, **font)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            order = ", from the highest mean" * (one.columns == "units")
            axes.set_xlabel(f"{one.columns}{order}", fontsize=LABEL, labelpad=1)


def _of_tokens(one: ActivationMap) -> bool:
    return isinstance(one.columns, Tensor)


def _scale(one: ActivationMap) -> tuple[float, float]:
    """What the ends of the colours stand for; 0 is white in every map."""
    weights_LHTS = one.weights[0]
    high = float(weights_LHTS.abs().max())
    return (-high if weights_LHTS.min() < 0 else 0.0), high


def _draw_map(axes: Axes, one: ActivationMap, layer: int, head: int) -> None:
    """One layer and head, titled where there are several."""
    _, layers, heads, rows, columns = one.weights.shape
    low, high = _scale(one)
    weights_TS = one.weights[0, layer, head].float().cpu()
    if one.columns == "units":
        weights_TS = weights_TS[:, weights_TS.mean(dim=0).argsort(descending=True)]
    first = 0 if _of_tokens(one) else 1  # units and experts are counted as layers are
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
    axes.set_title(", ".join(title), fontsize=LABEL, pad=2)


def labels(ids: Iterable[int], tokenizer: Tokenizer) -> list[str]:
    """Each token as one can see it: spaces, line ends and what the font lacks are written out."""
    known = get_font(findfont("DejaVu Sans Mono")).get_charmap()
    seen = {" ": "·", "\n": "↵", "\t": "⇥"}

    def label(token: int) -> str:
        text = tokenizer.token_bytes(token).decode(errors="backslashreplace")
        letters = [
            seen.get(letter, letter if ord(letter) in known else f"\\u{ord(letter):04x}")
            for letter in text
        ]
        shown = "".join(letters) or END_OF_TEXT
        return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"

    return [label(token) for token in ids]
