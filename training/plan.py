"""Estimate a run before it is trained: memory per device, FLOPs, tokens and time.

One training step is run with tensors that have shapes but no contents (torch's `FakeTensorMode`):
the model's own loss, autograd's graph and the run's optimizers. The bytes that each part allocates
are counted, so any model that trains can be planned without a formula of its own. A test compares
the counts with real steps.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt import LanguageModel, Model
from gpt.device import (
    DTYPES,
    GPUSpec,
    find_gpu_spec,
    gpu_name,
    is_gpu,
    matmul_dtype,
    resolve_device,
)
from gpt.summary import count_by_kind, count_parameters, describe
from training.config import TrainingConfig, new_model
from training.cpu import tune_for_cpu
from training.distributed import fsdp_layers
from training.optimizer import Optimizers
from training.progress import format_duration
from training.tasks import TASKS, check_task
from training.tasks.text import Text
from training.trainer import Objective

USABLE_MEMORY = 0.9
"""Share of a GPU's memory for tensors; the rest is for CUDA, NCCL and fragmentation."""
GIB = 2**30


class TensorMemoryTracker(TorchDispatchMode):
    """Counts the bytes of all live tensors, each storage once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return outputs

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed; a storage already counted is skipped."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = storage.nbytes()
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            finalize(storage, self._free, id(storage))

    def _free(self, storage: int) -> None:
        self.current -= self._sizes.pop(storage)


class GPUKernels(TorchFunctionMode):
    """Replaces operations that are one fused kernel on a GPU and several on a CPU.

    The replacements save no more for the backward pass than the GPU's kernels do.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func is F.rms_norm and kwargs["weight"] is not None:
            x, weight = args[0], kwargs["weight"]
            # On a GPU autocast computes it in float32.
            dtype = torch.float32 if torch.is_autocast_enabled("cpu") else x.dtype
            return _FusedRMSNorm.apply(x.to(dtype), weight.to(dtype))  # type: ignore[no-untyped-call]
        if func is F.dropout and kwargs["p"] and kwargs["training"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        if func is F.scaled_dot_product_attention:
            kwargs = kwargs | {"dropout_p": 0.0}  # a CPU's fused kernel has no dropout
        return func(*args, **kwargs)


class _FusedRMSNorm(torch.autograd.Function):
    """The fused kernel's shapes: it saves its input and one number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401 (torch's own)
        ctx.save_for_backward(x, weight, x[..., :1].clone())
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        _, weight, _ = ctx.saved_tensors
        return torch.empty_like(grad), torch.empty_like(weight)


MEMORY_NOTES = {
    "all_gather": "parameters and gradients unsharded temporarily",
    "activations": "saved for the backward pass of a micro-batch",
    "loss": "logits, and temporary buffers of the backward pass",
    "optimizer_step": "temporary buffers, after activations are freed",
    "eval_model": "full weights on rank 0, after activations are freed",
}
"""What the kinds of `Memory` are, for the table."""


@dataclass
class Memory:
    """Bytes on one device, by kind."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    all_gather: int
    activations: int
    loss: int
    """Of one chunk of logits."""
    optimizer_step: int
    eval_model: int
    peak: int = dataclasses.field(init=False)
    """Most bytes allocated at once."""

    def __post_init__(self) -> None:
        permanent = self.weights + self.gradients + self.optimizer
        forward_backward = self.all_gather + self.activations + self.loss
        self.peak = permanent + max(forward_backward, self.optimizer_step, self.eval_model)


@dataclass(frozen=True)
class Hardware:
    """The devices of a run, all of one kind."""

    num_devices: int
    device: str
    """Name of each."""
    spec: GPUSpec
    is_gpu: bool
    """False for this machine's CPU or MPS device."""
    precision: str
    """Data type of matrix products: a name of `DTYPES`."""

    def fits(self, memory: Memory) -> bool | None:
        """Return whether a device holds the peak memory; None if its memory is unknown."""
        capacity = self.spec.memory
        return None if capacity is None else memory.peak <= USABLE_MEMORY * capacity


def resolve_hardware(config: TrainingConfig, num_gpus: int, gpu: str | None) -> Hardware:
    """Return the GPUs of that name, or this machine's device if `gpu` is None."""
    if gpu is not None:
        if config.device != "auto":
            raise ValueError("--gpu and --device both choose the device: leave out one of them")
        spec, precision = find_gpu_spec(gpu), config.precision
        if precision == "auto":
            precision = "bfloat16" if spec.has_bfloat16 else "float16"
        return Hardware(num_gpus, gpu, spec, True, precision)
    device = resolve_device(config.device)
    name, spec = device.type, GPUSpec(None, None)
    if is_gpu(device):
        name = gpu_name(device)
        capacity = torch.get_device_module(device).get_device_properties(device).total_memory
        spec = find_gpu_spec(name)._replace(memory=capacity)
    dtype = matmul_dtype(device, config.precision)
    dtype_name = next(key for key, value in DTYPES.items() if value == dtype)
    return Hardware(num_gpus, name, spec, is_gpu(device), dtype_name)


def measure_memory(config: TrainingConfig, micro_batch_size: int, hardware: Hardware) -> Memory:
    """Measure the memory of one training step on each device with fake tensors."""
    on_gpu, dtype = hardware.is_gpu, DTYPES[hardware.precision]
    if dtype == torch.float16:  # its gradient scaling reads numbers, of which there are none here
        dtype = torch.bfloat16
    num_shards = hardware.num_devices if config.fsdp else 1
    task = TASKS[config.task]
    model_args = task.expected_model_args(config)
    arrays = [torch.from_numpy(array) for array in task.largest_batch(config, micro_batch_size)]
    kernels = GPUKernels() if on_gpu else contextlib.nullcontext()
    with FakeTensorMode() as fake, TensorMemoryTracker() as memory, kernels:
        batch = [fake.from_tensor(array) for array in arrays]
        for tensor in batch:
            memory.count(tensor)
        model = new_model(config, model_args).train()
        if hardware.device == "cpu":
            tune_for_cpu(model, hardware.precision, config.context_length)
        gradients = _shard_bytes(model.parameters(), num_shards)
        full_weights = _shard_bytes(model.parameters(), 1)
        weights = gradients + _shard_bytes(model.buffers(), 1)
        optimizers = Optimizers(model, config, torch.device("cpu"), dtype)
        for index in range(2):  # the first step creates the optimizer state
            _allocate_gradients(model)
            memory.peak = before = memory.current
            optimizers.step(index)
        optimizer_step = memory.peak - before
        optimizer = _shard_bytes(optimizers.state_dict().values(), num_shards)
        if num_shards > 1 and dtype != torch.float32 and on_gpu:
            _cast_to_bfloat16(model)  # FSDP gathers parameters in bfloat16
        _allocate_gradients(model)
        permanent = memory.current
        state = None
        if config.stateful:
            assert isinstance(model, LanguageModel)
            state = model.init_state(micro_batch_size, config.context_length)
        activations: list[int] = []
        if isinstance(model, LanguageModel):
            mean_nll = model.mean_nll

            def recording_mean_nll(
                features_BTD: Tensor, targets_BT: Tensor, label_smoothing: float = 0.0
            ) -> Tensor:
                activations.append(memory.current - permanent)
                return mean_nll(features_BTD, targets_BT, label_smoothing)

            model.mean_nll = recording_mean_nll  # type: ignore[method-assign]
        memory.peak = memory.current
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = Objective(model, config.label_smoothing)(*batch, state=state)
        activations.append(memory.current - permanent)  # for a model without logits
        loss.backward()
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        all_gather=all_gather_bytes(model) if num_shards > 1 else 0,
        activations=activations[0],
        loss=memory.peak - permanent - activations[0],
        optimizer_step=optimizer_step // num_shards,
        eval_model=full_weights if num_shards > 1 else 0,
    )


