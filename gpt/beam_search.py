"""From source sentences to translations: the best target that a search finds.

    score(target) = sum of ln p(token | source, tokens before it) / length ^ penalty

Beam search keeps the best few unfinished targets of each sentence and extends them all at
once (Sutskever et al. 2014); with one beam it is greedy. A sum of logarithms only falls, so
without the division short targets would win (Wu et al. 2016).
"""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from gpt.models.base import LanguageModel, State


def translate(
    model: LanguageModel,
    sources: Sequence[Sequence[int]],
    *,
    decoder_start_token: int,
    eos_token: int,
    max_tokens: int,
    num_beams: int = 1,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """What `searching` finds, all at once."""
    steps = beam_search(
        model,
        sources,
        decoder_start_token=decoder_start_token,
        eos_token=eos_token,
        max_tokens=max_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
    )
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


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
    """The target found for each source, without `begin` and `end`; none depends on those beside it.

    A step of the search makes every target that is followed one token longer.

    Args:
        model: One that translates, in evaluation mode.
        sources: Token ids of each sentence.
        decoder_start_token: The token fed first.
        eos_token: The token that ends a target.
        max_tokens: Longest target, its end included; shorter where the model has no room for it.
        num_beams: Targets followed at once, per sentence; 1 always takes the likeliest token.
        length_penalty: Power of the length that divides a score: 0 is the sum, 1 the mean.
    """
    if num_beams < 1 or max_tokens < 1 or length_penalty < 0:
        raise ValueError(
            f"beams and most must be at least 1 and penalty at least 0, not {num_beams}, {max_tokens} and "
            f"{length_penalty}"
        )
    if not all(len(source) for source in sources):
        raise ValueError("a source sentence is empty: expected at least one token")
    found: list[list[int]] = [[] for _ in sources]
    if not sources:
        return found
    device = next(model.parameters()).device
    lengths = [len(source) for source in sources]
    source_BS = torch.zeros(len(sources), max(lengths), dtype=torch.long)
    for source_S, source in zip(source_BS, sources, strict=True):
        source_S[: len(source)] = torch.tensor(source)
    state = model.encode_source(source_BS.to(device), torch.tensor(lengths, device=device))
    state = {name: tensor.repeat_interleave(num_beams, dim=0) for name, tensor in state.items()}
    search = _begin(
        [_room(model, length, max_tokens) for length in lengths],
        decoder_start_token,
        num_beams,
        device,
    )

    for length in range(1, int(search["most"].max()) + 1):
        yield
        last_N1 = search["targets"][:, :, -1:].flatten(0, 1)
        part = model.prefix_view(state, max(lengths) + length)
        logits_NV = model.logits(model.features(last_N1, part)[:, -1])
        parents_BN, better_B = _extend(search, logits_NV, length, eos_token, length_penalty)
        for sentence, target in zip(
            search["sentence"][better_B].tolist(), search["best"][better_B].tolist(), strict=True
        ):
            found[sentence] = [token for token in target[1:] if token != eos_token]

        # A sentence is done when no unfinished target, however long it grew, could win.
        hope_B = (search["totals"] / search["most"] ** length_penalty).amax(dim=-1)
        going_B = hope_B > search["score"].squeeze(1)
        if not going_B.any():
            break
        if num_beams == 1 and going_B.all():
            continue  # each target extends itself: there is nothing to move
        firsts_B1 = torch.arange(len(parents_BN), device=device).unsqueeze(1) * num_beams
        rows_N = (firsts_B1 + parents_BN)[going_B].flatten()
        state = {name: tensor[rows_N] for name, tensor in state.items()}
        search = {name: tensor[going_B] for name, tensor in search.items()}
    return found


def _room(model: LanguageModel, length: int, most: int) -> int:
    """Longest target of a source; its last token is predicted, never fed, and takes no place."""
    room = model.max_target_length(length)
    if room is None:
        return most
    if room < 1:
        raise ValueError(
            f"a source sentence is {length} tokens long: the model's context of {model.context_length} "
            "has no room for a target after it"
        )
    return min(most, room)


def _begin(most: list[int], begin: int, beams: int, device: torch.device) -> State:
    """Where the search of each sentence stands, with the sentence as first axis.

    sentence_B its number, most_B1 its longest target; targets_BNT, begun in N beams, and
    totals_BN, their sums of logarithms: minus infinity where a beam is not in use;
    free_B1, how many are not taken by a target that has ended; the best of those and its score_B1.
    """
    rows = len(most)
    totals_BN = torch.full((rows, beams), -torch.inf, device=device)
    totals_BN[:, 0] = 0.0
    return {
        "sentence": torch.arange(rows, device=device),
        "most": torch.tensor(most, device=device).unsqueeze(1),
        "targets": torch.full((rows, beams, 1), begin, device=device),
        "totals": totals_BN,
        "free": torch.full((rows, 1), beams, device=device),
        "score": torch.full((rows, 1), -torch.inf, device=device),
        "best": torch.full((rows, 1), begin, device=device),
    }


def _extend(
    search: State, logits_NV: Tensor, length: int, end: int, penalty: float
) -> tuple[Tensor, Tensor]:
    """Make every target one token longer, in place; note those that end.

    Returns parents_BN, the beam that each target now extends, and better_B, where the best
    that has ended is a new one.
    """
    rows, beams = search["totals"].shape
    vocabulary = logits_NV.shape[-1]
    logs_BNV = logits_NV.log_softmax(dim=-1).view(rows, beams, vocabulary)
    totals_BN, chosen_BN = (search["totals"].unsqueeze(-1) + logs_BNV).flatten(1).topk(beams)
    parents_BN, tokens_BN = chosen_BN // vocabulary, chosen_BN % vocabulary
    rows_B1 = torch.arange(rows, device=totals_BN.device).unsqueeze(1)
    targets_BNT = search["targets"][rows_B1, parents_BN]
    targets_BNT = torch.cat([targets_BNT, tokens_BN.unsqueeze(-1)], dim=-1)

    # A target that has ended keeps its beam: with one, the search is greedy.
    ranks_N = torch.arange(beams, device=totals_BN.device)
    totals_BN = totals_BN.masked_fill(ranks_N >= search["free"], -torch.inf)
    ends_BN = ((tokens_BN == end) | (length >= search["most"])) & totals_BN.isfinite()
    scores_BN = (totals_BN / length**penalty).masked_fill(~ends_BN, -torch.inf)
    score_B1, which_B1 = scores_BN.max(dim=-1, keepdim=True)
    better_B1 = score_B1 > search["score"]
    search["score"] = torch.maximum(search["score"], score_B1)
    search["best"] = targets_BNT[rows_B1, which_B1].squeeze(1)
    search["free"] = search["free"] - ends_BN.sum(dim=-1, keepdim=True)
    search["totals"] = totals_BN.masked_fill(ends_BN, -torch.inf)
    search["targets"] = targets_BNT
    return parents_BN, better_B1.squeeze(1)
