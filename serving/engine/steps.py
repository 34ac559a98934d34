"""The forward passes of an engine as modules, which run as they are or are compiled."""

from typing import Literal

import torch
from torch import Tensor, nn

from gpt.models.base import LanguageModel, State
from gpt.sampling import PLAIN_SAMPLING, sample

StepKind = Literal["decode_one", "decode", "prefill"]
"""The kinds of forward pass: decode of one sequence, decode of a batch, prefill of a chunk."""


class PrefillStep(nn.Module):
    """The forward pass over a chunk of one prompt."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_1T: Tensor, state: State) -> tuple[Tensor]:
        """Return features_1TD; the state is updated in place."""
        return (self.model.features(tokens_1T, state),)


class DecodeStep(nn.Module):
    """The forward pass that adds one token to each sequence of a batch."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, last_tokens_B1: Tensor, state: State, random_state: State | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits_BV, tokens_B, and the margin_B in nats between the two largest logits.

        States are updated in place, and the tokens are written to last_tokens_B1: the step can be
        repeated without reading anything back.

        Args:
            last_tokens_B1: The last token of each sequence.
            state: The model's state of these sequences.
            random_state: The entries `RANDOM_STATE` of their sampler's state. Sequences that are
                sampled get an infinite margin. Without it, all tokens are the most likely ones.
        """
        logits_BV = self.model.logits(self.model.features(last_tokens_B1, state)[:, -1])
        top_B2, tokens_B2 = logits_BV.topk(min(2, self.model.vocab_size), dim=-1)
        tokens_B, margin_B = tokens_B2[:, 0], (top_B2[:, 0] - top_B2[:, -1]).float()
        if random_state is not None:
            tokens_B = sample(logits_BV, random_state, PLAIN_SAMPLING)
            margin_B = torch.where(random_state["greedy"][:, 0], margin_B, torch.inf)
        last_tokens_B1.copy_(tokens_B.clamp(0, self.model.vocab_size - 1).unsqueeze(1))
        return logits_BV, tokens_B, margin_B


def eager_step(model: LanguageModel, kind: StepKind) -> nn.Module:
    """Return the step of this kind, not compiled."""
    return PrefillStep(model) if kind == "prefill" else DecodeStep(model)
