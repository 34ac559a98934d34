"""Chapter 4: softmax, temperature, labels, clusters, and the first language model."""

import math

import pytest
import torch

from gpt.models.linear import BigramLM, softmax
from training.chapters.classes import (
    LABELS,
    LAST_AND_NEXT,
    NEXT_WORDS,
    VOCABULARY,
    WORDS,
    bigram,
    bits_per_byte,
    classes_and_labels,
    clusters,
    k_means,
    measured_grains,
    next_word_gradient,
    next_word_scores,
    softmax_of_base,
)
from training.tasks.tables import GRAINS

SCORES = torch.tensor([3.0, 2.0, 1.0])


@pytest.mark.parametrize("base", [2.0, 10.0, math.e])
def test_another_base_is_another_temperature(base):
    torch.testing.assert_close(softmax_of_base(base, SCORES), softmax(SCORES, 1 / math.log(base)))


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(0.25, (0.982, 0.018, 0.000)), (1, (0.665, 0.245, 0.090)), (4, (0.419, 0.326, 0.254))],
)
def test_softer_at_a_higher_temperature(temperature, expected):
    assert softmax(SCORES, temperature).tolist() == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("word", "nats"), [("mat", 0.105), ("hat", 2.996), ("dog", 4.605)])
def test_loss_and_gradient_of_the_next_word(word, nats):
    assert -math.log(NEXT_WORDS[word]) == pytest.approx(nats, abs=5e-4)
    is_next = [float(name == word) for name in NEXT_WORDS]
    expected = [p - y for p, y in zip(NEXT_WORDS.values(), is_next, strict=True)]
    assert next_word_gradient(word) == pytest.approx(expected, abs=1e-6)


def test_a_light_grain_is_white_rice_and_each_grain_its_own_kind():
    classifier, _ = classes_and_labels()
    with torch.no_grad():
        p_BV = classifier(torch.tensor([[0.1], [0.0], [0.5], [1.0]]).double())
    assert p_BV[0, 0].item() == pytest.approx(0.96, abs=0.01)
    assert p_BV[1:].argmax(-1).tolist() == [0, 1, 2]
    torch.testing.assert_close(p_BV.sum(-1), torch.ones(4).double())


def test_sigmoids_give_several_labels_at_once():
    _, labels = classes_and_labels()
    for name, expected in LABELS.items():
        for grain, label in zip(GRAINS, expected, strict=True):
            with torch.no_grad():
                p = labels[name](torch.tensor([[grain.darkness]]).double()).item()
            assert p == pytest.approx(label, abs=0.02), (name, grain.name)


def test_clusters_without_labels_are_the_kinds_of_grain():
    x_BD, kind_B = measured_grains()
    centers_KD, cluster_B = k_means(x_BD, 3)
    kind_of_cluster = torch.stack([kind_B[cluster_B == k].mode().values for k in range(3)])
    assert sorted(kind_of_cluster.tolist()) == [0, 1, 2]
    assert (kind_of_cluster[cluster_B] == kind_B).sum() == 145
    for k in range(3):  # settled: each center is the mean of the points that are nearest to it
        torch.testing.assert_close(centers_KD[k], x_BD[cluster_B == k].mean(0))
    assert torch.equal(torch.cdist(x_BD, centers_KD).argmin(-1), cluster_B)


def test_figure_of_the_clusters_shows_every_grain_once():
    *found, centers = clusters()[0].series
    assert sum(len(series.x) for series in found) == 150
    assert len(centers.x) == 3


def test_untrained_bigram_model_is_as_unsure_as_its_vocabulary_is_large():
    model = BigramLM(len(VOCABULARY), len(WORDS))
    assert model.loss(*LAST_AND_NEXT).exp().item() == pytest.approx(len(VOCABULARY))


def test_bigram_model_learns_the_frequencies_of_the_text():
    p_V = softmax(next_word_scores("the"))
    after_the = dict(zip(VOCABULARY, p_V.tolist(), strict=True))
    assert after_the["mat"] == pytest.approx(1 / 2, abs=1e-3)
    assert after_the["cat"] == pytest.approx(1 / 3, abs=1e-3)
    assert after_the["dog"] == pytest.approx(1 / 6, abs=1e-3)


def test_perplexity_and_bits_per_byte_of_the_bigram_model():
    """Of the 20 words but the first, 6 follow "the" and 2 "cat"; all others are certain."""
    after_the = -sum(n * math.log(n / 6) for n in (3, 2, 1))
    after_cat = 2 * math.log(2)
    loss = bigram().loss(*LAST_AND_NEXT).item()
    assert loss == pytest.approx((after_the + after_cat) / (len(WORDS) - 1), abs=1e-3)
    assert math.exp(loss) == pytest.approx(1.45, abs=0.01)
    assert bits_per_byte(loss) == pytest.approx(0.151, abs=0.001)


def test_a_temperature_of_a_half_squares_probabilities():
    p_V = softmax(next_word_scores("the"), 0.5)
    mat, cat, dog = (p_V[VOCABULARY.index(word)].item() for word in ("mat", "cat", "dog"))
    assert (mat, cat, dog) == pytest.approx((9 / 14, 4 / 14, 1 / 14), abs=1e-3)
