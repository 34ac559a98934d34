"""Training speed against nanoGPT's published recipes and GPT-2 from `transformers`.

Time to loss: every training config is trained on the characters of tinyshakespeare (first 90% for
training, last 10% for validation) in a worker process of its own, so that its peak memory is its own.
The workers train in turns, a segment of their steps at a time, so that a change in the machine's
speed affects all of them. A worker's clock runs only while it trains, compilation included; after
each segment the whole validation split is scored with the clock stopped. Nothing is interpolated:
the time to a loss is the clock at the first score at or below it.

The CPU comparison always runs; with a GPU, the GPU comparison and the throughput of GPT-2 124M too.
"""

import dataclasses
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks import report, training_configs
from benchmarks.report import Result
from benchmarks.training_configs import AveragedConfig, Comparison, Configs
from benchmarks.worker import Worker
from gpt import Model
from gpt.device import peak_flops, resolve_device
from tokenizer.__main__ import Parser
from training.config import TrainingConfig
from training.data.corpus import Corpus
from training.presets import get_preset
from training.run_directory import environment_info
from training.tasks import open_task
from training.tasks.text import load_corpus
from training.trainer import Trainer

ROUNDS, STEPS_PER_ROUND = 6, 5
"""Of the throughput measurement; the first round is the warmup."""

# Training in turns.


