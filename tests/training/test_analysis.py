"""Intervals and p-values equal scipy's; the other figures equal a second computation."""

import math

import numpy as np
import pytest
from scipy import stats

from tests.training.helpers import write_corpus
from tokenizer import byte_tokenizer, train_bpe, train_words
from training.evaluation.analysis import (
    PairedSums,
    ScoredText,
    bootstrap_interval,
    calibration,
    loss_by_position,
    sign_flip_p_value,
)

BYTES = byte_tokenizer()


def tokens_of(documents, tokenizer=BYTES):
    ids = [[tokenizer.eos_token, *tokenizer.encode(document)] for document in documents]
    return np.concatenate([np.array(each, np.uint16) for each in ids])


def test_bootstrap_interval_is_that_of_scipy():
    rng = np.random.default_rng(1)
    sizes = rng.integers(50, 500, 40)
    nll = sizes * rng.normal(2.0, 0.3, 40)

    def ratio(nll, sizes, axis=-1):
        return nll.sum(axis) / sizes.sum(axis)

    expected = stats.bootstrap(
        (nll, sizes), ratio, paired=True, method="percentile", n_resamples=1000, rng=0
    ).confidence_interval
    found = bootstrap_interval(np.stack([nll, sizes], -1), lambda nll, sizes: nll / sizes)
    assert found == pytest.approx(tuple(expected), abs=0.1 * (expected.high - expected.low))
    assert found == bootstrap_interval(np.stack([nll, sizes], -1), lambda a, b: a / b)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(2), 0
    for _ in range(50):
        losses = rng.gamma(2.0, 1.0, 60)
        low, high = bootstrap_interval(losses[:, None], lambda total: total / 60)
        covered += low <= 2.0 <= high
    assert 43 <= covered <= 50


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5, 3.0])
def test_p_value_is_that_of_scipy(shift):
    difference = np.random.default_rng(3).normal(shift, 1, 30)
    expected = stats.permutation_test(
        (difference,), np.sum, permutation_type="samples", n_resamples=9999, rng=0
    ).pvalue
    assert sign_flip_p_value(difference) == pytest.approx(expected, abs=0.015)


def test_p_value_of_few_units_counts_the_observed_signs():
    # Of the eight signs of three units, two are as extreme as all above 0.
    assert sign_flip_p_value(np.array([0.1, 0.2, 0.3])) == pytest.approx(0.25, abs=0.02)
    assert sign_flip_p_value(np.zeros(5)) == 1
    assert sign_flip_p_value(np.full(200, 0.1)) == 1e-4


def test_documents_are_the_units_unless_they_are_few():
    documents = [f"document {i}" * (i + 1) for i in range(12)]
    text = ScoredText(tokens_of(documents), BYTES, "")
    units = text.units()
    assert units.description == "12 documents"
    [sizes] = units.sums(text.size_N).T
    assert sizes.tolist() == [len(document) for document in documents]
    # An EOS token, which has no bytes, ends its document.
    [tokens] = units.sums(np.ones_like(text.size_N)).T
    assert tokens.tolist() == [len(document) + 1 for document in documents[:-1]] + [sizes[-1]]
    few = ScoredText(tokens_of(documents[:9]), BYTES, "")
    blocks = few.units()
    assert blocks.description == "5 blocks of 100 bytes"
    assert blocks.sums(few.size_N)[:, 0].tolist() == [100, 100, 100, 100, few.size_N.sum() - 400]


def test_text_is_the_same_under_every_tokenizer_that_keeps_it():
    documents = ["naïve café, ", "tea and 東京 " * 30, "ends\n"]
    bpe = train_bpe(documents, 300)
    words = train_words(documents, 5)
    digest = ScoredText(tokens_of(documents), BYTES, "").digest()
    assert ScoredText(tokens_of(documents, bpe), bpe, "").digest() == digest
    assert ScoredText(tokens_of(["".join(documents)]), BYTES, "").digest() != digest
    assert ScoredText(tokens_of(documents, words), words, "lost").digest() != digest
    lossy = ScoredText(tokens_of(documents, words), words, "lost")
    assert lossy.size_unit == "tokens"
    assert lossy.size_N.sum() == len(lossy.tokens) - 1


