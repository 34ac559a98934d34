"""How fast training is, side by side: ours, nanoGPT's published recipe, `transformers`' GPT-2.

Every contestant trains in a process of its own, so that its peak of memory is its own, and
waits there for its turn: they train their recipes a slice at a time, one after the other, so
that a machine that slows down does so for all of them. A contestant's clock runs while it
trains, compilation included, and stands still while it is scored: after every slice, on every
character that is held out. Nothing is interpolated: a loss is reached at the first score at or
below it.

Two races on the characters of tinyshakespeare, the first 90% to train on and the last 10% to
score: on the CPU, and where there is a card also there, which then shows the throughput of
GPT-2 124M too.
"""

import dataclasses
import importlib.util
import itertools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from benchmarks.models import WITHOUT
from benchmarks.report import Row, add_common_options, command, machine, report, spread
from gpt import Model
from gpt.device import peak_flops, resolve_device
from tokenizer import Tokenizer
from tokenizer.__main__ import Parser
from training.config import LEARNING_RATES, TrainingConfig, scale_learning_rates
from training.data.corpus import Corpus
from training.presets import get_preset
from training.run_directory import environment_info
from training.tasks import TASKS, open_task
from training.tasks.base import Batch, Task
from training.tasks.text import load_corpus
from training.trainer import Objective, Trainer

PROG = "python -m benchmarks.train"
TURNS, STEPS = 6, 5
"""Turns of a contestant for its throughput, the first of them to warm up, and optimizer steps in one."""


class RandomTokens(Task):
    """One batch of random tokens again and again: what matters is how long it takes."""

    kind: ClassVar[str] = "text"
    fingerprint = ""
    description = "random tokens"

    def __init__(self, run: TrainingConfig) -> None:
        self.model_args = {"vocab_size": run.vocab_size, "context_length": run.context_length}
        self.sequence_length = run.context_length
        random = np.random.default_rng(run.seed)
        tokens_BT = random.integers(run.vocab_size, size=(run.batch_size, run.context_length + 1))
        self.arrays = tokens_BT[:, :-1], tokens_BT[:, 1:]

    @classmethod
    def open(cls, run: TrainingConfig, tokenizer: Tokenizer | None, for_training: bool) -> Self:  # noqa: ARG003
        return cls(run)

    def batch(self, index: int) -> Batch:  # noqa: ARG002
        return self.arrays

    def validate(self, model: Model) -> float:  # noqa: ARG002
        return math.nan


TASKS["random"] = RandomTokens


@dataclass(frozen=True)
class Race:
    """Who trains side by side, and to which loss."""

    title: str
    runs: dict[str, TrainingConfig]
    yardstick: str
    """Whose time to the target is one, and in whose whole time the best loss counts."""
    target: float
    """Nats per character."""
    slices: int = 50
    """Turns of a contestant, each the same share of its recipe."""


def cpu_race() -> Race:
    """NanoGPT's CPU recipe; 1.886 is the loss that nanoGPT itself was seen to end with."""
    yardstick = get_preset("nanogpt-cpu")
    sizes = {name: yardstick.model_args[name] for name in ("width", "depth", "heads")}
    runs = {
        "shakespeare": get_preset("shakespeare"),
        "nanogpt-cpu": yardstick,
        "transformers": dataclasses.replace(yardstick, model="transformers", model_args=sizes),
    }
    return Race("CPU: nanoGPT's small recipe", on("cpu", runs), "nanogpt-cpu", 1.886)


def gpu_race() -> Race:
    """NanoGPT's GPU recipe; its published loss is 1.4697."""
    runs = {name: get_preset(name) for name in ("shakespeare-gpu", "nanogpt-gpu")}
    return Race("GPU: nanoGPT's recipe", on("cuda", runs), "nanogpt-gpu", 1.47)


