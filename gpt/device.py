"""Devices: selection, precision, and peak speed."""

import ctypes
import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch


class GPUSpec(NamedTuple):
    """Memory and speed of a GPU, from its data sheet."""

    memory: int | None
    """Bytes; None if unknown: GPUs of one name come in several sizes."""
    flops: float | None
    """Dense bfloat16 operations per second; None if unknown."""


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
    "L40S": GPUSpec(48 * GB, 362e12),
    "L4": GPUSpec(24 * GB, 121e12),
    "A10G": GPUSpec(24 * GB, 70e12),
    "RTX 4090": GPUSpec(24 * GB, 165e12),
    "RTX 3090": GPUSpec(24 * GB, 71e12),
}
"""By the driver's name for the GPU, without `IGNORED_WORDS`."""

IGNORED_WORDS = {"nvidia", "geforce", "sxm", "sxm4", "hbm3", "hbm3e"}


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
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {name!r}") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        names = ", ".join(kind for kind, is_available in available.items() if is_available)
        raise ValueError(f"--device {name}: there is none on this machine; there is {names}")
    return device


@functools.cache
def cpu_info() -> dict[str, str]:
    """Return the CPU's `model name`; on Linux also its `vendor_id` and `flags`, if reported."""
    path = Path("/proc/cpuinfo")
    text = path.read_text("utf-8") if path.exists() else ""  # Linux only
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    info = {name.strip(): value.strip() for name, _, value in pairs}
    info.setdefault("model name", platform.processor() or platform.machine())
    return {name: info[name] for name in ("vendor_id", "model name", "flags") if name in info}


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """Return whether matrices are multiplied in bfloat16; `auto` is yes where that is faster."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # With AVX-512, bfloat16 is three times as fast as float32 on an AMD EPYC, but half as fast
        # on an Intel Xeon.
        is_amd = cpu_info().get("vendor_id") == "AuthenticAMD"
        has_fast_avx512 = is_amd and torch.cpu._is_avx512_bf16_supported()
        return has_fast_avx512 or torch.cpu._is_amx_tile_supported()
    return False


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which matrix products are computed in `precision`, sums in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(device, precision))


@contextmanager
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
    """Return the GPU's peak bfloat16 operations per second, or None if unknown."""
    if device.type != "cuda":
        return None
    return find_gpu_spec(torch.cuda.get_device_name(device)).flops


def device_name(device: torch.device) -> str:
    """Return a description of the device: its name and GPU model or number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
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