def test_difference_is_in_bits_per_byte_of_the_same_blocks():
    document = "the cat sat on the mat\n" * 50
    bpe = train_bpe([document], 270)
    sums = []
    for tokenizer, nats_per_byte in ((BYTES, 1.0), (bpe, 0.9)):
        text = ScoredText(tokens_of([document], tokenizer), tokenizer, "")
        sums.append(PairedSums(text, nats_per_byte * text.size_N))
    result = sums[1].difference(sums[0])
    assert result["difference"] == pytest.approx(-0.1 / math.log(2))
    low, high = result["interval"]
    assert low < result["difference"] < high < 0
    assert result["p"] < 0.01
    assert sums[1].figures()["bits_per_byte"] == pytest.approx(0.9 / math.log(2))
    assert sums[0].difference(sums[0]) == {"difference": 0, "interval": (0, 0), "p": 1}


def test_difference_is_in_nats_per_token_where_text_is_lost():
    documents = [f"the {word} sat " * 20 for word in ("cat", "dog", "rat")]
    words = train_words(documents, 5)
    text = ScoredText(tokens_of(documents, words), words, "' rat' becomes ' <unk>'")
    nll_N = np.linspace(1, 2, len(text.size_N))
    better, worse = PairedSums(text, nll_N), PairedSums(text, nll_N + 0.25)
    assert (better.unit, better.figures()) == ("nats per token", {})
    assert worse.difference(better)["difference"] == pytest.approx(0.25)


def test_loss_by_document_adds_up(tmp_path):
    split = write_corpus(tmp_path).splits["validation"]
    nll_N = np.random.default_rng(4).gamma(2.0, 1.0, len(split.tokens) - 1)
    rows = ScoredText(split.tokens, BYTES, split.lost).loss_by_document(nll_N)
    assert [row["document"] for row in rows] == list(range(1, split.documents + 1))
    assert sum(row["bytes"] for row in rows) == split.bytes
    assert sum(row["tokens"] * row["loss"] for row in rows) == pytest.approx(nll_N.sum())
    text = BYTES.decode(split.tokens.tolist())
    for row, line in zip(rows, text.splitlines(keepends=True), strict=True):
        assert row["bytes"] == len(line)
        assert row["text"] == line[:40]
        nats = row["bits_per_byte"] * row["bytes"] * math.log(2)
        assert nats == pytest.approx(row["loss"] * row["tokens"])


def test_no_interval_of_one_unit_or_of_an_infinite_loss():
    tokens = tokens_of(["x" * 90])
    assert ScoredText(tokens, BYTES, "").intervals(np.ones(90)) == ({}, "")
    tokens = tokens_of(["x" * 500])
    nll_N = np.ones(500)
    intervals, resampled = ScoredText(tokens, BYTES, "").intervals(nll_N)
    assert resampled == "5 blocks of 100 bytes"
    assert intervals["loss"] == pytest.approx((1, 1))
    assert intervals["bits_per_byte"] == pytest.approx((1 / math.log(2),) * 2)
    assert ScoredText(tokens, BYTES, "lost").intervals(nll_N)[0].keys() == {"loss", "perplexity"}
    nll_N[7] = math.inf
    assert ScoredText(tokens, BYTES, "").intervals(nll_N) == ({}, "")


def test_positions_are_in_powers_of_two():
    context_N = np.array([1, 2, 3, 4, 5, 6, 6, 6])
    rows = loss_by_position(context_N, np.array([8.0, 7, 6, 5, 4, 3, 2, 1]))
    spans = [(row["context_from"], row["context_to"], row["tokens"]) for row in rows]
    assert spans == [(1, 1, 1), (2, 2, 1), (3, 4, 2), (5, 6, 4)]
    assert [row["loss"] for row in rows] == [8, 7, 5.5, 2.5]


def test_calibration_error_of_known_bins():
    confidence_N = np.array([0.2] * 10 + [0.9] * 10 + [1.0])
    rank_N = np.array([0.0] * 2 + [1.0] * 8 + [0.0] * 5 + [5.0] * 5 + [4.0])
    figures, bins = calibration(rank_N, confidence_N)
    assert [each["tokens"] for each in bins] == [10, 10, 1]
    error = (10 * 0 + 10 * 0.4 + 1 * 1.0) / 21
    assert figures["expected_calibration_error"] == pytest.approx(error)
    assert figures["accuracy_at_1"] == pytest.approx(7 / 21)
    assert figures["accuracy_at_5"] == pytest.approx(16 / 21)


def test_a_calibrated_model_has_no_calibration_error():
    rng = np.random.default_rng(5)
    confidence_N = rng.uniform(0.05, 1, 100_000)
    rank_N = (rng.random(100_000) >= confidence_N).astype(float)
    figures, _ = calibration(rank_N, confidence_N)
    assert figures["expected_calibration_error"] < 0.01
