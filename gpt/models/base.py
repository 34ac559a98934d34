"""READ FIRST: the interface that all models share.

Every tensor argument and result in this package names its axes in a suffix: `logits_BTV` has the
shape (B, T, V). The letters:

    B  batch                                H  heads
    T  new tokens of each sequence          K  width of a head
    S  positions attended to, or source     F  hidden width of a feed-forward block
    D  width of the residual stream         E  experts
    V  vocabulary                           W  window
    L  layers                               N  flattened batch, unless stated otherwise

A `Model` can be trained: it computes its own loss. A `LanguageModel` predicts the next token; one
trainer, one evaluation, one sampler and one server work with all of them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt.kernels.cross_entropy import linear_cross_entropy

State = dict[str, Tensor]
"""What a language model keeps of each sequence between calls. Axis 0 of every tensor is B."""

TargetScore = Callable[[Tensor, Tensor], Tensor]
"""Maps logits_NV and targets_N to a score of each target, or to their sum: `cross_entropy`, …"""

MAX_LOGITS = 2**26
"""Maximum number of logits that a loss computes at a time: 256 MiB in float32."""


def cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, reduction: str = "none", label_smoothing: float = 0.0
) -> Tensor:
    """Return the cross-entropy of each target in nats, at least in float32; 0 for -100."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(
        logits_NV, targets_N, reduction=reduction, label_smoothing=label_smoothing
    )


def batch_slice(state: State, start: int, stop: int) -> State:
    """Return a view of the sequences [start, stop). Writing to the view writes to `state`."""
    return {name: tensor[start:stop] for name, tensor in state.items()}


def copy_state(state: State, source: State) -> None:
    """Copy `source` into `state`. A source with a batch of 1 is copied to every sequence."""
    for name, tensor in state.items():
        tensor.copy_(source[name].expand_as(tensor))


class ActivationMap(NamedTuple):
    """Attention weights or gate activations of one kind, by layer and head, with axis labels."""

    name: str
    """The kind: attention, alignment, forget gate, experts, …"""
    weights: Tensor
    """weights_BLHTS: weight of column S for the token in row T; L and H are 1 where not applicable.

    Values at padding are undefined.
    """
    rows: Tensor
    """rows_BT: the token of each row: the one read there, or for an alignment the one written."""
    columns: Tensor | str
    """columns_BS, the token of each column, or the kind of column: "units" or "experts"."""


class Model(nn.Module):
    """A trainable model. The arguments of its constructor are its configuration."""

    chapter: ClassVar[int]
    """Its chapter in docs/chapters/, 1 to 15."""
    year: ClassVar[int]
    paper: ClassVar[str]
    """Its first publication."""
    idea: ClassVar[str]
    """What it adds to the model of the chapter before, in a clause."""
    equation: ClassVar[str]
    """That idea in one line of ASCII."""
    supported_tasks: ClassVar[tuple[str, ...]]
    """Of regression, binary-classification, classification, word-vectors, text and translation."""

    def loss(self, *batch: Tensor) -> Tensor:
        """Return the scalar to minimize, a mean over the batch."""
        raise NotImplementedError

    def formulas(self, inputs: Sequence[str], classes: Sequence[str]) -> list[str]:  # noqa: ARG002
        """Return the model written out with its weights, given the names of inputs and classes.

        Empty for models of tokens.
        """
        return []

    def flops_per_token(self, length: int) -> float:  # noqa: ARG002 (used by subclasses)
        """Return the floating-point operations to train on one token of a sequence of `length`.

        Each weight of a matrix takes two in the forward and four in the backward pass (Kaplan et
        al. 2020); an embedding is only looked up. Models with operations that involve no weights,
        such as attention, add those.
        """
        modules = [module for module in self.modules() if not isinstance(module, nn.Embedding)]
        parameters = (p for module in modules for p in module.parameters(recurse=False))
        return 6.0 * sum(p.numel() for p in parameters if p.ndim >= 2)