class TrainingSession:
    """Train one config, some steps at a time, with a clock that runs only while it trains."""

    def __init__(self, config: TrainingConfig) -> None:
        self.device = resolve_device(config.device)
        self.trainer = Trainer(config, Path(), open_task(config), self.device)
        start = time.perf_counter()
        self.objective = self.trainer.compilation.objective
        self.average = None
        if isinstance(config, AveragedConfig):
            average = get_ema_multi_avg_fn(config.ema_decay)
            self.average = AveragedModel(self.trainer.model, multi_avg_fn=average)
        self.seconds = time.perf_counter() - start
        self.compile_seconds = self.seconds if self.trainer.compilation.enabled else 0.0

    def info(self) -> Result:
        """Return the number of parameters, the device, FLOPs, and whether and how long it compiled."""
        return environment_info(self.trainer) | {
            "compile_seconds": self.compile_seconds,
            "flops_per_token": self.trainer.flops_per_token,
            "peak_flops": peak_flops(self.device),
        }

    def train(self, steps: int) -> Result:
        """Train for some steps, then score the validation split with the clock stopped."""
        start = time.perf_counter()
        for _ in range(steps):
            self.trainer.train_step(self.objective)
            self.trainer.step += 1
            if self.average:
                self.average.update_parameters(self.trainer.model)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - start
        model = cast(Model, self.average.module) if self.average else self.trainer.model
        return {
            "step": self.trainer.step,
            "seconds": self.seconds,
            "peak_bytes": peak_bytes(self.device),
            "loss": self.trainer.task.validate(model),
        }


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak memory of tensors on a GPU, else of this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: on Linux a new process starts there with the peak of its parent.
    status = Path("/proc/self/status")
    lines = status.read_text("utf-8").splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def training_worker(connection: Connection, config: TrainingConfig, threads: int) -> None:
    """Send the session's info; then train for each number of steps received, and send the result."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # every seed pays for its own compilation
        session = TrainingSession(config)
        connection.send(session.info())
        while steps := connection.recv():
            connection.send(session.train(steps))


def train_in_turns(
    configs: Configs, schedule: Sequence[dict[str, int]], threads: int, label: str
) -> dict[str, Result]:
    """Train several configs in turns; return each one's info and its `curve`, a result for each turn.

    Args:
        configs: What to train, by name.
        schedule: For each turn, the steps of each config; 0 skips it.
        threads: Threads of each worker.
        label: Start of the progress lines.
    """
    workers = {
        name: Worker(name, training_worker, config, threads) for name, config in configs.items()
    }
    # Wait for all workers, so that no start-up disturbs another one's first turn.
    results: dict[str, Result] = {
        name: {"info": worker.receive(), "curve": []} for name, worker in workers.items()
    }
    for number, steps in enumerate(schedule, 1):
        for name, worker in workers.items():
            if steps[name]:
                results[name]["curve"].append(worker.request(steps[name]))
        last = {name: result["curve"][-1] for name, result in results.items() if result["curve"]}
        line = ", ".join(f"{name} {p['loss']:.4f} {p['seconds']:.1f} s" for name, p in last.items())
        print(f"{label}, turn {number}/{len(schedule)}: {line}", flush=True)
    for worker in workers.values():
        worker.close()
    return results


# Time to loss.


def segment_steps(steps: int, segments: int) -> list[int]:
    """Divide steps into segments whose sizes differ by at most one."""
    ends = [round(steps * segment / segments) for segment in range(segments + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def compare(comparison: Comparison, seeds: int, threads: int) -> Result:
    """Train the configs of a comparison with seeds 0 to `seeds` - 1."""
    steps = {
        name: segment_steps(config.steps, comparison.segments)
        for name, config in comparison.configs.items()
    }
    schedule = [
        {name: steps[name][segment] for name in steps} for segment in range(comparison.segments)
    ]
    schedule = [turn for turn in schedule if any(turn.values())]  # with few steps some are empty
    rounds = []
    for seed in range(seeds):
        configs = {
            name: dataclasses.replace(config, seed=seed)
            for name, config in comparison.configs.items()
        }
        rounds.append(
            train_in_turns(configs, schedule, threads, f"{comparison.title}, seed {seed}")
        )
    return summarize(comparison, rounds)


def summarize(comparison: Comparison, rounds: list[dict[str, Result]]) -> Result:
    """Add the metrics of each config to the results of `train_in_turns`, one round for each seed."""
    for results in rounds:
        baseline = results.get(comparison.baseline)
        total = baseline["curve"][-1]["seconds"] if baseline else None
        for name, result in results.items():
            config, curve = comparison.configs[name], result["curve"]
            first, last = curve[0], curve[-1]
            tokens = (last["step"] - first["step"]) * config.batch_size * config.context_length
            target = comparison.target_loss
            result["seconds_to_target"] = seconds_to_loss(target, curve) if target else None
            result["early_loss"] = curve[max(0, len(curve) // 5 - 1)]["loss"]
            result["best_loss"] = best_loss(curve, math.inf)
            result["best_loss_in_time"] = best_loss(curve, total) if total else None
            result["final_loss"] = last["loss"]
            result["difference"] = (
                last["loss"] - baseline["curve"][-1]["loss"] if baseline else None
            )
            result["tokens_per_second"] = tokens / (last["seconds"] - first["seconds"])
            # Before the first validation: the peak of training alone.
            result["peak_bytes"] = first["peak_bytes"]
        for result in results.values():
            result["speedup"] = None
            if baseline and result["seconds_to_target"]:
                # A baseline that did not reach the target would take at least its total time.
                baseline_seconds = baseline["seconds_to_target"] or total
                result["speedup"] = baseline_seconds / result["seconds_to_target"]
    return {
        "title": comparison.title,
        "baseline": comparison.baseline,
        "target_loss": comparison.target_loss,
        "segments": comparison.segments,
        "configs": {
            name: dataclasses.asdict(config) for name, config in comparison.configs.items()
        },
        "rounds": rounds,
    }


def seconds_to_loss(target: float, curve: list[Result]) -> float | None:
    """Return the clock at the first score at or below the target."""
    return next((point["seconds"] for point in curve if point["loss"] <= target), None)


def best_loss(curve: list[Result], seconds: float) -> float | None:
    """Return the lowest loss up to a time."""
    return min((point["loss"] for point in curve if point["seconds"] <= seconds), default=None)


def comparison_table(comparison: Result) -> str:
    """Format a comparison as a Markdown table: medians over the seeds, with their range.

    Without a target loss, only losses after as many tokens are compared.
    """
    rounds, baseline = comparison["rounds"], comparison["baseline"]
    target = comparison["target_loss"]
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "loss after a fifth": ("early_loss", "{:.4f}".format),
        "final loss": ("final_loss", "{:.4f}".format),
        f"difference from {baseline}": ("difference", "{:+.4f}".format),
    }
    if target:
        columns = {
            f"seconds to {target}": ("seconds_to_target", "{:.1f}".format),
            f"speedup over {baseline}": ("speedup", "{:.2f}".format),
            "loss after a fifth": ("early_loss", "{:.4f}".format),
            f"best loss in {baseline}'s time": ("best_loss_in_time", "{:.4f}".format),
            "best loss": ("best_loss", "{:.4f}".format),
            "final loss": ("final_loss", "{:.4f}".format),
        }
    columns |= {
        "tokens/s": ("tokens_per_second", "{:,.0f}".format),
        "peak memory": ("peak_bytes", lambda value: f"{value / 2**20:,.0f} MiB"),
    }
    rows = [
        [
            name,
            *(
                report.format_median([results[name][key] for results in rounds], format_value)
                for key, format_value in columns.values()
            ),
        ]
        for name in comparison["configs"]
    ]
    infos = {name: result["info"] for name, result in rounds[0].items()}
    device = next(iter(infos.values()))["device"]
    times = {n: i["compile_seconds"] for n, i in infos.items() if i["compile"]["enabled"]}
    compiled = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items()) or "none"
    note = (
        f"Median of {len(rounds)} seeds (min to max). Loss in nats per character, over the whole "
        f"validation split, after each {100 // comparison['segments']}% of the steps. Seconds of "
        f"training only, compilation included: {compiled}. {device}."
    )
    baseline_seconds = [
        results[baseline]["seconds_to_target"] for results in rounds if baseline in results
    ]
    if target and None in baseline_seconds:
        note += f" Where {baseline} did not reach {target}, its total time is used instead."
    table = report.markdown_table(["", *columns], rows)
    return "\n".join([f"### {comparison['title']}", "", *table, "", note]) + "\n"


# Throughput.


def measure_throughput(configs: Configs, threads: int, steps: int = STEPS_PER_ROUND) -> Result:
    """Measure each config's tokens per second, and its MFU where the device's peak is known."""
    schedule = [dict.fromkeys(configs, steps)] * ROUNDS
    results = train_in_turns(configs, schedule, threads, "throughput")
    for name, result in results.items():
        config, info = configs[name], result["info"]
        clock = [point["seconds"] for point in result["curve"]]
        seconds = [after - before for before, after in itertools.pairwise(clock)]
        tokens = steps * config.batch_size * config.context_length
        result["tokens_per_second"] = speed = tokens / statistics.median(seconds)
        peak = info["peak_flops"]
        result["mfu"] = speed * info["flops_per_token"] / peak if peak else None
        result["warmup_seconds"] = clock[0] - info["compile_seconds"]
        result["peak_bytes"] = result["curve"][-1]["peak_bytes"]
    return {
        "configs": {name: dataclasses.asdict(config) for name, config in configs.items()},
        "results": results,
    }


def throughput_table(throughput: Result) -> str:
    """Format throughputs as a Markdown table."""
    rows = []
    for name, result in throughput["results"].items():
        mfu, peak = result["mfu"], result["peak_bytes"]
        rows.append(
            [
                name,
                f"{result['info']['parameters']:,}",
                f"{result['tokens_per_second']:,.0f}",
                f"{mfu:.1%}" if mfu else "unknown",
                f"{peak / 2**30:.1f} GiB" if peak else "–",
                f"{result['info']['compile_seconds']:.1f} s"
                if result["info"]["compile"]["enabled"]
                else "eager",
                f"{result['warmup_seconds']:.1f} s",
            ]
        )
    header = ["", "parameters", "tokens/s", "MFU", "peak memory", "compilation", "warmup"]
    config = next(iter(throughput["configs"].values()))
    device = next(iter(throughput["results"].values()))["info"]["device"]
    note = (
        f"Batches of {config['batch_size']} sequences of {config['context_length']:,} tokens, "
        f"{config['gradient_accumulation_steps']} gradient accumulation steps, "
        f"{config['precision']}; median of {ROUNDS - 1} rounds. {device}."
    )
    table = report.markdown_table(header, rows)
    return "\n".join(["### Throughput on random tokens", "", *table, "", note]) + "\n"


# The command.


def open_character_corpus(data: str) -> Corpus:
    """Open or prepare a corpus with one token per character; a ValueError if that is impossible."""
    config = dataclasses.replace(get_preset("nanogpt-cpu"), data=data)
    corpus = load_corpus(config, None, True)
    if not {"train", "validation"} <= corpus.splits.keys():
        raise ValueError(
            f"{data}: expected splits train and validation, found {', '.join(corpus.splits)}: "
            "pass the text file"
        )
    split = corpus.splits["validation"]
    characters = len(corpus.tokenizer.decode(split.tokens.tolist()))
    if characters != len(split.tokens) - split.documents:
        raise ValueError(
            f"{data}: its validation split is not one token for each character: prepare it with "
            "--tokenizer characters, and with every character in the training split"
        )
    return corpus


def select(configs: Configs, only: Sequence[str]) -> Configs:
    """Return the configs named in `only`; all if it is empty."""
    return {name: config for name, config in configs.items() if not only or name in only}


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
    """Run what the machine can run, and write the report."""
    comparisons, speed_configs = (
        [training_configs.cpu_comparison(), training_configs.gpu_comparison()],
        training_configs.throughput_configs(),
    )
    if ablate:
        comparisons, speed_configs = [training_configs.ablation_study()], {}
    names = [*(name for comparison in comparisons for name in comparison.configs), *speed_configs]
    for name in only:
        if name not in names:
            raise ValueError(f"--only {name}: unknown name; expected one of {', '.join(names)}")
    report.check_at_least(1, seeds=seeds, threads=threads)
    report.check_at_least(2, steps=steps)
    needed = "transformers" in names and "transformers" in (only or names)
    if needed and not report.is_installed("transformers"):
        raise ValueError(
            "transformers is not installed: pip install transformers, or leave it out: "
            "--only shakespeare nanogpt-cpu"
        )
    corpus = open_character_corpus(data)
    counts = {name: len(split.tokens) - split.documents for name, split in corpus.splits.items()}
    print(f"{data}: {counts['train']:,} characters to train on, {counts['validation']:,} to score")
    result: Result = {
        "machine": report.machine_info(),
        "data": {"fingerprint": corpus.fingerprint, **counts},
        "threads": threads,
        "comparisons": [],
    }
    tables = []
    has_gpu = torch.cuda.is_available()
    for comparison in comparisons if has_gpu else comparisons[:1]:
        settings: dict[str, Any] = {
            "data": str(corpus.directory),
            "eval_tokens": len(corpus.splits["validation"].tokens),
        }
        configs = {
            name: dataclasses.replace(
                config, **settings, steps=min(config.steps, steps or config.steps)
            )
            for name, config in select(comparison.configs, only).items()
        }
        if configs:
            comparison = dataclasses.replace(comparison, configs=configs)
            result["comparisons"].append(compare(comparison, seeds, threads))
            tables.append(comparison_table(result["comparisons"][-1]))
    if not has_gpu and not ablate:
        tables.append("No GPU: the GPU comparison and the throughput measurement were skipped.\n")
    elif configs := select(speed_configs, only):
        steps_per_round = min(STEPS_PER_ROUND, steps or STEPS_PER_ROUND)
        result["throughput"] = measure_throughput(configs, threads, steps_per_round)
        tables.append(throughput_table(result["throughput"]))
    report.write(result, tables, output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the benchmark."""
    parser = Parser(
        prog="python -m benchmarks.train",
        description="Training speed: time to a target loss, and throughput on a GPU.",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="tinyshakespeare's input.txt, or prepared tokens of its characters; the text is at "
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    )
    report.add_common_options(parser, "train.json")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--steps", type=int, metavar="N", help="train for at most N steps")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="train these configs only"
    )
    parser.add_argument(
        "--ablate",
        action="store_true",
        help="run the ablation study of the preset `shakespeare` instead",
    )
    report.run_command(parser, benchmark, arguments)


if __name__ == "__main__":
    main()
