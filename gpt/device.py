"""The device: which one, in which precision, how fast it could be at best."""

import contextlib
import ctypes
import functools
import platform
from pathlib import Path
from typing import NamedTuple

import torch


class GPUSpec(NamedTuple):
    """What a maker's data sheet says of a card."""

    memory: int | None
    """Bytes; None where it is not known: cards of one name can have more or less."""
    flops: float | None
    """Dense bfloat16 operations a second; None where it is not known."""


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
"""By the name that the driver gives, without the words that say nothing more."""

SAYS_NOTHING_MORE = {"nvidia", "geforce", "sxm", "sxm4", "hbm3", "hbm3e"}


def find_gpu_spec(name: str) -> GPUSpec:
    """What is known of the card of that name: nothing if it is only like another (a laptop's, a slice)."""
    found = (card for known, card in GPU_SPECS.items() if _words(known) == _words(name))
    return next(found, GPUSpec(None, None))


def _words(name: str) -> list[str]:
    words = name.lower().replace("-", " ").split()
    return [word for word in words if word not in SAYS_NOTHING_MORE]


def resolve_device(name: str) -> torch.device:
    """`auto` is the best one here; a ValueError says what is not."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {name!r}") from None
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        here = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise ValueError(f"--device {name}: there is none on this machine; there is {here}")
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # AVX-512's is three times as fast as float32 on an AMD EPYC, and half as fast on an Intel Xeon.
        amd = cpu_info().get("vendor_id") == "AuthenticAMD"
        fast_units = amd and torch.cpu._is_avx512_bf16_supported()
        return fast_units or torch.cpu._is_amx_tile_supported()
    return False


@functools.cache
def cpu_info() -> dict[str, str]:
    """The first processor's model name; where Linux tells them, its vendor_id and flags too."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n")[0].splitlines()
    except OSError:  # no Linux
        lines = []
    pairs = (line.partition(":") for line in lines)
    told = {name.strip(): value.strip() for name, _, value in pairs}
    told.setdefault("model name", platform.processor() or platform.machine())
    return {name: told[name] for name in ("vendor_id", "model name", "flags") if name in told}


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether matrix products are computed in bfloat16: `auto` is where that is faster."""
    return precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which to compute: matrix products in `precision`, sums in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(device, precision))


def peak_flops(device: torch.device) -> float | None:
    """The card's bfloat16 peak in operations a second, or None where it is not known."""
    if device.type != "cuda":
        return None
    return find_gpu_spec(torch.cuda.get_device_name(device)).flops


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def retain_freed_memory() -> None:
    """Ask glibc to keep what a step frees for the next one.

    Otherwise every large tensor is mapped anew and its pages faulted in: a fifth of a small
    model's step on CPU. Elsewhere this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_mmap_threshold, 2**30)
            libc.mallopt(m_trim_threshold, 2**31 - 1)
