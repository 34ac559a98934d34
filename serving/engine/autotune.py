"""Measurements that fit the engine to a machine and a run: threads, decode steps, cost of a dtype."""

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
from serving.engine.steps import DecodeStep

NUM_TRIALS = 4
"""Decode steps that are timed with each number of threads."""
SCORING_SECONDS = 0.5
"""Seconds of validation before a model is quantized; the same tokens are scored after."""

Result = TypeVar("Result")


def run_in_own_thread(function: Callable[[], Result]) -> Result:
    """Call a function in a new thread, whose OpenMP workers end with it, and return its result.

    Where a process has more OpenMP workers than cores, even idle ones, libgomp lets none of them
    spin between parallel regions: an engine step has hundreds of these, each then a wake-up call.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result()


def tune_num_threads(model: LanguageModel) -> int:
    """Return the number of threads with which a decode step is fastest; of nearly equal ones the least.

    Matrix products of small models end before a second thread has started, and the cores left
    free serve clients.
    """
    max_threads = torch.get_num_threads()
    if next(model.parameters()).device.type != "cpu":
        return max_threads
    counts = [*(count for count in (1, 2, 4, 8, 16, 32) if count < max_threads), max_threads]
    seconds = dict.fromkeys(counts, math.inf)
    for _ in range(NUM_TRIALS):
        for count in counts:
            torch.set_num_threads(count)
            _decode_first_token(model)  # starts and ends threads
            start = time.perf_counter()
            _decode_first_token(model)
            seconds[count] = min(seconds[count], time.perf_counter() - start)
    torch.set_num_threads(max_threads)
    return next(count for count in counts if seconds[count] < 1.15 * min(seconds.values()))


@torch.inference_mode()
def _decode_first_token(model: LanguageModel) -> None:
    state, tokens_11 = model.init_state(1, 1), torch.zeros(1, 1, dtype=torch.long)
    DecodeStep(model)(tokens_11, model.prefix_view(state, 1))


def tune_scheduler_steps(model: LanguageModel) -> int:
    """Return a `num_scheduler_steps`: several where reading a token back takes as long as a step."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    is_cpu = next(model.parameters()).device.type == "cpu"
    return 4 if num_parameters < (3_000_000 if is_cpu else 1_000_000_000) else 1


def quantize_and_measure(
    model: LanguageModel, dtype: DType, run: Path
) -> tuple[LanguageModel, str]:
    """Return the model in `dtype`, and a sentence with the perplexity that this costs.

    The perplexity is that of the run's own validation tokens, before and after.

    Raises:
        ValueError: The validation file is damaged, or the device does not support `dtype`.
    """
    if dtype == "float32":
        return quantize(model, dtype), ""
    file = run / "validation.safetensors"
    if not file.exists():
        message = f"what {dtype} costs in perplexity is not known: the run has no {file.name}"
        return quantize(model, dtype), message
    tokens_N = load_tensors(file).get("tokens")
    if tokens_N is None or tokens_N.ndim != 1 or len(tokens_N) < 2:
        raise ValueError(f"{file}: expected a list of `tokens`; remove the file")
    if not 0 <= int(tokens_N.min()) <= int(tokens_N.max()) < model.vocab_size:
        raise ValueError(f"{file}: its tokens are not of this run's vocabulary; remove the file")
    windows = [w_T for w_T in tokens_N.long().split(model.context_length + 1) if len(w_T) > 1]
    nll_before = _window_nll(model, windows, SCORING_SECONDS)
    windows = windows[: len(nll_before)]
    model = quantize(model, dtype)
    nll_after = _window_nll(model, windows, math.inf)
    num_targets = sum(len(window_T) - 1 for window_T in windows)
    before, after = (math.exp(sum(nll) / num_targets) for nll in (nll_before, nll_after))
    message = (
        f"{dtype}: perplexity {after:.3f} instead of {before:.3f} ({after / before - 1:+.2%}) on "
        f"{num_targets:,} of the run's validation tokens"
    )
    return model, message


@torch.inference_mode()
def _window_nll(model: LanguageModel, windows: Sequence[Tensor], seconds: float) -> list[float]:
    """Return each window's negative log-likelihood in nats, of as many as can start in `seconds`."""
    device, start = next(model.parameters()).device, time.monotonic()
    nll: list[float] = []
    for window_T in windows:
        if nll and time.monotonic() > start + seconds:
            break
        window_1T = window_T.unsqueeze(0).to(device)
        tokens_1T, targets_1T = window_1T[:, :-1], window_1T[:, 1:]
        if model.supports_chunked_prefill:  # with cached keys and values in their dtype
            state = model.init_state(1, tokens_1T.shape[1])
            nll_1T = model.token_nll(model.features(tokens_1T, state), targets_1T)
        else:
            nll_1T = model.nll(tokens_1T, targets_1T)
        nll.append(nll_1T.cpu().double().sum().item())  # MPS has no float64
    return nll
