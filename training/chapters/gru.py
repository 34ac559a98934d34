"""Chapter 10: two gates, one memory."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gpt.models.recurrent import GRUCell
from gpt.summary import count_parameters
from training.chapters import reviews
from training.chapters.lstm import OPEN, gate_panels
from training.plots.panels import Panel


@torch.no_grad()
def step_by_hand(r: float, z: float) -> float:
    """Return h after one step from h = 0.8 with gates of these preactivations.

    The candidate is tanh(0.5 + r h), where h is the memory before the step.
    """
    cell = GRUCell(1, 1).double()
    for parameter in cell.parameters():
        nn.init.zeros_(parameter)
    cell.input.bias.copy_(torch.tensor([r, z, 0.5]))
    cell.hidden.weight[2] = 1.0
    x_BD = torch.zeros(1, 1, dtype=torch.float64)
    (hidden_BD,) = cell.step(cell.input(x_BD), x_BD + 0.8)
    return hidden_BD.item()


@torch.no_grad()
def negate_carry_gate(cell: GRUCell) -> None:
    """Negate every weight of the carry gate, so that its z becomes 1 - z."""
    z = slice(cell.width, 2 * cell.width)
    for parameter in (cell.input.weight, cell.input.bias, cell.hidden.weight, cell.hidden.bias):
        parameter[z] *= -1


@torch.no_grad()
def conventions() -> tuple[float, float]:
    """Return how far h = (1 - z) h + z n, and Cho's candidate tanh(W x + U (r h)), are from ours.

    The first has the weights of our z negated; the second has our weights, without biases.
    """
    torch.manual_seed(0)
    cell = GRUCell(6, 6).double()
    nn.init.zeros_(cell.hidden.bias)
    x_BD, hidden_BD = torch.randn(2, 32, 6, dtype=torch.float64)
    (expected_BD,) = cell.step(cell.input(x_BD), hidden_BD)
    r_BD, z_BD, _ = cell.gates(cell.input(x_BD), hidden_BD)
    _, _, input_n_BD = cell.input(x_BD).chunk(3, dim=-1)
    cho_n_BD = torch.tanh(input_n_BD + (r_BD * hidden_BD) @ cell.hidden.weight[12:].t())
    cho_BD = z_BD * hidden_BD + (1 - z_BD) * cho_n_BD
    negate_carry_gate(cell)
    _, z_BD, n_BD = cell.gates(cell.input(x_BD), hidden_BD)
    other_BD = (1 - z_BD) * hidden_BD + z_BD * n_BD
    return max_distance(other_BD, expected_BD), max_distance(cho_BD, expected_BD)


def max_distance(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference."""
    return (a - b).abs().max().item()


def cell_sizes(width: int = 256) -> dict[str, int]:
    """Return the parameters of each kind of cell."""
    return {name: count_parameters(cell(width, width)) for name, cell in reviews.CELLS.items()}


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield "One unit with h = 0.8, its gates set by hand. n = tanh(0.5 + r h), h' = z h + (1 - z) n"
    yield f"  z = 1          carries everything forward:  h' = {step_by_hand(-OPEN, OPEN):.2f}"
    yield f"  z = 0, r = 1   takes the candidate:         h' = {step_by_hand(OPEN, -OPEN):.2f}"
    yield f"  z = 0, r = 0   ignores the past:            h' = {step_by_hand(-OPEN, -OPEN):.2f}"
    yield f"  z = 0.5, r = 1 half old, half new:          h' = {step_by_hand(OPEN, 0):.2f}"
    flipped, cho = conventions()
    yield "Two conventions, on random inputs:"
    same = "the same h" if flipped < 1e-12 else "another h"
    yield f"  h' = (1 - z) h + z n with the weights of z negated: {same}"
    yield f"  U (r h) instead of r (U h): another model; h' differs by up to {cho:.1g}"
    yield "Parameters of a cell of 256 units:"
    for name, count in cell_sizes().items():
        yield f"  {name:<6}{count:,}"
    model = reviews.reader("GRU")
    right, count = reviews.accuracy(model), len(reviews.reviews()[1][0])
    yield f"A GRU of {reviews.UNITS} units on the reviews of chapter 9; of {count} unseen sentences {right:.0%} are right."
    unit, _ = reviews.negation_unit(model, "hidden")
    yield f"Unit {unit + 1}, in which the negations differ most, over a sentence:"
    names = ("reset gate", "carry gate", "candidate", "hidden")
    yield from reviews.unit_rows(model, unit, names)
    yield "How often the new memory lies between the old one and the candidate, as an average does:"
    yield f"  GRU   {reviews.share_between(model, 'hidden'):.0%}"
    yield f"  LSTM  {reviews.share_between(reviews.reader('LSTM'), 'cell'):.0%}"


def carry() -> Sequence[Panel]:
    """Chapter 10: the gates and the state of a trained GRU over a sentence with a negation."""
    return gate_panels("GRU", ("carry gate", "candidate", "hidden"))


FIGURES = (carry,)