def _allocate_gradients(model: Model) -> None:
    """Allocate gradients, which exist in every micro-batch of a step but the first."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def _cast_to_bfloat16(model: Model) -> None:
    """Cast parameters, and keep tied ones tied (`Module.to` rejects fake tensors)."""
    cast: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            low_precision = nn.Parameter(parameter.detach().to(torch.bfloat16))
            setattr(module, name, cast.setdefault(parameter, low_precision))


def _shard_bytes(tensors: Iterable[Tensor], num_shards: int) -> int:
    """Return the bytes of one device's shards, each tensor sharded along its first axis."""
    return sum(
        math.ceil(len(tensor) / num_shards) * tensor[:1].nbytes if tensor.ndim else tensor.nbytes
        for tensor in tensors
    )


def all_gather_bytes(model: Model) -> int:
    """Return the most bytes that FSDP unshards on a device at once.

    For the largest layer: its weights and gradients, and the prefetched weights of the next layer.
    For parameters outside the layers: weights and gradients. Gradients are reduced in float32.
    """
    layers = [count_parameters(layer) for layer in fsdp_layers(model)]
    outside, largest = count_parameters(model) - sum(layers), max(layers, default=0)
    itemsize = next(model.parameters()).itemsize
    return (2 * itemsize + 4) * largest + (itemsize + 4) * outside


