"""Chapters 11 to 13: what the trained translators show. In one file, so that each is trained once."""

import pytest
import torch
import torch.nn.functional as F

from tests.test_docs import assert_prints_what_the_page_shows
from tests.training.test_figures import TRAINED, assert_drawn
from training.chapters import FIGURES, attention, encoder_decoder, transformer
from training.chapters.toy_translation import attention_over_source, translate_sentences
from training.plots.panels import Heatmap


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


@pytest.mark.long
def test_cross_attention_finds_the_words():
    first, second = transformer.cross_attention()
    for panel in (first, second):
        assert isinstance(panel, Heatmap)
        torch.testing.assert_close(panel.values.sum(-1), torch.ones(len(panel.rows)).double())
    most_looked_at = [
        {
            panel.columns[column]
            for panel in (first, second)
            for column in [panel.values[row].argmax()]
        }
        for row in range(len(first.rows))
    ]
    found = dict(zip(first.rows, most_looked_at, strict=True))
    assert "cats" in found["chats"]
    assert "black" in found["noirs"]


@pytest.mark.long
@pytest.mark.parametrize("number", [11, 12, 13])
def test_chapter_prints_what_its_page_shows(number):
    assert_prints_what_the_page_shows(number)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(TRAINED))
def test_figures_are_drawn(name, tmp_path):
    assert_drawn(name, FIGURES[name](), tmp_path)
