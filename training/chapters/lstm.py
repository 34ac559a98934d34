"""Chapter 9: gates, and a memory that is changed by addition."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gpt.models.linear import Logistic
from gpt.models.recurrent import LSTMCell, ManyToOne, gradient_by_distance
from training.chapters import reviews
from training.chapters.fitting import train
from training.plots.panels import BLUE, GREEN, ORANGE, Heatmap, LinePlot, Panel, Series

OPEN = 1e3
"""A bias that opens a gate fully; its negative shuts it."""
TITLES = {"cell": "cell state C", "hidden": "hidden state h", "candidate": "candidate n"}
"""What figures call a state."""


def cell_by_hand(i: float, f: float, g: float, o: float) -> LSTMCell:
    """Return a cell of one unit whose gates have fixed preactivations, whatever it reads."""
    cell = LSTMCell(1, 1).double()
    for weight in (cell.input.weight, cell.hidden.weight):
        nn.init.zeros_(weight)
    with torch.no_grad():
        cell.input.bias.copy_(torch.tensor([i, f, g, o], dtype=torch.float64))
    return cell


@torch.no_grad()
def step_by_hand(
    memory: float = 2.0, *, i: float = -OPEN, f: float = OPEN, g: float = OPEN, o: float = OPEN
) -> tuple[float, float]:
    """Return C and h after one step from C = `memory`, with gates of these preactivations."""
    x_BD = torch.zeros(1, 1, dtype=torch.float64)
    cell = cell_by_hand(i, f, g, o)
    hidden_BD, cell_BD = cell.step(cell.input(x_BD), x_BD, x_BD + memory)
    return cell_BD.item(), hidden_BD.item()


def gradient_along_the_cell_state(forget: float, steps: int) -> float:
    """Return dC_t / dC_0 after `steps` steps with a forget gate of this value."""
    cell = cell_by_hand(-OPEN, torch.tensor(forget, dtype=torch.float64).logit().item(), 0.0, OPEN)
    first_BD = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    x_TBD = torch.zeros(steps, 1, 1, dtype=torch.float64)
    _, (_, last_BD) = cell(x_TBD, (x_TBD[0], first_BD))
    return torch.autograd.grad(last_BD, first_BD)[0].item()


def gate_sums() -> tuple[float, float]:
    """Return the least and the largest f + i of the trained LSTM over the sentence."""
    trace = reviews.reader("LSTM").trace(reviews.one_hot(reviews.SENTENCE))
    sums = trace["forget gate"] + trace["input gate"]
    return sums.min().item(), sums.max().item()


def coin_tosses(length: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return x_BTD of 1 and -1 at random, and y_B: whether the first is 1."""
    generator = torch.Generator().manual_seed(seed)
    x_BTD = torch.randint(2, (count, length, 1), generator=generator).double() * 2 - 1
    return x_BTD, (x_BTD[:, 0, 0] > 0).double()


