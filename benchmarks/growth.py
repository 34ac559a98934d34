"""How memory and speed scale with the size of the corpus.

Two texts, one many times as long as the other, are prepared, and the same small model is trained on
both for the same number of steps, each time in a process of its own. Another process samples its
memory every few milliseconds: anonymous memory (RssAnon), which the process has allocated, and file
pages (RssFile), which are libraries and memory-mapped tokens.

The texts repeat a few thousand lines, each time in another order and with one word of each line
replaced. Longer texts are not richer, so whatever grows does so because of the length.
"""

import dataclasses
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.report import Result
from benchmarks.worker import Worker
from tokenizer import Tokenizer
from tokenizer.__main__ import Parser
from training.config import TrainingConfig
from training.tasks import open_task
from training.tasks.text import load_corpus
from training.trainer import Trainer

MB = 10**6
BASE_BYTES = MB
"""The most bytes of the text that is repeated."""
CHUNK_CHARACTERS = MB
"""Characters that are tokenized at a time."""
SAMPLING_INTERVAL = 0.005
"""Seconds between two samples of a process's memory."""

CONFIG = TrainingConfig(
    model_args={"width": 64, "depth": 2, "heads": 2},
    batch_size=16,
    context_length=128,
    device="cpu",
    precision="float32",
)

# The texts.


