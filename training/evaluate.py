"""How well a language model predicts a text: every token scored exactly once.

    loss              mean of -ln p(token | what is before it), in nats
    perplexity        exp(loss); comparable only under one tokenizer
    word perplexity   exp(all nats / words); words and line ends count (Mikolov et al. 2010)
    bits per byte     all nats / (ln 2 * bytes of the text); comparable under every tokenizer

A text longer than the context is read in windows. Each window scores the `stride` tokens
that no window before it has scored, with what else fits in front of them as context. A
stride as long as the context is the fastest (half of it, for a model that reads one half of
a window to write the other); a shorter one gives every token more to go by,
and so a lower loss: figures are comparable only with both beside them.
"""

import dataclasses
import gzip
import lzma
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from gpt import LanguageModel
from gpt.device import autocast
from training.corpus import Split

TOKENS_AT_ONCE = 8192
"""Tokens that one forward pass scores."""


@dataclass(frozen=True)
class Score:
    """What evaluation found; `nats` is the sum over `tokens` predicted tokens."""

    nats: float
    tokens: int
    words: int
    bytes: int
    context: int
    stride: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """Per word or line end; NaN for a text without either."""
        return _exp(self.nats / self.words) if self.words else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Per byte of the text in UTF-8."""
        return self.nats / (math.log(2) * self.bytes)

    def to_json(self) -> dict[str, float]:
        """Every figure by name."""
        names = ("loss", "perplexity", "word_perplexity", "bits_per_byte")
        return {name: getattr(self, name) for name in names} | dataclasses.asdict(self)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, scored): read tokens [start, end) and score the last `scored` predictions.

    The predictions of a sequence of `length` tokens are those of its tokens 1 to length - 1,
    made from tokens 0 to length - 2.
    """
    end = min(context, length - 1)
    yield 0, end, end
    while end < length - 1:
        scored = min(stride, length - 1 - end)
        end += scored
        yield max(0, end - context), end, scored


def evaluate(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    words: int,
    bytes: int,  # noqa: A002 (the unit's own name)
    stride: int | None = None,
    precision: str = "auto",
) -> Score:
    """Score a sequence of token ids; its first token is context only.

    Args:
        model: On its device; its `context` is the length of a window.
        tokens: (N,) ids.
        words: Words and line ends of the text.
        bytes: Bytes of the text in UTF-8.
        stride: Tokens scored by each window after the first; when None, all that the model is
            trained to predict of one.
        precision: As in `Run`.
    """
    context = model.context
    stride = model.scorable if stride is None else stride
    if not 1 <= stride <= model.scorable:
        raise ValueError(
            f"--stride must be between 1 and {model.scorable}, which is what the model is trained "
            f"to predict of a window of {context}, not {stride}"
        )
    if len(tokens) < 2:
        raise ValueError("a text of no tokens cannot be scored")
    all_windows = windows(len(tokens), context, stride)
    nats, count = _sum(model, tokens, all_windows, precision)
    return Score(nats, count, words, bytes, context, stride)


def estimate(
    model: LanguageModel,
    tokens: np.ndarray,
    budget: int,
    precision: str = "auto",
) -> float:
    """The loss in nats over about `budget` tokens, in windows spread evenly over the text."""
    whole = list(windows(len(tokens), model.context, model.scorable))
    some = whole[:: max(1, len(whole) * model.scorable // max(budget, model.scorable))]
    nats, count = _sum(model, tokens, iter(some), precision)
    return nats / count


def _sum(
    model: LanguageModel,
    tokens: np.ndarray,
    some_windows: Iterator[tuple[int, int, int]],
    precision: str,
) -> tuple[float, int]:
    """The nats of all predictions that the windows score, and how many they are."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, count = 0.0, 0
    bar = tqdm(
        total=len(tokens) - 1, unit=" tokens", desc="scoring", delay=2, leave=False, disable=None
    )
    with bar, torch.inference_mode(), autocast(device, precision):
        for batch in _batches(some_windows, model.context):
            rows = np.stack([tokens[start : end + 1] for start, end, _ in batch]).astype(np.int64)
            rows_BT = torch.from_numpy(rows).to(device)
            targets_BT = rows_BT[:, 1:].clone()
            scored = batch[0][2]
            targets_BT[:, : targets_BT.shape[1] - scored] = -100
            nats += model.nll(rows_BT[:, :-1], targets_BT).cpu().double().sum().item()
            count += scored * len(batch)
            bar.update(scored * len(batch))
    model.train(was_training)
    return nats, count


def _batches(
    all_windows: Iterator[tuple[int, int, int]], context: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Neighbouring windows of one shape, together at most TOKENS_AT_ONCE tokens."""
    batch: list[tuple[int, int, int]] = []
    for window in all_windows:
        start, end, scored = window
        alike = batch and (end - start, scored) == (batch[0][1] - batch[0][0], batch[0][2])
        if batch and (not alike or (len(batch) + 1) * context > TOKENS_AT_ONCE):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def evaluate_split(
    model: LanguageModel,
    split: Split,
    stride: int | None = None,
    precision: str = "auto",
) -> Score:
    """Score all of a prepared split."""
    return evaluate(
        model,
        split.tokens,
        words=split.words,
        bytes=split.bytes,
        stride=stride,
        precision=precision,
    )


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors on the same text, as a yardstick."""
    sizes = {
        "gzip -9": len(gzip.compress(text, 9)),
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
