"""The figures of docs/chapters.md: small seeded experiments with the models of `gpt`.

Each takes seconds on a CPU and returns the data of its panels; `panels` draws them.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import summary
from gpt.models.attention import attention_weights
from gpt.models.base import Model
from gpt.models.linear import Linear, Logistic, SigmaPi, gradient_step, softmax
from gpt.models.mlp import MLP, Experts
from gpt.models.recurrent import Cell, GRUCell, LSTMCell, RNNCell, gradient_by_distance
from gpt.models.transformer import sinusoids
from gpt.models.word2vec import Word2Vec
from training.tasks.tables import (
    BINARY_CLASSIFICATION_TABLES,
    BROWN,
    CUPS,
    CURVES,
    FRANKEN,
    REGRESSION_TABLES,
    WHITE,
    Grain,
    Rows,
    grain_rows,
)

LineStyle = Literal["solid", "dashed", "dots"]
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#777777"


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
ModelT = TypeVar("ModelT", bound=Model)


def fit(build: Callable[[], ModelT], rows: Rows, max_iter: int = 300, restarts: int = 1) -> ModelT:
    """Fit a model with L-BFGS from each of `restarts` seeds; return the one with the lowest loss."""
    x_BD, y_B = (tensor.double() for tensor in rows)
    fitted = []
    for seed in range(restarts):
        torch.manual_seed(seed)
        model = build().double()
        weights = model.parameters()
        optimizer = torch.optim.LBFGS(weights, max_iter=max_iter, line_search_fn="strong_wolfe")

        def closure(model: Model = model) -> float:
            model.zero_grad()
            loss = model.loss(x_BD, y_B)
            loss.backward()
            return loss.item()

        optimizer.step(closure)
        fitted.append((closure(), model))
    return min(fitted, key=lambda loss_and_model: loss_and_model[0])[1]


@torch.no_grad()
def predict(model: Model, *columns: Tensor) -> Tensor:
    """Return a regression model's y_B for rows of these columns, which are broadcast."""
    return model(torch.stack(torch.broadcast_tensors(*columns), -1).double())


def line() -> Sequence[Panel]:
    """Chapter 1: a fitted line after 0 to 3,000 steps of gradient descent."""
    metres_BD, power_B = REGRESSION_TABLES["basketball"](0).splits["train"]
    model = Linear(1)
    nn.init.zeros_(model.weight)
    ends = torch.tensor([0.0, 9.0])
    labels = {0: "before", 1: "1 step", 2: "2 steps", 4: "4 steps", 3000: "3,000 steps"}
    series: list[Series] = []
    for step in range(max(labels) + 1):
        if step in labels:
            power = model(ends.unsqueeze(-1)).detach()
            alpha = 0.3 + 0.7 * len(series) / (len(labels) - 1)
            series.append(Series(ends, power, BLUE, labels[step], alpha=alpha))
        gradient_step(model, 0.005, metres_BD, power_B)
    shots = Series(metres_BD[:, 0], power_B, ORANGE, "shots that went in", "dots", 5, (-105, 8))
    return [LinePlot("distance (metres)", "power (units)", [*series, shots])]


GRAIN_COLORS = {WHITE: BLUE, BROWN: ORANGE, FRANKEN: GREEN}
WIDE_CUPS = torch.linspace(0, 10, 81)
"""Cups of grain, twice the range of CUPS."""


def rice() -> Sequence[Panel]:
    """Chapter 2: a product fits two kinds of rice and extrapolates; a ReLU network fits its points only."""
    rows = grain_rows(CUPS, WHITE, BROWN)
    product, network = fit(SigmaPi, rows), fit(lambda: MLP(2, (2,)), rows, restarts=8)
    return [
        rice_panel("3 weights: y = (pz + q) x + b", product, [WHITE, BROWN]),
        rice_panel("9 weights: two ReLUs", network, [WHITE, BROWN]),
    ]


def rice_panel(title: str, model: Model, kinds: Sequence[Grain]) -> LinePlot:
    """Plot the water that a model predicts for each kind of grain, and the water that it needs."""
    series = []
    for kind in kinds:
        color, darkness = GRAIN_COLORS[kind], torch.tensor(kind.darkness)
        x_BD, water_B = grain_rows(CUPS, kind)
        series += [
            Series(WIDE_CUPS, kind.water * WIDE_CUPS, GREY, style="dashed"),
            Series(WIDE_CUPS, predict(model, WIDE_CUPS, darkness), color, kind.name),
            Series(x_BD[:, 0], water_B, color, style="dots"),
        ]
    return LinePlot(
        "cups of grain", "cups of water", series, title, training_range=(1, 5), y_limits=(0, 31)
    )


