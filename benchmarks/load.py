"""Throughput and latency under load: closed loop, open loop, and overload.

closed loop  A fixed number of clients, each of which sends its next request when the last one is
             done: the engine alone, then through a server.
open loop    Requests that arrive at random (a Poisson process) at a share of the closed loop's
             throughput, whether or not earlier ones are done.
overload     Far more requests at once than the server has slots and queue for.

Tokens are counted by the engine's outputs or the server's usage field, never by stream events.
"""

import asyncio
import contextlib
import math
import random
import statistics
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import torch

from benchmarks import report
from benchmarks.backends import ModelSize, TinyGPT, random_prompts
from benchmarks.http_client import RequestTiming, running_server, send_request, wait_until_compiled
from benchmarks.report import Result
from gpt.kernels.quantization import DType, quantize
from gpt.sampling import SamplingParams
from serving.engine.autotune import tune_num_threads
from serving.engine.engine import Engine
from serving.engine.sequence import Request

Timings = TypeVar("Timings")

PROMPT_LENGTH = 16
CLIENTS = (1, 4, 16, 64)
LOADS = (0.5, 0.8, 1.2)
"""Request rates of the open loop, as shares of the closed loop's highest throughput."""
OVERLOAD_CLIENTS, OVERLOAD_OUTPUT_LENGTH = 500, 256
MAX_NUM_SEQS, MAX_QUEUE = 4, 16
"""Of the overloaded server."""


