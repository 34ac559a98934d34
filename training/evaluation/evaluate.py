"""Evaluate a language model on a text, scoring every token exactly once.

    loss              mean of -ln p(token | preceding tokens), in nats
    perplexity        exp(loss); comparable only under the same tokenizer
    word perplexity   exp(nll / words); words and line ends count (Mikolov et al. 2010)
    bits per byte     nll / (ln 2 * bytes of the text); comparable under every tokenizer

where nll is the sum of -ln p over all tokens. A model trained with `--stateful` reads the text in
one pass, carrying its state from the first token to the last. For other models, a text longer than
the context is split into windows. Each window scores the `stride` tokens that no earlier window has
scored, with as many preceding tokens as fit for context. A stride of the whole context (half of it
for an encoder-decoder, which predicts only the second half of a window) is the fastest. A shorter
stride gives every token more context and so a lower loss: scores are comparable only under the same
context length and stride.
"""

import contextlib
import dataclasses
import gzip
import itertools
import lzma
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gpt import LanguageModel, Model
from gpt.device import autocast

MAX_BATCH_TOKENS = 8192
"""Tokens of one forward pass."""
STATEFUL_CHUNK = 1024
"""Tokens of one forward pass of stateful evaluation, whose batch size is 1."""

Window = tuple[int, int, int]
"""(start, end, scored): read tokens [start, end) and score the last `scored` predictions."""


