"""Chapter 7: word vectors."""

import random
from collections.abc import Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.embeddings import cosines, nearest_tokens
from gpt.models.base import Model
from gpt.models.gpt import GPT
from gpt.models.word2vec import Word2Vec
from training.plots.panels import Heatmap, Panel

SENTENCES = {
    "the {} eats and sleeps": "cat dog horse cow",
    "a {} dress and a {} hat": "red blue green white",
    "we saw {} ships and {} men": "two three four five",
    "he went from {} to {} by train": "paris rome london berlin",
}
"""Sentence templates, and the words that fill them."""

FILLERS = " ".join(SENTENCES.values()).split()
"""The words of all groups, group after group."""

AMBIGUOUS = {
    "we {} along the river bank near {} water": ("walk run swim", "deep cold clear"),
    "they {} money at the bank for {} interest": ("save lend earn", "high low some"),
    "{} dress worn by the model on {} stage": ("red long silk", "one every that"),
    "{} token comes from the model after {} training": ("next last first", "long short more"),
}
"""Sentences in which the words bank and model mean two things each."""


def generate_text() -> list[str]:
    """Return the words of 3,000 sentences."""
    rng = random.Random(0)
    text: list[str] = []
    for _ in range(3000):
        template, fillers = rng.choice(list(SENTENCES.items()))
        text += template.format(*rng.sample(fillers.split(), 2)).split()
    return text


def words_of(text: Sequence[str]) -> list[str]:
    """Return the vocabulary of a text."""
    return sorted(set(text))


@cache
def word_vectors(negatives: int) -> tuple[Word2Vec, list[str]]:
    """Return vectors trained on the text, and their words; without negatives, by a softmax."""
    text = generate_text()
    vocabulary = words_of(text)
    ids = torch.tensor([vocabulary.index(word) for word in text])
    torch.manual_seed(0)
    model = Word2Vec(len(vocabulary), width=16, window=2, negatives=negatives)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(200):
        starts = torch.randint(len(ids) - 65, (16, 1))
        text_BW = ids[starts + torch.arange(65)]
        optimizer.zero_grad()
        model.loss(text_BW[:, :-1], text_BW[:, 1:]).backward()
        optimizer.step()
    return model, vocabulary


def filler_cosines(negatives: int) -> Tensor:
    """Return the cosines between the words of the groups."""
    model, vocabulary = word_vectors(negatives)
    tokens = [vocabulary.index(word) for word in FILLERS]
    return torch.stack([cosines(model, token)[tokens] for token in tokens])


def group_cosines(negatives: int) -> tuple[float, float]:
    """Return the mean cosine of two words of one group, and of two groups."""
    cosine_VV = filler_cosines(negatives)
    group_V = torch.arange(len(FILLERS)) // 4
    same_VV = group_V.unsqueeze(1) == group_V
    different = cosine_VV[~same_VV].mean().item()
    same_VV.fill_diagonal_(False)
    return cosine_VV[same_VV].mean().item(), different


def ambiguous_sentences() -> list[list[str]]:
    """Return every sentence of AMBIGUOUS, the nine of each template together."""
    return [
        template.format(first, second).split()
        for template, (firsts, seconds) in AMBIGUOUS.items()
        for first in firsts.split()
        for second in seconds.split()
    ]


@cache
def train_on_ambiguous(name: str) -> tuple[Model, list[str]]:
    """Train word2vec or a GPT on the sentences with bank and model; return it, and its words."""
    sentences = ambiguous_sentences()
    vocabulary = words_of([word for sentence in sentences for word in sentence])
    ids_BT = torch.tensor([[vocabulary.index(word) for word in s] for s in sentences])
    torch.manual_seed(0)
    model: Model
    if name == "word2vec":
        model = Word2Vec(len(vocabulary), width=16, window=3)
    else:
        model = GPT(len(vocabulary), 16, width=32, depth=2, heads=2)
    optimizer = torch.optim.Adam(model.parameters(), 0.02 if name == "word2vec" else 0.003)
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(ids_BT[:, :-1], ids_BT[:, 1:]).backward()
        optimizer.step()
    return model.eval(), vocabulary


def states(text: str) -> Tensor:
    """Return the GPT's states_TD after each word of a text."""
    model, vocabulary = train_on_ambiguous("gpt")
    assert isinstance(model, GPT)
    with torch.no_grad():
        return model.features(torch.tensor([[vocabulary.index(word) for word in text.split()]]))[0]


def state_cosine(first: str, second: str) -> float:
    """Return the cosine of the GPT's states after two texts."""
    return F.cosine_similarity(states(first)[-1], states(second)[-1], 0).item()


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield "Two vectors of length 1: the dot product is the cosine of the angle between them."
    for degrees in (60, 90, 120):
        angle = torch.tensor(degrees).double().deg2rad()
        vectors_2D = torch.tensor([[1, 0], [angle.cos(), angle.sin()]])
        yield f"  {degrees:>3} degrees  {(vectors_2D[0] @ vectors_2D[1]).item() + 0.0:.2f}"
    yield "Vectors from 3,000 generated sentences. Mean cosine of two words"
    yield "                     of one group  of two groups"
    for name, negatives in (("five negatives", 5), ("softmax", 0)):
        same, different = group_cosines(negatives)
        yield f"  {name:<20}{same:<15.2f}{different:.2f}"
    model, vocabulary = word_vectors(5)
    names = sorted(
        vocabulary[token] for token, _ in nearest_tokens(model, vocabulary.index("cat"), 3)
    )
    yield f"Nearest words of cat: {', '.join(names)}"
    yield "One vector for two meanings. Cosines:"
    both, vocabulary = train_on_ambiguous("word2vec")
    for word, others in {
        "bank": "river interest training",
        "model": "dress token water",
    }.items():
        cosine_V = cosines(both, vocabulary.index(word))
        values = "  ".join(
            f"{other} {cosine_V[vocabulary.index(other)]:.1f}" for other in others.split()
        )
        yield f"  {word:<8}{values}"
    yield "After attention (a GPT of two blocks): cosine of its states after"
    for first, second in (
        ("we walk along the river bank", "we swim along the river bank"),
        ("we walk along the river bank", "they save money at the bank"),
        ("red dress worn by the model", "next token comes from the model"),
        ("the model", "the model"),
    ):
        yield f"  {first:<29} {second:<33}{state_cosine(first, second):.1f}"


def words() -> Sequence[Panel]:
    """Chapter 7: cosine similarities of word vectors learned from generated sentences."""
    return [Heatmap(filler_cosines(5), rows=FILLERS, columns=FILLERS, colorbar_label="cosine")]


FIGURES = (words,)
