"""The interface of models with two networks: an encoder for the source, a decoder for the target.

An encoder-decoder is a language model too: the first half of a window of text is the source, and
the second half the target.
"""

from typing import ClassVar

import torch
from torch import Tensor

from gpt.models.base import ActivationMap, LanguageModel, State, TargetScore


class EncoderDecoder(LanguageModel):
    """A language model that encodes a source and decodes a target.

    A subclass implements `init_state`, `encode`, `decode`, `pair_activation_maps` and an
    unembedding. Source and target share a vocabulary. Of the tensors in a state, those that
    `encode` returns have room for a source of `context_length` tokens and are zero after its end.

    `features` without a state, or from that of `init_state`, decodes after an empty source.
    """

    supported_tasks: ClassVar[tuple[str, ...]] = ("text", "translation")
    supports_chunked_prefill: ClassVar[bool] = False

    def encode(self, source_BS: Tensor, lengths_B: Tensor) -> State:
        """Return what the decoder keeps of a source: entries of a state, S positions long.

        For a length of 0 they equal those of `init_state`.
        """
        raise NotImplementedError

    def decode(self, tokens_BT: Tensor, encoded: State, state: State | None = None) -> Tensor:
        """Return features_BTD of target tokens, given an encoded source.

        With a state, which then contains `encoded`, continue from it and update it in place.
        """
        raise NotImplementedError

    def pair_activation_maps(
        self, source_BS: Tensor, lengths_B: Tensor, tokens_BT: Tensor
    ) -> list[ActivationMap]:
        """Return the activation maps of encoder and decoder for a source and a target."""
        raise NotImplementedError

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """Return features_BTD; without a state, after an empty source."""
        if state is not None:
            return self.decode(tokens_BT, state, state)
        batch_size = len(tokens_BT)
        empty = self.encode(tokens_BT.new_zeros(batch_size, 1), tokens_BT.new_zeros(batch_size))
        return self.decode(tokens_BT, empty)

    def encode_source(self, source_BS: Tensor, lengths_B: Tensor) -> State:
        """Return a state from which `features` generates translations."""
        empty = self.init_state(len(source_BS), self.context_length)
        return empty | self.encode(source_BS, lengths_B)

    def prefill(self, prompt_BT: Tensor, state: State) -> Tensor:
        """Encode the last `context_length` tokens of the prompts, then decode the last token."""
        source_BS = prompt_BT[:, -self.context_length :]
        for name, tensor in self.encode(source_BS, _full_lengths(source_BS)).items():
            state[name][tuple(slice(size) for size in tensor.shape)] = tensor
        return self.features(prompt_BT[:, -1:], state)[:, -1]

    @property
    def max_scored_tokens(self) -> int:
        """The half of a window that is decoded."""
        return max(1, self.context_length // 2)

    def features_and_targets(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return features_BTD and targets_BT of pairs, or of the second halves of windows of text.

        In training, half of the text sources are shortened at random, so that the model also
        learns to continue short prompts.
        """
        if len(batch) == 2:
            batch = _split_window(*batch)
            if self.training:
                batch = (*_shorten_randomly(batch[0]), *batch[2:])
        source_BS, lengths_B, tokens_BT, targets_BT = batch
        return self.decode(tokens_BT, self.encode(source_BS, lengths_B)), targets_BT

    def score_targets(self, score: TargetScore, *batch: Tensor) -> Tensor:
        """Return the score of each target of a batch; its first axes are B and T.

        Targets in the first half of a text are scored with its first token as the only source.
        Only the last `max_scored_tokens` are comparable with other models.
        """
        if len(batch) != 2:
            return super().score_targets(score, *batch)
        tokens_BT, targets_BT = batch
        second_half = super().score_targets(score, *_split_window(tokens_BT, targets_BT))
        length = tokens_BT.shape[1] - second_half.shape[1]
        tokens_BT, targets_BT = tokens_BT[:, :length], targets_BT[:, :length]
        if not (targets_BT != -100).any():
            shape = (*tokens_BT.shape, *second_half.shape[2:])
            return torch.cat([second_half.new_zeros(shape), second_half], dim=1)
        first_B1 = tokens_BT[:, :1]
        first_half = super().score_targets(
            score, first_B1, _full_lengths(first_B1), tokens_BT, targets_BT
        )
        return torch.cat([first_half, second_half], dim=1)

    @torch.no_grad()
    def xray(self, *batch: Tensor) -> list[ActivationMap]:
        """Return the activation maps of pairs, or of text, whose first half is the source."""
        if len(batch) == 1:
            batch = _split_window(batch[0], batch[0])[:3]
        return self.pair_activation_maps(*batch)

    def flops_per_token(self, length: int) -> float:
        """Half of the weights: each token of a window passes through one of the two networks."""
        return super().flops_per_token(length) / 2


def _full_lengths(source_BS: Tensor) -> Tensor:
    """Return lengths_B of sources without padding."""
    return source_BS.new_full((len(source_BS),), source_BS.shape[1])


def _split_window(tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split a window of text into a pair: source_BS, lengths_B, tokens_BT and targets_BT.

    The target is the second half. The last source token is also the first that is decoded, so
    the first target is the first token that the source does not contain.
    """
    length = tokens_BT.shape[1]
    split = length - max(1, length // 2)
    source_BS = tokens_BT[:, : split + 1]
    return source_BS, _full_lengths(source_BS), tokens_BT[:, split:], targets_BT[:, split:]


def _shorten_randomly(source_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Drop a random number of tokens at the start of a random half of the sources.

    Returns source_BS, padded on the right, and lengths_B.
    """
    batch_size, length = source_BS.shape
    share_B, coin_B = torch.rand(2, batch_size, device=source_BS.device)
    dropped_B = (share_B * length).long() * (coin_B < 0.5)
    positions_S = torch.arange(length, device=source_BS.device)
    indices_BS = (positions_S + dropped_B.unsqueeze(1)).clamp(max=length - 1)
    return source_BS.gather(1, indices_BS), length - dropped_B
