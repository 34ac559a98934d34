"""Chapters 11 and 12: a translator with one context vector, and one that looks back."""

import pytest
import torch
import torch.nn.functional as F

from training.chapters import attention, encoder_decoder
from training.chapters.toy_translation import attention_over_source, translate_sentences


@pytest.mark.long
def test_one_vector_is_enough_for_short_sentences_only():
    model = encoder_decoder.trained_seq2seq()
    assert translate_sentences(model, ["I love cats"]) == ["J'aime les chats"]
    short, middle, long = encoder_decoder.matches_by_length(model).values()
    assert short > 0.5
    assert short > middle > long
    assert long < 0.1


@pytest.mark.long
def test_attention_removes_the_bottleneck():
    model = attention.trained_attention()
    assert min(encoder_decoder.matches_by_length(model).values()) > 0.9


def test_weights_of_the_documents_scores():
    assert attention.SCORES.softmax(0).tolist() == pytest.approx([0.27, 0.47, 0.26], abs=5e-3)


@pytest.mark.long
def test_jaime_looks_at_love():
    model = attention.trained_attention()
    words, weights_LHTS = attention_over_source(model, "I love cats", "alignment")
    assert words == ["J'aime", "les", "chats", "end"]
    aime, _, chats, _ = weights_LHTS[0, 0]
    assert aime[1] > 0.7  # love
    assert chats[2] > 0.5  # cats
    torch.testing.assert_close(weights_LHTS.sum(-1), torch.ones(1, 1, 4).double())


@pytest.mark.long
def test_similar_meanings_have_similar_states():
    """Nobody says that love and like are one, nor which French word is theirs."""
    model = attention.trained_attention()
    states = attention.verb_states(model)

    def cosine(one, other):
        return F.cosine_similarity(states[one], states[other], dim=0).item()

    assert cosine("love", "like") > 0.1 + max(cosine("love", "see"), cosine("love", "hear"))
    french = list(dict.fromkeys(attention.VERBS.values()))
    for verb, state in states.items():
        written = {word: attention.written_by(model, state, word) for word in french}
        assert max(written, key=written.__getitem__) == attention.VERBS[verb]