def summarize(timings: Sequence[RequestTiming]) -> Result:
    """Return throughput, latencies (in seconds) and numbers of requests.

    TTFT is the time to first token; TPOT, the time per output token, is the mean time between the
    tokens of a request.
    """
    completed = [timing for timing in timings if timing.status == 200 and timing.num_tokens]
    start, end = min(t.sent for t in timings), max(t.last_token for t in completed)
    return {
        "tokens_per_second": sum(t.num_tokens for t in completed) / (end - start),
        "ttft": percentiles([t.first_token - t.sent for t in completed]),
        "tpot": percentiles(
            [
                (t.last_token - t.first_token) / (t.num_tokens - 1)
                for t in completed
                if t.num_tokens > 1
            ]
        ),
        "completed": len(completed),
        "rejected": sum(t.status == 429 for t in timings),
        "failed": sum(t.status not in (200, 429) for t in timings),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile; nothing for no values."""
    if not values:
        return {}
    p99 = sorted(values)[math.ceil(0.99 * len(values)) - 1]
    return {"p50": statistics.median(values), "p99": p99}


def run_client(coroutine: Coroutine[Any, Any, Timings]) -> Timings:
    """Run a client on uvloop, which measuring the engine alone does not need."""
    import uvloop

    return uvloop.run(coroutine)


# Closed and open loop.


def engine_closed_loop(
    engine: Engine, clients: int, num_prompts: int, output_length: int
) -> Result:
    """Keep a number of requests in the engine until all are done."""
    prompts = random_prompts(num_prompts, PROMPT_LENGTH, engine.model.vocab_size)
    timings: dict[Request, RequestTiming] = {}
    start = time.perf_counter()

    def add_request() -> None:
        request = Request(prompts.pop(), output_length, SamplingParams(temperature=0))
        timings[request] = RequestTiming(time.perf_counter() - start)
        engine.add_request(request)

    for _ in range(min(clients, num_prompts)):
        add_request()
    while not engine.is_idle:
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            timing = timings[output.request]
            timing.num_tokens += 1
            timing.last_token = now
            if timing.num_tokens == 1:
                timing.first_token = now
            if output.finish_reason and prompts:
                add_request()
    return summarize([*timings.values()])


async def closed_loop(
    port: int, clients: int, num_prompts: int, output_length: int, vocab_size: int
) -> Result:
    """Run clients that each send their next request when the last one is done."""
    prompts = random_prompts(num_prompts, PROMPT_LENGTH, vocab_size)
    timings: list[RequestTiming] = []
    start = time.perf_counter()

    async def client() -> None:
        while prompts:
            timings.append(await send_request(port, prompts.pop(), output_length, start))

    await asyncio.gather(*(client() for _ in range(clients)))
    return summarize(timings)


async def open_loop(
    port: int, request_rate: float, num_prompts: int, output_length: int, vocab_size: int
) -> Result:
    """Send requests at random times, `request_rate` a second on average."""
    rng = random.Random(0)
    start = time.perf_counter()
    tasks, arrival = [], 0.0
    for prompt in random_prompts(num_prompts, PROMPT_LENGTH, vocab_size):
        arrival += rng.expovariate(request_rate)
        await asyncio.sleep(max(0.0, arrival - (time.perf_counter() - start)))
        tasks.append(asyncio.create_task(send_request(port, prompt, output_length, start)))
    return summarize(await asyncio.gather(*tasks))


def measure_load(
    size_name: str,
    size: ModelSize,
    *,
    num_prompts: int,
    output_length: int,
    max_num_seqs: int,
    dtype: DType,
    rounds: int,
    device: str = "cpu",
    http: bool = True,
) -> Result:
    """Measure the engine's closed loop and, if `http`, a server's, and its open loop."""
    threads = tune_num_threads(quantize(size.build().to(device), dtype))
    torch.set_num_threads(threads)
    engine = TinyGPT(size.build().to(device), max_num_seqs, dtype).engine
    for clients in CLIENTS:  # warmup
        engine_closed_loop(engine, clients, clients, 8)
    weights = (*engine.model.parameters(), *engine.model.buffers())
    result: Result = {
        "size": size_name,
        "output_length": output_length,
        "weight_bytes": sum(tensor.nbytes for tensor in weights),
        "closed_loop": [],
        "open_loop": [],
    }
    options = ["--max-num-seqs", max_num_seqs, "--max-queue", max(CLIENTS), "--device", device]
    options += ["--dtype", dtype, "--threads", threads]
    with contextlib.ExitStack() as servers:
        port = 0
        if http:
            port, result["startup_seconds"] = servers.enter_context(running_server(size, options))
            run_client(wait_until_compiled(port, engine.num_compiled_steps))
        for clients in CLIENTS:
            count = max(min(num_prompts, 8 * clients), 2 * clients)
            loop: Result = {"clients": clients, "engine": [], "http": []}
            for _ in range(rounds):
                loop["engine"].append(engine_closed_loop(engine, clients, count, output_length))
                if http:
                    client = closed_loop(port, clients, count, output_length, size.vocab_size)
                    loop["http"].append(run_client(client))
            result["closed_loop"].append(loop)
            print(f"{size_name}: {clients} clients", flush=True)
        if not http:
            return result
        capacity = max(
            median_of(loop["http"], "tokens_per_second") for loop in result["closed_loop"]
        )
        for load in LOADS:
            rate = load * capacity / output_length
            client = open_loop(port, rate, 2 * num_prompts, output_length, size.vocab_size)
            result["open_loop"].append({"load": load, "request_rate": rate, **run_client(client)})
            print(f"{size_name}: {load:.0%} of capacity", flush=True)
    return result


def memory_bandwidth(threads: int, device: str = "cpu") -> float:
    """Return the bytes per second that a sum reads from the device's memory."""
    torch.set_num_threads(threads)
    # So many on a GPU that starting the sum and waiting for it hardly count.
    numbers = torch.ones(2**26 if device == "cpu" else 2**30, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)


def load_table(result: Result, bandwidth: float) -> str:
    """Format closed and open loop as Markdown."""
    header = [
        "",
        "engine, tokens/s",
        "HTTP, tokens/s",
        "HTTP / engine",
        "bandwidth utilization",
        "TTFT p50, p99",
        "TPOT p50, p99",
        "rejected",
    ]
    rows = []
    for loop in result["closed_loop"]:
        engine = median_of(loop["engine"], "tokens_per_second")
        http = [summary["tokens_per_second"] for summary in loop["http"]]
        pairs = zip(loop["http"], loop["engine"], strict=bool(http))
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]
        rows.append(
            [
                f"{loop['clients']} clients",
                f"{engine:,.0f}",
                f"{statistics.median(http):,.0f}" if http else "–",
                report.format_median(ratios, "{:.0%}".format),
                f"{engine / loop['clients'] * result['weight_bytes'] / bandwidth:.0%}",
                *latency_cells(loop["http"] or loop["engine"]),
                str(sum(http["rejected"] for http in loop["http"])),
            ]
        )
    for loop in result["open_loop"]:
        label = f"{loop['load']:.0%} of capacity: {loop['request_rate']:.1f} requests/s"
        speed = f"{loop['tokens_per_second']:,.0f}"
        rows.append([label, "", speed, "", "", *latency_cells([loop]), str(loop["rejected"])])
    rounds = len(result["closed_loop"][0]["engine"])
    server = "Without a server: latencies are the engine's. "
    if "startup_seconds" in result:
        server = f"The server was ready after {result['startup_seconds']:.1f} s; "
        server += "clients and server share the machine. "
    note = (
        f"Prompts of {PROMPT_LENGTH} tokens, outputs of {result['output_length']}; medians of "
        f"{rounds} rounds in turns; ratios are within a round. {server}Memory bandwidth "
        f"is {bandwidth / 1e9:.1f} GB/s, measured with a sum; utilization counts reading all weights "
        "once per engine step."
    )
    title = f"### {result['size']}: concurrent clients"
    return "\n".join([title, "", *report.markdown_table(header, rows), "", note]) + "\n"


