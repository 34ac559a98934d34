"""Every token is scored once, and every metric equals a second computation."""

import dataclasses
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
    score = evaluate(Uniform(vocab_size, CONTEXT), tokens, words=50, bytes=1000)
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
    score = evaluate(model, tokens, words=7, bytes=200, stride=stride, precision="float32")
    assert score.tokens == length - 1
    assert score.nll == pytest.approx(total, rel=1e-9)
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / 200, rel=1e-9)


def test_score_does_not_depend_on_batch_size(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 60, 500)
    batched = evaluate(model, tokens, words=1, bytes=1, stride=7, precision="float32")
    monkeypatch.setattr("training.evaluation.evaluate.MAX_BATCH_TOKENS", 1)
    single = evaluate(model, tokens, words=1, bytes=1, stride=7, precision="float32")
    assert single.nll == pytest.approx(batched.nll, rel=1e-12)


def test_loss_estimate_over_all_tokens_is_the_loss(model: GPT) -> None:
    tokens = np.random.default_rng(0).integers(0, 60, 500)
    loss = evaluate(model, tokens, words=1, bytes=1, precision="float32").loss
    assert estimate_loss(model, tokens, 10_000, "float32") == pytest.approx(loss)
    estimate = estimate_loss(model, tokens, 100, "float32")
    assert estimate != loss
    assert estimate == pytest.approx(loss, rel=0.3)


def test_training_mode_is_restored(model: GPT) -> None:
    model.train()
    evaluate(model, np.arange(20), words=1, bytes=1)
    assert model.training


def test_stride_outside_the_context_is_rejected(model: GPT) -> None:
    for stride in (0, CONTEXT + 1):
        with pytest.raises(ValueError, match=f"between 1 and {CONTEXT}"):
            evaluate(model, np.arange(50), words=1, bytes=1, stride=stride)


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
