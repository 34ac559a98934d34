"""The figures of docs/chapters.md: small experiments with the models of `gpt`, each in seconds on a CPU.

Here they are computed, from seeds; `plot` draws them.
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
from torch import Tensor

from gpt import summary
from gpt.checkpoint import did_you_mean
from gpt.models.attention import attention_weights
from gpt.models.base import Model
from gpt.models.linear import Linear, Logistic, SigmaPi, gradient_step, softmax
from gpt.models.mlp import MLP, Experts
from gpt.models.recurrent import Cell, GRUCell, LSTMCell, RNNCell, gradient_by_distance
from gpt.models.transformer import sinusoids
from gpt.models.word2vec import Word2Vec
from training.tasks.tables import (
    BROWN,
    CUPS,
    CURVES,
    FRANKEN,
    WHITE,
    Choice,
    Grain,
    Numbers,
    Rows,
    Table,
    grains,
)

Look = Literal["line", "dashes", "dots"]
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#777777"


@dataclass(frozen=True)
class Series:
    """A line or points, with a name written beside one of them."""

    x: Tensor
    y: Tensor
    color: str
    name: str = ""
    look: Look = "line"
    at: int = -1
    """The point that the name stands at."""
    shift: tuple[float, float] = (5, 0)
    """Where from there, in points; the name's middle stands at that height."""
    strength: float = 1.0
    """Of the colour."""


@dataclass(frozen=True)
class Curves:
    """Series on common axes."""

    x: str
    y: str
    series: Sequence[Series]
    title: str = ""
    log: bool = False
    """Whether the y axis counts in powers of ten."""
    seen: tuple[float, float] | None = None
    """The range of x that was trained on."""
    limits: tuple[float, float] | None = None
    """Of the y axis; all that there is when not given."""


@dataclass(frozen=True)
class Bars:
    """A bar for each name, and what is written at its end."""

    x: str
    names: Sequence[str]
    values: Sequence[float]
    labels: Sequence[str]
    title: str = ""
    whole: float | None = None
    """What a full bar stands for; the largest value when not given."""


@dataclass(frozen=True)
class Map:
    """Numbers as colours; each also written out where there are `labels`."""

    values: Tensor
    x: str = ""
    y: str = ""
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    labels: Sequence[Sequence[str]] = ()
    title: str = ""
    scale: str = ""
    """What the colours mean; a bar of them is drawn where this is said."""


Panel = Curves | Bars | Map
Some = TypeVar("Some", bound=Model)


def numbers(name: str) -> Table:
    """The table of a task whose answer is a number."""
    return Numbers.tables[name](0)


def fit(make: Callable[[], Some], rows: Rows, steps: int = 300, starts: int = 1) -> Some:
    """The best of a few models that L-BFGS has fitted, each from first weights of its own."""
    x_BD, y_B = (part.double() for part in rows)
    fitted = []
    for seed in range(starts):
        torch.manual_seed(seed)
        model = make().double()
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=steps, line_search_fn="strong_wolfe"
        )

        def closure(model: Model = model) -> float:
            model.zero_grad()
            loss = model.loss(x_BD, y_B)
            loss.backward()
            return loss.item()

        optimizer.step(closure)
        fitted.append((closure(), model))
    return min(fitted, key=lambda each: each[0])[1]


@torch.no_grad()
def said(model: Model, *columns: Tensor) -> Tensor:
    """y_B that a model of numbers says to rows of these columns."""
    return model(torch.stack(torch.broadcast_tensors(*columns), -1).double())


def line() -> Sequence[Panel]:
    """Chapter 1: the line after more and more steps of gradient descent."""
    metres_BD, power_B = numbers("basketball").splits["train"]
    model = Linear(1)
    with torch.no_grad():
        model.weight.zero_()
    ends = torch.tensor([0.0, 9.0])
    wanted = {0: "before", 1: "1 step", 2: "2 steps", 4: "4 steps", 3000: "3,000 steps"}
    series: list[Series] = []
    for step in range(max(wanted) + 1):
        if step in wanted:
            power = model(ends.unsqueeze(-1)).detach()
            strength = 0.3 + 0.7 * len(series) / (len(wanted) - 1)
            series.append(Series(ends, power, BLUE, wanted[step], strength=strength))
        gradient_step(model, 0.005, metres_BD, power_B)
    shots = Series(metres_BD[:, 0], power_B, ORANGE, "shots that went in", "dots", 5, (-105, 8))
    return [Curves("distance (metres)", "power (units)", [*series, shots])]


KINDS = {WHITE: BLUE, BROWN: ORANGE, FRANKEN: GREEN}
FAR = torch.linspace(0, 10, 81)
"""Cups of grain, twice as far as CUPS."""