def border() -> Sequence[Panel]:
    """Chapter 3: the score of a logistic regression separates two kinds of rice; its sigmoid is a probability."""
    x_BD, class_B = BINARY_CLASSIFICATION_TABLES["white-or-brown"](0).splits["train"]
    model = fit(lambda: Logistic(2), (x_BD, class_B))
    (cups, water), bias = model.score.weight.tolist(), model.score.bias.item()
    ends = torch.tensor([1.0, 5.0])
    plane = []
    for label, color in enumerate([BLUE, ORANGE]):
        x_N, y_N = x_BD[class_B == label].T
        plane.append(Series(x_N, y_N, color, style="dots"))
    for p in (0.1, 0.5, 0.9):
        y = (math.log(p / (1 - p)) - bias - cups * ends) / water
        style: LineStyle = "solid" if p == 0.5 else "dashed"
        plane.append(Series(ends, y, GREY, f"p = {p:g}", style, label_offset=(5, 30 * p - 15)))
    z = torch.linspace(-30, 30, 241)
    sigmoid = [Series(z, torch.sigmoid(z), GREY)]
    for label, (kind, color) in enumerate([(WHITE, BLUE), (BROWN, ORANGE)]):
        with torch.no_grad():
            z_N = model.score(x_BD[class_B == label].double())
        name = f"{kind.name}, y = {label}"
        median, offset = int(z_N.median(0).indices), (-30, 14 - 28 * label)
        sigmoid.append(Series(z_N, z_N * 0 + label, color, name, "dots", median, offset))
    return [
        LinePlot("cups of rice", "cups of water", plane),
        LinePlot("score z = w·x + b", "probability that it is brown", sigmoid),
    ]


def temperature() -> Sequence[Panel]:
    """Chapter 4: the softmax of the same scores at three temperatures."""
    scores = torch.tensor([3.0, 2.0, 1.0])
    names = [f"score {score:g}" for score in scores]
    panels = []
    for T in (0.25, 1.0, 4.0):
        p = softmax(scores, T).tolist()
        labels = [f"{share:.3f}" for share in p]
        panels.append(BarChart("probability", names, p, labels, f"T = {T:g}", 1.0))
    return panels


def curves() -> Sequence[Panel]:
    """Chapter 5: three curves fitted with 2, 8 and 32 ReLUs, each of which adds a kink."""
    x = torch.linspace(-1.5, 2.5, 161)
    colors = {"square": BLUE, "cubic": GREEN, "sine": ORANGE}
    panels = []
    for units, restarts in {2: 4, 8: 4, 32: 1}.items():
        series = []
        for name, (formula, curve) in CURVES.items():
            rows = REGRESSION_TABLES[name](0).splits["train"]
            model = fit(partial(MLP, 1, (units,)), rows, 120, restarts)
            series.append(Series(x, curve(x), GREY, style="dashed"))
            label = formula.replace("^2", "²").replace("^3", "³")
            series.append(Series(x, predict(model, x), colors[name], label))
        panels.append(LinePlot("x", "y", series, f"{units} units"))
    return panels


def experts() -> Sequence[Panel]:
    """Chapter 6: gated experts switch between linear laws and extrapolate each; a ReLU network bends."""
    kinds = [WHITE, BROWN, FRANKEN]
    rows = grain_rows(CUPS, *kinds)
    model = fit(lambda: Experts(2, 3, u=(0,), v=(1,)), rows, restarts=8)
    network = fit(lambda: MLP(2, (7,)), rows, restarts=4)
    darkness = torch.linspace(0, 1, 81)
    with torch.no_grad():
        gates_BE = model.gate_weights(torch.stack([darkness * 0, darkness], -1).double())
    peaks_E, order_E = gates_BE.argmax(0).sort()
    series = [
        Series(darkness, gates_BE[:, expert], PURPLE, f"{number}", "solid", int(peak), (-3, 9))
        for number, (peak, expert) in enumerate(zip(peaks_E, order_E, strict=True), 1)
    ]
    title = "the gates of experts 1, 2 and 3"
    return [
        rice_panel("three experts, gated", model, kinds),
        rice_panel("seven ReLUs", network, kinds),
        LinePlot("darkness of the grain", "weight", series, title, y_limits=(0, 1.1)),
    ]


SENTENCES = {
    "the {} eats and sleeps": "cat dog horse cow",
    "a {} dress and a {} hat": "red blue green white",
    "we saw {} ships and {} men": "two three four five",
    "he went from {} to {} by train": "paris rome london berlin",
}
"""Sentence templates, and the words that fill them."""


