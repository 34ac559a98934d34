"""What grows with the corpus, and what does not: memory, time per token, tokenising on more cores.

Two texts, one many times as long as the other, are prepared, and the same small model takes the
same steps on both, each in a process of its own. A process's own memory is what the system
calls anonymous (RssAnon): all that it made, and nothing that it only reads. The pages of files
stand beside it (RssFile): libraries, and what it has mapped of the tokens. Both are read every few
milliseconds, by another process.

The texts are a few thousand lines again and again, each time in another order and with another
word in each: a text that is longer and not richer, so that what grows comes from its length.
"""

import dataclasses
import multiprocessing
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

from benchmarks.report import Row, add_common_options, command, machine, report
from tokenizer import Tokenizer
from tokenizer.__main__ import Parser
from training.config import TrainingConfig
from training.tasks import open_task
from training.tasks.text import load_corpus
from training.trainer import Trainer

PROG = "python -m benchmarks.growth"
MB = 10**6
BASE = MB
"""Bytes of the text that is repeated, at most."""
PIECE = MB
"""Characters that are tokenised at a time."""
SECONDS = 0.005
"""Between two looks at a process's memory."""

RUN = TrainingConfig(
    model_args={"width": 64, "depth": 2, "heads": 2},
    batch_size=16,
    context_length=128,
    device="cpu",
    precision="float32",
)


