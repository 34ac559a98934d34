"""Tokens with similar vectors."""

import pytest
import torch

from gpt import GPT
from gpt.embeddings import cosines, nearest_tokens
from gpt.models.linear import BigramLM
from gpt.models.word2vec import Word2Vec


def model_of(*vectors):
    model = Word2Vec(len(vectors), width=2)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.tensor(vectors))
    return model


def test_nearest_are_those_of_the_largest_cosine_without_the_token_itself():
    model = model_of((1.0, 0.0), (0.0, 2.0), (3.0, 3.0), (-1.0, 0.0))
    assert cosines(model, 0).tolist() == pytest.approx([1, 0, 0.5**0.5, -1])
    assert nearest_tokens(model, 0, 2) == [(2, pytest.approx(0.5**0.5)), (1, 0)]
    assert len(nearest_tokens(model, 0, 100)) == 3


def test_every_model_with_an_embedding_has_neighbors():
    assert len(nearest_tokens(GPT(9, 4, width=8, heads=1, depth=1), 2, 5)) == 5


def test_a_model_without_vectors_is_refused():
    with pytest.raises(ValueError, match="BigramLM has no embedding"):
        nearest_tokens(BigramLM(9, 4), 2, 5)
    with pytest.raises(ValueError, match="none with the id 4: its model and the tokenizer are not"):
        nearest_tokens(model_of((1.0, 0.0), (0.0, 1.0)), 4, 5)
    with pytest.raises(ValueError, match="not finite"):
        nearest_tokens(model_of((1.0, 0.0), (float("nan"), 1.0)), 0, 1)