def rice() -> Sequence[Panel]:
    """Chapter 2: a product fits two rices, near and far; a ReLU network follows its points."""
    rows = grains(CUPS, WHITE, BROWN)
    return [
        cooked("3 weights: y = (pz + q) x + b", fit(SigmaPi, rows), [WHITE, BROWN]),
        cooked("9 weights: two ReLUs", fit(lambda: MLP(2, (2,)), rows, starts=8), [WHITE, BROWN]),
    ]


def cooked(title: str, model: Model, kinds: Sequence[Grain]) -> Curves:
    """The water that a model gives to each kind, beside the water that it needs."""
    series = []
    for kind in kinds:
        color, darkness = KINDS[kind], torch.tensor(kind.darkness)
        x_BD, water_B = grains(CUPS, kind)
        series += [
            Series(FAR, kind.water * FAR, GREY, look="dashes"),
            Series(FAR, said(model, FAR, darkness), color, kind.name),
            Series(x_BD[:, 0], water_B, color, look="dots"),
        ]
    return Curves("cups of grain", "cups of water", series, title, seen=(1, 5), limits=(0, 31))


def border() -> Sequence[Panel]:
    """Chapter 3: the score of a logistic regression divides two rices; its sigmoid says how surely."""
    x_BD, class_B = Choice.tables["white-or-brown"](0).splits["train"]
    model = fit(lambda: Logistic(2), (x_BD, class_B))
    (cups, water), bias = model.score.weight.tolist(), model.score.bias.item()
    across = torch.tensor([1.0, 5.0])
    series, curve = [], []
    for number, color in enumerate([BLUE, ORANGE]):
        own_BD = x_BD[class_B == number]
        series.append(Series(own_BD[:, 0], own_BD[:, 1], color, look="dots"))
    for p in (0.1, 0.5, 0.9):
        at = (math.log(p / (1 - p)) - bias - cups * across) / water
        look: Look = "line" if p == 0.5 else "dashes"
        series.append(Series(across, at, GREY, f"p = {p:g}", look, shift=(5, 30 * p - 15)))
    score = torch.linspace(-30, 30, 241)
    curve.append(Series(score, torch.sigmoid(score), GREY))
    for number, (kind, color) in enumerate([(WHITE, BLUE), (BROWN, ORANGE)]):
        with torch.no_grad():
            own = model.score(x_BD[class_B == number].double())
        name = f"{kind.name}, y = {number}"
        middle, shift = int(own.median(0).indices), (-30, 14 - 28 * number)
        curve.append(Series(own, own * 0 + number, color, name, "dots", middle, shift))
    return [
        Curves("cups of rice", "cups of water", series),
        Curves("score z = w·x + b", "probability that it is brown", curve),
    ]


def temperature() -> Sequence[Panel]:
    """Chapter 4: a softmax of the same scores at three temperatures."""
    scores = torch.tensor([3.0, 2.0, 1.0])
    names = [f"score {score:g}" for score in scores]
    panels = []
    for T in (0.25, 1.0, 4.0):
        p = softmax(scores, T).tolist()
        panels.append(
            Bars("probability", names, p, [f"{each:.3f}" for each in p], f"T = {T:g}", 1.0)
        )
    return panels


def curves() -> Sequence[Panel]:
    """Chapter 5: three curves by 2, 8 and 32 ReLUs: a kink for each."""
    x = torch.linspace(-1.5, 2.5, 161)
    colors = {"square": BLUE, "cubic": GREEN, "sine": ORANGE}
    panels = []
    for units, starts in {2: 4, 8: 4, 32: 1}.items():
        series = []
        for name, (formula, curve) in CURVES.items():
            rows = numbers(name).splits["train"]
            model = fit(partial(MLP, 1, (units,)), rows, 120, starts)
            series.append(Series(x, curve(x), GREY, look="dashes"))
            written = formula.replace("^2", "²").replace("^3", "³")
            series.append(Series(x, said(model, x), colors[name], written))
        panels.append(Curves("x", "y", series, f"{units} units"))
    return panels


def experts() -> Sequence[Panel]:
    """Chapter 6: experts behind gates switch where a network bends, and keep each law whole."""
    kinds = [WHITE, BROWN, FRANKEN]
    rows = grains(CUPS, *kinds)
    model = fit(lambda: Experts(2, 3, u=(0,), v=(1,)), rows, starts=8)
    network = fit(lambda: MLP(2, (7,)), rows, starts=4)
    darkness = torch.linspace(0, 1, 81)
    with torch.no_grad():
        gates_BE = model.gate_weights(torch.stack([darkness * 0, darkness], -1).double())
    peaks_E, order_E = gates_BE.argmax(0).sort()
    series = [
        Series(darkness, gates_BE[:, expert], PURPLE, f"{place + 1}", at=int(peak), shift=(-3, 9))
        for place, (peak, expert) in enumerate(zip(peaks_E, order_E, strict=True))
    ]
    return [
        cooked("three experts, gated", model, kinds),
        cooked("seven ReLUs", network, kinds),
        Curves(
            "darkness of the grain",
            "weight",
            series,
            "the gates of experts 1, 2 and 3",
            limits=(0, 1.1),
        ),
    ]


