"""Evaluate a language model on a text, scoring every token exactly once.

    loss              mean of -ln p(token | preceding tokens), in nats
    perplexity        exp(loss); comparable only under the same tokenizer
    word perplexity   exp(nll / words); words and line ends count (Mikolov et al. 2010)
    bits per byte     nll / (ln 2 * bytes of the text); comparable under every tokenizer

where nll is the sum of -ln p over all tokens, added in float64. One pass makes the nll of each token,
and everything else is computed from these (`training.evaluation.analysis`). A model trained with `--stateful` reads the text in
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
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from gpt import LanguageModel, Model
from gpt.device import autocast
from gpt.models.base import TargetScore, cross_entropy
from training.evaluation.analysis import Floats, Interval, Ints

MAX_BATCH_TOKENS = 8192
"""Tokens of one forward pass."""
STATEFUL_CHUNK = 1024
"""Tokens of one forward pass of stateful evaluation, whose batch size is 1."""

SHOWN_DOCUMENTS = 3
"""Best, and worst, documents that are printed."""

Columns = NDArray[np.float64]
"""A row for each scored token: its nll or, from `target_predictions`, also rank and confidence."""

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
    intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
    """95% bootstrap intervals by the name of the figure."""
    resampled: str = ""
    """What the intervals are computed over: "42 documents", "100 blocks of 1,116 bytes"."""
    accuracy: dict[str, float] = dataclasses.field(default_factory=dict)
    """accuracy@1, accuracy@5 and expected calibration error."""
    calibration_bins: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    by_position: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The rows of `loss_by_position`."""
    by_document: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The rows of `loss_by_document`, with the beginning of each text."""

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

    def to_json(self) -> dict[str, Any]:
        """Return all metrics and counts by name, without those that are undefined."""
        names = ("loss", "perplexity", "word_perplexity", "bits_per_byte")
        metrics = {name: getattr(self, name) for name in names}
        defined = {name: value for name, value in metrics.items() if not math.isnan(value)}
        fields = dataclasses.asdict(self)
        accuracy = fields.pop("accuracy")
        given = {name: value for name, value in fields.items() if value not in ("", {}, [])}
        return defined | accuracy | given

    def table(self) -> str:
        """Return the metrics as lines of text, with units, context length and stride."""
        lines = [f"  loss             {self._show('loss')} nats per token"]
        lines.append(f"  perplexity       {self._show('perplexity', 3)} per token")
        if not math.isnan(self.word_perplexity):
            lines.append(f"  word perplexity  {self.word_perplexity:.2f}")
        if not math.isnan(self.bits_per_byte):
            lines.append(f"  bits per byte    {self._show('bits_per_byte')}")
        if self.lost:
            lines.append(f"  text lost        {self.lost}: no figure per byte")
        lines += [f"    {name:<15}{bits:.4f}" for name, bits in self.compressors.items()]
        if self.accuracy:
            at_1, at_5, error = self.accuracy.values()
            lines.append(f"  accuracy@1       {at_1:.4f}; accuracy@5 {at_5:.4f}")
            lines.append(f"  calibration      {error:.4f} expected calibration error")
        if self.by_position:
            lines.append("  by position      tokens of context, and nats per token given them")
        for row in self.by_position:
            first, last = row["context_from"], row["context_to"]
            name = f"{first:,} to {last:,}" if first < last else f"{first:,}"
            lines.append(f"    {name:<15}{row['loss']:.4f} ({row['tokens']:,} tokens)")
        lines += self._document_lines()
        unknown = f" ({self.unknown_tokens:,} unknown)" * bool(self.unknown_tokens)
        lines.append(
            f"  context {self.context_length}, stride {self.stride}; "
            f"{self.tokens:,} tokens{unknown}, {self.words:,} words, {self.bytes:,} bytes"
        )
        if self.intervals:
            lines.append(f"  in brackets: 95% intervals, bootstrapped over {self.resampled}")
        return "\n".join(lines)

    def _show(self, name: str, digits: int = 4) -> str:
        """Format a metric with its interval, if it has one."""
        text = f"{getattr(self, name):.{digits}f}"
        if name in self.intervals:
            low, high = self.intervals[name]
            text += f" [{low:.{digits}f}, {high:.{digits}f}]"
        return text

    def _document_lines(self) -> list[str]:
        """Return a line for each of the best and the worst documents."""
        name = "loss" if self.lost else "bits_per_byte"
        rows = sorted(self.by_document, key=lambda row: row[name])
        if len(rows) > 2 * SHOWN_DOCUMENTS:
            rows = rows[:SHOWN_DOCUMENTS] + rows[-SHOWN_DOCUMENTS:]
        number = len(self.by_document)
        title = (
            f"  by document      {name.replace('_', ' ')} of the best and the worst of {number:,}"
        )
        return [title] * bool(rows) + [
            f"    {row['document']:<15,}{row[name]:.4f} ({row['tokens']:,} tokens) {row['text']!r}"
            for row in rows
        ]


@dataclass(frozen=True)
class Predictions:
    """How a model predicted each token of a text but the first, in the order of the text."""

    columns: Columns
    context_N: Ints
    """How many tokens before each the model read."""
    context_length: int
    stride: int

    @property
    def nll_N(self) -> Floats:
        """Negative log-likelihood of each token, in nats."""
        return self.columns[:, 0]

    def score(self, words: int, num_bytes: int, **fields: Any) -> Score:  # noqa: ANN401 (fields of Score)
        """Return the metrics of a text of so many words and bytes."""
        counts = len(self.nll_N), words, num_bytes, self.context_length, self.stride
        return Score(float(self.nll_N.sum()), *counts, **fields)


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


def target_predictions(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return columns_N3: cross-entropy, rank of the target, and probability of the likeliest token.

    The rank is the number of other tokens that are at least as likely: a tie is not a hit.
    """
    nll_N = cross_entropy(logits_NV, targets_N)
    target_N1 = logits_NV.gather(-1, targets_N.clamp(min=0).unsqueeze(-1)).to(nll_N.dtype)
    rank_N = (~(logits_NV < target_N1)).sum(-1) - 1  # so that NaN is no hit either
    # nll = log sum exp(logits) - target's logit, so this is the largest logit's probability.
    confidence_N = (logits_NV.amax(-1) - target_N1.squeeze(-1) - nll_N).exp().clamp(max=1)
    return torch.stack([nll_N, rank_N.to(nll_N.dtype), confidence_N], dim=-1)


