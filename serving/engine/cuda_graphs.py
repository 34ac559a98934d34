"""Steps recorded once and replayed: on a card one launch instead of a hundred (CUDA graphs).

A recording computes with fixed addresses and sizes. So the rows are padded to a power of two
and the reach to another, and each size is recorded when it is first wanted, together with the
choice of the tokens: nothing needs to come back before the next step is launched. Idle rows
that pad are emptied before each step, and what they say is dropped.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt.models.base import State, batch_slice, copy_state
from gpt.sampling import SamplingFlags, sample

if TYPE_CHECKING:
    from serving.engine.engine import Engine

SHORTEST = 128
"""Positions looked at by the recording with the shortest reach."""

CapturedGraph = tuple[Callable[[], None], tuple[Tensor, Tensor]]
"""What takes the step, and where its logits_BV and tokens_B are then."""


class GraphRunner:
    """Takes an engine's steps.

    On a device that cannot record, each is computed anew, at the same addresses and sizes.
    """

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.recordings: dict[tuple[int, int, SamplingFlags], CapturedGraph] = {}
        self.on_card = engine.last_B1.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.on_card else None

    def __call__(self, count: int, reach: int, ways: SamplingFlags) -> tuple[Tensor, Tensor]:
        """logits_BV and tokens_B of the next step of the first `count` rows, good until the one after it.

        The tokens are fed by then: the step can be taken again.
        """
        engine = self.engine
        padded = min(1 << (count - 1).bit_length(), engine.max_num_seqs)
        length = min(max(SHORTEST, 1 << (reach - 1).bit_length()), engine.cache_length)
        key = padded, length, ways
        if key not in self.recordings:
            self.recordings[key] = self._record(*key)
        if padded > count:
            idle = engine.model.prefix_view(batch_slice(engine.state, count, padded), 0)
            copy_state(idle, engine.model.prefix_view(engine.empty_state, 0))
        step, (logits_BV, tokens_B) = self.recordings[key]
        step()
        return logits_BV[:count], tokens_B[:count]

    def _record(self, count: int, length: int, ways: SamplingFlags) -> CapturedGraph:
        engine = self.engine
        last_B1 = engine.last_B1[:count]
        state = engine.model.prefix_view(batch_slice(engine.state, 0, count), length)
        chosen = batch_slice(engine.sampler.state, 0, count)

        def step(last_B1: Tensor, state: State, chosen: State) -> tuple[Tensor, Tensor]:
            logits_BV = engine.model.logits(engine.model.features(last_B1, state)[:, -1])
            tokens_B = sample(logits_BV, chosen, ways)
            last_B1[:, 0] = tokens_B.clamp(0, engine.model.vocab_size - 1)
            return logits_BV, tokens_B

        # On copies: libraries choose their kernels and make room for themselves outside of a recording.
        outputs = step(last_B1.clone(), _copied(state), _copied(chosen))
        if self.on_card:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # The mode of this thread: others may use the card meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                outputs = step(last_B1, state, chosen)
            return graph.replay, outputs

        def again() -> None:
            for kept, new in zip(outputs, step(last_B1, state, chosen), strict=True):
                kept.copy_(new)

        return again, outputs


def _copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}
