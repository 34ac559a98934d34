"""How fast texts are made: by the engine, over HTTP, and by others on the same weights.

Parts, each a table or two:

rivals     The engine, `transformers`' generate and llama.cpp, where it is installed, make the
           same greedy texts from the weights of one GPT-2, taking turns in processes of their own,
           with one thread and with all: one text, eight at once, and a prompt of 256 tokens.
closed     So many clients that each ask again as soon as they are answered: the engine alone,
           then the same through a server.
open       Clients that come at random, at shares of what the closed loop could do: then a queue
           grows or does not.
crowd      500 clients at once where there is room for 20 texts: how soon the others are refused,
           and what it costs those who are served.
reach      What a token costs after 50 and after 1,000 others.

Tokens are counted from ids or from the usage that a server tells, never from events.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import uvloop

from benchmarks.report import Row, add_common_options, command, machine, report, spread
from benchmarks.rivals import SIZES, LlamaCpp, Ours, Size, Transformers
from gpt.checkpoint import save_config, save_tensors, unique_state_dict
from gpt.kernels.quantization import DType, quantize
from gpt.models.gpt import GPT2
from gpt.sampling import SamplingParams
from serving.engine.autotune import tune_num_threads
from serving.engine.engine import Engine
from serving.engine.sequence import Request
from tokenizer import train_bpe
from tokenizer.__main__ import Parser

PROG = "python -m benchmarks.serve"
ROUNDS = 5
TURN = 0.5
"""Seconds, at least, that a rival's turn lasts: as often as that takes it does its task."""
PROMPT = 16
"""Tokens of a prompt, where it is not what is measured."""
TASKS = {"one": (1, PROMPT, 128), "eight": (8, PROMPT, 64), "prompt": (1, 256, 1)}
"""Texts at once, tokens of a prompt, tokens of a text."""
CLIENTS = (1, 4, 16, 64)
SHARES = (0.5, 0.8, 1.2)
CROWD, CROWD_ROWS, CROWD_PLACES, CROWD_TOKENS = 500, 4, 16, 256
REACHES = (50, 1000)
"""Tokens before the one that is timed; the models' context is 1,024."""
OWN = 32
"""Of these, those that are not of the prompt: what was read for that is out of the processor's caches then."""


