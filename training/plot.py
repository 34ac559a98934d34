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
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from gpt.model import Importance
from tokenizer import END_OF_TEXT, Tokenizer

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
PIXELS = 8000
"""The longest side of a picture: a larger one has fewer dots per inch."""


def draw_xray(found: Sequence[Importance], tokenizer: Tokenizer, output: Path) -> None:
    """The first row of each map of an X-ray, under each other, as SVG, PNG or PDF.

    Layers go down and heads to the right; gates over the same tokens stand side by side, the
    units of each map in an order of its own. Each kind has its own scale, which its title
    tells; what is exactly 0 is left white.
    """
    check_output(output)
    blocks = [
        list(block)
        for _, block in itertools.groupby(
            found, lambda one: one.name if _of_tokens(one) else one.rows[0].tolist()
        )
    ]
    sizes = [_size(block, tokenizer) for block in blocks]
    width, height = max(width for width, _ in sizes), sum(height for _, height in sizes)
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": LABEL + 1}):
        figure = Figure(figsize=(width, height))
        top = height
        for block, (_, size) in zip(blocks, sizes, strict=True):
            _draw(figure, block, tokenizer, top)
            top -= size
        save(figure, output, min(150, PIXELS / max(width, height)))


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


def _of_tokens(one: Importance) -> bool:
    return isinstance(one.columns, Tensor)


def _margins(one: Importance, tokenizer: Tokenizer) -> tuple[float, float]:
    """Inches for the labels at the left and below."""

    def longest(ids: Tensor) -> float:
        return GAP + LETTER * max(map(len, labels(ids[0].tolist(), tokenizer)))

    below = longest(one.columns) if isinstance(one.columns, Tensor) else 3 * GAP
    return GAP + longest(one.rows), below


def _map_size(one: Importance) -> tuple[float, float]:
    """Inches of one map."""
    *_, rows, columns = one.weights.shape
    return CELL * columns if _of_tokens(one) else UNITS, CELL * rows


def _across(block: Sequence[Importance]) -> int:
    """Maps beside each other: the heads of one kind, or several kinds."""
    return sum(one.weights.shape[2] for one in block)


def _size(block: Sequence[Importance], tokenizer: Tokenizer) -> tuple[float, float]:
    """Inches of a block of maps, with its titles and labels."""
    (left, below), (width, height) = _margins(block[0], tokenizer), _map_size(block[0])
    layers = block[0].weights.shape[1]
    return (
        left + _across(block) * (width + GAP) + GAP,
        TITLE + layers * (height + TITLE) + below + 2 * GAP,
    )


def _draw(figure: Figure, block: Sequence[Importance], tokenizer: Tokenizer, top: float) -> None:
    """Draw a block of maps below `top` inches."""
    (left, _), (width, height) = _margins(block[0], tokenizer), _map_size(block[0])
    whole_width, whole_height = figure.get_size_inches()
    layers = block[0].weights.shape[1]
    columns = [(one, head) for one in block for head in range(one.weights.shape[2])]
    for place, (one, head) in enumerate(columns):
        x = left + place * (width + GAP)
        low, high = _scale(one.weights[0])
        if head == 0:
            figure.text(
                x / whole_width,
                (top - GAP) / whole_height,
                f"{one.name}: red {low:.2g}, blue {high:.2g}"
                if low
                else f"{one.name}: 0 to {high:.2g}",
                va="top",
            )
        for layer in range(layers):
            y = top - TITLE - (layer + 1) * (height + TITLE)
            axes = figure.add_axes(
                (x / whole_width, y / whole_height, width / whole_width, height / whole_height)
            )
            weights_TS = one.weights[0, layer, head].float().cpu()
            if one.columns == "units":
                weights_TS = weights_TS[:, weights_TS.mean(dim=0).argsort(descending=True)]
            axes.imshow(
                weights_TS.masked_fill(weights_TS == 0, torch.nan).numpy(),
                cmap="RdBu" if low < 0 else "Blues",
                vmin=low,
                vmax=high,
                aspect="auto",
                interpolation="nearest",
            )
            heads = one.weights.shape[2]
            title = [f"layer {layer + 1}"] * (layers > 1) + [f"head {head + 1}"] * (heads > 1)
            axes.set_title(", ".join(title), fontsize=LABEL, pad=2)
            _label(axes, one, tokenizer, left=place == 0, below=layer == layers - 1)


def _scale(weights_LHTS: Tensor) -> tuple[float, float]:
    """What the lightest and the darkest colour stand for: 0 is white in every map."""
    high = float(weights_LHTS.abs().max())
    return (-high if weights_LHTS.min() < 0 else 0.0), high


def _label(axes: Axes, one: Importance, tokenizer: Tokenizer, *, left: bool, below: bool) -> None:
    """Tokens at the left of a row of maps and below a column of them."""
    font: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": LABEL, "parse_math": False}
    axes.tick_params(length=0, pad=2, labelsize=LABEL)
    rows = labels(one.rows[0].tolist(), tokenizer) if left else []
    axes.set_yticks(range(len(rows)), rows, **font)
    if not below:
        axes.set_xticks([])
    elif isinstance(one.columns, Tensor):
        columns = labels(one.columns[0].tolist(), tokenizer)
        axes.set_xticks(range(len(columns)), columns, rotation=90, **font)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        order = ", from the highest mean" * (one.columns == "units")
        axes.set_xlabel(f"{one.columns}{order}", fontsize=LABEL, labelpad=1)