SENTENCES = {
    "the {} eats and sleeps": "cat dog horse cow",
    "a {} dress and a {} hat": "red blue green white",
    "we saw {} ships and {} men": "two three four five",
    "he went from {} to {} by train": "paris rome london berlin",
}
"""Frames, and the words that stand in them."""


def words() -> Sequence[Panel]:
    """Chapter 7: the cosines of word vectors, learned from sentences by what stands near."""
    draw = random.Random(0)
    text: list[str] = []
    for _ in range(3000):
        frame, fitting = draw.choice(list(SENTENCES.items()))
        text += frame.format(*draw.sample(fitting.split(), 2)).split()
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
    chosen = " ".join(SENTENCES.values()).split()
    vectors = F.normalize(model.vectors_VD[[vocabulary.index(word) for word in chosen]], dim=-1)
    return [Map(vectors @ vectors.t(), rows=chosen, columns=chosen, scale="cosine")]


def powers() -> Sequence[Panel]:
    """Chapter 8: what reaches back through a scalar recurrence is its weight, to the power of the distance."""
    series = []
    weights = {1.5: ORANGE, 1.0: GREY, 0.9: BLUE, 0.5: PURPLE, 0.2: GREEN}
    for weight, color in weights.items():
        cell = RNNCell(1, 1).double()
        with torch.no_grad():
            for parameter in cell.parameters():
                parameter.zero_()
            cell.hidden.weight.fill_(weight)
        norms = gradient_by_distance(cell, torch.zeros(41, 1, 1, dtype=torch.float64))
        series.append(Series(torch.arange(41), norms, color, f"w = {weight:g}"))
    return [Curves("steps back", "gradient that is left", series, log=True)]


def memory() -> Sequence[Panel]:
    """Chapters 8 to 10: how much of a gradient reaches a state, by its distance from the last."""
    steps, width, seeds = 61, 64, 5
    cells: dict[str, type[Cell]] = {"LSTM": LSTMCell, "GRU": GRUCell, "RNN": RNNCell}
    series = []
    for (name, cell), color in zip(cells.items(), (BLUE, GREEN, ORANGE), strict=True):
        logarithms = torch.zeros(steps, dtype=torch.float64)
        for seed in range(seeds):
            torch.manual_seed(seed)
            x_TBD = torch.randn(steps, 4, width).double()
            norms = gradient_by_distance(cell(width, width).double(), x_TBD)
            logarithms += (norms / norms[0]).log() / seeds
        series.append(Series(torch.arange(steps), logarithms.exp(), color, name))
    title = f"{width} units, first weights, mean of {seeds} seeds"
    return [Curves("steps back", "gradient that is left", series, title, log=True)]


def mask() -> Sequence[Panel]:
    """Chapter 13: what makes an average know its place: a mask, and positions."""
    text = ["I", "eat", "bread", "and", "jam"]
    equal_BHTK = torch.zeros(1, 1, len(text), 8)
    past_TS = torch.ones(len(text), len(text), dtype=torch.bool).tril()
    weights = attention_weights(equal_BHTK, equal_BHTK, past_TS)[0, 0]
    labels = [
        [str(Fraction(each).limit_denominator(9)) for each in row] for row in weights.tolist()
    ]
    return [
        Map(weights, "looks at", "the word", text, text, labels, "equal scores behind the mask"),
        Map(sinusoids(48, 32), "unit", "position", title="positions", scale="sine or cosine"),
    ]


def gpt3() -> Sequence[Panel]:
    """Chapter 14: what GPT-3 is made of."""
    kinds = summary.count_by_kind(summary.build_gpt3())
    total = sum(weights for _, weights in kinds.values())
    weights = [weights / 1e9 for _, weights in kinds.values()]
    labels = [f"{each:.2f} ({each * 1e9 / total:.1%})" for each in weights]
    return [Bars("billion weights", list(kinds), weights, labels, f"GPT-3: {total:,} weights")]


FIGURES: dict[str, Callable[[], Sequence[Panel]]] = {
    "line": line,
    "rice": rice,
    "border": border,
    "temperature": temperature,
    "curves": curves,
    "experts": experts,
    "words": words,
    "powers": powers,
    "memory": memory,
    "mask": mask,
    "gpt3": gpt3,
}
"""By name, in the order of the chapters."""


def chosen(names: Sequence[str]) -> dict[str, Callable[[], Sequence[Panel]]]:
    """The figures that were named, in the order of the chapters; all where none was."""
    for name in names:
        if name not in FIGURES:
            raise ValueError(
                f"no figure is named {name!r}{did_you_mean(name, FIGURES)}; there are {', '.join(FIGURES)}"
            )
    return {name: panels for name, panels in FIGURES.items() if not names or name in names}
