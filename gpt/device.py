"""Devices: selection, precision, and peak speed."""

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class GPUSpec(NamedTuple):
    """Memory and speed of a GPU, from its data sheet."""

    memory: int | None
    """Bytes; None if unknown: GPUs of one name come in several sizes."""
    flops: float | None
    """Dense operations per second in bfloat16, or else in float16; None if unknown."""
    has_bfloat16: bool = True


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The data types of `--precision`, by name."""

GB = 10**9

GPU_SPECS = {
    "A100": GPUSpec(None, 312e12),
    "A100 40GB": GPUSpec(40 * GB, 312e12),
    "A100 80GB": GPUSpec(80 * GB, 312e12),
    "A100 PCIe 40GB": GPUSpec(40 * GB, 312e12),
    "A100 80GB PCIe": GPUSpec(80 * GB, 312e12),
    "H100": GPUSpec(80 * GB, 989e12),
    "H100 80GB": GPUSpec(80 * GB, 989e12),
    "H100 PCIe": GPUSpec(80 * GB, 756e12),
    "H100 NVL": GPUSpec(94 * GB, 835e12),
    "H200": GPUSpec(141 * GB, 989e12),
    "H200 NVL": GPUSpec(141 * GB, 835e12),
    "GH200 480GB": GPUSpec(96 * GB, 989e12),
    "B200": GPUSpec(180 * GB, 2250e12),
    "V100 16GB": GPUSpec(16 * GB, 125e12, has_bfloat16=False),
    "V100 32GB": GPUSpec(32 * GB, 125e12, has_bfloat16=False),
    "T4": GPUSpec(16 * GB, 65e12, has_bfloat16=False),
    "L40S": GPUSpec(48 * GB, 362e12),
    "L4": GPUSpec(24 * GB, 121e12),
    "A10G": GPUSpec(24 * GB, 70e12),
    "RTX 4090": GPUSpec(24 * GB, 165e12),
    "RTX 3090": GPUSpec(24 * GB, 71e12),
}
"""By the driver's name for the GPU, without `IGNORED_WORDS`."""

IGNORED_WORDS = {"nvidia", "tesla", "geforce", "sxm", "sxm2", "sxm4", "hbm3", "hbm3e"}


def find_gpu_spec(name: str) -> GPUSpec:
    """Return the spec of the GPU of that name; all None if unknown, as for a laptop's or a MIG slice."""

    def words(name: str) -> list[str]:
        return [
            word for word in name.lower().replace("-", " ").split() if word not in IGNORED_WORDS
        ]

    specs = (spec for known, spec in GPU_SPECS.items() if words(known) == words(name))
    return next(specs, GPUSpec(None, None))


def resolve_device(name: str) -> torch.device:
    """Return the device of that name, or the fastest for `auto`; a ValueError if there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {name!r}") from None
    counts = {"cpu": 1}
    if accelerator:
        counts[accelerator.type] = torch.accelerator.device_count()
    if (device.index or 0) >= counts.get(device.type, 0):
        names = ", ".join(counts)
        raise ValueError(f"--device {name}: there is none on this machine; there is {names}")
    return device


def is_gpu(device: torch.device) -> bool:
    """Return whether the device has memory and streams of its own: a CUDA, ROCm or XPU device, not MPS."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")


def has_cuda_graphs(device: torch.device) -> bool:
    """Return whether `torch.get_device_module` of the device has CUDA graphs."""
    return hasattr(torch.get_device_module(device), "CUDAGraph")


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a CPU tensor on the device; copies to a GPU are queued, without waiting."""
    if is_gpu(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@functools.cache
def cpu_info() -> dict[str, str]:
    """Return the CPU's `model name`; on Linux also its `vendor_id` and `flags`, if reported."""
    path = Path("/proc/cpuinfo")
    text = path.read_text("utf-8") if path.exists() else ""  # Linux only
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    info = {name.strip(): value.strip() for name, _, value in pairs}
    info.setdefault("model name", platform.processor() or platform.machine())
    return {name: info[name] for name in ("vendor_id", "model name", "flags") if name in info}


def matmul_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return the data type in which matrices are multiplied; `auto` is the fastest of the device.

    On a CPU that is a guess; a run measures instead (`training.autotune.choose_precision`).
    """
    if precision != "auto":
        return DTYPES[precision]
    if is_gpu(device):
        module = torch.get_device_module(device)
        has_bfloat16 = module.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "cpu":
        # With AVX-512, bfloat16 is three times as fast as float32 on an AMD EPYC, but half as fast
        # on an Intel Xeon.
        is_amd = cpu_info().get("vendor_id") == "AuthenticAMD"
        has_fast_avx512 = is_amd and torch.cpu._is_avx512_bf16_supported()
        if has_fast_avx512 or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16
    return torch.float32


def fork_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context after which the random numbers of the CPU and the device continue as if it had not been."""
    devices = [device] if device.type != "cpu" else []
    return torch.random.fork_rng(devices, device_type=device.type)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which matrix products are computed in `precision`, sums in float32."""
    dtype = matmul_dtype(device, precision)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Within this context a GPU multiplies float32 matrices in TF32: several times as fast.

    TF32 rounds factors to 10 bits, where float32 has 23 and bfloat16 has 7: enough for train steps.
    Evaluation, sampling and serving stay outside, so that their figures are those of a CPU.
    """
    previous = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


def peak_flops(device: torch.device) -> float | None:
    """Return the GPU's `GPUSpec.flops`, or None if unknown."""
    return find_gpu_spec(gpu_name(device)).flops if is_gpu(device) else None


def gpu_name(device: torch.device) -> str:
    """Return the driver's name for a GPU."""
    return str(torch.get_device_module(device).get_device_name(device))


def device_name(device: torch.device) -> str:
    """Return a description of the device: its name and GPU model or number of threads."""
    if is_gpu(device):
        return f"{device} ({gpu_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def retain_freed_memory() -> None:
    """Let glibc keep the memory that a training step frees for the next step.

    Otherwise every large tensor is mapped again and its pages are faulted in, which takes a fifth
    of a small model's step on CPU. Without glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
