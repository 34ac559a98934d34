"""Throughput of the engine, `transformers` and llama.cpp on the same weights, as far as installed.

Each backend runs in a worker process of its own, once with one thread and once with all. The workers
run each workload in turns, so that a change in the machine's speed affects all of them.
"""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from benchmarks import report
from benchmarks.backends import LlamaCpp, ModelSize, TinyGPT, Transformers, random_prompts
from benchmarks.report import Result
from benchmarks.worker import Worker
from gpt.kernels.quantization import DType
from gpt.models.gpt import GPT2

MIN_SECONDS = 0.5
"""A workload is repeated for at least this long in each turn."""


class Workload(NamedTuple):
    """What a backend generates in one call."""

    batch_size: int
    prompt_length: int
    output_length: int


WORKLOADS = {
    "one sequence": Workload(1, 16, 128),
    "eight sequences": Workload(8, 16, 64),
    "prefill": Workload(1, 256, 1),
}
GPU_WORKLOADS = {**WORKLOADS, "256 sequences": Workload(256, 16, 64)}
PAIRS = (
    ("tinygpt float32", "transformers"),
    ("tinygpt int8", "llama.cpp q8_0"),
    ("tinygpt bfloat16", "transformers bfloat16"),
)
"""Backends of similar precision, for the table of speedups."""


def available_backends(device: str = "cpu") -> list[str]:
    """Return the names of the backends that are installed and run on a device."""
    if device != "cpu":
        transformers = ["transformers bfloat16"] * report.is_installed("transformers")
        return ["tinygpt bfloat16", *transformers]
    names = ["tinygpt float32", "tinygpt int8"]
    if report.is_installed("transformers"):
        names.append("transformers")
    if report.is_installed("llama_cpp") and report.is_installed("gguf"):
        names += ["llama.cpp f32", "llama.cpp q8_0"]
    return names


def create_backend(
    name: str, model: GPT2, threads: int, max_num_seqs: int
) -> TinyGPT | Transformers | LlamaCpp:
    """Build a backend by its name, on the model's device."""
    torch.set_num_threads(threads)
    dtypes: dict[str, DType] = {"int8": "int8", "bfloat16": "bfloat16"}
    dtype = dtypes.get(name.split()[-1], "float32")
    if name.startswith("transformers"):
        return Transformers(model.bfloat16() if dtype == "bfloat16" else model)
    if name.startswith("llama.cpp"):
        return LlamaCpp(
            model, "q8_0" if name.endswith("q8_0") else "float32", threads, max_num_seqs
        )
    return TinyGPT(model, max_num_seqs, dtype)


def backend_worker(
    connection: Connection,
    name: str,
    size: ModelSize,
    threads: int,
    device: str,
    workloads: Mapping[str, Workload],
) -> None:
    """Send the first tokens generated; then the tokens per second of each workload received."""
    max_num_seqs = max(workload.batch_size for workload in workloads.values())
    backend = create_backend(name, size.build().to(device), threads, max_num_seqs)
    prompts = {
        workload: random_prompts(batch_size, length, size.vocab_size)
        for workload, (batch_size, length, _) in workloads.items()
    }
    warmup = {
        workload: backend.generate(prompts[workload], workloads[workload].output_length)
        for workload in workloads
    }
    connection.send(warmup["one sequence"][0][:8])
    while workload := connection.recv():
        batch_size, prompt_length, output_length = workloads[workload]
        tokens, seconds = 0, 0.0
        start = time.perf_counter()
        while seconds < MIN_SECONDS:
            outputs = backend.generate(prompts[workload], output_length)
            assert [len(output) for output in outputs] == [output_length] * batch_size
            tokens += prompt_length if workload == "prefill" else batch_size * output_length
            seconds = time.perf_counter() - start
        connection.send(tokens / seconds)


def compare_backends(
    sizes: Mapping[str, ModelSize],
    backends: Sequence[str],
    threads: int,
    rounds: int,
    device: str = "cpu",
    workloads: Mapping[str, Workload] = WORKLOADS,
) -> list[Result]:
    """Return the tokens per second of each backend, thread count, workload and round."""
    results: list[Result] = []
    for size_name, size in sizes.items():
        workers: list[tuple[Worker, Result]] = []
        for name in backends:
            for count in sorted({1, threads} if device == "cpu" else {threads}):
                worker = Worker(name, backend_worker, name, size, count, device, workloads)
                # One after the other: loading all at once needs twice the memory.
                first_tokens = worker.receive()
                result: Result = {"size": size_name, "backend": name, "threads": count}
                workers.append((worker, result | {"first_tokens": first_tokens}))
        for number in range(rounds):
            for workload in workloads:
                for worker, result in workers:
                    result.setdefault(workload, []).append(worker.request(workload))
            print(f"{size_name}: round {number + 1}/{rounds}", flush=True)
        for worker, result in workers:
            worker.close()
            results.append(result)
    return results


def fastest(results: Iterable[Result], size: str, backend: str, workload: str) -> list[float]:
    """Return a backend's speeds in all rounds, with the number of threads that is fastest for it."""
    speeds = [
        result[workload]
        for result in results
        if (result["size"], result["backend"]) == (size, backend)
    ]
    return max(speeds, key=statistics.median)


def backends_table(results: Sequence[Result]) -> str:
    """Format tokens per second, and below them the engine's speedups over the others."""
    backends = list(dict.fromkeys(result["backend"] for result in results))
    sizes = list(dict.fromkeys(result["size"] for result in results))
    workloads = [name for name in GPU_WORKLOADS if name in results[0]]
    pairs = [pair for pair in PAIRS if {*pair} <= {*backends}]
    speed_rows, speedup_rows = [], []
    for size in sizes:
        for workload in workloads:
            speeds = {name: fastest(results, size, name, workload) for name in backends}
            medians = [f"{statistics.median(speed):,.0f}" for speed in speeds.values()]
            speed_rows.append([f"{size}, {workload}", *medians])
            ratios = [
                [a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True)]
                for ours, theirs in pairs
            ]
            cells = [report.format_median(values, "{:.2f}".format) for values in ratios]
            speedup_rows.append([f"{size}, {workload}", *cells])
    lines = ["### Compared with other engines", ""]
    lines += report.markdown_table(["tokens/s", *backends], speed_rows)
    if pairs:
        header = ["speedup", *(f"{ours} / {theirs}" for ours, theirs in pairs)]
        lines += ["", *report.markdown_table(header, speedup_rows)]
    one, eight, prefill = WORKLOADS.values()
    note = (
        f"One sequence of {one.output_length} tokens, eight or 256 of {eight.output_length}, a "
        f"prompt of {prefill.prompt_length} tokens plus one; prefill included. Each engine with its fastest number of threads; "
        f"medians of {len(results[0]['prefill'])} interleaved rounds, ratios within a round."
    )
    return "\n".join([*lines, "", note]) + "\n"