def median_of(results: Sequence[Result], key: str) -> float:
    """Return the median of one measurement."""
    return statistics.median(result[key] for result in results)


def latency_cells(results: Sequence[Result]) -> list[str]:
    """Format TTFT and TPOT in milliseconds, as medians over the rounds."""
    cells = []
    for key in ("ttft", "tpot"):
        known = [result[key] for result in results if result[key]]  # one token has no TPOT
        p50, p99 = (1e3 * median_of(known, name) if known else math.nan for name in ("p50", "p99"))
        cells.append(f"{p50:.1f}, {p99:.1f} ms" if known else "–")
    return cells


# Overload.


async def burst(
    port: int, clients: int, output_length: int, vocab_size: int
) -> list[RequestTiming]:
    """Send one request from each client, all at once."""
    prompts = random_prompts(clients, PROMPT_LENGTH, vocab_size)
    start = time.perf_counter()
    return await asyncio.gather(*(send_request(port, p, output_length, start) for p in prompts))


def measure_overload(size_name: str, size: ModelSize, dtype: DType, rounds: int) -> Result:
    """Measure bursts of which most is rejected, in turns with bursts that the server has room for."""
    result: Result = {"size": size_name, "overload": [], "full": []}
    options = ["--max-num-seqs", MAX_NUM_SEQS, "--max-queue", MAX_QUEUE, "--max-connections", 1000]
    with running_server(size, [*options, "--dtype", dtype, "--no-compile"]) as (port, _):
        for number in range(rounds + 1):
            for name, clients in (
                ("full", MAX_NUM_SEQS + MAX_QUEUE),
                ("overload", OVERLOAD_CLIENTS),
            ):
                requests = burst(port, clients, OVERLOAD_OUTPUT_LENGTH, size.vocab_size)
                timings = run_client(requests)
                rejection = percentiles([t.end - t.sent for t in timings if t.status == 429])
                if number > 0:  # the first round is the warmup
                    result[name].append(summarize(timings) | {"rejection": rejection})
            print(f"{size_name}: overload {number}/{rounds}", flush=True)
    return result


def overload_table(result: Result) -> str:
    """Format the rounds as Markdown."""
    title = (
        f"### {result['size']}: overload, {OVERLOAD_CLIENTS} clients at once, "
        f"capacity {MAX_NUM_SEQS + MAX_QUEUE}"
    )
    header = ["completed", "rejected", "failed", "rejection p50, p99", "tokens/s"]
    rows = []
    for overload, full in zip(result["overload"], result["full"], strict=True):
        speed, rejection = overload["tokens_per_second"], overload["rejection"]
        rows.append(
            [
                *(str(overload[key]) for key in header[:3]),
                f"{1e3 * rejection['p50']:.0f}, {1e3 * rejection['p99']:.0f} ms",
                f"{speed:,.0f}",
                f"{speed / full['tokens_per_second']:.0%}",
            ]
        )
    table = report.markdown_table([*header, "relative to no overload"], rows)
    return "\n".join([title, "", *table]) + "\n"
