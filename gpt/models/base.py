"""READ FIRST: the one interface that every model here is behind.

The dimension key. In this package every tensor argument and result carries the
letters of its axes as a suffix, so that `logits_BTV` needs no comment:

    B  rows: independent sequences        H  heads
    T  new tokens of each row             K  width of a head
    S  positions attended to, of a source F  hidden width of a feed-forward block
    D  width of the residual stream       L  layers
    V  vocabulary                         E  experts
                                          W  window

Everything that can be trained is a `Model`: it knows its own loss. A model that
gives a next-token distribution is a `LanguageModel`: it is trained, measured,
sampled and served by one code, whatever is inside. An `EncoderDecoder` is a
`LanguageModel` in two parts: one network reads, one writes.
"""

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt.kernels.cross_entropy import linear_cross_entropy

State = dict[str, Tensor]
"""What a language model remembers between calls. The first axis of every tensor is the row."""

MAX_LOGITS = 2**26
"""Logits are made at most this many at a time in a loss: 256 MiB in float32."""


def batch_slice(state: State, start: int, stop: int) -> State:
    """A view of rows [start, stop): what is written through it is written in `state`."""
    return {name: tensor[start:stop] for name, tensor in state.items()}


def copy_state(state: State, new: State) -> None:
    """Let `state` hold what `new` does; one row of `new` goes to every row."""
    for name, tensor in state.items():
        tensor.copy_(new[name].expand_as(tensor))


class ActivationMap(NamedTuple):
    """One kind of choice inside a model, made visible: a map for each layer and head.

    It carries what stands at its axes, so that whoever draws or serves it needs to know no model.
    """

    name: str
    """What is weighed: attention, alignment, forget gate, experts, …"""
    weights: Tensor
    """weights_BLHTS: what the token at row T takes from column S; L and H are 1 where there is only one.

    What stands at places of padding means nothing.
    """
    rows: Tensor
    """rows_BT, the token at each row of a map."""
    columns: Tensor | str
    """columns_BS, the token at each column; or what is counted there: "units", "experts"."""