def words() -> Sequence[Panel]:
    """Chapter 7: cosine similarities of word vectors learned from generated sentences."""
    rng = random.Random(0)
    text: list[str] = []
    for _ in range(3000):
        template, fillers = rng.choice(list(SENTENCES.items()))
        text += template.format(*rng.sample(fillers.split(), 2)).split()
    vocabulary = sorted(set(text))
    ids = torch.tensor([vocabulary.index(word) for word in text])
    torch.manual_seed(0)
    model = Word2Vec(len(vocabulary), width=16, window=2)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(200):
        starts = torch.randint(len(ids) - 65, (16, 1))
        text_BW = ids[starts + torch.arange(65)]
        optimizer.zero_grad()
        model.loss(text_BW[:, :-1], text_BW[:, 1:]).backward()
        optimizer.step()
    selected = " ".join(SENTENCES.values()).split()
    vectors = F.normalize(model.vectors_VD[[vocabulary.index(word) for word in selected]], dim=-1)
    cosines = vectors @ vectors.t()
    return [Heatmap(cosines, rows=selected, columns=selected, colorbar_label="cosine")]


def powers() -> Sequence[Panel]:
    """Chapter 8: the gradient through a scalar recurrence is its weight to the power of the distance."""
    series = []
    weights = {1.5: ORANGE, 1.0: GREY, 0.9: BLUE, 0.5: PURPLE, 0.2: GREEN}
    for weight, color in weights.items():
        cell = RNNCell(1, 1).double()
        for parameter in cell.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(cell.hidden.weight, weight)
        norms = gradient_by_distance(cell, torch.zeros(41, 1, 1, dtype=torch.float64))
        series.append(Series(torch.arange(41), norms, color, f"w = {weight:g}"))
    return [LinePlot("steps back", "gradient that is left", series, log_y=True)]


def memory() -> Sequence[Panel]:
    """Chapters 8 to 10: norm of the gradient at a state, by its distance from the last state."""
    steps, width, seeds = 61, 64, 5
    cells: dict[str, type[Cell]] = {"LSTM": LSTMCell, "GRU": GRUCell, "RNN": RNNCell}
    series = []
    for (name, cell), color in zip(cells.items(), (BLUE, GREEN, ORANGE), strict=True):
        mean_log = torch.zeros(steps, dtype=torch.float64)
        for seed in range(seeds):
            torch.manual_seed(seed)
            x_TBD = torch.randn(steps, 4, width).double()
            norms = gradient_by_distance(cell(width, width).double(), x_TBD)
            mean_log += (norms / norms[0]).log() / seeds
        series.append(Series(torch.arange(steps), mean_log.exp(), color, name))
    title = f"{width} units, first weights, mean of {seeds} seeds"
    return [LinePlot("steps back", "gradient that is left", series, title, log_y=True)]


def mask() -> Sequence[Panel]:
    """Chapter 13: the causal mask under equal scores, and sinusoidal positions."""
    text = ["I", "eat", "bread", "and", "jam"]
    equal_BHTK = torch.zeros(1, 1, len(text), 8)
    causal_TS = torch.ones(len(text), len(text), dtype=torch.bool).tril()
    weights = attention_weights(equal_BHTK, equal_BHTK, causal_TS)[0, 0]
    labels = [
        [str(Fraction(weight).limit_denominator(9)) for weight in row] for row in weights.tolist()
    ]
    title = "equal scores behind the mask"
    positions = Heatmap(
        sinusoids(48, 32), "unit", "position", title="positions", colorbar_label="sine or cosine"
    )
    return [Heatmap(weights, "looks at", "the word", text, text, labels, title), positions]


def gpt3() -> Sequence[Panel]:
    """Chapter 14: the parameters of GPT-3 by kind."""
    kinds = summary.count_by_kind(summary.build_gpt3())
    total = sum(weights for _, weights in kinds.values())
    billions = [weights / 1e9 for _, weights in kinds.values()]
    labels = [f"{count:.2f} ({count * 1e9 / total:.1%})" for count in billions]
    return [BarChart("billion weights", list(kinds), billions, labels, f"GPT-3: {total:,} weights")]


_FIGURES = (line, rice, border, temperature, curves, experts, words, powers, memory, mask, gpt3)
FIGURES: dict[str, Callable[[], Sequence[Panel]]] = {figure.__name__: figure for figure in _FIGURES}
"""Functions that compute a figure's panels, in the order of the chapters."""
