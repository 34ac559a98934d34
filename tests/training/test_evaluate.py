"""Every token is scored once, and every metric equals a second computation."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpt import GPT, LSTM, LanguageModel, State
from gpt.models.transformer import Transformer
from training.evaluation.analysis import calibration
from training.evaluation.evaluate import (
    Predictions,
    Score,
    compression_baselines,
    estimate_loss,
    evaluate,
    windows,
)

CONTEXT = 16


class Uniform(LanguageModel):
    """Predicts every token with the same probability."""

    def __init__(self, vocab_size: int, context_length: int) -> None:
        super().__init__(vocab_size, context_length)
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        return tokens_BT.double().unsqueeze(-1) * 0

    def logits(self, features_BTD: Tensor) -> Tensor:
        return features_BTD.expand(*features_BTD.shape[:-1], self.vocab_size) + self.weight


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(60, CONTEXT, width=32, depth=2, heads=2).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("vocab_size", [2, 257, 4096, 50257])
def test_perplexity_of_a_uniform_model_is_the_vocab_size(vocab_size: int) -> None:
    tokens = np.random.default_rng(0).integers(0, vocab_size, 300)
    score = evaluate(Uniform(vocab_size, CONTEXT), tokens).score(50, 1000)
    assert score.perplexity == pytest.approx(vocab_size, abs=1e-6)
    assert score.bits_per_byte == pytest.approx(299 * math.log2(vocab_size) / 1000)
    assert score.word_perplexity == pytest.approx(math.exp(299 * math.log(vocab_size) / 50))


@pytest.mark.parametrize("length", [2, 3, 15, 16, 17, 18, 33, 100, 161])
@pytest.mark.parametrize("stride", range(1, CONTEXT + 1))
def test_every_token_is_scored_once_at_any_stride(length: int, stride: int) -> None:
    predicted: list[int] = []
    for start, end, scored in windows(length, CONTEXT, stride):
        assert 0 <= start < end <= length - 1
        assert end - start <= CONTEXT
        predicted += range(end - scored + 1, end + 1)
    assert predicted == list(range(1, length))


@pytest.mark.parametrize("stride", [1, 5, 8, 15, 16])
@pytest.mark.parametrize("length", [2, 16, 17, 83])
def test_windows_equal_one_prediction_at_a_time(model: GPT, stride: int, length: int) -> None:
    tokens = np.random.default_rng(length).integers(0, 60, length)
    total = 0.0
    for position in range(1, length):
        # Windows after the first start so that their last `stride` predictions are new.
        if position <= CONTEXT:
            start = 0
        else:
            end = min(CONTEXT + math.ceil((position - CONTEXT) / stride) * stride, length - 1)
            start = end - CONTEXT
        prefix_1T = torch.from_numpy(tokens[start:position]).unsqueeze(0)
        with torch.inference_mode():
            probabilities_V = model(prefix_1T)[0, -1].softmax(-1)
        total -= math.log(probabilities_V[tokens[position]].item())
    score = evaluate(model, tokens, stride=stride, precision="float32").score(7, 200)
    assert score.tokens == length - 1
    assert score.nll == pytest.approx(total, rel=1e-9)
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / 200, rel=1e-9)


@pytest.mark.parametrize("accuracy", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
def test_six_digits_depend_on_neither_batch_size_nor_threads(
    stateful: bool, accuracy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = LSTM(300, 16, width=48).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = np.random.default_rng(0).integers(0, 300, 1000)
    threads, figures = torch.get_num_threads(), set()
    options: dict[str, Any] = {"stateful": stateful, "precision": "float32", "accuracy": accuracy}
    try:
        for number, size in ((1, 8192), (2, 640), (1, 1)):
            torch.set_num_threads(number)
            monkeypatch.setattr("training.evaluation.evaluate.MAX_BATCH_TOKENS", size)
            monkeypatch.setattr("training.evaluation.evaluate.STATEFUL_CHUNK", 7 + size)
            score = evaluate(model, tokens, **options).score(500, 9000)
            names = ("loss", "perplexity", "word_perplexity", "bits_per_byte", "nll")
            figures.add(tuple(f"{getattr(score, name):.6g}" for name in names))
    finally:
        torch.set_num_threads(threads)
    assert len(figures) == 1


def test_sums_are_exact_where_float32_would_lose_small_terms() -> None:
    nll_N = np.full(2_000_000, 0.1)
    score = Predictions(nll_N[:, None], np.arange(len(nll_N)), 1, 1).score(1, 1)
    assert score.loss == pytest.approx(0.1, abs=1e-13)
    assert float(nll_N.astype(np.float32).cumsum()[-1]) / len(nll_N) != pytest.approx(0.1, rel=1e-3)


class Unigram(Uniform):
    """Predicts every token with its share of the text."""

    def __init__(self, counts_V: np.ndarray, context_length: int) -> None:
        super().__init__(len(counts_V), context_length)
        self.weight = nn.Parameter(torch.from_numpy(counts_V / counts_V.sum()).log())


@pytest.mark.parametrize("accuracy", [False, True])
def test_unigram_counts_score_the_entropy_of_the_text(accuracy: bool) -> None:
    tokens = np.random.default_rng(0).geometric(0.2, 5000).clip(max=30)
    counts_V = np.bincount(tokens[1:], minlength=31)
    shares = counts_V[counts_V > 0] / 4999
    entropy = -(shares * np.log(shares)).sum()
    for stride in (1, 5, CONTEXT):
        predictions = evaluate(Unigram(counts_V, CONTEXT), tokens, stride=stride, accuracy=accuracy)
        assert predictions.score(1, 1).loss == pytest.approx(entropy, abs=1e-6)


def test_loss_estimate_over_all_tokens_is_the_loss(model: GPT) -> None:
    tokens = np.random.default_rng(0).integers(0, 60, 500)
    loss = evaluate(model, tokens, precision="float32").score(1, 1).loss
    assert estimate_loss(model, tokens, 10_000, "float32") == pytest.approx(loss)
    estimate = estimate_loss(model, tokens, 100, "float32")
    assert estimate != loss
    assert estimate == pytest.approx(loss, rel=0.3)


def test_training_mode_is_restored(model: GPT) -> None:
    model.train()
    evaluate(model, np.arange(20))
    assert model.training


def test_stride_outside_the_context_is_rejected(model: GPT) -> None:
    for stride in (0, CONTEXT + 1):
        with pytest.raises(ValueError, match=f"between 1 and {CONTEXT}"):
            evaluate(model, np.arange(50), stride=stride)


def test_perplexity_of_a_huge_loss_is_infinite() -> None:
    assert Score(1e6, 10, 1, 1, 1, 1).perplexity == math.inf
    assert math.isnan(Score(1.0, 1, 0, 1, 1, 1).word_perplexity)


def test_no_figure_per_byte_or_word_of_a_text_that_was_not_scored() -> None:
    lossless = Score(10.0, 10, 3, 20, 1, 1)
    assert {"bits_per_byte", "word_perplexity"} <= lossless.to_json().keys()
    assert "lost" not in lossless.to_json()
    lossy = dataclasses.replace(lossless, lost="'The' becomes 'the'")
    assert not {"bits_per_byte", "word_perplexity"} & lossy.to_json().keys()
    assert lossy.to_json()["lost"] == "'The' becomes 'the'"
    assert "'The' becomes 'the'" in lossy.table()
    assert "bits per byte" not in lossy.table()


def test_unknown_words_are_counted() -> None:
    score = Score(10.0, 1234, 1100, 5000, 1, 1, unknown_tokens=56, lost="' x' becomes ' <unk>'")
    assert "1,234 tokens (56 unknown)" in score.table()
    assert score.to_json()["unknown_tokens"] == 56
    assert "word_perplexity" in score.to_json()


def test_compression_baselines_are_bits_per_byte() -> None:
    baselines = compression_baselines(b"abcd" * 10_000)
    assert baselines.keys() == {"gzip -9", "xz -9e"}
    assert all(0 < bits < 0.2 for bits in baselines.values())


def test_context_is_what_each_prediction_has_read(model: GPT) -> None:
    tokens = np.random.default_rng(0).integers(0, 60, 50)
    predictions = evaluate(model, tokens, stride=5, precision="float32")
    for position, context in enumerate(predictions.context_N.tolist(), 1):
        read_1T = torch.from_numpy(tokens[position - context : position]).unsqueeze(0)
        with torch.inference_mode():
            log_probabilities_V = model(read_1T)[0, -1].log_softmax(-1)
        nll = -log_probabilities_V[tokens[position]].item()
        assert predictions.nll_N[position - 1] == pytest.approx(nll, rel=1e-9)
    stateful = evaluate(LSTM(60, CONTEXT, width=8), tokens, stateful=True)
    assert stateful.context_N.tolist() == list(range(1, 50))


@pytest.mark.parametrize("kind", ["gpt", "transformer"])
def test_ranks_and_confidences_equal_those_of_all_logits(
    kind: str, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: LanguageModel = model
    if kind == "transformer":  # scores the halves of its first window one by one
        scored = Transformer(60, CONTEXT, width=32, depth=1, heads=2).double().eval()
    tokens = np.random.default_rng(0).integers(0, 60, CONTEXT + 1)
    plain = evaluate(scored, tokens, precision="float32")
    monkeypatch.setattr("gpt.models.base.MAX_LOGITS", 300)  # chunks of five tokens
    predictions = evaluate(scored, tokens, precision="float32", accuracy=True)
    np.testing.assert_allclose(predictions.nll_N, plain.nll_N, rtol=1e-9)
    if kind == "transformer":
        return
    with torch.inference_mode():
        logits_TV = model(torch.from_numpy(tokens[None, :-1]))[0].numpy()
    probabilities_TV = np.exp(logits_TV) / np.exp(logits_TV).sum(-1, keepdims=True)
    order_TV = np.argsort(-logits_TV)
    ranks = [order.tolist().index(t) for order, t in zip(order_TV, tokens[1:], strict=True)]
    assert predictions.columns[:, 1].tolist() == ranks
    np.testing.assert_allclose(predictions.columns[:, 2], probabilities_TV.max(-1), rtol=1e-9)


def test_a_tie_is_a_miss() -> None:
    predictions = evaluate(Uniform(7, CONTEXT), np.arange(7), accuracy=True)
    assert (predictions.columns[:, 1] == 6).all()
    np.testing.assert_allclose(predictions.columns[:, 2], 1 / 7)


def test_a_model_that_has_diverged_hits_nothing() -> None:
    model = Uniform(7, CONTEXT)
    nn.init.constant_(model.weight, math.nan)
    _, rank_N, confidence_N = evaluate(model, np.arange(7), accuracy=True).columns.T
    figures, _ = calibration(rank_N, confidence_N)
    assert figures["accuracy_at_1"] == figures["accuracy_at_5"] == 0