@dataclass(frozen=True)
class Plan:
    """The estimated cost of a run on some hardware."""

    config: TrainingConfig
    hardware: Hardware
    mfu: float
    """Expected model FLOPs utilization, a share of the peak."""
    micro_batch_size: int
    memory: Memory
    model: Model
    """The model on the meta device."""

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole run; None if sequences differ in length."""
        if not issubclass(TASKS[self.config.task], Text):
            return None
        return self.config.steps * self.config.batch_size * self.config.context_length

    @property
    def tokens_per_second(self) -> float | None:
        """Throughput of all devices; None if the peak FLOP/s are unknown, as they are in float32."""
        peak_flops = self.hardware.spec.flops
        flops_per_token = self.model.flops_per_token(self.config.context_length)
        in_float32 = self.hardware.precision == "float32"
        if in_float32 or not (self.tokens and peak_flops and flops_per_token):
            return None
        return self.hardware.num_devices * self.mfu * peak_flops / flops_per_token

    @functools.cached_property
    def suggestion(self) -> str | None:
        """Options that make the run fit; None if it fits already or the memory is unknown."""
        config, size, fits = self.config, self.micro_batch_size, self.hardware.fits
        if fits(self.memory) is not False:
            return None
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        splits = [1] if config.stateful else divisors  # a stateful batch is not split
        for fsdp in dict.fromkeys((config.fsdp, self.hardware.num_devices > 1)):
            changed = dataclasses.replace(config, fsdp=fsdp)
            if not fits(measure_memory(changed, size // splits[-1], self.hardware)):
                continue
            for n in splits:
                if fits(measure_memory(changed, size // n, self.hardware)):
                    accumulation = config.gradient_accumulation_steps * n
                    options = [f"--gradient-accumulation-steps {accumulation}"] * (n > 1)
                    return " ".join(options + ["--fsdp"] * (fsdp and not config.fsdp))
        return "more GPUs with --fsdp, or a smaller model"

    def to_json(self) -> dict[str, Any]:
        """Return all estimates by name; unknown ones are None."""
        config, hardware, model = self.config, self.hardware, self.model
        tokens, speed, parameters = self.tokens, self.tokens_per_second, count_parameters(model)
        return {
            "preset": config.preset,
            "model": config.model,
            "parameters": parameters,
            "parameters_by_kind": {kind: size for kind, (_, size) in count_by_kind(model).items()},
            "num_devices": hardware.num_devices,
            "device": hardware.device,
            "device_memory": hardware.spec.memory,
            "device_peak_flops": hardware.spec.flops,
            "precision": hardware.precision,
            "fsdp": config.fsdp,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "micro_batch_size": self.micro_batch_size,
            "memory": dataclasses.asdict(self.memory),
            "fits": hardware.fits(self.memory),
            "suggestion": self.suggestion,
            "steps": config.steps,
            "tokens": tokens,
            "tokens_per_parameter": tokens and tokens / parameters,
            "flops_per_token": tokens and model.flops_per_token(config.context_length),
            "mfu": self.mfu,
            "tokens_per_second": speed,
            "seconds": tokens / speed if tokens and speed else None,
        }

    def table(self) -> str:
        """Return the estimates as lines of text, with units and settings."""
        config, hardware, tokens = self.config, self.hardware, self.tokens
        devices, capacity = f"{hardware.num_devices} x {hardware.device}", hardware.spec.memory
        lines = [
            f"preset {config.preset}: {config.model} on {devices}",
            describe(self.model),
            "",
            f"batch: {config.batch_size:,} rows = {hardware.num_devices} x "
            f"{config.gradient_accumulation_steps} micro-batches of {self.micro_batch_size:,}, "
            f"in {hardware.precision}",
            f"memory per device, GiB{', sharded' if config.fsdp else ''}:",
        ]
        verdict = "of unknown memory"
        if capacity is not None:
            fits = f"too much: {self.suggestion}" if self.suggestion else "fits"
            verdict = f"of {USABLE_MEMORY:.0%} of {capacity / GIB:.1f}: {fits}"
        notes = MEMORY_NOTES | {"peak": verdict}
        for name, size in dataclasses.asdict(self.memory).items():
            if size:
                label = name.replace("_", " ")
                lines.append(f"  {label:<16}{size / GIB:>9.3f}  {notes.get(name, '')}".rstrip())
        lines.append("time:")
        if tokens is None:
            return "\n".join([*lines, "  unknown: sequences differ in length"])
        flops, speed = self.model.flops_per_token(config.context_length), self.tokens_per_second
        peak_flops = hardware.spec.flops
        peak = f"{peak_flops / 1e12:,.0f} TFLOP/s" if peak_flops else "an unknown peak"
        time = f"{speed:,.0f} tokens/s, {format_duration(tokens / speed)}" if speed else "unknown"
        lines += [
            f"  {tokens:,} tokens in {config.steps:,} steps, "
            f"{tokens / count_parameters(self.model):,.1f} per parameter",
            f"  {flops / 1e9:,.3f} GFLOP per token, {flops * tokens:.2e} FLOP in total",
            f"  {devices} at {self.mfu:.0%} of {peak}: {time}",
        ]
        return "\n".join(lines)


def make_plan(config: TrainingConfig, num_gpus: int, gpu: str | None, mfu: float) -> Plan:
    """Estimate a run on GPUs of that name, or on this machine's device if `gpu` is None.

    Raises ValueError if options contradict each other. `mfu` is the model FLOPs utilization that
    is expected, a share of the peak.
    """
    check_task(config)
    if num_gpus < 1:
        raise ValueError(f"--num-gpus must be at least 1, not {num_gpus}")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu must be above 0 and at most 1, not {mfu}")
    accumulation = config.gradient_accumulation_steps
    micro_batch_size, remainder = divmod(config.batch_size, num_gpus * accumulation)
    if remainder:
        raise ValueError(
            f"--batch-size {config.batch_size} cannot be divided among --num-gpus {num_gpus}, each "
            f"with --gradient-accumulation-steps {accumulation}: choose a multiple of "
            f"{num_gpus * accumulation}"
        )
    model_args = TASKS[config.task].expected_model_args(config)
    with torch.device("meta"):
        model = new_model(config, model_args)
    hardware = resolve_hardware(config, num_gpus, gpu)
    memory = measure_memory(config, micro_batch_size, hardware)
    return Plan(config, hardware, mfu, micro_batch_size, memory, model)
