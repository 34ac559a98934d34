"""Beam search: from source sentences to their translations.

    score(target) = sum of ln p(token | source, tokens before it) / length ^ length_penalty

Beam search keeps the best few unfinished targets of each sentence and extends all of them by one
token per step (Sutskever et al. 2014); with one beam it is greedy. A sum of log probabilities only
falls, so without the division short targets would win (Wu et al. 2016).
"""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt.models.base import LanguageModel, State


def translate(
    model: LanguageModel,
    sources: Sequence[Sequence[int]],
    **options: Any,  # noqa: ANN401 (those of beam_search)
) -> list[list[int]]:
    """Run `beam_search`, which documents the options, to its end, and return its result."""
    steps = beam_search(model, sources, **options)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


@torch.inference_mode()
def beam_search(
    model: LanguageModel,
    sources: Sequence[Sequence[int]],
    *,
    decoder_start_token: int,
    eos_token: int,
    max_tokens: int,
    num_beams: int = 1,
    length_penalty: float = 1.0,
) -> Generator[None, None, list[list[int]]]:
    """Return the best target of each source, without start and EOS token; yield before each step.

    A step extends every hypothesis by one token. No result depends on the other sources. The model
    must translate, and be in evaluation mode. A target has at most `max_tokens`, EOS token included;
    less where the model's context is shorter. One beam always takes the likeliest token.
    `length_penalty` is the power of the length that divides a score: 0 gives the sum, 1 the mean.
    An option out of range and a source that is empty or leaves no room for a target are ValueErrors.
    """
    if num_beams < 1 or max_tokens < 1 or length_penalty < 0:
        raise ValueError(
            "num_beams and max_tokens must be at least 1 and length_penalty at least 0, not "
            f"{num_beams}, {max_tokens} and {length_penalty}"
        )
    if not all(len(source) for source in sources):
        raise ValueError("a source sentence is empty: expected at least one token")
    results: list[list[int]] = [[] for _ in sources]
    if not sources:
        return results
    device = next(model.parameters()).device
    lengths = [len(source) for source in sources]
    source_BS = torch.zeros(len(sources), max(lengths), dtype=torch.long)
    for source_S, source in zip(source_BS, sources, strict=True):
        source_S[: len(source)] = torch.tensor(source)
    state = model.encode_source(source_BS.to(device), torch.tensor(lengths, device=device))
    state = {name: tensor.repeat_interleave(num_beams, dim=0) for name, tensor in state.items()}
    max_lengths = [_max_target_length(model, length, max_tokens) for length in lengths]
    log_probs_BN = torch.full((len(sources), num_beams), -torch.inf, device=device)
    log_probs_BN[:, 0] = 0.0
    start_B1 = torch.full((len(sources), 1), decoder_start_token, device=device)
    beams = {  # the first axis of each tensor is the sentence
        "sentence": torch.arange(len(sources), device=device),  # its number
        "max_length": torch.tensor(max_lengths, device=device).unsqueeze(1),  # of its target
        "targets": start_B1.unsqueeze(1).repeat(1, num_beams, 1),  # unfinished, N beams: BNT
        "log_probs": log_probs_BN,  # of each target; minus infinity for a beam not in use
        "free_beams": torch.full_like(start_B1, num_beams),  # that no finished target occupies
        "best_score": torch.full((len(sources), 1), -torch.inf, device=device),
        "best": start_B1,  # the best finished target, with this score: BT
    }

    for length in range(1, max(max_lengths) + 1):
        yield
        last_N1 = beams["targets"][:, :, -1:].flatten(0, 1)
        view = model.prefix_view(state, max(lengths) + length)
        logits_NV = model.logits(model.features(last_N1, view)[:, -1])
        parents_BN, improved_B = _extend(beams, logits_NV, length, eos_token, length_penalty)
        for sentence, target in zip(
            beams["sentence"][improved_B].tolist(), beams["best"][improved_B].tolist(), strict=True
        ):
            results[sentence] = [token for token in target[1:] if token != eos_token]

        # A sentence is done when no unfinished target, however long it grew, could win.
        bound_B = (beams["log_probs"] / beams["max_length"] ** length_penalty).amax(dim=-1)
        active_B = bound_B > beams["best_score"].squeeze(1)
        if not active_B.any():
            break
        if num_beams == 1 and active_B.all():
            continue  # each target extends itself: no row moves
        first_rows_B1 = torch.arange(len(parents_BN), device=device).unsqueeze(1) * num_beams
        rows_N = (first_rows_B1 + parents_BN)[active_B].flatten()
        state = {name: tensor[rows_N] for name, tensor in state.items()}
        beams = {name: tensor[active_B] for name, tensor in beams.items()}
    return results


def _max_target_length(model: LanguageModel, source_length: int, max_tokens: int) -> int:
    """Return the longest target of a source; its last token is predicted but takes no position."""
    max_length = model.max_target_length(source_length)
    if max_length is None:
        return max_tokens
    if max_length < 1:
        raise ValueError(
            f"a source sentence is {source_length} tokens long: the model's context of "
            f"{model.context_length} has no room for a target after it"
        )
    return min(max_tokens, max_length)


def _extend(
    beams: State, logits_NV: Tensor, length: int, eos_token: int, length_penalty: float
) -> tuple[Tensor, Tensor]:
    """Extend every target by one token, in place, and take finished targets out of their beams.

    Returns parents_BN, the beam that each new target extends, and improved_B, True where the best
    finished target is a new one.
    """
    num_beams, vocab_size = beams["log_probs"].shape[1], logits_NV.shape[-1]
    token_log_probs_BNV = logits_NV.log_softmax(dim=-1).view(-1, num_beams, vocab_size)
    candidates_BNV = beams["log_probs"].unsqueeze(-1) + token_log_probs_BNV
    log_probs_BN, indices_BN = candidates_BNV.flatten(1).topk(num_beams)
    parents_BN, tokens_BN = indices_BN // vocab_size, indices_BN % vocab_size
    rows_B1 = torch.arange(len(parents_BN), device=log_probs_BN.device).unsqueeze(1)
    targets_BNT = beams["targets"][rows_B1, parents_BN]
    targets_BNT = torch.cat([targets_BNT, tokens_BN.unsqueeze(-1)], dim=-1)

    # A finished target keeps its beam occupied: with one beam, the search is greedy.
    ranks_N = torch.arange(num_beams, device=log_probs_BN.device)
    log_probs_BN = log_probs_BN.masked_fill(ranks_N >= beams["free_beams"], -torch.inf)
    finished_BN = (tokens_BN == eos_token) | (length >= beams["max_length"])
    finished_BN = finished_BN & log_probs_BN.isfinite()
    scores_BN = (log_probs_BN / length**length_penalty).masked_fill(~finished_BN, -torch.inf)
    score_B1, beam_B1 = scores_BN.max(dim=-1, keepdim=True)
    improved_B1 = score_B1 > beams["best_score"]
    beams["best_score"] = torch.maximum(beams["best_score"], score_B1)
    beams["best"] = targets_BNT[rows_B1, beam_B1].squeeze(1)
    beams["free_beams"] = beams["free_beams"] - finished_BN.sum(dim=-1, keepdim=True)
    beams["log_probs"] = log_probs_BN.masked_fill(finished_BN, -torch.inf)
    beams["targets"] = targets_BNT
    return parents_BN, improved_B1.squeeze(1)
