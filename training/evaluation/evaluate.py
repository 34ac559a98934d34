"""How well a language model predicts a text: every token scored exactly once.

    loss              mean of -ln p(token | what is before it), in nats
    perplexity        exp(loss); comparable only under one tokenizer
    word perplexity   exp(all nats / words); words and line ends count (Mikolov et al. 2010)
    bits per byte     all nats / (ln 2 * bytes of the text); comparable under every tokenizer

A model that was trained to carry its state on reads a text as one window, from its first token
to its last. For others, a text longer than the context is read in windows. Each window scores the `stride` tokens
that no window before it has scored, with what else fits in front of them as context. A
stride as long as the context is the fastest (half of it, for a model that reads one half of
a window to write the other); a shorter one gives every token more to go by,
and so a lower loss: figures are comparable only with both beside them.
"""

import contextlib
import dataclasses
import gzip
import lzma
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from gpt import LanguageModel, Model
from gpt.device import autocast

TOKENS_AT_ONCE = 8192
"""Tokens that one forward pass scores."""
CARRIED_AT_ONCE = 1024
"""The same of a single row."""


@dataclass(frozen=True)
class Score:
    """What evaluation found; `nats` is the sum over `tokens` predicted tokens."""

    nats: float
    tokens: int
    words: int
    bytes: int
    context_length: int
    stride: int
    baselines: dict[str, float] = dataclasses.field(default_factory=dict)
    """Bits per byte of general compressors on the same text."""

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
        """Per byte of the text in UTF-8; NaN where the tokens do not say all of it."""
        return self.nats / (math.log(2) * self.bytes) if self.bytes else math.nan

    def to_json(self) -> dict[str, float]:
        """Every figure by name; what is not known is left out."""
        names = ("loss", "perplexity", "word_perplexity", "bits_per_byte")
        figures = {name: getattr(self, name) for name in names}
        known = {name: figure for name, figure in figures.items() if not math.isnan(figure)}
        compressors = {"compressors": self.baselines} if self.baselines else {}
        counts = dataclasses.asdict(self)
        del counts["beside"]
        return known | counts | compressors

    def table(self) -> str:
        """The score in lines, its units and its setting with it."""
        lines = [
            f"  loss             {self.loss:.4f} nats per token",
            f"  perplexity       {self.perplexity:.3f} per token",
        ]
        if not math.isnan(self.word_perplexity):
            lines.append(f"  word perplexity  {self.word_perplexity:.2f}")
        if not math.isnan(self.bits_per_byte):
            lines.append(f"  bits per byte    {self.bits_per_byte:.4f}")
        lines += [f"    {name:<15}{bits:.4f}" for name, bits in self.baselines.items()]
        lines.append(
            f"  context {self.context_length}, stride {self.stride}; "
            f"{self.tokens:,} tokens, {self.words:,} words"
            + f", {self.bytes:,} bytes"
            * bool(self.bytes)
        )
        return "\n".join(lines)


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
    context_length: int | None = None,
    precision: str = "auto",
    stateful: bool = False,
) -> Score:
    """Score a sequence of token ids; its first token is context only.

    Args:
        model: On its device.
        tokens: (N,) ids.
        words: Words and line ends of the text.
        bytes: Bytes of the text in UTF-8.
        stride: Tokens scored by each window after the first; when None, all that the model is
            trained to predict of one.
        context_length: Length of a window; when None, the model's own.
        precision: As in `Run`.
        stateful: Read all of it with one state, whatever the context.
    """
    if stateful:
        if (stride, context_length) != (None, None):
            raise ValueError(
                "--stride and --context cut a text into windows; this run carries its state on"
            )
        nats, count = _carried(model, tokens, precision)
        return Score(nats, count, words, bytes, count, count)
    context_length = model.context_length if context_length is None else context_length
    if not 1 <= context_length <= model.context_length:
        raise ValueError(
            f"--context must be between 1 and {model.context_length}, not {context_length}"
        )
    scorable = max(1, context_length * model.max_scored_tokens // model.context_length)
    stride = scorable if stride is None else stride
    if not 1 <= stride <= scorable:
        raise ValueError(
            f"--stride must be between 1 and {scorable}, which is what the model is trained "
            f"to predict of a window of {context_length}, not {stride}"
        )
    if len(tokens) < 2:
        raise ValueError("a text of no tokens cannot be scored")
    all_windows = windows(len(tokens), context_length, stride)
    nats, count = _sum(model, tokens, all_windows, precision)
    return Score(nats, count, words, bytes, context_length, stride)


def estimate_loss(
    model: LanguageModel,
    tokens: np.ndarray,
    budget: int,
    precision: str = "auto",
    carry: bool = False,
) -> float:
    """The loss in nats over about `budget` tokens, in windows spread evenly over the text.

    With `carry`, over the first `budget`.
    """
    if carry:
        nats, count = _carried(model, tokens[: budget + 1], precision)
        return nats / count
    whole = list(windows(len(tokens), model.context_length, model.max_scored_tokens))
    some = whole[
        :: max(1, len(whole) * model.max_scored_tokens // max(budget, model.max_scored_tokens))
    ]
    nats, count = _sum(model, tokens, iter(some), precision)
    return nats / count


def _sum(
    model: LanguageModel,
    tokens: np.ndarray,
    some_windows: Iterator[tuple[int, int, int]],
    precision: str,
) -> tuple[float, int]:
    """The nats of all predictions that the windows score, and how many they are."""
    nats, count = 0.0, 0
    bar = tqdm(
        total=len(tokens) - 1, unit=" tokens", desc="scoring", delay=2, leave=False, disable=None
    )
    with bar, inference_mode(model, precision) as device:
        for batch in _batches(some_windows, model.context_length):
            rows = np.stack([tokens[start : end + 1] for start, end, _ in batch]).astype(np.int64)
            rows_BT = torch.from_numpy(rows).to(device)
            targets_BT = rows_BT[:, 1:].clone()
            scored = batch[0][2]
            targets_BT[:, : targets_BT.shape[1] - scored] = -100
            nats += model.nll(rows_BT[:, :-1], targets_BT).cpu().double().sum().item()
            count += scored * len(batch)
            bar.update(scored * len(batch))
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


def _carried(model: LanguageModel, tokens: np.ndarray, precision: str) -> tuple[float, int]:
    """The nats of all predictions, made with one state from the first token to the last."""
    nats = 0.0
    state = model.init_state(1, len(tokens))
    with inference_mode(model, precision) as device:
        for start in range(0, len(tokens) - 1, CARRIED_AT_ONCE):
            row = tokens[start : start + CARRIED_AT_ONCE + 1].astype(np.int64)
            row_BT = torch.from_numpy(row).to(device).unsqueeze(0)
            nats += len(row[1:]) * model.stateful_loss(state, row_BT[:, :-1], row_BT[:, 1:]).item()
    return nats, len(tokens) - 1


@contextlib.contextmanager
def inference_mode(model: Model, precision: str = "float32") -> Iterator[torch.device]:
    """Within this context the model drops nothing out and keeps no gradients; gives its device."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            yield device
    finally:
        model.train(was_training)


def compression_baselines(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors on the same text, as a yardstick."""
    sizes = {
        "gzip -9": len(gzip.compress(text, 9)),
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
