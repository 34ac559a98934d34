"""What suits this machine, this model and this run: threads, steps taken ahead, and what a number format costs."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from gpt.checkpoint import load_tensors
from gpt.kernels.quantization import DType, quantize
from gpt.models.base import LanguageModel
from serving.engine.engine import DecodeStep

TRIALS = 4
"""Times that a token is made with each number of threads."""
MEASURING = 0.5
"""Seconds of validation before a model is converted; the same tokens are scored after."""

Result = TypeVar("Result")


def run_in_own_thread(work: Callable[[], Result]) -> Result:
    """What the work gives, done in a thread of its own, with which its OpenMP workers end.

    Where a process has more workers than cores, even idle ones, libgomp lets none of them wait
    awake for its next share: an engine's step is hundreds of shares, each then a call to wake up.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result()


def tune_num_threads(model: LanguageModel) -> int:
    """With how many threads a token takes least, by trying; of nearly equal ones the fewest.

    The products of small models are over before a second thread has joined in, and the cores
    that are left answer clients.
    """
    most = torch.get_num_threads()
    if next(model.parameters()).device.type != "cpu":
        return most
    counts = [*(count for count in (1, 2, 4, 8, 16, 32) if count < most), most]
    seconds = dict.fromkeys(counts, math.inf)
    for _ in range(TRIALS):
        for count in counts:
            torch.set_num_threads(count)
            _first_token(model)  # threads come and go
            begun = time.perf_counter()
            _first_token(model)
            seconds[count] = min(seconds[count], time.perf_counter() - begun)
    torch.set_num_threads(most)
    return next(count for count in counts if seconds[count] < 1.15 * min(seconds.values()))


@torch.inference_mode()
def _first_token(model: LanguageModel) -> None:
    state, last_B1 = model.init_state(1, 1), torch.zeros(1, 1, dtype=torch.long)
    DecodeStep(model)(last_B1, model.prefix_view(state, 1))


def tune_scheduler_steps(model: LanguageModel) -> int:
    """How many steps to take before their tokens are looked at: several, where looking takes as long."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    on_card = next(model.parameters()).device.type == "cuda"
    return 4 if weights < (1_000_000_000 if on_card else 3_000_000) else 1


def quantize_and_measure(
    model: LanguageModel, dtype: DType, run: Path
) -> tuple[LanguageModel, str]:
    """The model in a number format, and in words what that costs on the run's own validation tokens.

    A ValueError says what is wrong with these, or where a device cannot.
    """
    if dtype == "float32":
        return quantize(model, dtype), ""
    file = run / "validation.safetensors"
    if not file.exists():
        cost = f"what {dtype} costs in perplexity is not known: the run has no {file.name}"
        return quantize(model, dtype), cost
    ids_N = load_tensors(file).get("tokens")
    if ids_N is None or ids_N.ndim != 1 or len(ids_N) < 2:
        raise ValueError(f"{file}: expected a list of `tokens`; remove the file")
    if not 0 <= int(ids_N.min()) <= int(ids_N.max()) < model.vocab_size:
        raise ValueError(f"{file}: its tokens are not of this run's vocabulary; remove the file")
    windows = [ids_T for ids_T in ids_N.long().split(model.context_length + 1) if len(ids_T) > 1]
    before = _nats(model, windows, MEASURING)
    model = quantize(model, dtype)
    after = _nats(model, windows[: len(before)], math.inf)
    tokens = sum(len(ids_T) - 1 for ids_T in windows[: len(before)])
    old, new = (math.exp(sum(nats) / tokens) for nats in (before, after))
    cost = (
        f"{dtype}: perplexity {new:.3f} instead of {old:.3f} ({new / old - 1:+.2%}) on "
        f"{tokens:,} of the run's validation tokens"
    )
    return model, cost


@torch.inference_mode()
def _nats(model: LanguageModel, windows: Sequence[Tensor], seconds: float) -> list[float]:
    """The nats of each window, of as many as begin in time."""
    device, begun = next(model.parameters()).device, time.monotonic()
    found: list[float] = []
    for ids_T in windows:
        if found and time.monotonic() > begun + seconds:
            break
        ids_1T = ids_T.unsqueeze(0).to(device)
        before_1T, targets_1T = ids_1T[:, :-1], ids_1T[:, 1:]
        if (
            model.supports_chunked_prefill
        ):  # as the engine does: with keys and values as they are kept
            state = model.init_state(1, before_1T.shape[1])
            nats_1T = model.token_nll(model.features(before_1T, state), targets_1T)
        else:
            nats_1T = model.nll(before_1T, targets_1T)
        found.append(nats_1T.double().sum().item())
    return found