def prompts(texts: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random ones, the same every time."""
    dice = random.Random(length)
    return [[dice.randrange(vocabulary) for _ in range(length)] for _ in range(texts)]


def rival(name: str, model: GPT2, threads: int) -> Any:  # noqa: ANN401 (whoever has `many`)
    """One that makes texts."""
    torch.set_num_threads(threads)
    if name == "transformers":
        return Transformers(model)
    if name.startswith("llama.cpp"):
        return LlamaCpp(model, name.split()[-1].upper(), threads, rows=8)
    return Ours(model, 8, "int8" if name.endswith("int8") else "float32")


def compete(pipe: Connection, name: str, size: Size, threads: int) -> None:
    """The life of a rival's process: answer each task with its tokens a second."""
    model = size.build()
    one = rival(name, model, threads)
    first = {}
    for task, (texts, length, tokens) in TASKS.items():  # to warm up, and to see what it writes
        first[task] = one.many(prompts(texts, length, size.vocabulary), tokens)
    pipe.send(first["one"][0][:8])
    while task := pipe.recv():
        texts, length, tokens = TASKS[task]
        asked = prompts(texts, length, size.vocabulary)
        counted, seconds = 0, 0.0
        begun = time.perf_counter()
        while seconds < TURN:
            made = one.many(asked, tokens)
            assert [len(text) for text in made] == [tokens] * texts
            counted += length if task == "prompt" else texts * tokens
            seconds = time.perf_counter() - begun
        pipe.send(counted / seconds)


def names_of_rivals() -> list[str]:
    """Those that are installed here."""
    names = ["ours float32", "ours int8"]
    if importlib.util.find_spec("transformers"):
        names.append("transformers")
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        names += ["llama.cpp f32", "llama.cpp q8_0"]
    return names


def side_by_side(sizes: Sequence[str], names: Sequence[str], threads: int) -> list[Row]:
    """Tokens a second of every rival at every task, in `ROUNDS` rounds of turns, with one thread and with all."""
    rows: list[Row] = []
    context = get_context("spawn")
    for size in sizes:
        processes = {}
        for name in names:
            for count in sorted({1, threads}):
                pipe, theirs = context.Pipe()
                arguments = (theirs, name, SIZES[size], count)
                process = context.Process(target=compete, args=arguments, daemon=True)
                process.start()
                theirs.close()
                # One after the other: several that start at once need all of the memory twice.
                begins = receive(pipe, name)
                processes[name, count] = process, pipe
                rows.append({"size": size, "rival": name, "threads": count, "begins": begins})
        of = {(row["rival"], row["threads"]): row for row in rows if row["size"] == size}
        for number in range(ROUNDS):
            for task in TASKS:
                for key, (_, pipe) in processes.items():
                    pipe.send(task)
                    of[key].setdefault(task, []).append(receive(pipe, key[0]))
            print(f"{size}: round {number + 1}/{ROUNDS}", flush=True)
        for process, pipe in processes.values():
            pipe.send("")
            process.join()
    return rows


def receive(pipe: Connection, name: str) -> Any:  # noqa: ANN401 (what was sent)
    """What comes from a process; a ValueError where nothing comes any more."""
    try:
        return pipe.recv()
    except EOFError:
        raise ValueError(f"{name}: its process has ended, see above why") from None


def best(rows: Sequence[Row], size: str, name: str, task: str) -> list[float]:
    """A rival's speeds in each round, at the number of threads at which it is fastest."""
    own = [row[task] for row in rows if (row["size"], row["rival"]) == (size, name)]
    return max(own, key=statistics.median)


def rivals_table(rows: Sequence[Row]) -> str:
    """Tokens a second, the median of the rounds; below, each of ours against the others."""
    names = list(dict.fromkeys(row["rival"] for row in rows))
    lines = ["### Beside others", "", "| tokens/s | " + " | ".join(names) + " |"]
    lines.append("|---|" + "---:|" * len(names))
    for size in dict.fromkeys(row["size"] for row in rows):
        for task in TASKS:
            speeds = [best(rows, size, name, task) for name in names]
            cells = [f"{statistics.median(speed):,.0f}" for speed in speeds]
            lines.append(f"| {size}, {task} | " + " | ".join(cells) + " |")
    pairs = [
        (ours, theirs)
        for ours, theirs in (("ours float32", "transformers"), ("ours int8", "llama.cpp q8_0"))
        if {ours, theirs} <= set(names)
    ]
    if pairs:
        lines += ["", "| times as fast | " + " | ".join(f"{a} / {b}" for a, b in pairs) + " |"]
        lines.append("|---|" + "---:|" * len(pairs))
        for size in dict.fromkeys(row["size"] for row in rows):
            for task in TASKS:
                cells = []
                for pair in pairs:
                    both = [best(rows, size, name, task) for name in pair]
                    ratios = [a / b for a, b in zip(*both, strict=True)]
                    cells.append(spread(ratios, "{:.2f}".format))
                lines.append(f"| {size}, {task} | " + " | ".join(cells) + " |")
    note = (
        f"One text of {TASKS['one'][2]} tokens, eight of {TASKS['eight'][2]}, a prompt of "
        f"{TASKS['prompt'][1]} tokens and one more. Each with as many threads as it is fastest "
        f"with; medians of {ROUNDS} rounds in turns, ratios of neighbours in a round."
    )
    return "\n".join([*lines, "", note]) + "\n"


# Loops.


@dataclasses.dataclass
class Timing:
    """One text as its client saw it, in seconds after the loop's beginning."""

    asked: float
    first: float = math.nan
    last: float = math.nan
    ended: float = math.nan
    tokens: int = 0
    status: int = 200


def summary(timings: Sequence[Timing], clients: float) -> Row:
    """Throughput and latencies of a loop."""
    served = [one for one in timings if one.status == 200 and one.tokens]
    begun, ended = min(t.asked for t in timings), max(t.last for t in served)
    gaps = [(one.last - one.first) / (one.tokens - 1) for one in served if one.tokens > 1]
    firsts = sorted(one.first - one.asked for one in served)
    return {
        "clients": clients,
        "tokens_per_second": sum(one.tokens for one in served) / (ended - begun),
        "first_token": quantiles(firsts),
        "between_tokens": quantiles(sorted(gaps)),
        "texts": len(served),
        "refused": sum(one.status == 429 for one in timings),
        "failed": sum(one.status not in (200, 429) for one in timings),
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the slowest hundredth of sorted values."""
    if not values:
        return {}
    return {"p50": statistics.median(values), "p99": values[math.ceil(0.99 * len(values)) - 1]}


def engine_loop(engine: Engine, clients: int, texts: int, tokens: int) -> Row:
    """So many requests are always there, until so many texts are made."""
    asked = prompts(texts, PROMPT, engine.model.vocab_size)
    timings: dict[Request, Timing] = {}
    begun = time.perf_counter()

    def ask() -> None:
        request = Request(asked.pop(), tokens, SamplingParams(temperature=0))
        timings[request] = Timing(time.perf_counter() - begun)
        engine.add_request(request)

    for _ in range(min(clients, texts)):
        ask()
    while not engine.is_idle:
        events = engine.step()
        now = time.perf_counter() - begun
        for event in events:
            timing = timings[event.request]
            timing.tokens += 1
            timing.last = now
            if timing.tokens == 1:
                timing.first = now
            if event.finish_reason and asked:
                ask()
    return summary(list(timings.values()), clients)


class Client(asyncio.Protocol):
    """A connection that asks, and times what is streamed back without looking into it before the end."""

    def __init__(self, body: bytes, begun: float) -> None:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.request, self.begun = head.encode() + body, begun
        self.timing = Timing(time.perf_counter() - begun)
        self.ended = asyncio.get_running_loop().create_future()
        self.received = bytearray()

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # type: ignore[override]
        """Ask."""
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Note the time; only the end of the answer is kept."""
        now = time.perf_counter() - self.begun
        self.received += data
        if math.isnan(self.timing.first) and b'"text":' in self.received:
            self.timing.first = now
        if b'"text":' in data:
            self.timing.last = now

    def connection_lost(self, error: Exception | None) -> None:
        """Read the status and the number of tokens."""
        self.timing.ended = time.perf_counter() - self.begun
        self.timing.status = int(self.received[9:12] or 0) if not error else 0
        found = re.search(rb'"completion_tokens":(\d+)', self.received)
        self.timing.tokens = int(found[1]) if found else 0
        self.ended.set_result(self.timing)


async def ask(port: int, prompt: Sequence[int], tokens: int, begun: float) -> Timing:
    """One request, and how it went."""
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    loop = asyncio.get_running_loop()
    raw = json.dumps(body).encode()
    _, client = await loop.create_connection(lambda: Client(raw, begun), "127.0.0.1", port)
    return await client.ended


async def settled(port: int, parts: int) -> None:
    """Wait until a server runs as many parts compiled as its engine does here."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        found = re.search(rb"compiled_steps{[^}]*} (\d+)", await reader.read())
        writer.close()
        if found and int(found[1]) >= parts:
            return
        await asyncio.sleep(0.2)


async def closed_loop(port: int, clients: int, texts: int, tokens: int, vocabulary: int) -> Row:
    """Clients that ask again as soon as they are answered."""
    asked = prompts(texts, PROMPT, vocabulary)
    timings: list[Timing] = []
    begun = time.perf_counter()

    async def go_on() -> None:
        while asked:
            timings.append(await ask(port, asked.pop(), tokens, begun))

    await asyncio.gather(*(go_on() for _ in range(clients)))
    return summary(timings, clients)


async def open_loop(port: int, rate: float, texts: int, tokens: int, vocabulary: int) -> Row:
    """Clients that come at random, so many a second, whatever the others do (a Poisson process)."""
    dice = random.Random(0)
    begun = time.perf_counter()
    tasks, due = [], 0.0
    for prompt in prompts(texts, PROMPT, vocabulary):
        due += dice.expovariate(rate)
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - begun)))
        tasks.append(asyncio.create_task(ask(port, prompt, tokens, begun)))
    return summary(await asyncio.gather(*tasks), rate)


async def crowd(port: int, clients: int, tokens: int, vocabulary: int) -> list[Timing]:
    """All come at once and ask once."""
    begun = time.perf_counter()
    asked = prompts(clients, PROMPT, vocabulary)
    return await asyncio.gather(*(ask(port, prompt, tokens, begun) for prompt in asked))


def crowds(size: str, dtype: DType) -> Row:
    """A crowd that is mostly refused, in turns with as many as there is room for."""
    shape, room, tokens = SIZES[size], CROWD_ROWS + CROWD_PLACES, CROWD_TOKENS
    result: Row = {"size": size, "tokens": tokens, "crowd": [], "fitting": []}
    options = ["--max-num-seqs", CROWD_ROWS, "--max-queue", CROWD_PLACES, "--max-connections", 1000]
    with served(shape, [*options, "--dtype", dtype, "--no-compile"]) as (port, _):
        for number in range(ROUNDS + 1):
            for name, clients in (("fitting", room), ("crowd", CROWD)):
                timings = uvloop.run(crowd(port, clients, tokens, shape.vocabulary))
                row = summary(timings, clients)
                refused = [one.ended - one.asked for one in timings if one.status == 429]
                row["refusal"] = quantiles(sorted(refused))
                result[name] += [row] * (number > 0)  # the first is to warm up
            print(f"{size}: crowd {number}/{ROUNDS}", flush=True)
    return result


def crowds_table(result: Row) -> str:
    """The rounds as Markdown."""
    lines = [
        f"### {result['size']}: {CROWD} clients at once, room for {CROWD_ROWS + CROWD_PLACES}",
        "",
        "| served | refused | failed | refusal p50, p99 | tokens/s | of that without a crowd |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for many, few in zip(result["crowd"], result["fitting"], strict=True):
        times = many["refusal"]
        lines.append(
            f"| {many['texts']} | {many['refused']} | {many['failed']} "
            f"| {1e3 * times['p50']:.0f}, {1e3 * times['p99']:.0f} ms "
            f"| {many['tokens_per_second']:,.0f} "
            f"| {many['tokens_per_second'] / few['tokens_per_second']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def per_token(engine: Engine, before: int, tokens: int) -> float:
    """Seconds for each of so many tokens of a text alone, after so many others, the last of which are its own."""
    prompt = prompts(1, before - OWN, engine.model.vocab_size)[0]
    engine.add_request(Request(prompt, OWN + tokens, SamplingParams(temperature=0)))
    made = 0
    while made < OWN:
        made += len(engine.step())
    begun = time.perf_counter()
    while not engine.is_idle:
        engine.step()
    return (time.perf_counter() - begun) / tokens


def reaches(size: str, threads: int) -> list[Row]:
    """A token's time at every reach and in every format."""
    torch.set_num_threads(threads)
    found: list[Row] = []
    dtypes: tuple[DType, ...] = ("float32", "int8")
    for dtype in dtypes:
        engine = Ours(SIZES[size].build(), 1, dtype).engine
        engine.num_scheduler_steps = 1
        rounds = [[per_token(engine, before, 16) for before in REACHES] for _ in range(ROUNDS + 1)]
        found.append({"size": size, "dtype": dtype, "seconds": rounds[1:]})
    return found


def reaches_table(rows: Sequence[Row]) -> str:
    """Medians, and the last as a multiple of the first."""
    lines = ["### A token after others, one text", ""]
    lines.append("| | " + " | ".join(f"after {reach:,}" for reach in REACHES) + " | ratio |")
    lines.append("|---|" + "---:|" * (len(REACHES) + 1))
    for row in rows:
        columns = list(zip(*row["seconds"], strict=True))
        cells = [f"{1e3 * statistics.median(column):.2f} ms" for column in columns]
        ratios = [seconds[-1] / seconds[0] for seconds in row["seconds"]]
        cells.append(spread(ratios, "{:.2f}".format))
        lines.append(f"| {row['size']}, {row['dtype']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save_run(folder: Path, size: Size) -> None:
    """A run directory of untrained weights, with a tokenizer of so many tokens."""
    model = size.build()
    arguments = {"vocab_size": size.vocabulary, "context_length": size.context, "width": size.width}
    save_config(folder, "gpt2", {**arguments, "depth": size.depth, "heads": size.heads})
    save_tensors(folder / "model.safetensors", unique_state_dict(model))
    library = Path(os.__file__).parent
    texts = (file.read_text("utf-8", errors="replace") for file in sorted(library.glob("*.py")))
    train_bpe(texts, size.vocabulary).save(folder / "tokenizer.json")


@contextlib.contextmanager
def served(size: Size, options: Sequence[object]) -> Iterator[tuple[int, float]]:
    """A server in a process of its own: its port, and the seconds until it was ready."""
    with tempfile.TemporaryDirectory() as folder:
        save_run(Path(folder), size)
        command = [sys.executable, "-m", "serving", "serve", folder, "--port", "0"]
        begun = time.perf_counter()
        with subprocess.Popen(
            [*command, *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            try:
                assert process.stdout
                line = process.stdout.readline()
                found = re.search(r"http://[^ ]*:(\d+)", line)
                if not found:
                    raise ValueError(f"the server has not started: {line!r}")
                yield int(found[1]), time.perf_counter() - begun
            finally:
                process.terminate()


def loops(size: str, texts: int, tokens: int, rows: int, dtype: DType) -> Row:
    """The engine's closed loops, a server's, and its open ones."""
    shape = SIZES[size]
    result: Row = {"size": size, "texts": texts, "tokens": tokens, "closed": [], "open": []}
    threads = tune_num_threads(quantize(shape.build(), dtype))
    torch.set_num_threads(threads)
    engine = Ours(shape.build(), rows, dtype).engine
    for clients in CLIENTS:
        engine_loop(engine, clients, clients, 8)
    model = engine.model
    result["bytes"] = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    options = [
        "--max-num-seqs",
        rows,
        "--max-queue",
        max(CLIENTS),
        "--dtype",
        dtype,
        "--threads",
        threads,
    ]
    with served(shape, options) as (port, seconds):
        result["ready_seconds"] = seconds
        uvloop.run(settled(port, engine.num_compiled_steps))
        vocabulary = shape.vocabulary
        for clients in CLIENTS:
            count = max(min(texts, 8 * clients), 2 * clients)
            found: Row = {"clients": clients, "engine": [], "http": []}
            for _ in range(ROUNDS):
                found["engine"].append(engine_loop(engine, clients, count, tokens))
                run = closed_loop(port, clients, count, tokens, vocabulary)
                found["http"].append(uvloop.run(run))
            result["closed"].append(found)
            print(f"{size}: {clients} clients", flush=True)
        most = max(middle(row["http"], "tokens_per_second") for row in result["closed"])
        for share in SHARES:
            rate = share * most / tokens
            row = uvloop.run(open_loop(port, rate, 2 * texts, tokens, vocabulary))
            result["open"].append({**row, "share": share})
            print(f"{size}: {share:.0%} of capacity", flush=True)
    return result


def bandwidth(threads: int) -> float:
    """Bytes a second that this machine reads from memory."""
    torch.set_num_threads(threads)
    numbers = torch.ones(2**26)
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begun)
    return numbers.nbytes / min(seconds)


def loops_table(result: Row, speed: float) -> str:
    """Closed and open loops as Markdown."""
    size = result["size"]
    lines = [
        f"### {size}: many clients",
        "",
        "| | tokens/s: engine | over HTTP | share | of the bandwidth | first token p50, p99 | between tokens p50, p99 | refused |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["closed"]:
        engine, http = (middle(row[key], "tokens_per_second") for key in ("engine", "http"))
        pairs = zip(row["http"], row["engine"], strict=True)
        shares = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]
        lines.append(
            f"| {row['clients']} clients | {engine:,.0f} | {http:,.0f} "
            f"| {spread(shares, '{:.0%}'.format)} "
            f"| {engine / row['clients'] * result['bytes'] / speed:.0%} "
            f"| {latencies(row['http'])} | {sum(one['refused'] for one in row['http'])} |"
        )
    for row in result["open"]:
        lines.append(
            f"| {row['share']:.0%} of capacity: {row['clients']:.1f} a second | "
            f"| {row['tokens_per_second']:,.0f} | | | {latencies([row])} | {row['refused']} |"
        )
    note = (
        f"Texts of {result['tokens']} tokens after {PROMPT}; medians of {ROUNDS} rounds in turns, ratios "
        f"of neighbours in a round. The server was "
        f"ready after {result['ready_seconds']:.1f} s; clients and server share the machine. The "
        f"bandwidth, {speed / 1e9:.1f} GB/s, is what a sum reads; of it, what reading all weights in "
        "every step of the engine takes."
    )
    return "\n".join([*lines, "", note]) + "\n"


def middle(rows: Sequence[Row], key: str) -> float:
    """The median of a figure."""
    return statistics.median(row[key] for row in rows)


def latencies(rows: Sequence[Row]) -> str:
    """Two cells of milliseconds, medians of rounds."""
    cells = []
    for key in ("first_token", "between_tokens"):
        found = [row[key] for row in rows if row[key]]  # empty where no text has two tokens
        half, last = (1e3 * middle(found, name) if found else math.nan for name in ("p50", "p99"))
        cells.append(f"{half:.1f}, {last:.1f} ms" if found else "–")
    return " | ".join(cells)


def benchmark(
    output: Path,
    *,
    threads: int,
    sizes: Sequence[str],
    only: Sequence[str],
    texts: int,
    tokens: int,
    rows: int,
    dtype: DType,
) -> None:
    """Measure, print the tables, write JSON and, beside it, Markdown."""
    for name, value in (("threads", threads), ("texts", texts), ("tokens", tokens), ("rows", rows)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    result: Row = {"machine": machine(), "threads": threads, "loops": []}
    tables = []
    if "rivals" in only:
        result["rivals"] = side_by_side(sizes, names_of_rivals(), threads)
        tables.append(rivals_table(result["rivals"]))
    if "loops" in only:
        result["bandwidth"] = bandwidth(threads)
        for size in sizes:
            result["loops"].append(loops(size, texts, tokens, rows, dtype))
            tables.append(loops_table(result["loops"][-1], result["bandwidth"]))
    if "crowd" in only:
        result["crowds"] = [crowds(size, dtype) for size in sizes]
        tables += map(crowds_table, result["crowds"])
    if "reach" in only:
        result["reaches"] = [row for size in sizes for row in reaches(size, threads)]
        tables.append(reaches_table(result["reaches"]))
    report(result, tables, output)


PARTS = ["rivals", "loops", "crowd", "reach"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line; a mistake is one line and exit code 2."""
    parser: argparse.ArgumentParser = Parser(prog=PROG, description="How fast texts are made.")
    add_common_options(parser, "serve.json")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dtype", choices=["float32", "int8"], default="float32")
    for name, default in (("texts", 32), ("tokens", 64), ("rows", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="%(default)s")
    command(parser, benchmark, arguments)


if __name__ == "__main__":
    main()