class LanguageModel(Model):
    """A model of the next token.

    A subclass implements `init_state`, `features` and `activation_maps`, and creates
    `self.unembedding` or overrides `logits`. Models that support the task "translation" also
    implement `encode_source` and accept batches of sentence pairs.

    Args:
        vocab_size: Number of token ids, V.
        context_length: Tokens of a training sequence.
    """

    supported_tasks: ClassVar[tuple[str, ...]] = ("text",)
    supports_chunked_prefill: ClassVar[bool] = True
    """Whether `features` may process a prompt in several chunks."""

    unembedding: nn.Linear
    """The projection from features to logits, unless a model overrides `logits`."""
    cache_dtype: torch.dtype | None = None
    """The dtype of cached keys and values. None: that of the weights."""

    def __init__(self, vocab_size: int, context_length: int) -> None:
        super().__init__()
        if vocab_size < 1 or context_length < 1:
            raise ValueError(
                "vocab_size and context_length must be at least 1, "
                f"not {vocab_size} and {context_length}"
            )
        self.vocab_size = vocab_size
        self.context_length = context_length

    # Forward pass

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """Return features_BTD, the input of the unembedding, from each token and those before it.

        With a state, the new tokens continue its sequences, and it is updated in place.
        """
        raise NotImplementedError

    def logits(self, features_BTD: Tensor) -> Tensor:
        """Return logits_BTV. Any number of leading axes is allowed."""
        return self.unembedding(features_BTD)

    def forward(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """Return logits_BTV of the token after each token."""
        return self.logits(self.features(tokens_BT, state))

    # State

    @property
    def max_length(self) -> int | None:
        """Maximum number of positions of a sequence; None for models without a limit."""
        return None

    def _check_length(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{length} tokens do not fit in the context of {self.max_length}")

    def init_state(self, batch_size: int, length: int) -> State:
        """Return an empty state for `batch_size` sequences of up to `length` tokens."""
        raise NotImplementedError

    def prefix_view(self, state: State, length: int) -> State:  # noqa: ARG002 (for KV caches)
        """Return a view of the first `length` positions: enough for `features` up to there."""
        return state

    def prefill(self, prompt_BT: Tensor, state: State) -> Tensor:
        """Process prompts from an empty state and return features_BD at their last token.

        `features` continues from the state.
        """
        return self.features(prompt_BT, state)[:, -1]

    # Loss

    @property
    def max_scored_tokens(self) -> int:
        """The tokens at the end of a window that training scores, and so evaluation too."""
        return self.context_length

    def features_and_targets(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return features_BTD and the targets_BT to predict from them.

        A batch is text (tokens_BT, targets_BT) or, for models that translate, pairs (source_BS,
        lengths_B, tokens_BT, targets_BT) with sources as in `encode_source`.
        """
        if len(batch) != 2:
            raise ValueError(self._no_translation_message)
        tokens_BT, targets_BT = batch
        return self.features(tokens_BT), targets_BT

    def loss(self, *batch: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy of a batch in nats. Targets of -100 are ignored.

        The batch is as in `features_and_targets`. Of each target, `label_smoothing` is spread evenly
        over the vocabulary (Szegedy et al. 2016).
        """
        return self.mean_nll(*self.features_and_targets(*batch), label_smoothing)

    def stateful_loss(self, state: State, *batch: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of text that continues from a state, which is updated in place."""
        tokens_BT, targets_BT = batch
        return self.mean_nll(self.features(tokens_BT, state), targets_BT, label_smoothing)

    def nll(self, *batch: Tensor) -> Tensor:
        """Return nll_BT, the cross-entropy in nats of each target of a batch; 0 for -100."""
        return self.score_targets(cross_entropy, *batch)

    def score_targets(self, score: TargetScore, *batch: Tensor) -> Tensor:
        """Return the score of each target of a batch; its first axes are B and T."""
        return self.score_features(score, *self.features_and_targets(*batch))

    def mean_nll(
        self, features_BTD: Tensor, targets_BT: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        """Return the mean cross-entropy in nats. Targets of -100 are ignored."""
        if type(self).logits is LanguageModel.logits:
            total = linear_cross_entropy(
                features_BTD.flatten(0, 1),
                self.unembedding.weight,
                self.unembedding.bias,
                targets_BT.flatten(),
                self._loss_chunk_size,
                label_smoothing,
            )
        else:
            sum_nll = functools.partial(
                cross_entropy, reduction="sum", label_smoothing=label_smoothing
            )
            total = torch.stack(list(self._score_chunks(sum_nll, features_BTD, targets_BT))).sum()
        return total / (targets_BT != -100).sum().clamp(min=1)

    def token_nll(self, features_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Return nll_BT, the cross-entropy of each target in nats; 0 where it is -100."""
        return self.score_features(cross_entropy, features_BTD, targets_BT)

    def score_features(
        self, score: TargetScore, features_BTD: Tensor, targets_BT: Tensor
    ) -> Tensor:
        """Return the score of each target, given the features it is predicted from."""
        chunks = list(self._score_chunks(score, features_BTD, targets_BT))
        return torch.cat(chunks).unflatten(0, targets_BT.shape)

    @property
    def _loss_chunk_size(self) -> int:
        """Positions whose logits a loss computes at a time."""
        return max(1, MAX_LOGITS // self.vocab_size)

    def _score_chunks(
        self, score: TargetScore, features_BTD: Tensor, targets_BT: Tensor
    ) -> Iterator[Tensor]:
        """Yield scores in chunks, so that (B·T, V) logits never exist at once."""

        def score_chunk(features_ND: Tensor, targets_N: Tensor) -> Tensor:
            return score(self.logits(features_ND), targets_N)

        features_ND, targets_N = features_BTD.flatten(0, 1), targets_BT.flatten()
        size = self._loss_chunk_size
        if len(targets_N) <= size:
            yield score_chunk(features_ND, targets_N)
            return
        for chunk_ND, chunk_N in zip(features_ND.split(size), targets_N.split(size), strict=True):
            # The backward pass recomputes the logits: storing all chunks would undo the chunking.
            yield checkpoint(score_chunk, chunk_ND, chunk_N, use_reentrant=False)

    # Translation

    def encode_source(self, source_BS: Tensor, lengths_B: Tensor) -> State:  # noqa: ARG002
        """Return a state from which `features` generates translations, after a decoder start token.

        Sources of lengths_B are padded on the right with any tokens. ValueError if the model does
        not translate.
        """
        raise ValueError(self._no_translation_message)

    def max_target_length(self, source_length: int) -> int | None:  # noqa: ARG002
        """Return how many tokens may follow a source of `source_length`; None for no limit."""
        return self.max_length

    @property
    def _no_translation_message(self) -> str:
        return f"the model {type(self).__name__} does not translate: it takes text, not pairs"

    # Visualization

    @torch.no_grad()
    def xray(self, *batch: Tensor) -> list[ActivationMap]:
        """Return attention weights, alignments or gate activations for a batch without targets.

        They come from a separate forward pass, which computes what `features_and_targets`
        computes in evaluation mode, so that the usual pass does not have to store them. A batch is
        text (tokens_BT) or, for models that translate, pairs (source_BS, lengths_B, tokens_BT).
        """
        if len(batch) != 1:
            raise ValueError(self._no_translation_message)
        return self.activation_maps(*batch)

    def activation_maps(self, tokens_BT: Tensor) -> list[ActivationMap]:
        """Return the activation maps of a text."""
        raise NotImplementedError
