"""Decode steps as CUDA graphs: captured once, then replayed as one launch instead of a hundred.

A graph computes with fixed addresses and sizes. So the batch is padded to a power of two and the
sequence length to another, and a graph is captured when its sizes first occur. It samples, too:
nothing has to be read back before the next step is launched. Free slots that pad the batch are
emptied before each step, and their outputs are dropped.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt.models.base import State, batch_slice, copy_state
from gpt.sampling import SamplingFlags, sample

if TYPE_CHECKING:
    from serving.engine.engine import Engine

MIN_LENGTH = 128
"""The shortest sequence length that a graph is captured for."""

CapturedGraph = tuple[Callable[[], None], tuple[Tensor, Tensor]]
"""A function that runs the step, and the logits_BV and tokens_B that it writes."""


class GraphRunner:
    """Runs an engine's decode steps.

    On a device without CUDA graphs each step is computed eagerly, at the same addresses and sizes.
    """

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.graphs: dict[tuple[int, int, SamplingFlags], CapturedGraph] = {}
        self.is_cuda = engine.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.is_cuda else None

    def __call__(self, count: int, length: int, flags: SamplingFlags) -> tuple[Tensor, Tensor]:
        """Run a step of the first `count` slots; return logits_BV and tokens_B, valid until the next.

        The tokens become the input of the next step, which can be run without reading them back.
        """
        engine = self.engine
        padded_count = min(1 << (count - 1).bit_length(), engine.max_num_seqs)
        padded_length = min(max(MIN_LENGTH, 1 << (length - 1).bit_length()), engine.cache_length)
        key = padded_count, padded_length, flags
        if key not in self.graphs:
            self.graphs[key] = self._capture(*key)
        if padded_count > count:
            padding = batch_slice(engine.state, count, padded_count)
            copy_state(engine.model.prefix_view(padding, 0), engine.empty_state)
        replay, (logits_BV, tokens_B) = self.graphs[key]
        replay()
        return logits_BV[:count], tokens_B[:count]

    def _capture(self, count: int, length: int, flags: SamplingFlags) -> CapturedGraph:
        model = self.engine.model
        last_tokens_B1 = self.engine.last_tokens_B1[:count]
        state = model.prefix_view(batch_slice(self.engine.state, 0, count), length)
        sampler_state = batch_slice(self.engine.sampler.state, 0, count)

        def step(
            last_tokens_B1: Tensor, state: State, sampler_state: State
        ) -> tuple[Tensor, Tensor]:
            logits_BV = model.logits(model.features(last_tokens_B1, state)[:, -1])
            tokens_B = sample(logits_BV, sampler_state, flags)
            last_tokens_B1[:, 0] = tokens_B.clamp(0, model.vocab_size - 1)
            return logits_BV, tokens_B

        # Warm up on copies: libraries select kernels and allocate workspaces outside of a capture.
        outputs = step(last_tokens_B1.clone(), _clone(state), _clone(sampler_state))
        if self.is_cuda:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Thread-local: other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                outputs = step(last_tokens_B1, state, sampler_state)
            return graph.replay, outputs

        def recompute() -> None:
            new_outputs = step(last_tokens_B1, state, sampler_state)
            for output, new_output in zip(outputs, new_outputs, strict=True):
                output.copy_(new_output)

        return recompute, outputs


def _clone(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}
