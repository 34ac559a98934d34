"""Chapter 2: products of inputs, and rice."""

import functools
from collections.abc import Iterator, Sequence

import torch

from gpt.models.base import Model
from gpt.models.linear import Linear, SigmaPi
from gpt.models.mlp import MLP
from training.chapters.fitting import fit, fit_each, predict
from training.plots.panels import BLUE, GREEN, GREY, ORANGE, BarChart, LinePlot, Panel, Series
from training.tasks.tables import BROWN, CUPS, FRANKEN, GRAINS, WHITE, Grain, grain_rows

GRAIN_COLORS = {WHITE: BLUE, BROWN: ORANGE, FRANKEN: GREEN}

WIDE_CUPS = torch.linspace(0, 10, 81)
"""Cups of grain, twice the range of CUPS."""

RICES = WHITE, BROWN
BAGS = tuple(Grain("rice", z, 2 + 2 * z) for z in (0, 0.125, 0.25, 0.375, 0.5))
"""Rices between white and brown, by how much bran they have: each needs (2z + 2) x cups of water."""


@functools.cache
def plane(*kinds: Grain) -> Linear:
    """Return the best plane y = ax + bz + c for CUPS of these kinds of grain."""
    return fit(lambda: Linear(2), grain_rows(CUPS, *kinds))


@functools.cache
def product(*kinds: Grain) -> SigmaPi:
    """Return the best y = (pz + q) x + b for CUPS of these kinds of grain."""
    return fit(SigmaPi, grain_rows(CUPS, *kinds))


@functools.cache
def networks(units: int, *kinds: Grain) -> list[tuple[float, MLP]]:
    """Return losses and networks of so many ReLUs for CUPS of these kinds of grain, from 8 starts."""
    return fit_each(lambda: MLP(2, (units,)), grain_rows(CUPS, *kinds), max_iter=100, restarts=8)


def best_network(units: int, *kinds: Grain) -> MLP:
    """Return the best of `networks`."""
    return min(networks(units, *kinds), key=lambda loss_and_model: loss_and_model[0])[1]


def models(*kinds: Grain) -> dict[str, Model]:
    """Return the chapter's models by name, each as it is best for CUPS of these kinds of grain."""
    return {
        "plane": plane(*kinds),
        "2 ReLUs": best_network(2, *kinds),
        "10 ReLUs": best_network(10, *kinds),
        "product": product(*kinds),
    }


@torch.no_grad()
def mean_squared_error(model: Model, *kinds: Grain) -> float:
    """Return a model's loss on CUPS of these kinds of grain."""
    x_BD, y_B = grain_rows(CUPS, *kinds)
    return model.loss(x_BD.double(), y_B.double()).item()


def water(model: Model, cups: float, darkness: float) -> float:
    """Return the cups of water that a model predicts."""
    return predict(model, torch.tensor([cups]), torch.tensor([darkness])).item()


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield "White rice (z = 0) needs 2x cups of water, brown rice (z = 0.5) 3x."
    yield "Trained on 1 to 5 cups of both:"
    (a, b), c = plane(*RICES).weight.tolist(), plane(*RICES).bias.item()
    yield f"  plane     y = {a:.2f} x + {b:.2f} z - {-c:.2f}"
    p, q, b = product(*RICES).weight.tolist()
    yield f"  product   y = {p:.2f} x z + {q:.2f} x + {b:z.2f}"
    yield "                        mean     10 cups   10 cups    4 cups of z = 0.25,"
    yield "          weights  squared error  white     brown       a little bran"
    for name, model in models(*RICES).items():
        weights = sum(weight.numel() for weight in model.parameters())
        white, brown, bran = (water(model, *row) for row in ((10, 0), (10, 0.5), (4, 0.25)))
        error = mean_squared_error(model, *RICES)
        yield f"{name:<10}{weights:5}{error:14.4f}{white:12.2f}{brown:10.2f}{bran:14.2f}"
    yield f"{'truth':<29}{20:12.2f}{30:10.2f}{10:14.2f}"
    for units in (2, 10):
        losses = [loss for loss, _ in networks(units, *RICES)]
        fitted = sum(loss < 1e-4 for loss in losses)
        yield f"{units} ReLUs fit both rices from {fitted} of {len(losses)} random starts."
    yield "Trained on five bags from white to brown (z = 0 to 0.5), mean squared error:"
    errors = {name: mean_squared_error(model, *BAGS) for name, model in models(*BAGS).items()}
    yield "  " + "   ".join(f"{name} {error:.4f}" for name, error in errors.items())
    yield "Franken-grain (z = 1) needs 1 cup of water per cup."
    yield f"  the product for the two rices gives it {water(product(*RICES), 1, 1):.2f}"
    p, q, b = product(*GRAINS).weight.tolist()
    error = mean_squared_error(product(*GRAINS), *GRAINS)
    yield f"  trained on all three: y = {p:.2f} x z + {q:.2f} x + {b:z.2f}, mean squared error {error:.2f}"


def surface() -> Sequence[Panel]:
    """Chapter 2: a plane gives each kind of rice a line of the same slope."""
    return [rice_panel("the best plane: y = 2.5x + 6z - 1.5", plane(*RICES), RICES)]


def rice() -> Sequence[Panel]:
    """Chapter 2: a product fits two kinds of rice and extrapolates; a ReLU network fits its points only."""
    errors = {name: mean_squared_error(model, *BAGS) for name, model in models(*BAGS).items()}
    return [
        rice_panel("3 weights: y = (pz + q) x + b", product(*RICES), RICES),
        rice_panel("9 weights: two ReLUs", best_network(2, *RICES), RICES),
        BarChart(
            "mean squared error",
            list(errors),
            list(errors.values()),
            [f"{error:.4f}" for error in errors.values()],
            "five bags of rice, from white to brown",
        ),
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


FIGURES = (surface, rice)