@dataclass(frozen=True)
class Score:
    """Evaluation results of a language model on a text."""

    nll: float
    """Sum over `tokens` predicted tokens, in nats."""
    tokens: int
    words: int
    """Words and line ends of the text."""
    bytes: int
    """Bytes of the text in UTF-8."""
    context_length: int
    stride: int
    unknown_tokens: int = 0
    """Words or characters, among the tokens, that are not in the vocabulary."""
    lost: str = ""
    """An example of text that the tokens do not hold; empty if they hold all of it."""
    compressors: dict[str, float] = dataclasses.field(default_factory=dict)
    """Bits per byte of general-purpose compressors on the same text."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """Perplexity per word or line end; NaN for a text with neither, or if words were lost.

        Words that became `<unk>` count, as is usual for vocabularies of words.
        """
        is_defined = self.words and (self.unknown_tokens or not self.lost)
        return _exp(self.nll / self.words) if is_defined else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the text in UTF-8; NaN if the tokens do not hold all of it."""
        is_defined = self.bytes and not self.lost
        return self.nll / (math.log(2) * self.bytes) if is_defined else math.nan

    def to_json(self) -> dict[str, float]:
        """Return all metrics and counts by name, without those that are undefined."""
        names = ("loss", "perplexity", "word_perplexity", "bits_per_byte")
        metrics = {name: getattr(self, name) for name in names}
        defined = {name: value for name, value in metrics.items() if not math.isnan(value)}
        counts = dataclasses.asdict(self)
        for name in ("compressors", "lost"):
            if not counts[name]:
                del counts[name]
        return defined | counts

    def table(self) -> str:
        """Return the metrics as lines of text, with units, context length and stride."""
        lines = [f"  loss             {self.loss:.4f} nats per token"]
        lines.append(f"  perplexity       {self.perplexity:.3f} per token")
        if not math.isnan(self.word_perplexity):
            lines.append(f"  word perplexity  {self.word_perplexity:.2f}")
        if not math.isnan(self.bits_per_byte):
            lines.append(f"  bits per byte    {self.bits_per_byte:.4f}")
        if self.lost:
            lines.append(f"  text lost        {self.lost}: no figure per byte")
        lines += [f"    {name:<15}{bits:.4f}" for name, bits in self.compressors.items()]
        unknown = f" ({self.unknown_tokens:,} unknown)" * bool(self.unknown_tokens)
        lines.append(
            f"  context {self.context_length}, stride {self.stride}; "
            f"{self.tokens:,} tokens{unknown}, {self.words:,} words, {self.bytes:,} bytes"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class MixtureScore:
    """Scores of the sources of a mixture, and those of the mixture.

    A token of the mixture is of a source with the probability that is the source's share. So its
    loss is the mean of theirs, weighted by the shares, whatever the sizes of their splits.
    """

    sources: dict[str, Score]
    shares: dict[str, float]

    def _mean(self, value: Callable[[Score], float]) -> float:
        return sum(share * value(self.sources[name]) for name, share in self.shares.items())

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self._mean(lambda score: score.loss)

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte; NaN if the tokens of a source do not hold all of its text."""
        if any(math.isnan(score.bits_per_byte) for score in self.sources.values()):
            return math.nan
        return self.loss / (math.log(2) * self._mean(lambda score: score.bytes / score.tokens))

    def to_json(self) -> dict[str, Any]:
        """Return the mixture's figures by name, and under `sources` those of each."""
        metrics = {name: getattr(self, name) for name in ("loss", "perplexity", "bits_per_byte")}
        first = next(iter(self.sources.values()))
        return {
            **{name: value for name, value in metrics.items() if not math.isnan(value)},
            "tokens": sum(score.tokens for score in self.sources.values()),
            "context_length": first.context_length,
            "stride": first.stride,
            "sources": {
                name: {"share": self.shares[name], **score.to_json()}
                for name, score in self.sources.items()
            },
        }

    def table(self) -> str:
        """Return the mixture's figures, then those of each source, as lines of text."""
        lines = [
            f"  loss             {self.loss:.4f} nats per token",
            f"  perplexity       {self.perplexity:.3f} per token",
        ]
        if not math.isnan(self.bits_per_byte):
            lines.append(f"  bits per byte    {self.bits_per_byte:.4f}")
        for name, score in self.sources.items():
            lines += [f"{self.shares[name]:.2%} {name}", score.table()]
        return "\n".join(lines)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def windows(length: int, context_length: int, stride: int) -> Iterator[Window]:
    """Split the predictions of a sequence of `length` tokens into windows.

    The predictions are those of tokens 1 to length - 1, made from tokens 0 to length - 2.
    """
    end = min(context_length, length - 1)
    yield 0, end, end
    while end < length - 1:
        scored = min(stride, length - 1 - end)
        end += scored
        yield max(0, end - context_length), end, scored


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
    """Score token ids of shape (N,), of which the first is context only, on the model's device.

    `words` and `bytes` are those of `Score`, `precision` is that of `TrainingConfig`. The default
    `context_length` of a window is the model's own, and the default `stride`, which is how many
    tokens each window after the first scores, is as many as the model is trained to predict. If
    `stateful`, one state is carried through the whole text, whatever the context length.
    """
    if stateful:
        if (stride, context_length) != (None, None):
            raise ValueError(
                "--stride and --context-length split a text into windows; this run is stateful"
            )
        nll, count = _stateful_nll(model, tokens, precision)
        return Score(nll, count, words, bytes, count, count)
    context_length = model.context_length if context_length is None else context_length
    if not 1 <= context_length <= model.context_length:
        raise ValueError(
            f"--context-length must be between 1 and {model.context_length}, not {context_length}"
        )
    max_stride = max(1, context_length * model.max_scored_tokens // model.context_length)
    stride = max_stride if stride is None else stride
    if not 1 <= stride <= max_stride:
        raise ValueError(
            f"--stride must be between 1 and {max_stride}, which is what the model is trained "
            f"to predict of a window of {context_length}, not {stride}"
        )
    spans = windows(len(tokens), context_length, stride)
    nll, count = _windowed_nll(model, tokens, spans, precision)
    return Score(nll, count, words, bytes, context_length, stride)


def estimate_loss(
    model: LanguageModel,
    tokens: np.ndarray,
    max_tokens: int,
    precision: str = "auto",
    stateful: bool = False,
) -> float:
    """Estimate the loss in nats per token from about `max_tokens` tokens.

    They are windows spread evenly over the text or, if `stateful`, its first tokens.
    """
    if stateful:
        nll, count = _stateful_nll(model, tokens[: max_tokens + 1], precision)
    else:
        stride = model.max_scored_tokens
        spans = list(windows(len(tokens), model.context_length, stride))
        step = max(1, len(spans) * stride // max(max_tokens, stride))
        nll, count = _windowed_nll(model, tokens, spans[::step], precision)
    return nll / count


def _windowed_nll(
    model: LanguageModel, tokens: np.ndarray, spans: Iterable[Window], precision: str
) -> tuple[float, int]:
    """Return the summed negative log-likelihood of the windows' scored tokens, and their number.

    Consecutive windows of equal shape are batched, to at most MAX_BATCH_TOKENS tokens.
    """
    nll, count, batch_size = 0.0, 0, max(1, MAX_BATCH_TOKENS // model.context_length)
    bar = tqdm(
        total=len(tokens) - 1, unit=" tokens", desc="scoring", delay=2, leave=False, disable=None
    )
    with bar, inference_mode(model, precision) as device:
        for (length, scored), group in itertools.groupby(spans, lambda s: (s[1] - s[0], s[2])):
            while batch := list(itertools.islice(group, batch_size)):
                rows = np.stack([tokens[start : end + 1] for start, end, _ in batch])
                rows_BT = torch.from_numpy(rows.astype(np.int64)).to(device)
                targets_BT = rows_BT[:, 1:].clone()
                targets_BT[:, : length - scored] = -100
                nll += model.nll(rows_BT[:, :-1], targets_BT).cpu().double().sum().item()
                count += scored * len(batch)
                bar.update(scored * len(batch))
    return nll, count


def _stateful_nll(model: LanguageModel, tokens: np.ndarray, precision: str) -> tuple[float, int]:
    """Return the summed negative log-likelihood under one state, and the number of predictions."""
    nll = 0.0
    state = model.init_state(1, len(tokens))
    with inference_mode(model, precision) as device:
        for start in range(0, len(tokens) - 1, STATEFUL_CHUNK):
            chunk = tokens[start : start + STATEFUL_CHUNK + 1].astype(np.int64)
            chunk_BT = torch.from_numpy(chunk).to(device).unsqueeze(0)
            loss = model.stateful_loss(state, chunk_BT[:, :-1], chunk_BT[:, 1:]).item()
            nll += len(chunk[1:]) * loss
    return nll, len(tokens) - 1


@contextlib.contextmanager
def inference_mode(model: Model, precision: str = "float32") -> Iterator[torch.device]:
    """Put the model in evaluation mode, without gradients; yield its device."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            yield device
    finally:
        model.train(was_training)


def compression_baselines(text: bytes) -> dict[str, float]:
    """Return the bits per byte of general-purpose compressors on a text."""
    sizes = {
        "gzip -9": len(gzip.compress(text, 9)),
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
