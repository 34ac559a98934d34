"""Chapter 6: experts chosen by a gate."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from gpt.models.linear import Regression
from gpt.models.mlp import MLP, Experts, GatedExperts
from gpt.summary import count_parameters
from training.chapters.fitting import fit, fit_each, fit_many, predict
from training.chapters.products import rice_panel
from training.plots.panels import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    LinePlot,
    Panel,
    Series,
)
from training.tasks.tables import CUPS, GRAINS, TEN, five_lines, grain_rows

STARTS = 8
"""First weights that each layer of experts is trained from."""

LINES: dict[str, Callable[[], Regression]] = {
    "five experts": lambda: Experts(2, 5),
    "7 ReLUs": lambda: MLP(2, (7,)),
    "4 + 3 ReLUs": lambda: MLP(2, (4, 3)),
}
"""Models of five random lines, of 30, 29 and 31 parameters."""

BEYOND = torch.tensor([-3.0, -2.5, -2.0, -1.5, 1.5, 2.0, 2.5, 3.0])
"""Points beyond the range from -1 to 1 in which the lines are sampled."""


class Start(NamedTuple):
    """A layer of experts after training."""

    model: Experts
    loss: float
    error_at_ten: float
    """Largest error for ten cups of a grain."""


def error_at_ten(model: Experts) -> float:
    """Return the largest error for ten cups of white rice, brown rice and franken-grain."""
    x_BD, water_B = grain_rows(TEN, *GRAINS)
    return (predict(model, *x_BD.t()) - water_B).abs().max().item()


@cache
def split_starts() -> list[Start]:
    """Train three experts that see the cups only, under gates that see the darkness only."""
    fitted = fit_each(lambda: Experts(2, 3, u=(0,), v=(1,)), grain_rows(CUPS, *GRAINS), 300, STARTS)
    return [Start(model, loss, error_at_ten(model)) for loss, model in fitted]


@cache
def joint_starts() -> list[Start]:
    """Train the document's own layer: three experts and gates that see both, u = v = (x, z)."""
    x_BD, y_B = (tensor.double() for tensor in grain_rows(CUPS, *GRAINS))
    tables = x_BD.expand(STARTS, -1, -1), y_B.expand(STARTS, -1)
    models = fit_many(lambda: Experts(2, 3), *tables, steps=1000, rate=0.1)
    return [Start(model, model.loss(x_BD, y_B).item(), error_at_ten(model)) for model in models]


def lowest(starts: Sequence[Start]) -> Start:
    """Return the start with the lowest loss."""
    return min(starts, key=lambda start: start.loss)


@torch.no_grad()
def documents_layer() -> Experts:
    """Return the layer that the document printed, with its weights of one decimal."""
    model = Experts(2, 3).double()
    weights = {
        "gates.weight": [[0, -10], [0.2, 0], [-0.8, 9.2]],
        "gates.bias": [3.9, -0.1, -2.8],
        "experts.weight": [[1.9, 0], [2.1, -29.2], [1, 0]],
        "experts.bias": [-0.5, 20.3, 0],
    }
    model.mixture.load_state_dict({name: torch.tensor(it) for name, it in weights.items()})
    return model


def formula(weights: Sequence[float], bias: float, names: Sequence[str]) -> str:
    """Return w·x + b as text, each weight with one decimal."""
    terms = zip((*weights, bias), (*names, ""), strict=True)
    # Adding 0 turns -0.0 into 0.0.
    return " ".join(f"{round(number, 1) + 0.0:+6.1f}{name}" for number, name in terms)


def layer_as_text(model: Experts) -> Iterator[str]:
    """Yield the scores s of the gates and the experts r of a layer, as the document prints them."""
    for letter, module, columns in (
        ("s", model.mixture.gates, model.v),
        ("r", model.mixture.experts, model.u),
    ):
        linear = cast(nn.Linear, module)
        for number, (row, bias) in enumerate(zip(linear.weight, linear.bias, strict=True), 1):
            names = ["xz"[column] for column in columns]
            yield f"  {letter}{number} = {formula(row.tolist(), bias.item(), names)}"


