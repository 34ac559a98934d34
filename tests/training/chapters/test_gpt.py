"""Chapter 15: what each part of today's block does, and a small GPT that translates."""

import pytest
import torch

from training.chapters import gpt


def test_rms_norm_is_layer_norm_where_the_mean_is_0():
    assert gpt.norms(0) < 1e-9
    assert gpt.norms(3) > 1


def test_a_rotary_score_depends_on_the_distance_only():
    scores_TS = gpt.rotary_scores()
    for distance in (0, 1, 2, 50):
        diagonal = scores_TS.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert (scores_TS[3, 1] - scores_TS[3, 2]).abs() > 0.1


def test_normalized_queries_and_keys_bound_the_score():
    assert gpt.largest_score(1) == pytest.approx(gpt.largest_score(1000), rel=1e-4)
    assert gpt.largest_score(1000) <= 4


@pytest.mark.parametrize(("darkness", "cups_of_water"), [(0.0, 20), (0.5, 30), (0.25, 25)])
def test_swiglu_multiplies_as_chapter_2_does(darkness, cups_of_water):
    assert gpt.rice_by_swiglu(10, darkness) == pytest.approx(cups_of_water)


def test_a_gpt_learns_by_the_five_steps_of_chapter_1():
    before, after = gpt.loss_of_one_step()
    assert after < before - 0.5


def test_a_small_gpt_continues_a_sentence_with_its_translation():
    assert gpt.continue_greedily("a black cat and a red bird =") == (
        ["un", "chat", "noir", "et", "un", "oiseau", "rouge", "."]
    )
    assert gpt.share_translated() > 0.98


def test_translated_words_attend_to_their_sources():
    weights_HTS, written, read = gpt.attention_of_translation()
    assert written == ["un", "chat", "noir", "et", "un", "oiseau", "rouge", "."]
    for french, english in (
        ("chat", "cat"),
        ("noir", "black"),
        ("oiseau", "bird"),
        ("rouge", "red"),
    ):
        weights_HS = weights_HTS[:, written.index(french)]
        assert weights_HS[:, read.index(english)].max() > 0.5
    assert [panel.rows for panel in gpt.attention()] == [written, written]