def ablations() -> Race:
    """The preset `shakespeare` beside itself with one thing changed, each for as many tokens."""
    whole = get_preset("shakespeare")
    tokens = whole.steps * whole.batch_size * whole.context_length

    def but(changes: dict[str, Any] | None = None, **arguments: Any) -> TrainingConfig:  # noqa: ANN401
        """With other settings, and other arguments of the model."""
        run = dataclasses.replace(whole, model_args=whole.model_args | arguments, **(changes or {}))
        return dataclasses.replace(run, steps=tokens // (run.batch_size * run.context_length))

    adam = {"optimizer": "adamw", "weight_decay": 0.1, "embedding_decay": 0.1}
    runs = {
        "shakespeare": whole,
        "no n-grams": but(ngrams=0),
        "n-grams in 4,096 rows": but(ngrams=4096),
        "AdamW instead of Muon": but(adam | dict.fromkeys(LEARNING_RATES, 0.002)),
        **{f"no {part}": but({"model": "gpt-without"}, without=part) for part in WITHOUT},
        "tied unembedding": but({"embedding_lr": 0.005}, tied=True),
        "cool-down over 60%": but({"cooldown_fraction": 0.6}),
        "cosine cool-down": but({"cosine": True}),
        "weight decay 0.1": but({"weight_decay": 0.1}),
        "dropout 0.1": but(dropout=0.1),
        "windows of 64": but({"context_length": 64, "batch_size": 24}),
        "windows of 256": but({"context_length": 256, "batch_size": 6}),
        "batches of 24": scale_learning_rates(but({"batch_size": 24}), whole),
        "2 layers of 192": but(depth=2, width=192, heads=6),
    }
    return Race("CPU: one thing changed", on("cpu", runs), "shakespeare", 1.886, slices=20)


def gpt2_124m() -> dict[str, TrainingConfig]:
    """Today's GPT and GPT-2, 12 layers of width 768, on random tokens: one vocabulary, window, batch."""
    yardstick = dataclasses.replace(get_preset("gpt2-124m"), task="random")
    today = get_preset("gpt-small")
    names = (
        "task",
        "vocab_size",
        "batch_size",
        "context_length",
        "gradient_accumulation_steps",
        "compile",
        "precision",
    )
    alike = {name: getattr(yardstick, name) for name in names}
    return on("cuda", {"gpt-small": dataclasses.replace(today, **alike), "gpt2-124m": yardstick})


def on(device: str, runs: dict[str, TrainingConfig]) -> dict[str, TrainingConfig]:
    """The same runs on a device."""
    return {name: dataclasses.replace(run, device=device) for name, run in runs.items()}


class Contestant:
    """One training, a turn at a time."""

    def __init__(self, run: TrainingConfig) -> None:
        self.device = resolve_device(run.device)
        self.trainer = Trainer(run, Path(), open_task(run), self.device)
        self.objective: Callable[..., Tensor] = Objective(self.trainer.model)
        if run.compile:
            self.objective = torch.compile(self.objective)
        self.seconds = 0.0

    def about(self) -> Row:
        """What is known before the first step."""
        return environment_info(self.trainer) | {
            "flops_per_token": self.trainer.flops_per_token,
            "peak_flops": peak_flops(self.device),
        }

    def turn(self, steps: int) -> Row:
        """Train for so many steps, with the clock running; then score, without."""
        begun = time.perf_counter()
        for _ in range(steps):
            self.trainer.train_step(self.objective)
            self.trainer.step += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - begun
        return {
            "step": self.trainer.step,
            "seconds": self.seconds,
            "peak_bytes": peak_bytes(self.device),
            "loss": self.trainer.task.validate(self.trainer.model),
        }


def peak_bytes(device: torch.device) -> int | None:
    """The most memory ever used: of the card's by tensors, else of this process's; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: on Linux a new process begins there with the peak of the one that started it.
    status = Path("/proc/self/status")
    lines = status.read_text("utf-8").splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def serve(pipe: Connection, run: TrainingConfig, threads: int) -> None:
    """The life of a contestant's process: answer every number of steps with what a turn gave."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as compiled:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled  # so that every seed compiles anew
        contestant = Contestant(run)
        pipe.send(contestant.about())
        while steps := pipe.recv():
            pipe.send(contestant.turn(steps))


class Remote:
    """A contestant in a process of its own."""

    def __init__(self, name: str, run: TrainingConfig, threads: int) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, run, threads), daemon=True)
        self.process.start()
        theirs.close()

    def turn(self, steps: int) -> Row:
        """What `Contestant.turn` gave there."""
        self.pipe.send(steps)
        return self.answer()

    def answer(self) -> Row:
        """What comes from there; a ValueError where nothing comes any more."""
        try:
            return self.pipe.recv()
        except EOFError:
            raise ValueError(f"{self.name}: its process has ended, see above why") from None

    def close(self) -> None:
        """Let the process end."""
        self.pipe.send(0)
        self.process.join()