def evaluate(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    stride: int | None = None,
    context_length: int | None = None,
    precision: str = "auto",
    stateful: bool = False,
    accuracy: bool = False,
) -> Predictions:
    """Score token ids of shape (N,), of which the first is context only, on the model's device.

    `precision` is that of `TrainingConfig`. The default `context_length` of a window is the model's
    own, and the default `stride`, which is how many tokens each window after the first scores, is
    as many as the model is trained to predict. If `stateful`, one state is carried through the
    whole text, whatever the context length. With `accuracy`, ranks and confidences are kept too.
    """
    score = target_predictions if accuracy else cross_entropy
    if stateful:
        if (stride, context_length) != (None, None):
            raise ValueError(
                "--stride and --context-length split a text into windows; this run is stateful"
            )
        columns = _score_statefully(model, tokens, precision, score)
        return Predictions(columns, np.arange(1, len(tokens)), len(columns), len(columns))
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
    spans = list(windows(len(tokens), context_length, stride))
    columns = _score_windows(model, tokens, spans, precision, score)
    starts, _, scored = np.array(spans).T
    context_N = np.arange(1, len(tokens)) - np.repeat(starts, scored)
    return Predictions(columns, context_N, context_length, stride)


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
        tokens = tokens[: max_tokens + 1]
        return float(_score_statefully(model, tokens, precision, cross_entropy).mean())
    stride = model.max_scored_tokens
    spans = list(windows(len(tokens), model.context_length, stride))
    step = max(1, len(spans) * stride // max(max_tokens, stride))
    return float(_score_windows(model, tokens, spans[::step], precision, cross_entropy).mean())


def _score_windows(
    model: LanguageModel,
    tokens: np.ndarray,
    spans: Iterable[Window],
    precision: str,
    score: TargetScore,
) -> Columns:
    """Return the scores of the windows' scored tokens, in their order.

    Consecutive windows of equal shape are batched, to at most MAX_BATCH_TOKENS tokens.
    """
    columns, batch_size = [], max(1, MAX_BATCH_TOKENS // model.context_length)
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
                scores = model.score_targets(score, rows_BT[:, :-1], targets_BT)
                columns.append(_to_columns(scores[:, length - scored :]))
                bar.update(scored * len(batch))
    return np.concatenate(columns)


def _score_statefully(
    model: LanguageModel, tokens: np.ndarray, precision: str, score: TargetScore
) -> Columns:
    """Return the score of every token but the first, under one state."""
    columns = []
    state = model.init_state(1, len(tokens))
    with inference_mode(model, precision) as device:
        for start in range(0, len(tokens) - 1, STATEFUL_CHUNK):
            chunk = tokens[start : start + STATEFUL_CHUNK + 1].astype(np.int64)
            chunk_BT = torch.from_numpy(chunk).to(device).unsqueeze(0)
            features_BTD = model.features(chunk_BT[:, :-1], state)
            columns.append(_to_columns(model.score_features(score, features_BTD, chunk_BT[:, 1:])))
    return np.concatenate(columns)


def _to_columns(scores: Tensor) -> Columns:
    """Return scores with the axes B and T, and perhaps one more, as rows of float64."""
    rows = scores.flatten(0, 1).cpu().double()  # in this order: MPS has no float64
    return rows.reshape(len(rows), -1).numpy()


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
