"""Log-probabilities of tokens, as requests ask for them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """A token's log-probability under the model alone: before bias, penalties and temperature."""

    token: int
    logprob: float
    """In nats."""
    top_logprobs: Sequence[tuple[int, float]]
    """The most likely tokens and their log-probabilities, most likely first."""


def compute_logprobs(
    logits_NV: Tensor, tokens: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Return the logprobs of each row's token, and of that row's `num_top` most likely tokens."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    tokens_N1 = torch.tensor(tokens, device=logprobs_NV.device).unsqueeze(1)
    logprobs = logprobs_NV.gather(1, tokens_N1).squeeze(1).tolist()
    top_NK, top_tokens_NK = logprobs_NV.topk(min(max(num_top), logprobs_NV.shape[-1]), dim=-1)
    top_logprobs = zip(top_tokens_NK.tolist(), top_NK.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, list(zip(ids[:count], values[:count], strict=True)))
        for token, logprob, (ids, values), count in zip(
            tokens, logprobs, top_logprobs, num_top, strict=True
        )
    ]
