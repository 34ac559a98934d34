"""Chapter 7: word vectors."""

import random
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from gpt.models.word2vec import Word2Vec
from training.plots.panels import Heatmap, Panel

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


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = (words,)
