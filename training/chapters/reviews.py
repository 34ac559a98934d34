"""Generated sentences of praise and blame, in which "not" turns the verdict around: chapters 9 and 10."""

import functools
import itertools
import random
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.models.linear import Logistic
from gpt.models.recurrent import Cell, GRUCell, LSTMCell, ManyToOne, RNNCell
from training.chapters.fitting import train

PRAISE, BLAME = ("good", "great", "fine"), ("bad", "awful", "dull")
NEGATIONS, INTENSIFIERS = ("not", "never", "hardly"), ("very", "really", "so")
SLOTS = (
    ("the", "this"),
    ("film", "book", "song", "ending"),
    ("was", "is", "seems"),
    NEGATIONS + INTENSIFIERS,
    PRAISE + BLAME,
)
"""The words of each of the five places of a sentence."""
VOCABULARY = tuple(itertools.chain(*SLOTS))
SENTENCE = ["the", "film", "was", "not", "good"]
"""The sentence whose gates are shown."""
UNITS = 10


def is_praise(words: tuple[str, ...]) -> bool:
    """Return whether a sentence praises: a kind word, or an unkind one behind a negation."""
    return (words[4] in PRAISE) != (words[3] in NEGATIONS)


def one_hot(*sentences: tuple[str, ...] | list[str]) -> Tensor:
    """Return x_BTV in float64: 1 at each word's number, 0 elsewhere."""
    ids = [[VOCABULARY.index(word) for word in words] for words in sentences]
    return F.one_hot(torch.tensor(ids), len(VOCABULARY)).double()


def reviews() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (x_BTV, y_B) of 432 sentences to learn from, and of the 432 others."""
    sentences = list(itertools.product(*SLOTS))
    random.Random(0).shuffle(sentences)
    x_BTV = one_hot(*sentences)
    y_B = torch.tensor([is_praise(words) for words in sentences]).double()
    half = len(sentences) // 2
    return (x_BTV[:half], y_B[:half]), (x_BTV[half:], y_B[half:])


CELLS: dict[str, type[Cell]] = {"LSTM": LSTMCell, "GRU": GRUCell, "RNN": RNNCell}


@functools.cache
def reader(cell: str) -> ManyToOne:
    """Return one of CELLS, of ten units, and a logistic regression, trained on the reviews."""
    torch.manual_seed(0)
    model = ManyToOne(CELLS[cell](len(VOCABULARY), UNITS), Logistic(UNITS)).double()
    return train(model, itertools.repeat(reviews()[0], 100), rate=0.03, weight_decay=0.3)


@torch.no_grad()
def accuracy(model: ManyToOne) -> float:
    """Return the share of unseen sentences whose verdict is right."""
    x_BTV, y_B = reviews()[1]
    return ((model(x_BTV) >= 0.5) == y_B.bool()).double().mean().item()


@torch.no_grad()
def verdict(model: ManyToOne, sentence: str) -> float:
    """Return the probability that a sentence praises."""
    return model(one_hot(sentence.split())).item()


def negation_unit(model: ManyToOne, state: str) -> tuple[int, Tensor]:
    """Return the unit in which negations and intensifiers differ most, and its values after each.

    The values are those of a state after "the film was" and each of NEGATIONS + INTENSIFIERS.
    """
    starts = [("the", "film", "was", word) for word in NEGATIONS + INTENSIFIERS]
    values_BD = model.trace(one_hot(*starts))[state][:, -1]
    negated_BD, others_BD = values_BD.chunk(2)
    gaps_D = (others_BD.mean(0) - negated_BD.mean(0)).abs()
    unit = int(gaps_D.argmax())
    return unit, values_BD[:, unit]


def share_between(model: ManyToOne, state: str) -> float:
    """Return how often a new state lies between the old one and the candidate.

    A weighted average always does. Counted over every unit and word of the unseen sentences.
    """
    trace = model.trace(reviews()[1][0])
    new_BTD, candidate_BTD = trace[state], trace["candidate"]
    old_BTD = torch.cat([torch.zeros_like(new_BTD[:, :1]), new_BTD[:, :-1]], dim=1)
    low_BTD, high_BTD = torch.minimum(old_BTD, candidate_BTD), torch.maximum(old_BTD, candidate_BTD)
    between_BTD = (low_BTD - 1e-9 <= new_BTD) & (new_BTD <= high_BTD + 1e-9)
    return between_BTD.double().mean().item()


def unit_rows(model: ManyToOne, unit: int, names: Sequence[str]) -> Iterator[str]:
    """Yield a line for each word of SENTENCE with gates and states of one unit."""
    trace = model.trace(one_hot(SENTENCE))
    yield "  " + " " * 8 + "".join(f"{name:>14}" for name in names)
    for position, word in enumerate(SENTENCE):
        values = (trace[name][0, position, unit].item() for name in names)
        yield f"  {word:<8}" + "".join(f"{value:14.2f}" for value in values)