def base_text(data: str | None, seed: int) -> str:
    """The beginning of a text file, or sentences of made-up words."""
    if data is not None:
        with Path(data).open(encoding="utf-8") as file:
            text = file.read(BASE)
        if not text.strip():
            raise ValueError(f"{data}: there is no text in it")
        return text
    chance = random.Random(seed)
    words = [
        "".join(chance.choices("etaoinshrdlucmfw", k=chance.randint(1, 9))) for _ in range(4000)
    ]
    weights = [1 / rank for rank in range(1, len(words) + 1)]  # Zipf's law
    lines = (" ".join(chance.choices(words, weights, k=12)) + ".\n" for _ in range(BASE // 60))
    return "".join(lines)


def write_text(path: Path, size: int, base: str, seed: int) -> None:
    """A text of about so many bytes: the base again and again, its lines in another order, in each another word."""
    chance = random.Random(seed)
    lines = [line.split(" ") for line in base.splitlines(keepends=True)]
    words = [word for line in lines for word in line[:-1]] or [""]
    written = 0
    with path.open("wb") as file:
        while written < size:
            chance.shuffle(lines)
            for line in lines:
                if len(line) > 1:
                    line[int(chance.random() * (len(line) - 1))] = chance.choice(words)
                written += file.write(" ".join(line).encode())
                if written >= size:
                    break


def prepared(run: TrainingConfig, cache: str) -> Row:
    """Prepare a run's text as `training train` does: learn a tokenizer, write the tokens."""
    os.environ["TINYGPT_CACHE"] = cache
    begun = time.perf_counter()
    corpus = load_corpus(run, None, for_training=True)
    tokens = sum(len(split.tokens) for split in corpus.splits.values())
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "tokens": tokens, "directory": str(corpus.directory)}


def trained(run: TrainingConfig, threads: int) -> Row:
    """Take a run's steps and score it once; the seconds of a token at both ends of the training."""
    torch.set_num_threads(threads)
    trainer = Trainer(run, Path(), open_task(run), torch.device(run.device))
    seconds = []
    while trainer.step < run.steps:
        begun = time.perf_counter()
        trainer.train_step(trainer.objective)
        seconds.append((time.perf_counter() - begun) / (run.batch_size * run.context_length))
        trainer.step += 1
    trainer.task.validate(trainer.model)
    tenth = max(1, run.steps // 10)
    return {
        "first": statistics.median(seconds[:tenth]),
        "last": statistics.median(seconds[-tenth:]),
    }


def tokenised(text: Path, directory: str, cores: int) -> Row:
    """How fast a text is tokenised on so many cores."""
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    tokenizer = Tokenizer.load(directory)
    size, seconds = 0, 0.0
    with text.open(encoding="utf-8") as file:
        while lines := file.readlines(PIECE):
            begun = time.perf_counter()
            tokenizer.encode_batch(lines)
            seconds += time.perf_counter() - begun
            size += sum(len(line.encode()) for line in lines)
    return {"cores": cores, "bytes": size, "seconds": seconds}


def memory_of(process: int | None) -> Counter[str]:
    """Bytes of a process in memory: its own (RssAnon) and of files (RssFile); empty if not known."""
    try:
        lines = Path(f"/proc/{process}/status").read_text("utf-8").splitlines()
    except OSError:
        return Counter()
    pairs = (line.split() for line in lines if line.startswith(("RssAnon", "RssFile")))
    return Counter({name.rstrip(":"): 1024 * int(size) for name, size, _ in pairs})


def _answer(pipe: Connection, function: Callable[..., Row], arguments: Sequence[Any]) -> None:
    pipe.send(function(*arguments))


def alone(function: Callable[..., Row], *arguments: Any) -> Row:  # noqa: ANN401 (the function's own)
    """What a function gives in a process of its own, with the most memory that this was seen to have."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    most: Counter[str] = Counter()
    while not pipe.poll(SECONDS):
        most |= memory_of(process.pid)
    try:
        found = pipe.recv()
    except EOFError:
        raise ValueError(f"{function.__name__}: its process has ended, see above why") from None
    process.join()
    return {**found, "own_bytes": most.get("RssAnon"), "file_bytes": most.get("RssFile")}


def measure(megabytes: Sequence[int], run: TrainingConfig, data: str | None, threads: int) -> Row:
    """Prepare and train on a text of each size, then tokenise the smallest on one core and on all."""
    sizes: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < 3 * MB * sum(megabytes):
            raise ValueError(
                f"{folder} has {free // MB:,} MB left, and {3 * sum(megabytes):,} may be needed: "
                "choose smaller sizes, or another disk with TMPDIR"
            )
        base = base_text(data, run.seed)
        for size in megabytes:
            text = Path(folder) / f"{size}.txt"
            write_text(text, size * MB, base, run.seed)
            own = dataclasses.replace(run, data=str(text))
            row: Row = {"megabytes": size, "bytes": text.stat().st_size}
            row["prepare"] = alone(prepared, own, folder)
            print(f"{size:,} MB: prepared in {row['prepare']['seconds']:.0f} s", flush=True)
            directory = row["prepare"].pop("directory")
            row["train"] = alone(trained, dataclasses.replace(own, data=directory), threads)
            print(f"{size:,} MB: trained {run.steps} steps", flush=True)
            sizes.append(row)
            if len(sizes) == 1:
                cores = sorted({1, len(os.sched_getaffinity(0))})
                tokenising = [alone(tokenised, text, directory, count) for count in cores]
            text.unlink()
    return {"run": dataclasses.asdict(run), "sizes": sizes, "tokenising": tokenising}


def table(result: Row) -> str:
    """Both sizes side by side, and tokenising below, as Markdown."""
    rows: dict[str, tuple[str, str, Callable[[float], str]]] = {
        "preparing: own memory, peak": ("prepare", "own_bytes", mebibytes),
        "preparing: pages of files, peak": ("prepare", "file_bytes", mebibytes),
        "preparing: seconds": ("prepare", "seconds", "{:.1f}".format),
        "tokens": ("prepare", "tokens", "{:,}".format),
        "training: own memory, peak": ("train", "own_bytes", mebibytes),
        "training: pages of files, peak": ("train", "file_bytes", mebibytes),
        "training: a token, first tenth of the steps": ("train", "first", microseconds),
        "training: a token, last tenth": ("train", "last", microseconds),
    }
    sizes, run = result["sizes"], result["run"]
    titles = [f"{size['megabytes']:,} MB" for size in sizes]
    lines = [f"| | {' | '.join(titles)} | times |", "|---|" + "---:|" * (len(sizes) + 1)]
    for title, (part, key, written) in rows.items():
        values = [size[part][key] for size in sizes]
        cells = [written(value) if value is not None else "unknown" for value in values]
        times = "–" if None in values else f"{values[-1] / values[0]:.2f}"
        lines.append(f"| {title} | {' | '.join(cells)} | {times} |")
    lines += ["", "| tokenising | MB/s | times |", "|---|---:|---:|"]
    speeds = [row["bytes"] / MB / row["seconds"] for row in result["tokenising"]]
    for row, speed in zip(result["tokenising"], speeds, strict=True):
        cores = f"{row['cores']} core" + "s" * (row["cores"] > 1)
        lines.append(f"| {cores} | {speed:.2f} | {speed / speeds[0]:.2f} |")
    notes = (
        f"Own memory is RssAnon, pages of files are RssFile, seen every {1000 * SECONDS:.0f} ms. "
        f"{run['steps']} steps of {run['batch']} rows of {run['window']}; of a tenth of them the "
        "median. MB are 10^6 bytes of text."
    )
    return "\n".join(["### Growth with the corpus", "", *lines, "", notes]) + "\n"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


def microseconds(value: float) -> str:
    return f"{1e6 * value:.2f} µs"


def benchmark(
    small: int, large: int, output: Path, *, data: str | None, steps: int, threads: int
) -> None:
    """Measure, print the table, write JSON and, beside it, Markdown."""
    at_least_1 = {"small": small, "steps": steps, "threads": threads}
    for name, value in at_least_1.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    if large <= small:
        raise ValueError(f"--large must be more than --small, {small}, not {large}")
    if data is not None and not Path(data).is_file():
        raise ValueError(f"{data}: no such file: --data takes a text file")
    result = measure((small, large), dataclasses.replace(RUN, steps=steps), data, threads)
    report({"machine": machine(), "threads": threads, **result}, [table(result)], output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line; a mistake is one line and exit code 2."""
    parser = Parser(
        prog=PROG, description="A small and a large corpus side by side: memory, speed."
    )
    parser.add_argument("--small", type=int, default=20, metavar="MB", help="default: 20")
    parser.add_argument("--large", type=int, default=1000, metavar="MB", help="default: 1000")
    parser.add_argument(
        "--data", metavar="PATH", help="text to repeat (default: sentences of made-up words)"
    )
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="default: 300")
    add_common_options(parser, "growth.json")
    command(parser, benchmark, arguments)


if __name__ == "__main__":
    main()
