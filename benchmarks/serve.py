"""Serving speed, on GPT-2s of several sizes with untrained weights.

Parts, each of which prints a table:

comparison  The engine, `transformers` and llama.cpp on the same weights (`benchmarks.comparison`).
load        Closed and open loop, of the engine and over HTTP (`benchmarks.load`).
overload    500 clients at once with room for 20 (`benchmarks.load`).
context     The latency of a decode step after 50 and after 1,000 tokens.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import comparison, load, report
from benchmarks.backends import SIZES, ModelSize, TinyGPT, random_prompts
from benchmarks.report import Result
from gpt.kernels.quantization import DType
from gpt.sampling import SamplingParams
from serving.engine.engine import Engine
from serving.engine.sequence import Request
from tokenizer.__main__ import Parser

PARTS = ["comparison", "load", "overload", "context"]
DTYPES: tuple[DType, ...] = ("float32", "int8")
ROUNDS = 5
CONTEXT_LENGTHS = (50, 1000)
"""Tokens before those that are timed; the models' context length is 1,024."""
WARMUP_STEPS = 4
WARMUP_TOKENS = 32
"""The last of these are generated: by then the prefill's data has left the processor's caches."""


def decode_latency(engine: Engine, context_length: int, num_tokens: int) -> float:
    """Return the seconds per token of a single sequence after `context_length` tokens."""
    prompt_length = context_length - WARMUP_TOKENS
    (prompt,) = random_prompts(1, prompt_length, engine.model.vocab_size)
    max_tokens = WARMUP_TOKENS + num_tokens
    engine.add_request(Request(prompt, max_tokens, SamplingParams(temperature=0)))
    generated = 0
    while generated < WARMUP_TOKENS:
        generated += len(engine.step())
    start = time.perf_counter()
    while not engine.is_idle:
        engine.step()
    return (time.perf_counter() - start) / num_tokens


def decode_speed(engine: Engine, num_seqs: int, num_steps: int) -> float:
    """Return the tokens per second of decoding `num_seqs` sequences at once, prefill excluded.

    The engine reads back the tokens of every step, so its clock needs no synchronization.
    """
    prompts = random_prompts(num_seqs, WARMUP_TOKENS, engine.model.vocab_size)
    max_tokens = engine.cache_length - WARMUP_TOKENS
    requests = [Request(prompt, max_tokens, SamplingParams(temperature=0)) for prompt in prompts]
    for request in requests:
        engine.add_request(request)
    while engine.waiting:
        engine.step()
    for _ in range(WARMUP_STEPS):
        engine.step()
    start = time.perf_counter()
    num_tokens = sum(len(engine.step()) for _ in range(num_steps))
    seconds = time.perf_counter() - start
    assert len(engine.running) == num_seqs, "sequences ended while they were measured"
    for request in requests:
        engine.abort(request)
    return num_tokens / seconds


def prefill_speed(engine: Engine, length: int) -> float:
    """Return the tokens per second of processing a prompt of this length, and sampling one token."""
    (prompt,) = random_prompts(1, length, engine.model.vocab_size)
    start = time.perf_counter()
    engine.add_request(Request(prompt, 1, SamplingParams(temperature=0)))
    while not engine.is_idle:
        engine.step()
    return length / (time.perf_counter() - start)


def measure_context(
    sizes: Mapping[str, ModelSize],
    threads: int,
    rounds: int,
    device: str = "cpu",
    dtypes: Sequence[DType] = DTYPES,
) -> list[Result]:
    """Measure the decode latency at every context length and dtype."""
    torch.set_num_threads(threads)
    results: list[Result] = []
    for size_name, size in sizes.items():
        for dtype in dtypes:
            engine = TinyGPT(size.build().to(device), 1, dtype).engine
            engine.num_scheduler_steps = 1
            seconds = [
                [decode_latency(engine, length, 16) for length in CONTEXT_LENGTHS]
                for _ in range(rounds + 1)
            ]
            results.append({"size": size_name, "dtype": dtype, "seconds": seconds[1:]})
    return results


def context_table(results: Sequence[Result]) -> str:
    """Format the medians, and the last context length's latency relative to the first's."""
    rows = []
    for result in results:
        medians = [statistics.median(column) for column in zip(*result["seconds"], strict=True)]
        ratios = [seconds[-1] / seconds[0] for seconds in result["seconds"]]
        cells = [f"{1e3 * seconds:.2f} ms" for seconds in medians]
        label = f"{result['size']}, {result['dtype']}"
        rows.append([label, *cells, report.format_median(ratios, "{:.2f}".format)])
    header = ["", *(f"after {length:,} tokens" for length in CONTEXT_LENGTHS), "ratio"]
    title = "### Decode latency by context length, single sequence"
    return "\n".join([title, "", *report.markdown_table(header, rows)]) + "\n"


def benchmark(
    output: Path,
    *,
    threads: int,
    sizes: Sequence[str],
    only: Sequence[str],
    num_prompts: int,
    output_length: int,
    max_num_seqs: int,
    dtype: DType,
) -> None:
    """Run the parts and write the report."""
    report.check_at_least(
        1,
        threads=threads,
        num_prompts=num_prompts,
        output_length=output_length,
        max_num_seqs=max_num_seqs,
    )
    models = {name: SIZES[name] for name in sizes}
    result: Result = {"machine": report.machine_info(), "threads": threads}
    tables = []
    if "comparison" in only:
        result["comparison"] = comparison.compare_backends(
            models, comparison.available_backends(), threads, ROUNDS
        )
        tables.append(comparison.backends_table(result["comparison"]))
    if "load" in only:
        result["bandwidth"] = load.memory_bandwidth(threads)
        result["load"] = [
            load.measure_load(
                name,
                size,
                num_prompts=num_prompts,
                output_length=output_length,
                max_num_seqs=max_num_seqs,
                dtype=dtype,
                rounds=ROUNDS,
            )
            for name, size in models.items()
        ]
        tables += [load.load_table(loads, result["bandwidth"]) for loads in result["load"]]
    if "overload" in only:
        result["overload"] = [
            load.measure_overload(name, size, dtype, ROUNDS) for name, size in models.items()
        ]
        tables += map(load.overload_table, result["overload"])
    if "context" in only:
        result["context"] = measure_context(models, threads, ROUNDS)
        tables.append(context_table(result["context"]))
    report.write(result, tables, output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the benchmark."""
    parser = Parser(
        prog="python -m benchmarks.serve",
        description="Serving throughput and latency, beside transformers and llama.cpp.",
    )
    report.add_common_options(parser, "serve.json")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the engine's weights"
    )
    for name, default, what in (
        ("num-prompts", 32, "requests of the closed loop"),
        ("output-length", 64, "tokens of each"),
        ("max-num-seqs", 64, "slots of the engine"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    report.run_command(parser, benchmark, arguments)


if __name__ == "__main__":
    main()
