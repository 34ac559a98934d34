"""Chapter 14: a fact in a feed-forward layer, a head by hand, and the value matrix factored."""

import pytest
import torch

from training.chapters import gpt2
from training.chapters.gpt2 import FEATURES, WORDS, recall


@pytest.mark.parametrize(
    ("names", "active"),
    [
        (("Michael", "Jordan"), 1),
        (("Michael", "Phelps"), 0),
        (("Barbara", "Jordan"), 0),
        (("Barbara", "Phelps"), 0),
    ],
)
def test_michael_and_jordan_together_give_basketball(names, active):
    fact = recall(*names)
    for value in (fact["neuron"], fact["basketball"], fact["Chicago Bulls"]):
        assert value == pytest.approx(active, abs=1e-12)


def test_the_fact_is_added_to_what_the_vector_says_already():
    x_D = gpt2.vector("Michael", "Jordan")
    after_D = x_D + gpt2.store_of_facts()(x_D)
    expected_D = gpt2.vector("Michael", "Jordan", "basketball", "Chicago Bulls")
    torch.testing.assert_close(after_D, expected_D)


def test_creature_takes_up_its_adjectives_and_no_other_word_changes():
    weights_TS, before_TD, after_TD = gpt2.contextualize()

    def meaning(word, of):
        return after_TD[WORDS.index(word), FEATURES.index(of)].item()

    assert meaning("creature", "creature") == 1
    assert meaning("creature", "fluffy") > 0.2
    assert meaning("creature", "blue") > 0.5
    assert meaning("creature", "fluffy") + meaning("creature", "blue") == pytest.approx(1, abs=1e-3)
    assert meaning("creature", "verdant") == 0  # behind the mask
    assert meaning("forest", "verdant") > 0.95
    changed = (after_TD - before_TD).abs().amax(-1) > 1e-3
    assert [word for word, c in zip(WORDS, changed, strict=True) if c] == ["creature", "forest"]
    assert not weights_TS.triu(1).any()


def test_value_matrices_factored_are_equal_to_1e_12():
    distance, rank = gpt2.factored_values()
    assert distance < 1e-12
    assert rank == 12  # that of the head's width, of 48


def test_ups_side_by_side_are_the_output_matrix():
    torch.manual_seed(0)
    attention = gpt2.MultiHeadAttention(48, 4, bias=False).double()
    downs = attention.value.weight.unflatten(0, (4, 12))
    identity = [
        whole @ torch.linalg.pinv(down)
        for whole, down in zip(gpt2.value_matrices(attention), downs, strict=True)
    ]
    torch.testing.assert_close(torch.cat(identity, dim=1), attention.output.weight)


def test_one_pass_gives_the_prediction_after_every_prefix():
    assert gpt2.prefixes_apart() < 1e-12


def test_a_word_has_one_vector_before_attention_and_after_it_one_for_each_past():
    before, after = gpt2.distance_of_one_word([1, 4, 5], [1, 6, 5], position=2)
    assert before == 0
    assert after > 1
    # Behind the mask, the words after it change nothing.
    assert gpt2.distance_of_one_word([1, 5, 2], [1, 5, 3], position=1) == (0, 0)


def test_figure_shows_the_heads_weights():
    attention, vectors = gpt2.creature()
    torch.testing.assert_close(attention.values.sum(-1), torch.ones(8).double())
    assert vectors.values[3].tolist() == pytest.approx([0, 0.27, 0.73, 1, 0, 0, 0, 0], abs=0.01)