class Model(nn.Module):
    """Anything that can be trained: a constructor that is its configuration, and a loss."""

    chapter: ClassVar[int]
    """Its rung on the ladder, 1 to 15."""
    year: ClassVar[int]
    paper: ClassVar[str]
    """Who described it first, and where."""
    idea: ClassVar[str]
    """What it adds to the rung before it, in a clause."""
    supported_tasks: ClassVar[tuple[str, ...]]
    """The kinds of batches that it takes: numbers, choice (of two classes), classes, vectors, text, pairs."""

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

    Some also translate: they give a `start` from a source sentence, and take pairs of
    sentences for a batch. The others refuse both.

    Args:
        vocab_size: Number of token ids, V.
        context_length: Tokens of a row that it is trained on at once.
    """

    supported_tasks: ClassVar[tuple[str, ...]] = ("text",)

    unembedding: nn.Linear
    """From features to logits, in all models but those with `logits` of their own."""
    cache_dtype: torch.dtype | None = None
    """What keys and values are kept in; the weights' own when None."""

    def __init__(self, vocab_size: int, context_length: int) -> None:
        super().__init__()
        if vocab_size < 1 or context_length < 1:
            raise ValueError(
                f"vocabulary and context must be at least 1, not {vocab_size} and {context_length}"
            )
        self.vocab_size = vocab_size
        self.context_length = context_length

    @property
    def max_length(self) -> int | None:
        """The most positions a row can hold, or None where a row can go on for ever."""
        return None

    @property
    def max_scored_tokens(self) -> int:
        """How many tokens at the end of a window it is trained to predict: evaluation scores no more at once."""
        return self.context_length

    supports_chunked_prefill: ClassVar[bool] = True
    """Whether a prompt may be read as `features` of one part of it after the other."""

    def init_state(self, rows: int, length: int) -> State:
        """An empty state for `rows` rows of up to `length` tokens each."""
        raise NotImplementedError

    def prefix_view(self, state: State, length: int) -> State:  # noqa: ARG002 (for those that grow)
        """A view of what `length` tokens fill of each row: all that `features` needs to see until then."""
        return state

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """features_BTD of each token, from it and those before it.

        With a state, continue from it and update it in place.
        """
        raise NotImplementedError

    def prefill(self, prompt_BT: Tensor, state: State) -> Tensor:
        """features_BD of what follows a prompt, with which rows of an empty state begin.

        `features` goes on from the state with the next token.
        """
        return self.features(prompt_BT, state)[:, -1]

    def encode_source(self, source_BS: Tensor, lengths_B: Tensor) -> State:  # noqa: ARG002
        """A state from which `features` writes the translation of each row's source.

        The first token to feed is one that begins a translation; `search.translate` does it.

        Args:
            source_BS: Source sentences; what stands after a sentence's end does not matter.
            lengths_B: Tokens of each sentence.
        """
        raise ValueError(self._no_translation_message)

    def max_target_length(self, source: int) -> int | None:  # noqa: ARG002
        """How many tokens can be fed after `start` on `source` tokens; None where there is no limit."""
        return self.max_length

    @property
    def _no_translation_message(self) -> str:
        return f"the model {type(self).__name__} does not translate: it takes text, not pairs"

    def logits(self, features_BTD: Tensor) -> Tensor:
        """logits_BTV: the unembedding. Any leading axes will do."""
        return self.unembedding(features_BTD)

    def forward(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """logits_BTV of the token that follows each token."""
        return self.logits(self.features(tokens_BT, state))

    def features_and_targets(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """What a batch is scored on: features_BTD, and the targets_BT to be predicted from them.

        A batch is text (tokens_BT, targets_BT) or, for a model that translates, pairs
        (source_BS, lengths_B, tokens_BT, targets_BT), the sources as in `start`.
        """
        if len(batch) != 2:
            raise ValueError(self._no_translation_message)
        tokens_BT, targets_BT = batch
        return self.features(tokens_BT), targets_BT

    def loss(self, *batch: Tensor) -> Tensor:
        """Mean cross-entropy in nats of a batch's targets (see `predictions`); a target of -100 does not count."""
        return self.mean_nll(*self.features_and_targets(*batch))

    def stateful_loss(self, state: State, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss of text that goes on from a state, which is updated in place."""
        return self.mean_nll(self.features(tokens_BT, state), targets_BT)

    def mean_nll(self, features_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """The mean cross-entropy in nats of the targets that count, from what precedes the logits."""
        if type(self).logits is LanguageModel.logits:
            total = linear_cross_entropy(
                features_BTD.flatten(0, 1),
                self.unembedding.weight,
                self.unembedding.bias,
                targets_BT.flatten(),
                self._at_once,
            )
        else:
            total = torch.stack(list(self._chunked_nll(features_BTD, targets_BT, "sum"))).sum()
        return total / (targets_BT != -100).sum().clamp(min=1)

    def nll(self, *batch: Tensor) -> Tensor:
        """nll_BT: the cross-entropy in nats of each target of a batch, 0 where it is -100."""
        return self.token_nll(*self.features_and_targets(*batch))

    def token_nll(self, features_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """nll_BT, from what precedes the logits."""
        chunks = list(self._chunked_nll(features_BTD, targets_BT, "none"))
        return torch.cat(chunks).view_as(targets_BT)

    @torch.no_grad()
    def xray(self, *batch: Tensor) -> list[ActivationMap]:
        """What the model listens to as it reads and writes a batch, without its targets.

        The numbers are those that `predictions` computes with in evaluation mode, from a pass
        of their own: the ordinary one keeps nothing and asks nothing.

        Args:
            batch: Text (tokens_BT) or, for a model that translates, pairs (source_BS,
                lengths_B, tokens_BT).
        """
        if len(batch) != 1:
            raise ValueError(self._no_translation_message)
        return self.activation_maps(*batch)

    def activation_maps(self, tokens_BT: Tensor) -> list[ActivationMap]:
        """The X-ray of a text: what there is to see, by name."""
        raise NotImplementedError

    @property
    def _at_once(self) -> int:
        """Positions whose logits are made at a time."""
        return max(1, MAX_LOGITS // self.vocab_size)

    def _chunked_nll(
        self, features_BTD: Tensor, targets_BT: Tensor, reduction: str
    ) -> Iterator[Tensor]:
        """Cross-entropies over a few positions at a time, so that (B·T, V) logits never exist at once."""

        def nll(features_ND: Tensor, targets_N: Tensor) -> Tensor:
            logits_NV = self.logits(features_ND)
            if logits_NV.dtype in (torch.bfloat16, torch.float16):
                logits_NV = logits_NV.float()
            return F.cross_entropy(logits_NV, targets_N, reduction=reduction)

        features_ND = features_BTD.flatten(0, 1)
        targets_N = targets_BT.flatten()
        size = self._at_once
        if len(targets_N) <= size:
            yield nll(features_ND, targets_N)
            return
        for some_ND, some_N in zip(features_ND.split(size), targets_N.split(size), strict=True):
            # Recomputed in the backward pass: keeping every chunk's logits would undo the chunking.
            yield checkpoint(nll, some_ND, some_N, use_reentrant=False)


class EncoderDecoder(LanguageModel):
    """One network reads a source, another writes what follows.

    It speaks by reading the first half of a window and writing the second; what it writes
    first is predicted from the last token read. `features` without a state, or from one of
    `init_state`, is the decoder after an empty source.

    A model gives `init_state`, `logits` and the two networks. In a state the tensors that
    `encode` gives have room for a source of `context` tokens, and beyond it hold zeros.
    """

    supported_tasks: ClassVar[tuple[str, ...]] = ("text", "translation")
    supports_chunked_prefill: ClassVar[bool] = False

    def encode(self, source_BS: Tensor, lengths_B: Tensor) -> State:
        """All that the decoder has of a source: part of a state, each tensor cut to the source's length.

        A length of 0 gives what `init_state` gives.
        """
        raise NotImplementedError

    def decode(self, tokens_BT: Tensor, encoded: State, state: State | None = None) -> Tensor:
        """features_BTD of the tokens written so far.

        With a state, of which `encoded` is then a part, continue from it and update it in place.
        """
        raise NotImplementedError

    def pair_activation_maps(
        self, source_BS: Tensor, lengths_B: Tensor, tokens_BT: Tensor
    ) -> list[ActivationMap]:
        """The X-ray of a source being read and tokens being written, by name."""
        raise NotImplementedError

    @property
    def max_scored_tokens(self) -> int:
        """The half that it writes."""
        return max(1, self.context_length // 2)

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """features_BTD; without a state, after an empty source."""
        if state is not None:
            return self.decode(tokens_BT, state, state)
        rows = len(tokens_BT)
        return self.decode(
            tokens_BT, self.encode(tokens_BT.new_zeros(rows, 1), tokens_BT.new_zeros(rows))
        )

    def encode_source(self, source_BS: Tensor, lengths_B: Tensor) -> State:
        """A state from which `features` writes the translation of each row's source."""
        empty = self.init_state(len(source_BS), self.context_length)
        return empty | self.encode(source_BS, lengths_B)

    def prefill(self, prompt_BT: Tensor, state: State) -> Tensor:
        """features_BD of what follows a prompt: its last `context` tokens are the source."""
        source_BS = prompt_BT[:, -self.context_length :]
        for name, tensor in self.encode(source_BS, _whole(source_BS)).items():
            state[name][tuple(slice(size) for size in tensor.shape)] = tensor
        return self.features(prompt_BT[:, -1:], state)[:, -1]

    def features_and_targets(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """features_BTD and targets_BT of pairs, or of the second halves of windows of text.

        In training half of the windows lose a part of their beginning, so that short
        prompts are met too.
        """
        if len(batch) == 2:
            batch = _halves(*batch)
            if self.training:
                batch = (*_shorten(batch[0]), *batch[2:])
        source_BS, lengths_B, tokens_BT, targets_BT = batch
        return self.decode(tokens_BT, self.encode(source_BS, lengths_B)), targets_BT

    def nll(self, *batch: Tensor) -> Tensor:
        """nll_BT: the cross-entropy in nats of each target of a batch, 0 where it is -100.

        In text, targets of the first half have a value too: predicted after reading the
        first token alone. What is to be compared stands in the last `scorable` places.
        """
        if len(batch) != 2:
            return super().nll(*batch)
        tokens_BT, targets_BT = batch
        late_BT = super().nll(*_halves(tokens_BT, targets_BT))
        early = tokens_BT.shape[1] - late_BT.shape[1]
        tokens_BT, targets_BT = tokens_BT[:, :early], targets_BT[:, :early]
        if not (targets_BT != -100).any():
            return torch.cat([late_BT.new_zeros(tokens_BT.shape), late_BT], dim=1)
        first_B1 = tokens_BT[:, :1]
        early_BT = super().nll(first_B1, _whole(first_B1), tokens_BT, targets_BT)
        return torch.cat([early_BT, late_BT], dim=1)

    @torch.no_grad()
    def xray(self, *batch: Tensor) -> list[ActivationMap]:
        """What it listens to in pairs; of text the first half is read and the second written."""
        if len(batch) == 1:
            batch = _halves(batch[0], batch[0])[:3]
        return self.pair_activation_maps(*batch)

    def flops_per_token(self, length: int) -> float:
        """Each token of a window goes through one of the two networks: half of the weights each."""
        return super().flops_per_token(length) / 2


def _whole(source_BS: Tensor) -> Tensor:
    """lengths_B of a source without padding."""
    return source_BS.new_full((len(source_BS),), source_BS.shape[1])


def _halves(tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A window of text as a pair: the last half of the targets is written.

    The source ends with the token that is fed first: the target after it is the first
    that the source does not show.
    """
    length = tokens_BT.shape[1]
    read = length - max(1, length // 2)
    source_BS = tokens_BT[:, : read + 1]
    return source_BS, _whole(source_BS), tokens_BT[:, read:], targets_BT[:, read:]


def _shorten(source_BS: Tensor) -> tuple[Tensor, Tensor]:
    """source_BS and lengths_B, with a random part of the left end gone from a random half of the rows."""
    rows, length = source_BS.shape
    share_B, which_B = torch.rand(2, rows, device=source_BS.device)
    gone_B = (share_B * length).long() * (which_B < 0.5)
    places_S = torch.arange(length, device=source_BS.device)
    places_BS = (places_S + gone_B.unsqueeze(1)).clamp(max=length - 1)
    return source_BS.gather(1, places_BS), length - gone_B
