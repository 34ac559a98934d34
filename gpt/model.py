"""READ FIRST: the one interface that every model here is behind.

The dimension key. In this package every tensor argument and result carries the
letters of its axes as a suffix, so that `logits_BTV` needs no comment:

    B  rows: independent sequences        H  heads
    T  new tokens of each row             K  width of a head
    S  positions attended to              F  hidden width of a feed-forward block
    D  width of the residual stream       L  layers
    V  vocabulary                         E  experts
                                          W  window

Everything that can be trained is a `Model`: it knows its own loss. A model that
gives a next-token distribution is a `LanguageModel`: it is trained, measured,
sampled and served by one code, whatever is inside.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

State = dict[str, Tensor]
"""What a language model remembers between calls. The first axis of every tensor is the row."""

CHUNK_ELEMENTS = 2**26
"""Logits are made at most this many at a time in a loss: 256 MiB in float32."""


def rows(state: State, start: int, stop: int) -> State:
    """A view of rows [start, stop): what is written through it is written in `state`."""
    return {name: tensor[start:stop] for name, tensor in state.items()}


class Model(nn.Module):
    """Anything that can be trained: a constructor that is its configuration, and a loss."""

    def loss(self, *batch: Tensor) -> Tensor:
        """The scalar to minimise, a mean over the batch."""
        raise NotImplementedError

    def flops_per_token(self, length: int) -> float:  # noqa: ARG002 (for those that need it)
        """Floating-point operations to train on one token of a row of `length` tokens.

        Forward and backward: two and four for each weight of a matrix (Kaplan et al. 2020).
        A model adds what it computes without weights.
        """
        matrices = sum(p.numel() for p in self.parameters() if p.ndim >= 2)
        looked_up = sum(
            module.weight.numel() for module in self.modules() if isinstance(module, nn.Embedding)
        )
        return 6.0 * (matrices - looked_up)


class LanguageModel(Model):
    """A model of the next token.

    Args:
        vocabulary: Number of token ids, V.
        context: Tokens of a row that it is trained on at once.
    """

    def __init__(self, vocabulary: int, context: int) -> None:
        super().__init__()
        if vocabulary < 1 or context < 1:
            raise ValueError(
                f"vocabulary and context must be at least 1, not {vocabulary} and {context}"
            )
        self.vocabulary = vocabulary
        self.context = context

    @property
    def limit(self) -> int | None:
        """The most positions a row can hold, or None where a row can go on for ever."""
        return None

    def init_state(self, rows: int, length: int) -> State:
        """An empty state for `rows` rows of up to `length` tokens each."""
        raise NotImplementedError

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """features_BTD of each token, from it and those before it.

        With a state, continue from it and update it in place.
        """
        raise NotImplementedError

    def logits(self, features_BTD: Tensor) -> Tensor:
        """logits_BTV: the unembedding. Any leading axes will do."""
        raise NotImplementedError

    def forward(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """logits_BTV of the token that follows each token."""
        return self.logits(self.features(tokens_BT, state))

    def loss(self, *batch: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets_BT given tokens_BT; a target of -100 does not count."""
        tokens_BT, targets_BT = batch
        total = torch.stack(list(self._chunked_nll(tokens_BT, targets_BT, "sum"))).sum()
        return total / (targets_BT != -100).sum().clamp(min=1)

    def nll(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """nll_BT: the cross-entropy in nats of each target, 0 where it is -100."""
        chunks = list(self._chunked_nll(tokens_BT, targets_BT, "none"))
        return torch.cat(chunks).view_as(targets_BT)

    def _chunked_nll(
        self, tokens_BT: Tensor, targets_BT: Tensor, reduction: str
    ) -> Iterator[Tensor]:
        """Cross-entropies over a few positions at a time, so that (B·T, V) logits never exist at once."""

        def nll(features_ND: Tensor, targets_N: Tensor) -> Tensor:
            logits_NV = self.logits(features_ND)
            if logits_NV.dtype in (torch.bfloat16, torch.float16):
                logits_NV = logits_NV.float()
            return F.cross_entropy(logits_NV, targets_N, reduction=reduction)

        features_ND = self.features(tokens_BT).flatten(0, 1)
        targets_N = targets_BT.flatten()
        size = max(1, CHUNK_ELEMENTS // self.vocabulary)
        if len(targets_N) <= size:
            yield nll(features_ND, targets_N)
            return
        for some_ND, some_N in zip(features_ND.split(size), targets_N.split(size), strict=True):
            # Recomputed in the backward pass: keeping every chunk's logits would undo the chunking.
            yield checkpoint(nll, some_ND, some_N, use_reentrant=False)
