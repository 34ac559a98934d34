"""Decode steps as CUDA graphs: captured once, then replayed as one launch instead of a hundred.

A graph computes with fixed addresses and sizes. So the batch is padded to a power of two and the
sequence length to another, and a graph is captured when its sizes first occur. It samples, too:
nothing has to be read back before the next step is launched. Free slots that pad the batch are
emptied before each step, and their outputs are dropped.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gpt.device import has_cuda_graphs
from gpt.models.base import LanguageModel, State, batch_slice, copy_state
from gpt.sampling import SamplingFlags, sample

MIN_LENGTH = 128
"""The shortest sequence length that a graph is captured for."""

CapturedGraph = tuple[Callable[[], None], tuple[Tensor, Tensor]]
"""A function that runs the step, and the logits_BV and tokens_B that it writes."""


class GraphRunner:
    """Runs an engine's decode steps on the engine's own tensors, whose addresses must not change.

    On a device without CUDA graphs each step is computed eagerly, at the same addresses and sizes.

    Args:
        model: The model.
        state: Its state for all slots, of `cache_length` positions.
        empty_state: The prefix view of an empty state of one slot.
        sampler_state: State of the sampler for all slots.
        last_tokens_B1: The tokens that a step feeds, and overwrites with those it samples.
        cache_length: Positions of a slot.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: State,
        empty_state: State,
        sampler_state: State,
        last_tokens_B1: Tensor,
        cache_length: int,
    ) -> None:
        self.model, self.state, self.empty_state = model, state, empty_state
        self.sampler_state, self.last_tokens_B1 = sampler_state, last_tokens_B1
        self.cache_length = cache_length
        self.graphs: dict[tuple[int, int, SamplingFlags], CapturedGraph] = {}
        self.device = last_tokens_B1.device
        self.captures = has_cuda_graphs(self.device)
        self.module = torch.get_device_module(self.device)
        self.pool = self.module.graph_pool_handle() if self.captures else None

    def __call__(self, count: int, length: int, flags: SamplingFlags) -> tuple[Tensor, Tensor]:
        """Run a step of the first `count` slots; return logits_BV and tokens_B, valid until the next.

        The tokens become the input of the next step, which can be run without reading them back.
        """
        padded_count = min(1 << (count - 1).bit_length(), len(self.last_tokens_B1))
        padded_length = min(max(MIN_LENGTH, 1 << (length - 1).bit_length()), self.cache_length)
        key = padded_count, padded_length, flags
        if key not in self.graphs:
            self.graphs[key] = self._capture(*key)
        if padded_count > count:
            padding = batch_slice(self.state, count, padded_count)
            copy_state(self.model.prefix_view(padding, 0), self.empty_state)
        replay, (logits_BV, tokens_B) = self.graphs[key]
        replay()
        return logits_BV[:count], tokens_B[:count]

    def _capture(self, count: int, length: int, flags: SamplingFlags) -> CapturedGraph:
        model, last_tokens_B1 = self.model, self.last_tokens_B1[:count]
        state = model.prefix_view(batch_slice(self.state, 0, count), length)
        sampler_state = batch_slice(self.sampler_state, 0, count)

        def step(
            last_tokens_B1: Tensor, state: State, sampler_state: State
        ) -> tuple[Tensor, Tensor]:
            logits_BV = model.logits(model.features(last_tokens_B1, state)[:, -1])
            tokens_B = sample(logits_BV, sampler_state, flags)
            last_tokens_B1[:, 0] = tokens_B.clamp(0, model.vocab_size - 1)
            return logits_BV, tokens_B

        # Warm up on copies: libraries select kernels and allocate workspaces outside of a capture.
        outputs = step(last_tokens_B1.clone(), _clone(state), _clone(sampler_state))
        if self.captures:
            graph = self.module.CUDAGraph()
            with (
                # A capture records a stream of this thread's current device.
                torch.accelerator.device_index(self.device.index),
                # Thread-local: other threads may use the GPU meanwhile.
                self.module.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                outputs = step(last_tokens_B1, state, sampler_state)
            return graph.replay, outputs

        def recompute() -> None:
            new_outputs = step(last_tokens_B1, state, sampler_state)
            for output, new_output in zip(outputs, new_outputs, strict=True):
                output.copy_(new_output)

        return recompute, outputs


def _clone(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}
