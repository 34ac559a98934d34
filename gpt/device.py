"""The device: which one, in which precision, how fast it could be at best."""

import contextlib
import ctypes
import platform

import torch

PEAK_BFLOAT16 = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 operations a second, from the makers' data sheets; the first name that fits counts."""


def find_device(name: str) -> torch.device:
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


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def in_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether matrix products are computed in bfloat16: `auto` is where that is faster."""
    return precision == "bfloat16" or (precision == "auto" and fast_bfloat16(device))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which to compute: matrix products in `precision`, sums in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device, precision))


def peak_flops(device: torch.device) -> float | None:
    """The card's bfloat16 peak in operations a second, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_BFLOAT16.items() if card in name), None)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def keep_freed_memory() -> None:
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
