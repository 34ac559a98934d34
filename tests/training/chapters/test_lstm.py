"""Chapter 9: the cases of each gate, and gates over a real sentence."""

import math

import pytest
import torch

from training.chapters import lstm, reviews
from training.chapters.lstm import OPEN, step_by_hand
from training.plots.drawing import draw_figure


def test_forget_gate_0_erases_and_1_keeps():
    assert step_by_hand(f=-OPEN)[0] == 0
    assert step_by_hand()[0] == 2


def test_sign_of_the_candidate_lowers_or_raises_the_cell_state_unless_the_input_gate_is_0():
    assert step_by_hand(i=OPEN, g=-OPEN)[0] == 1
    assert step_by_hand(i=OPEN, g=OPEN)[0] == 3
    assert step_by_hand(i=-OPEN, g=-OPEN)[0] == step_by_hand(i=-OPEN, g=OPEN)[0] == 2


def test_output_gate_shows_the_sign_of_the_cell_state_or_nothing():
    assert step_by_hand(-2)[1] == pytest.approx(-math.tanh(2))
    assert step_by_hand(2)[1] == pytest.approx(math.tanh(2))
    assert step_by_hand(2, o=-OPEN)[1] == 0


def test_first_cell_has_nothing_to_forget():
    assert step_by_hand(0, i=OPEN, f=OPEN) == step_by_hand(0, i=OPEN, f=-OPEN)
    assert step_by_hand(0, i=OPEN)[0] == 1


@pytest.mark.parametrize("forget", [1.0, 0.99, 0.5])
def test_gradient_along_the_cell_state_is_a_power_of_the_forget_gate(forget):
    gradient = lstm.gradient_along_the_cell_state(forget, 100)
    assert gradient == pytest.approx(forget**100, rel=1e-9)


def test_an_rnn_forgets_the_first_of_20_tosses_and_an_lstm_does_not():
    assert lstm.recall_first("RNN", 5) == 1
    assert lstm.recall_first("RNN", 20) < 0.6
    assert lstm.recall_first("LSTM", 20) == 1


def test_forget_and_input_gate_need_not_add_up_to_1():
    low, high = lstm.gate_sums()
    assert low < 0.5
    assert high > 1.5


def test_lstm_leaves_the_range_between_old_and_candidate():
    assert reviews.share_between(reviews.reader("LSTM"), "cell") < 0.9


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_not_turns_the_verdict_around(cell):
    model = reviews.reader(cell)
    assert reviews.accuracy(model) > 0.99
    assert reviews.verdict(model, "the film was very good") > 0.9
    assert reviews.verdict(model, "the film was not good") < 0.1
    assert reviews.verdict(model, "the film was not bad") > 0.9


@pytest.mark.parametrize(("cell", "state"), [("LSTM", "cell"), ("GRU", "hidden")])
def test_a_unit_finds_the_negation_taught_by_nobody(cell, state):
    _, values_B = reviews.negation_unit(reviews.reader(cell), state)
    negated_B, others_B = values_B.chunk(2)
    assert max(others_B.min() - negated_B.max(), negated_B.min() - others_B.max()) > 0.8


def test_training_sentences_are_not_among_the_unseen():
    (seen_BTV, _), (unseen_BTV, _) = reviews.reviews()
    seen = {tuple(row.flatten().tolist()) for row in seen_BTV}
    assert not seen & {tuple(row.flatten().tolist()) for row in unseen_BTV}
    assert len(seen) == len(unseen_BTV) == 432


def test_gates_figure_is_the_trace_over_the_sentence():
    forget, write, cell = lstm.gates()
    assert forget.rows == ["the", "film", "was", "not", "good"]
    assert forget.columns == [str(unit) for unit in range(1, 11)]
    for panel in (forget, write):
        assert 0 <= panel.values.min() < panel.values.max() <= panel.max_value == 1
    # C of the first word is i g alone: nothing was remembered.
    candidate = reviews.reader("LSTM").trace(reviews.one_hot(reviews.SENTENCE))["candidate"][0]
    torch.testing.assert_close(cell.values[0], write.values[0] * candidate[0])
    torch.testing.assert_close(
        cell.values[1:], forget.values[1:] * cell.values[:-1] + (write.values * candidate)[1:]
    )


def test_gates_are_drawn_from_0_to_1_and_states_with_both_signs(tmp_path):
    forget, _, cell = lstm.gates()
    minus = "\u2212"
    for panel, signs in ((forget, False), (cell, True)):
        draw_figure([panel], tmp_path / "gates.svg")
        svg = (tmp_path / "gates.svg").read_text("utf-8")
        assert (minus in svg) == signs
        for label in (panel.title, *panel.rows, *panel.columns):
            assert f">{label}<" in svg
    draw_figure([forget], tmp_path / "gates.svg")
    assert ">1.0<" in (tmp_path / "gates.svg").read_text("utf-8")