@functools.cache
def recall_first(cell: str, length: int) -> float:
    """Return how often a cell of 16 units tells the first toss after the last, once trained to."""
    torch.manual_seed(0)
    model = ManyToOne(reviews.CELLS[cell](1, 16), Logistic(16)).double()
    train(model, (coin_tosses(length, 64, seed) for seed in range(200)), rate=0.01)
    x_BTD, y_B = coin_tosses(length, 1000, seed=200)
    with torch.no_grad():
        return ((model(x_BTD) >= 0.5) == y_B.bool()).double().mean().item()


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield "One unit with C = 2, its gates set by hand. C' = f C + i g, h = o tanh(C')"
    yield f"  forget gate  f = 0 erases: C' = {step_by_hand(f=-OPEN)[0]:g}"
    yield f"               f = 1 keeps:  C' = {step_by_hand()[0]:g}"
    yield f"  input gate   i = 1, candidate -1: C' = {step_by_hand(i=OPEN, g=-OPEN)[0]:g}"
    yield f"               i = 1, candidate +1: C' = {step_by_hand(i=OPEN)[0]:g}"
    yield f"               i = 0, any candidate: C' = {step_by_hand()[0]:g}"
    yield f"  output gate  o = 1, C = -2: h = {step_by_hand(-2)[1]:.2f}"
    yield f"               o = 1, C = +2: h = {step_by_hand()[1]:.2f}"
    yield f"               o = 0, any C:  h = {step_by_hand(o=-OPEN)[1]:g}"
    yield f"  first word   no past, C = 0: C' = i g = {step_by_hand(0, i=OPEN)[0]:g}"
    yield "The gradient along C after 100 steps is f^100:"
    for forget in (1.0, 0.99, 0.5):
        yield f"  f = {forget:<6g}{gradient_along_the_cell_state(forget, 100):.2g}"
    yield "What was the first coin toss? Told after the last, with 200 steps of training, to the nearest 10%:"
    for length in (5, 20):
        rnn, lstm = (round(recall_first(cell, length), 1) for cell in ("RNN", "LSTM"))
        yield f"  of {length:>2} tosses: the RNN is right in {rnn:.0%}, the LSTM in {lstm:.0%}"
    model = reviews.reader("LSTM")
    right, count = reviews.accuracy(model), len(reviews.reviews()[1][0])
    yield f"An LSTM of {reviews.UNITS} units learns praise from blame; of {count} unseen sentences {right:.0%} are right."
    for sentence in ("the film was very good", "the film was not good", "the film was not bad"):
        yield f"  {sentence:<24}praise: {reviews.verdict(model, sentence):.0%}"
    unit, values_B = reviews.negation_unit(model, "cell")
    yield f"Unit {unit + 1} has found the negation, taught by nobody. Its C after each word:"
    words = (*reviews.NEGATIONS, *reviews.INTENSIFIERS)
    yield "  " + "  ".join(f"{w} {v:.2f}" for w, v in zip(words, values_B.tolist(), strict=True))
    yield f"Unit {unit + 1} over a sentence:"
    names = ("input gate", "forget gate", "candidate", "cell", "output gate", "hidden")
    yield from reviews.unit_rows(model, unit, names)
    low, high = gate_sums()
    yield f"f + i over the sentence is not 1, but from {low:.2f} to {high:.2f}."


def memory() -> Sequence[Panel]:
    """Chapters 8 to 10: norm of the gradient at a state, by its distance from the last state."""
    steps, width, seeds = 61, 64, 5
    series = []
    for (name, cell), color in zip(reviews.CELLS.items(), (BLUE, GREEN, ORANGE), strict=True):
        mean_log = torch.zeros(steps, dtype=torch.float64)
        for seed in range(seeds):
            torch.manual_seed(seed)
            x_TBD = torch.randn(steps, 4, width).double()
            norms = gradient_by_distance(cell(width, width).double(), x_TBD)
            mean_log += (norms / norms[0]).log() / seeds
        series.append(Series(torch.arange(steps), mean_log.exp(), color, name))
    title = f"{width} units, first weights, mean of {seeds} seeds"
    return [LinePlot("steps back", "gradient that is left", series, title, log_y=True)]


def gate_panels(cell: str, names: Sequence[str]) -> list[Heatmap]:
    """Plot gates and states of a trained cell over the sentence: a row a word, a column a unit."""
    trace: dict[str, Tensor] = reviews.reader(cell).trace(reviews.one_hot(reviews.SENTENCE))
    units = [str(unit + 1) for unit in range(reviews.UNITS)]
    return [
        Heatmap(
            trace[name][0],
            "unit",
            rows=reviews.SENTENCE,
            columns=units,
            title=TITLES.get(name, name),
            colorbar_label="shut 0, open 1" if name.endswith("gate") else "value",
            max_value=1.0 if name.endswith("gate") else None,
        )
        for name in names
    ]


def gates() -> Sequence[Panel]:
    """Chapter 9: gates and cell state of a trained LSTM over a sentence with a negation."""
    return gate_panels("LSTM", ("forget gate", "input gate", "cell"))


FIGURES = (memory, gates)
