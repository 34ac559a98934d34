"""Chapter 7: what its examples and figures claim."""

import pytest
import torch

from gpt.embeddings import cosines, nearest_tokens
from training.chapters import word_vectors as chapter


@pytest.mark.parametrize("negatives", [5, 0], ids=["negative sampling", "softmax"])
def test_words_of_one_group_get_similar_vectors(negatives):
    same, different = chapter.group_cosines(negatives)
    assert same > 0.9
    assert different < 0.5


def test_nearest_words_are_those_of_the_group():
    model, vocabulary = chapter.word_vectors(5)
    nearest = nearest_tokens(model, vocabulary.index("cat"), 3)
    assert {vocabulary[token] for token, _ in nearest} == {"dog", "horse", "cow"}


@pytest.mark.parametrize(
    ("word", "companies", "other"),
    [("bank", ("river", "interest"), "training"), ("model", ("dress", "token"), "water")],
)
def test_a_word_of_two_meanings_has_one_vector_between_them(word, companies, other):
    model, vocabulary = chapter.train_on_ambiguous("word2vec")
    cosine_V = cosines(model, vocabulary.index(word))
    near = [cosine_V[vocabulary.index(company)].item() for company in companies]
    assert min(near) > cosine_V[vocabulary.index(other)].item() + 0.2


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (
            "we walk along the river bank",
            "we swim along the river bank",
            "they save money at the bank",
        ),
        (
            "red dress worn by the model",
            "silk dress worn by the model",
            "next token comes from the model",
        ),
    ],
)
def test_after_attention_a_word_has_a_state_for_each_meaning(one, same, other):
    assert chapter.state_cosine(one, same) > 0.9
    assert chapter.state_cosine(one, other) < 0.4


def test_a_causal_state_does_not_know_the_next_word():
    on_stage, comes = chapter.states("the model on"), chapter.states("the model after")
    torch.testing.assert_close(on_stage[:2], comes[:2])
    assert not torch.allclose(on_stage[2], comes[2], atol=0.1)
