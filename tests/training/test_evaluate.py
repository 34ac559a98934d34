"""Every token counted once, and every figure by a second computation."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpt import GPT, LanguageModel, State
from training.evaluation.evaluate import (
    Score,
    compression_baselines,
    estimate_loss,
    evaluate,
    windows,
)

CONTEXT = 16


class Uniform(LanguageModel):
    """Knows nothing: every token is equally likely."""

    def __init__(self, vocabulary: int, context: int) -> None:
        super().__init__(vocabulary, context)
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


@pytest.mark.parametrize("vocabulary", [2, 257, 4096, 50257])
def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(vocabulary: int) -> None:
    tokens = np.random.default_rng(0).integers(0, vocabulary, 300)
    score = evaluate(Uniform(vocabulary, CONTEXT), tokens, words=50, bytes=1000)
    assert score.perplexity == pytest.approx(vocabulary, abs=1e-6)
    assert score.bits_per_byte == pytest.approx(299 * math.log2(vocabulary) / 1000)
    assert score.word_perplexity == pytest.approx(math.exp(299 * math.log(vocabulary) / 50))


@pytest.mark.parametrize("length", [2, 3, 15, 16, 17, 18, 33, 100, 161])
@pytest.mark.parametrize("stride", range(1, CONTEXT + 1))
def test_every_prediction_is_scored_once_whatever_the_stride(length: int, stride: int) -> None:
    predicted: list[int] = []
    for start, end, scored in windows(length, CONTEXT, stride):
        assert 0 <= start < end <= length - 1
        assert end - start <= CONTEXT
        predicted += range(end - scored + 1, end + 1)
    assert predicted == list(range(1, length))


@pytest.mark.parametrize("stride", [1, 5, 8, 15, 16])
@pytest.mark.parametrize("length", [2, 16, 17, 83])
def test_the_sum_equals_one_prediction_at_a_time(model: GPT, stride: int, length: int) -> None:
    tokens = np.random.default_rng(length).integers(0, 60, length)
    total, context_of_next = 0.0, 0
    for place in range(1, length):
        # Windows after the first begin so that their last `stride` predictions are new.
        if place <= CONTEXT:
            start = 0
        else:
            end = min(CONTEXT + math.ceil((place - CONTEXT) / stride) * stride, length - 1)
            start = end - CONTEXT
        seen_1T = torch.from_numpy(tokens[start:place]).unsqueeze(0)
        with torch.inference_mode():
            probabilities_V = model(seen_1T)[0, -1].softmax(-1)
        total -= math.log(probabilities_V[tokens[place]].item())
        context_of_next += 1
    score = evaluate(model, tokens, words=7, bytes=200, stride=stride, precision="float32")
    assert score.tokens == context_of_next == length - 1
    assert score.nats == pytest.approx(total, rel=1e-9)
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / 200, rel=1e-9)


def test_batching_windows_changes_nothing(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 60, 500)
    whole = evaluate(model, tokens, words=1, bytes=1, stride=7, precision="float32")
    monkeypatch.setattr("training.evaluation.evaluate.TOKENS_AT_ONCE", 1)
    assert evaluate(
        model, tokens, words=1, bytes=1, stride=7, precision="float32"
    ).nats == pytest.approx(whole.nats, rel=1e-12)


def test_an_estimate_with_budget_for_all_is_the_loss(model: GPT) -> None:
    tokens = np.random.default_rng(0).integers(0, 60, 500)
    whole = evaluate(model, tokens, words=1, bytes=1, precision="float32")
    assert estimate_loss(model, tokens, 10_000, "float32") == pytest.approx(whole.loss)
    some = estimate_loss(model, tokens, 100, "float32")
    assert some != whole.loss
    assert some == pytest.approx(whole.loss, rel=0.3)


def test_training_mode_is_left_as_it_was(model: GPT) -> None:
    model.train()
    evaluate(model, np.arange(20), words=1, bytes=1)
    assert model.training


def test_a_stride_outside_the_context_is_refused(model: GPT) -> None:
    for stride in (0, CONTEXT + 1):
        with pytest.raises(ValueError, match=f"between 1 and {CONTEXT}"):
            evaluate(model, np.arange(50), words=1, bytes=1, stride=stride)


def test_perplexity_of_a_hopeless_loss_is_infinite_not_an_error() -> None:
    assert Score(1e6, 10, 1, 1, 1, 1).perplexity == math.inf
    assert math.isnan(Score(1.0, 1, 0, 1, 1, 1).word_perplexity)


def test_compressors_give_bits_per_byte() -> None:
    found = compression_baselines(b"abcd" * 10_000)
    assert found.keys() == {"gzip -9", "xz -9e"}
    assert all(0 < bits < 0.2 for bits in found.values())