@torch.no_grad()
def slopes(model: Experts) -> list[float]:
    """Return the slope of the mixed line of each grain: the mean of the slopes, weighted by the gates."""
    darkness_V = torch.tensor([[0, grain.darkness] for grain in GRAINS]).double()
    slope_E = cast(nn.Linear, model.mixture.experts).weight[:, 0]
    return (model.gate_weights(darkness_V) @ slope_E).tolist()


@cache
def line_fits(name: str) -> list[tuple[Regression, float]]:
    """Fit a model to each of five tables of five random lines; return models and errors beyond the range."""
    fits = []
    for seed in range(5):
        model = fit(LINES[name], five_lines(seed, torch.linspace(-1, 1, 10)), 100)
        x_BD, y_B = five_lines(seed, BEYOND)
        fits.append((model, (predict(model, *x_BD.t()) - y_B).abs().mean().item()))
    return fits


def median_error(name: str) -> float:
    """Return the median over the five tables of the mean error beyond the range."""
    return torch.tensor([error for _, error in line_fits(name)]).median().item()


def photos(seed: int, photos_per_grain: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return cups, photos and cups of water. The grain decides the shape of the dark pixels.

    A photo has 8 x 8 pixels, four of them dark: a bar, a square or a diagonal, anywhere. All photos
    are equally dark, so that only the shape tells the grain.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        [(0, 0), (0, 1), (0, 2), (0, 3)],
        [(0, 0), (0, 1), (1, 0), (1, 1)],
        [(i, i) for i in range(4)],
    ]
    kind_B = torch.arange(len(GRAINS)).repeat_interleave(photos_per_grain)
    photos_BCHW = torch.zeros(len(kind_B), 1, 8, 8, dtype=torch.float64)
    corners_B2 = torch.randint(5, (len(kind_B), 2), generator=generator)
    for photo_CHW, kind, (top, left) in zip(photos_BCHW, kind_B, corners_B2.tolist(), strict=True):
        for row, column in shapes[kind]:
            photo_CHW[0, top + row, left + column] = 1
    cups_B1 = 1 + 4 * torch.rand(len(kind_B), 1, generator=generator).double()
    water_B = torch.tensor([grain.water for grain in GRAINS])[kind_B].double()
    return cups_B1, photos_BCHW, water_B * cups_B1[:, 0]


@cache
def photo_gate(convolution: bool) -> GatedExperts:
    """Train three experts of the cups under a gate of photos: a line of the pixels, or a convolution."""
    torch.manual_seed(0)
    model = GatedExperts(1, 64, 3, 1)
    model.gates = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    if convolution:
        model.gates = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )
    model.double()
    cups_B1, photos_BCHW, water_B = photos(0, 40)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(500):
        optimizer.zero_grad()
        ((model(cups_B1, photos_BCHW)[:, 0] - water_B) ** 2).mean().backward()
        optimizer.step()
    return model