def base_text(data: str | None, seed: int) -> str:
    """Return the start of a text file, or without one sentences of made-up words."""
    if data is not None:
        with Path(data).open(encoding="utf-8") as file:
            text = file.read(BASE_BYTES)
        if not text.strip():
            raise ValueError(f"{data}: the file has no text")
        return text
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(1, 9))) for _ in range(4000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]  # Zipf's law
    lines = (" ".join(rng.choices(words, weights, k=12)) + ".\n" for _ in range(BASE_BYTES // 60))
    return "".join(lines)


def write_text(path: Path, size: int, base: str, seed: int) -> None:
    """Write about `size` bytes: the lines of `base`, shuffled, with one word of each replaced."""
    rng = random.Random(seed)
    lines = [line.split(" ") for line in base.splitlines(keepends=True)]
    words = [word for line in lines for word in line[:-1]] or [""]
    written = 0
    with path.open("wb") as file:
        while written < size:
            rng.shuffle(lines)
            for line in lines:
                if len(line) > 1:
                    line[int(rng.random() * (len(line) - 1))] = rng.choice(words)
                written += file.write(" ".join(line).encode())
                if written >= size:
                    break


# What is measured, each in a process of its own.


def prepare(config: TrainingConfig, cache: str) -> Result:
    """Prepare the text as `training train` does: train a tokenizer, write the tokens."""
    os.environ["TINYGPT_CACHE"] = cache
    start = time.perf_counter()
    corpus = load_corpus(config, None, True)
    tokens = sum(len(split.tokens) for split in corpus.splits.values())
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": tokens, "directory": str(corpus.directory)}


def train(config: TrainingConfig, threads: int) -> Result:
    """Train and validate once; return the seconds per token at the start and at the end."""
    torch.set_num_threads(threads)
    trainer = Trainer(config, Path(), open_task(config), torch.device(config.device))
    tokens_per_step = config.batch_size * config.context_length
    seconds = []
    while trainer.step < config.steps:
        start = time.perf_counter()
        trainer.train_step(trainer.objective)
        seconds.append((time.perf_counter() - start) / tokens_per_step)
        trainer.step += 1
    trainer.task.validate(trainer.model)
    tenth = max(1, config.steps // 10)
    return {
        "first": statistics.median(seconds[:tenth]),
        "last": statistics.median(seconds[-tenth:]),
    }


def tokenize(text: Path, directory: str, cores: int) -> Result:
    """Measure the speed of tokenization on a number of cores."""
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    tokenizer = Tokenizer.load(directory)
    size, seconds = 0, 0.0
    with text.open(encoding="utf-8") as file:
        while lines := file.readlines(CHUNK_CHARACTERS):
            start = time.perf_counter()
            tokenizer.encode_batch(lines)
            seconds += time.perf_counter() - start
            size += sum(len(line.encode()) for line in lines)
    return {"cores": cores, "bytes": size, "seconds": seconds}


def memory_of(pid: int | None) -> Counter[str]:
    """Return a process's resident bytes: anonymous (RssAnon) and of files (RssFile); empty if unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    except OSError:
        return Counter()
    fields = (line.split() for line in lines if line.startswith(("RssAnon", "RssFile")))
    return Counter({name.rstrip(":"): 1024 * int(size) for name, size, _ in fields})


def _send_result(connection: Connection, function: Callable[..., Result], *arguments: Any) -> None:  # noqa: ANN401
    connection.send(function(*arguments))


def measure_memory(function: Callable[..., Result], *arguments: Any) -> Result:  # noqa: ANN401
    """Call a function in a process of its own; add the peaks of its memory to its result."""
    worker = Worker(function.__name__, _send_result, function, *arguments)
    peak: Counter[str] = Counter()
    while not worker.connection.poll(SAMPLING_INTERVAL):
        peak |= memory_of(worker.process.pid)
    result = worker.receive()
    worker.process.join()
    return {**result, "anonymous_bytes": peak.get("RssAnon"), "file_bytes": peak.get("RssFile")}


def measure(
    megabytes: Sequence[int], config: TrainingConfig, data: str | None, threads: int
) -> Result:
    """Prepare and train on a text of each size; tokenize the smallest on one core and on all."""
    sizes: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < 3 * MB * sum(megabytes):
            raise ValueError(
                f"{folder} has {free // MB:,} MB free, and {3 * sum(megabytes):,} may be needed: "
                "choose smaller sizes, or another disk with TMPDIR"
            )
        base = base_text(data, config.seed)
        for size in megabytes:
            text = Path(folder) / f"{size}.txt"
            write_text(text, size * MB, base, config.seed)
            result: Result = {"megabytes": size, "bytes": text.stat().st_size}
            text_config = dataclasses.replace(config, data=str(text))
            result["prepare"] = measure_memory(prepare, text_config, folder)
            print(f"{size:,} MB: prepared in {result['prepare']['seconds']:.0f} s", flush=True)
            directory = result["prepare"].pop("directory")
            token_config = dataclasses.replace(config, data=directory)
            result["train"] = measure_memory(train, token_config, threads)
            print(f"{size:,} MB: trained {config.steps} steps", flush=True)
            sizes.append(result)
            if len(sizes) == 1:
                cores = sorted({1, len(os.sched_getaffinity(0))})
                tokenization = [measure_memory(tokenize, text, directory, n) for n in cores]
            text.unlink()
    return {"config": dataclasses.asdict(config), "sizes": sizes, "tokenization": tokenization}


# The table and the command.


def growth_tables(result: Result) -> str:
    """Format the sizes side by side, and tokenization below, as Markdown."""
    metrics: dict[str, tuple[str, str, Callable[[float], str]]] = {
        "preparation: anonymous memory, peak": ("prepare", "anonymous_bytes", format_mebibytes),
        "preparation: file pages, peak": ("prepare", "file_bytes", format_mebibytes),
        "preparation: seconds": ("prepare", "seconds", "{:.1f}".format),
        "tokens": ("prepare", "tokens", "{:,}".format),
        "training: anonymous memory, peak": ("train", "anonymous_bytes", format_mebibytes),
        "training: file pages, peak": ("train", "file_bytes", format_mebibytes),
        "training: time per token, first tenth of the steps": (
            "train",
            "first",
            format_microseconds,
        ),
        "training: time per token, last tenth": ("train", "last", format_microseconds),
    }
    sizes, config = result["sizes"], result["config"]
    rows = []
    for title, (phase, key, format_value) in metrics.items():
        values = [size[phase][key] for size in sizes]
        cells = [format_value(value) if value is not None else "unknown" for value in values]
        rows.append([title, *cells, "–" if None in values else f"{values[-1] / values[0]:.2f}"])
    lines = report.markdown_table(
        ["", *(f"{size['megabytes']:,} MB" for size in sizes), "ratio"], rows
    )
    speeds = [run["bytes"] / MB / run["seconds"] for run in result["tokenization"]]
    rows = [
        [f"{run['cores']} core{'s' * (run['cores'] > 1)}", f"{x:.2f}", f"{x / speeds[0]:.2f}"]
        for run, x in zip(result["tokenization"], speeds, strict=True)
    ]
    lines += ["", *report.markdown_table(["tokenization", "MB/s", "ratio"], rows)]
    note = (
        f"Memory is sampled every {1000 * SAMPLING_INTERVAL:.0f} ms: anonymous memory is RssAnon, "
        f"file pages are RssFile. {config['steps']} steps of {config['batch_size']} sequences of "
        f"{config['context_length']} tokens; times are medians. MB are 10^6 bytes of text."
    )
    return "\n".join(["### Growth with the corpus", "", *lines, "", note]) + "\n"


def format_mebibytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


def format_microseconds(value: float) -> str:
    return f"{1e6 * value:.2f} µs"


def benchmark(
    small: int, large: int, output: Path, *, data: str | None, steps: int, threads: int
) -> None:
    """Measure both sizes and write the report."""
    report.check_at_least(1, small=small, steps=steps, threads=threads)
    if large <= small:
        raise ValueError(f"--large must be more than --small, {small}, not {large}")
    if data is not None and not Path(data).is_file():
        raise ValueError(f"{data}: no such file: --data takes a text file")
    result = measure((small, large), dataclasses.replace(CONFIG, steps=steps), data, threads)
    result |= {"machine": report.machine_info(), "threads": threads}
    report.write(result, [growth_tables(result)], output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the benchmark."""
    parser = Parser(
        prog="python -m benchmarks.growth",
        description="Memory and speed of preparing and training on a small and a large corpus.",
    )
    parser.add_argument("--small", type=int, default=20, metavar="MB", help="default: 20")
    parser.add_argument("--large", type=int, default=1000, metavar="MB", help="default: 1000")
    parser.add_argument(
        "--data", metavar="PATH", help="text to repeat (default: sentences of made-up words)"
    )
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="default: 300")
    report.add_common_options(parser, "growth.json")
    report.run_command(parser, benchmark, arguments)


if __name__ == "__main__":
    main()
