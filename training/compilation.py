"""Whether a run's train steps are compiled: with `--compile auto`, where that saves time.

torch.compile fuses the many small operations between matrix products, which about halves the time
of a step on a GPU. Compiling takes seconds, once. The estimate is rough, and need not be better:
most runs take either much longer than compiling, or much shorter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt import LanguageModel, Model
from gpt.device import GPU_SPECS, peak_flops
from training.config import TrainingConfig
from training.distributed import fsdp_layers

COMPILE_SECONDS_PER_LAYER = 2.0
"""Seconds that TorchInductor takes for the forward and backward pass of a Transformer's layer."""
EAGER_MFU = 0.1
"""Expected model FLOPs utilization of a step that is not compiled."""
MIN_RATIO = 2.0
"""Compiling pays where the eager run takes this many times as long: it saves half of that."""
UNKNOWN_GPU_FLOPS = GPU_SPECS["A100"].flops
"""Peak FLOP/s that are assumed of a GPU that is not in the table."""


@dataclass(frozen=True)
class Compilation:
    """What train steps call, and whether it is compiled."""

    objective: Callable[..., Tensor]
    enabled: bool
    reason: str

    def __str__(self) -> str:
        return f"{'on' if self.enabled else 'off'} ({self.reason})"


def should_compile(
    config: TrainingConfig, model: Model, device: torch.device, num_devices: int, fixed_shapes: bool
) -> tuple[bool, str]:
    """Return whether to compile a run, and why.

    The answer depends on nothing that changes during a run, so that a resumed one computes the
    same. `fixed_shapes` says that all batches have one shape.
    """
    if config.compile != "auto":
        return config.compile == "on", f"--compile {config.compile}"
    if device.type != "cuda":
        return False, f"auto compiles on a GPU only, not on {device.type}"
    if config.fsdp:
        return False, "auto does not compile with --fsdp"
    if not fixed_shapes:
        return False, "batches differ in shape: each shape may need its own code"
    if not isinstance(model, LanguageModel) or model.max_length is None:
        return False, "auto compiles Transformers only: loops over tokens take minutes to compile"
    tokens = config.steps * config.batch_size * config.context_length
    flops = tokens * model.flops_per_token(config.context_length) / num_devices
    peak = peak_flops(device) or UNKNOWN_GPU_FLOPS
    assert peak
    seconds = flops / (EAGER_MFU * peak)
    compile_seconds = COMPILE_SECONDS_PER_LAYER * len(fsdp_layers(model))
    return seconds >= MIN_RATIO * compile_seconds, (
        f"auto: about {seconds:,.0f} s of training without, {compile_seconds:,.0f} s of compiling"
    )