def photo_error(convolution: bool) -> float:
    """Return the mean squared error for new photos."""
    model = photo_gate(convolution)
    cups_B1, photos_BCHW, water_B = photos(1, 100)
    with torch.no_grad():
        return ((model(cups_B1, photos_BCHW)[:, 0] - water_B) ** 2).mean().item()


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    starts = split_starts()
    best = lowest(starts).model
    solved = sum(start.error_at_ten < 0.1 for start in starts)
    yield "Three grains. Three experts r see the cups x, their gates softmax(s) the darkness z."
    yield f"  starts that find the grains: {solved} of {STARTS}. That one:"
    yield from layer_as_text(best)
    yield f"  {'':<15}{'gates':<25}mixed line"
    darkness_BD = torch.tensor([[0, grain.darkness] for grain in GRAINS]).double()
    for grain, gates_E, slope in zip(
        GRAINS, best.gate_weights(darkness_BD), slopes(best), strict=True
    ):
        gates = "  ".join(f"{gate:.2f}" for gate in gates_E.tolist())
        yield f"  {grain.name:<15}{gates:<25}{slope:.2f}x"
    starts = joint_starts()
    fit, beyond = (
        sum(it) for it in zip(*((s.loss < 0.05, s.error_at_ten < 1) for s in starts), strict=True)
    )
    yield "Experts and gates both see x and z."
    yield f"  starts that fit 1 to 5 cups: {fit} of {STARTS}; right within a cup at 10 cups: {beyond}. The best one:"
    yield from layer_as_text(lowest(starts).model)
    yield f"  its largest error at 10 cups: {lowest(starts).error_at_ten:.1f} cups of water"
    yield "Weights of that layer as a text printed them, cups of water for white, brown, franken (2x, 3x, x):"
    for cups in (1, 5, 10):
        x_BD, _ = grain_rows(torch.tensor([float(cups)]), *GRAINS)
        water = "  ".join(f"{y:5.2f}" for y in predict(documents_layer(), *x_BD.t()).tolist())
        yield f"  {f'x = {cups}':<9}{water}"
    yield "Five random lines, sampled between -1 and 1. Error between 1.5 and 3, median of five tables:"
    for name in LINES:
        [(model, _), *_] = line_fits(name)
        yield f"  {name:<14}{count_parameters(model)} parameters  {median_error(name):.1f}"
    yield "A photo of the grain in place of its darkness. Mean squared error for new photos:"
    for name, convolution in (("a line of the pixels", False), ("a convolution", True)):
        yield f"  {'gate: ' + name:<28}{photo_error(convolution):.2f}"


def experts() -> Sequence[Panel]:
    """Chapter 6: experts mixed by gates that see the darkness extrapolate; a ReLU network bends."""
    model = lowest(split_starts()).model
    network = fit(lambda: MLP(2, (7,)), grain_rows(CUPS, *GRAINS), restarts=4)
    darkness = torch.linspace(0, 1, 81)
    with torch.no_grad():
        gates_BE = model.gate_weights(torch.stack([darkness * 0, darkness], -1).double())
        slope_E = cast(nn.Linear, model.mixture.experts).weight[:, 0]
    series = [
        Series(
            darkness,
            gate_B,
            color,
            f"{slope:.2f}x",
            "solid",
            int(gate_B.argmax().clamp(8, 80)),
            (-12, 10) if gate_B.argmax() < 80 else (4, 0),
        )
        for gate_B, slope, color in zip(
            gates_BE.t(), slope_E.tolist(), (PURPLE, GREY, BLACK), strict=True
        )
    ]
    return [
        rice_panel("three experts, gated", model, GRAINS),
        rice_panel("seven ReLUs", network, GRAINS),
        LinePlot(
            "darkness of the grain", "weight", series, "gate of each expert", y_limits=(0, 1.1)
        ),
    ]


def lines() -> Sequence[Panel]:
    """Chapter 6: five random lines; beyond the points only the experts stay near them."""
    x, seed = torch.linspace(-3, 3, 49), 3
    colors = (BLUE, ORANGE, GREEN, PURPLE, GREY)
    x_BD, y_B = five_lines(seed, x)
    panels = []
    for name in LINES:
        model, _ = line_fits(name)[seed]
        predicted_B = predict(model, *x_BD.t())
        series = []
        for color, true, predicted in zip(colors, y_B.chunk(5), predicted_B.chunk(5), strict=True):
            series.append(Series(x, true, color, style="dashed"))
            series.append(Series(x, predicted, color))
        panels.append(LinePlot("x", "y", series, name, training_range=(-1, 1), y_limits=(-8, 8)))
    return panels


FIGURES = (experts, lines)