def take_turns(
    runs: dict[str, TrainingConfig], turns: Sequence[dict[str, int]], threads: int, say: str
) -> dict[str, Row]:
    """Let them train in turn; what is known about each, and what each turn gave.

    Args:
        runs: The contestants.
        turns: For each turn the steps of everyone.
        threads: Of each process.
        say: What to begin a line of progress with.
    """
    remotes = {name: Remote(name, run, threads) for name, run in runs.items()}
    # When all have come that far, nobody's start disturbs another's first turn.
    rows: dict[str, Row] = {
        name: {"about": remote.answer(), "curve": []} for name, remote in remotes.items()
    }
    for number, turn in enumerate(turns, 1):
        for name, remote in remotes.items():
            if turn[name]:
                rows[name]["curve"].append(remote.turn(turn[name]))
        last = {name: row["curve"][-1] for name, row in rows.items() if row["curve"]}
        line = ", ".join(f"{name} {p['loss']:.4f} {p['seconds']:.1f} s" for name, p in last.items())
        print(f"{say}, turn {number}/{len(turns)}: {line}", flush=True)
    for remote in remotes.values():
        remote.close()
    return rows


def slices(steps: int, turns: int) -> list[int]:
    """The steps of each turn of a race."""
    ends = [round(steps * turn / turns) for turn in range(turns + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def race(contest: Race, seeds: int, threads: int) -> Row:
    """Run a race with every seed, and judge it."""
    each = {name: slices(run.steps, contest.slices) for name, run in contest.runs.items()}
    turns = [{name: each[name][turn] for name in each} for turn in range(contest.slices)]
    turns = [turn for turn in turns if any(turn.values())]  # of short recipes some are empty
    rounds = []
    for seed in range(seeds):
        runs = {name: dataclasses.replace(run, seed=seed) for name, run in contest.runs.items()}
        rounds.append(take_turns(runs, turns, threads, f"{contest.title}, seed {seed}"))
    return judge(contest, rounds)


def judge(contest: Race, rounds: list[dict[str, Row]]) -> Row:
    """Every contestant's figures in every round, beside the yardstick's."""
    for rows in rounds:
        yardstick = rows.get(contest.yardstick)
        whole = yardstick["curve"][-1]["seconds"] if yardstick else None
        for name, row in rows.items():
            run, first, last = contest.runs[name], row["curve"][0], row["curve"][-1]
            steady = (last["step"] - first["step"]) * run.batch_size * run.context_length
            row["seconds_to_target"] = seconds_to(contest.target, row["curve"])
            row["early_loss"] = row["curve"][max(0, len(row["curve"]) // 5 - 1)]["loss"]
            row["best_loss"] = best(row["curve"], math.inf)
            row["best_loss_in_time"] = best(row["curve"], whole) if whole else None
            row["final_loss"] = last["loss"]
            row["tokens_per_second"] = steady / (last["seconds"] - first["seconds"])
            # Before it was first scored: what training takes.
            row["peak_bytes"] = first["peak_bytes"]
        for row in rows.values():
            row["times_faster"] = None
            if yardstick and row["seconds_to_target"]:
                # A yardstick that did not get there takes at least all of its time.
                row["times_faster"] = (yardstick["seconds_to_target"] or whole) / row[
                    "seconds_to_target"
                ]
    return {
        "title": contest.title,
        "yardstick": contest.yardstick,
        "target": contest.target,
        "slices": contest.slices,
        "runs": {name: dataclasses.asdict(run) for name, run in contest.runs.items()},
        "rounds": rounds,
    }


def seconds_to(target: float, curve: list[Row]) -> float | None:
    """The clock at the first score at or below the target."""
    return next((point["seconds"] for point in curve if point["loss"] <= target), None)


def best(curve: list[Row], seconds: float) -> float | None:
    """The lowest score up to a time."""
    return min((point["loss"] for point in curve if point["seconds"] <= seconds), default=None)


def race_table(result: Row) -> str:
    """A race as a Markdown table: medians over the seeds, with the least and the most."""
    rounds, yardstick, target = result["rounds"], result["yardstick"], result["target"]
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        f"seconds to {target}": ("seconds_to_target", "{:.1f}".format),
        f"times as fast as {yardstick}": ("times_faster", "{:.2f}".format),
        "loss after a fifth": ("early_loss", "{:.4f}".format),
        f"best loss in {yardstick}'s time": ("best_loss_in_time", "{:.4f}".format),
        "best loss": ("best_loss", "{:.4f}".format),
        "final loss": ("final_loss", "{:.4f}".format),
        "tokens/s": ("tokens_per_second", "{:,.0f}".format),
        "peak memory": ("peak_bytes", lambda value: f"{value / 2**20:,.0f} MiB"),
    }
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in result["runs"]:
        cells = [
            spread([rows[name][key] for rows in rounds], written)
            for key, written in columns.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first = next(iter(rounds[0].values()))["about"]
    notes = [
        "",
        f"Median of {len(rounds)} seeds (least to most). Loss in nats per character, every one "
        f"held out scored after each {100 // result['slices']}% of a recipe. Seconds of training alone, "
        f"compilation included. {first['device']}.",
    ]
    late = [rows[yardstick]["seconds_to_target"] for rows in rounds if yardstick in rows]
    if None in late:
        notes[-1] += (
            f" Where {yardstick} did not reach {target}, its whole time stands for what it would take."
        )
    return "\n".join([f"### {result['title']}", "", *lines, *notes]) + "\n"


def throughput(runs: dict[str, TrainingConfig], threads: int, steps: int = STEPS) -> Row:
    """Tokens a second of each, and the share of the card's peak that they are."""
    turns = [dict.fromkeys(runs, steps)] * TURNS
    rows = take_turns(runs, turns, threads, "throughput")
    for name, row in rows.items():
        run, clock = runs[name], [point["seconds"] for point in row["curve"]]
        taken = [after - before for before, after in itertools.pairwise(clock)]
        speed = steps * run.batch_size * run.context_length / statistics.median(taken)
        peak = row["about"]["peak_flops"]
        row["tokens_per_second"] = speed
        row["mfu"] = speed * row["about"]["flops_per_token"] / peak if peak else None
        row["first_turn_seconds"] = clock[0]
        row["peak_bytes"] = row["curve"][-1]["peak_bytes"]
    return {"runs": {name: dataclasses.asdict(run) for name, run in runs.items()}, "rows": rows}


def throughput_table(result: Row) -> str:
    """Throughputs as a Markdown table."""
    lines = [
        "### Throughput on random tokens",
        "",
        "| | parameters | tokens/s | MFU | peak memory | first turn, compilation included |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["rows"].items():
        mfu, peak = row["mfu"], row["peak_bytes"]
        lines.append(
            f"| {name} | {row['about']['parameters']:,} | {row['tokens_per_second']:,.0f} "
            f"| {f'{mfu:.1%}' if mfu else 'unknown'} "
            f"| {f'{peak / 2**30:.1f} GiB' if peak else '–'} | {row['first_turn_seconds']:.1f} s |"
        )
    run = next(iter(result["runs"].values()))
    device = next(iter(result["rows"].values()))["about"]["device"]
    notes = (
        f"{run['batch']} rows of {run['window']:,} a step in {run['accumulation']} parts, "
        f"{run['precision']}; the median of {TURNS - 1} turns. {device}."
    )
    return "\n".join([*lines, "", notes]) + "\n"


def characters_of(data: str) -> Corpus:
    """Prepared tokens, one for each character; a ValueError if the data is absent or has others."""
    corpus = load_corpus(dataclasses.replace(get_preset("nanogpt-cpu"), data=data), None, True)
    if not {"train", "validation"} <= corpus.splits.keys():
        raise ValueError(f"{data}: has only the splits {', '.join(corpus.splits)}: give the text")
    split = corpus.splits["validation"]
    characters = len(corpus.tokenizer.decode(split.tokens.tolist()))
    if characters != len(split.tokens) - split.documents:
        raise ValueError(
            f"{data}: its validation split is not one token for each character: prepare it with "
            "--tokenizer characters, and with every character in the training split"
        )
    return corpus


def chosen(runs: dict[str, TrainingConfig], only: Sequence[str]) -> dict[str, TrainingConfig]:
    """The contestants that take part."""
    return {name: run for name, run in runs.items() if not only or name in only}


def benchmark(
    data: str,
    output: Path,
    *,
    seeds: int,
    threads: int,
    steps: int | None,
    only: Sequence[str],
    ablate: bool,
) -> None:
    """Run what the machine can, print the tables, write JSON and, beside it, Markdown."""
    races, speed = [cpu_race(), gpu_race()], gpt2_124m()
    if ablate:
        races, speed = [ablations()], {}
    everyone = [*(name for contest in races for name in contest.runs), *speed]
    for name in only:
        if name not in everyone:
            raise ValueError(f"--only {name}: there is no such; there are {', '.join(everyone)}")
    for name, value, least in (("seeds", seeds, 1), ("threads", threads, 1), ("steps", steps, 2)):
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, not {value}")
    if (
        "transformers" in everyone
        and "transformers" in (only or everyone)
        and not importlib.util.find_spec("transformers")
    ):
        raise ValueError(
            "transformers is not installed: pip install transformers, or name the others: "
            "--only shakespeare nanogpt-cpu"
        )
    corpus = characters_of(data)
    counts = {name: len(split.tokens) - split.documents for name, split in corpus.splits.items()}
    print(f"{data}: {counts['train']:,} characters to train on, {counts['validation']:,} to score")
    result: Row = {"machine": machine(), "data": {"fingerprint": corpus.fingerprint, **counts}}
    result |= {"threads": threads, "races": []}
    tables = []
    there_is_a_card = torch.cuda.is_available()
    for contest in races if there_is_a_card else races[:1]:
        given: dict[str, Any] = {
            "data": str(corpus.directory),
            "validation_tokens": len(corpus.splits["validation"].tokens),
        }
        runs = {
            name: dataclasses.replace(run, **given, steps=min(run.steps, steps or run.steps))
            for name, run in chosen(contest.runs, only).items()
        }
        if runs:
            result["races"].append(race(dataclasses.replace(contest, runs=runs), seeds, threads))
            tables.append(race_table(result["races"][-1]))
    if not there_is_a_card and not ablate:
        tables.append("No card here: the GPU's race and throughput were left out.\n")
    elif chosen(speed, only):
        result["throughput"] = throughput(chosen(speed, only), threads, min(STEPS, steps or STEPS))
        tables.append(throughput_table(result["throughput"]))
    report(result, tables, output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line; a mistake is one line and exit code 2."""
    parser = Parser(prog=PROG, description="Training side by side: seconds to a loss, throughput.")
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="tinyshakespeare's input.txt, or prepared tokens of its characters; the text is at "
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    )
    add_common_options(parser, "train.json")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--steps", type=int, metavar="N", help="shorten every recipe to N steps")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="these contestants alone"
    )
    parser.add_argument(
        "--ablate", action="store_true", help="instead: ours beside itself with one thing changed"
    )
    command(parser, benchmark, arguments)


if __name__ == "__main__":
    main()
