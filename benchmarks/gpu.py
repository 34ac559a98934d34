"""Everything that only a GPU can show, in one command of at most ten minutes: `make bench-gpu`.

Each part runs in a process of its own, with a limit of time, and writes its results one by one:
neither a failure nor a hang costs what other parts have measured. Failures are reported with their
tracebacks, and make the exit code 1.

smoke       Every preset, shrunk: trained, resumed, scored as on the CPU, generated from.
throughput  Training of GPT-2 124M and of today's GPT of its size: tokens/s and MFU.
decode      GPT-2 124M, one to 256 sequences: tokens/s of decoding and of prefill.
loss        Seconds to nanoGPT's published loss, beside nanoGPT's recipe.
comparison  The engine beside `transformers`.
load        Clients of the engine and, where FastAPI is installed, of a server.
context     The latency of a decode step after 50 and after 1,000 tokens.

It needs torch with CUDA and Triton, a C compiler, numpy, safetensors, tokenizers, tqdm and tyro.
`transformers`, FastAPI with uvicorn and sacrebleu are used where they are installed; `datasets`
and a network are not.
"""

import dataclasses
import functools
import inspect
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import comparison, load, report, serve, train, training_configs
from benchmarks.backends import SIZES, ModelSize, TinyGPT
from benchmarks.report import Result
from benchmarks.training_configs import Comparison
from gpt import LanguageModel
from gpt.checkpoint import load_model, load_tensors, model_class, write_atomically
from gpt.device import resolve_device
from gpt.generation import generate
from gpt.sampling import SamplingParams
from serving.engine.engine import Engine
from serving.engine.sequence import Request
from tokenizer import Tokenizer, byte_tokenizer, decode_utf8, train_characters
from tokenizer.__main__ import Parser
from training.config import TrainingConfig
from training.data.corpus import CorpusWriter, TextChunk
from training.presets import PRESETS
from training.run_directory import create_run, resume_run
from training.tasks import TASKS
from training.tasks.base import Task
from training.tasks.tables import TABULAR_TASKS

TEXT_CHARACTERS = 1_115_394
"""Of tinyshakespeare; as many are taken of the standard library's sources."""
SMOKE_PRESETS = tuple(PRESETS)
COMPILED_PRESETS = ("gpt-nano", "gpt2", "transformer")
"""Those that the smoke part also trains with `--compile on`."""
STREAMS = (1, 8, 64, 256)
ROUNDS = 3
STEPS_PER_ROUND = 2
"""Of the throughput part: a step of GPT-2 124M takes a second."""
DECODE_STEPS, PROMPT_LENGTH = 48, 1000
MAX_DIFFERENCE = 1e-3
"""Largest relative difference of a loss from the CPU's, both in float32."""
MIN_EQUAL = 0.9
"""Smallest share of tokens that are equal to those of `generate`; rounding may break a tie."""
TARGETS = {
    "GPT-2 124M, training, tokens/s": 600_000.0,
    "GPT-2 124M, training, MFU": 0.52,
    "GPT-2 124M, decoding 1 sequence, tokens/s": 3_000.0,
    "GPT-2 124M, decoding 256 sequences, tokens/s": 150_000.0,
}
"""For an H100 or H200, in bfloat16."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every part gets."""

    device: str
    small: bool
    """Tiny models and few steps, to try the benchmark itself."""
    threads: int
    folder: Path
    """Scratch space, with the prepared corpora."""

    @property
    def sizes(self) -> dict[str, ModelSize]:
        """GPT-2 124M, or a tiny model in its place."""
        return {"124M": ModelSize(300, 32, 2, 2) if self.small else SIZES["124M"]}


Measurement = tuple[str, Callable[[], Result]]
"""A name, and a function that measures. Of its result, `table` (Markdown), `row` (cells of the part's
table) and `figures` (by name) go into the report; all of it goes into the JSON."""

# Data.


def read_text(data: str | None) -> tuple[str, str]:
    """Return the text of a file, or sources of the standard library, and a description.

    Of the standard library only characters that are ASCII are kept, so that none is unknown.
    """
    if data is not None:
        if not Path(data).is_file():
            raise ValueError(f"--data {data}: no such file; expected tinyshakespeare's input.txt")
        text = decode_utf8(Path(data).read_bytes(), f"--data {data}")
        if len(text) < 1000:
            raise ValueError(f"--data {data}: expected at least 1,000 characters of text")
        return text, f"{Path(data).name}, {len(text):,} characters"
    text = ""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += file.read_text("ascii", errors="ignore")
        if len(text) >= TEXT_CHARACTERS:
            break
    text = text[:TEXT_CHARACTERS]
    return text, f"sources of the standard library, {len(text):,} characters"


def write_corpora(text: str, folder: Path) -> None:
    """Prepare the text's characters and, for the smoke part, bytes of its start and pairs of its lines.

    As in nanoGPT, the first 90% are for training. `training.data.prepare` would do the same, with
    `datasets`.
    """
    end = int(0.9 * len(text))

    def write(name: str, tokenizer: Tokenizer, splits: Mapping[str, Sequence[TextChunk]]) -> None:
        (folder / name).mkdir()
        writer = CorpusWriter(folder / name, tokenizer)
        for split, chunks in splits.items():
            writer.write(split, chunks)
        writer.close(name, ("a", "b") if name == "pairs" else None)

    def splits(train_text: str, validation_text: str) -> dict[str, list[TextChunk]]:
        return {
            "train": [TextChunk(train_text, True)],
            "validation": [TextChunk(validation_text, True)],
        }

    characters = train_characters([text[:end]], 4096)
    write("characters", characters, splits(text[:end], text[end:]))
    write("bytes", byte_tokenizer(), splits(text[:20_000], text[20_000:22_000] or text[:2000]))
    lines = [line[:12] for line in text[:20_000].split("\n") if line.strip()]
    pairs = [TextChunk(line, True, line[::-1]) for line in lines]
    write("pairs", byte_tokenizer(), {"train": pairs, "validation": pairs[:16]})


# Smoke.


def shrink(config: TrainingConfig, **changes: Any) -> TrainingConfig:  # noqa: ANN401 (field values)
    """Return a config with a tiny model, four steps and other changes that its task supports."""
    parameters = inspect.signature(model_class(config.model)).parameters
    sizes = {"width": 32, "depth": 2, "heads": 2, "ngrams": 64}
    tiny = {name: size for name, size in sizes.items() if name in parameters}
    changes = {
        "model_args": config.model_args | ({} if config.task in TABULAR_TASKS else tiny),
        "steps": 4,
        "batch_size": 4,
        "context_length": 32,
        "gradient_accumulation_steps": 1 if config.stateful else 2,
        "warmup_steps": min(config.warmup_steps, 1),
        "eval_interval": 2,
        "eval_tokens": 128,
        "checkpoint_interval": 2,
        "log_interval": 1,
        "sample_tokens": 4,
        **changes,
    }
    unsupported = TASKS[config.task].unsupported_options
    supported = {name: value for name, value in changes.items() if name not in unsupported}
    return dataclasses.replace(config, **supported)


def smoke(settings: Settings) -> Iterator[Measurement]:
    """Check every preset, then some of them compiled."""
    for name in SMOKE_PRESETS:
        yield name, functools.partial(check_preset, name, "off", settings)
    for name in COMPILED_PRESETS[:1] if settings.small else COMPILED_PRESETS:
        yield f"{name}, compiled", functools.partial(check_preset, name, "on", settings)


SMOKE_HEADER = [
    "",
    "loss",
    "resumed run differs by",
    "loss differs from the CPU's by",
    "equal tokens",
]


def check_preset(name: str, compile_option: Any, settings: Settings) -> Result:  # noqa: ANN401
    """Train, resume, score and generate; an AssertionError says what is wrong."""
    preset = PRESETS[name]
    data = "pairs" if preset.task == "translation" else "bytes"
    config = shrink(
        preset, data=str(settings.folder / data), device=settings.device, compile=compile_option
    )
    run = settings.folder / "runs" / f"{name}-{compile_option}"
    trainer = create_run(config, run)
    trainer.train()
    last = run / "checkpoints" / f"step-{config.steps}"
    expected = load_tensors(last / "model.safetensors")
    shutil.rmtree(last)
    trainer = resume_run(run, settings.device)
    assert trainer.step == 2, f"resumed at step {trainer.step}, not 2"
    trainer.train()
    resumed = load_tensors(last / "model.safetensors")
    # Kernels that add in any order (atomics) make this more than 0 on a GPU.
    difference = max(
        float((tensor - resumed[key]).abs().max() / tensor.abs().max().clamp(min=1e-6))
        for key, tensor in expected.items()
        if tensor.is_floating_point()
    )
    result: Result = {"resumed": difference, "compile": str(trainer.compilation)}
    assert difference < 0.1, f"the weights of a resumed run differ by {difference:.1%}"
    model, task = trainer.model, trainer.task
    if config.task != "translation" or report.is_installed("sacrebleu"):
        result["loss"] = trainer.score().to_json()["loss"]
        if config.task != "word-vectors":  # their negatives are drawn on the device
            on_cpu = task.score(load_model(run).eval(), "validation").to_json()["loss"]
            result["cpu_difference"] = abs(result["loss"] - on_cpu) / max(abs(on_cpu), 1e-6)
            assert result["cpu_difference"] <= MAX_DIFFERENCE, (
                f"the loss is {result['loss']:.6f}, on the CPU {on_cpu:.6f}"
            )
    if isinstance(model, LanguageModel):
        result["equal"] = equal_tokens(model.eval(), task, config)
        assert result["equal"] >= MIN_EQUAL, (
            f"{result['equal']:.0%} of the engine's tokens equal those of generate()"
        )
    cells = [
        f"{result['loss']:.4f}" if "loss" in result else "–",
        f"{difference:.1e}" if difference else "0",
        f"{result['cpu_difference']:.1e}" if "cpu_difference" in result else "–",
        f"{result['equal']:.0%}" if "equal" in result else "–",
    ]
    return result | {"row": cells}


def equal_tokens(model: LanguageModel, task: Task, config: TrainingConfig) -> float:
    """Return the share of the engine's tokens, with and without CUDA graphs, that `generate` gives too."""
    assert task.tokenizer
    eos = task.tokenizer.eos_token
    start_token = eos if config.task == "translation" else None
    prompts = [task.tokenizer.encode(text) for text in ("The cat", "a", "All the dogs")]
    params, length = SamplingParams(temperature=0), 12
    expected = [
        list(generate(model, prompt, length, params, decoder_start_token=start_token))
        for prompt in prompts
    ]
    equal = total = 0
    for cuda_graphs in (False, True):
        engine = Engine(model, 2, cuda_graphs=cuda_graphs)
        requests = [Request(p, length, params, decoder_start_token=start_token) for p in prompts]
        outputs: dict[Request, list[int | None]] = {request: [] for request in requests}
        for request in requests:
            engine.add_request(request)
        while not engine.is_idle:
            for output in engine.step():
                assert output.finish_reason != "error", output.error
                outputs[output.request].append(output.token)
        for tokens, wanted in zip(outputs.values(), expected, strict=True):
            equal += sum(a == b for a, b in zip(tokens, wanted, strict=True))
            total += len(wanted)
    return equal / total


# Training.


def throughput(settings: Settings) -> Iterator[Measurement]:
    """Measure one config after the other: each has the GPU for itself."""
    for name, config in training_configs.throughput_configs().items():
        yield name, functools.partial(measure_training, name, config, settings)


def measure_training(name: str, config: TrainingConfig, settings: Settings) -> Result:
    """Measure tokens per second and MFU."""
    if settings.small:
        config = dataclasses.replace(shrink(config), vocab_size=300)
    config = dataclasses.replace(config, device=settings.device)
    steps = 1 if settings.small else STEPS_PER_ROUND
    result = train.measure_throughput({name: config}, settings.threads, steps)
    measured = result["results"][name]
    label = "GPT-2 124M" if name == "gpt2-124m" else name
    figures = {f"{label}, training, tokens/s": measured["tokens_per_second"]}
    if measured["mfu"]:
        figures[f"{label}, training, MFU"] = measured["mfu"]
    if resolve_device(settings.device).type == "cuda" and not settings.small:
        compilation = measured["info"]["compile"]
        if not compilation["enabled"]:
            result["error"] = f"trained eagerly: {compilation['reason']}\n"
    return result | {"table": train.throughput_table(result), "figures": figures}


def loss(settings: Settings) -> Iterator[Measurement]:
    """Compare the recipes for a GPU."""
    compared = training_configs.gpu_comparison()
    configs = training_configs.on_device(settings.device, compared.configs)
    configs = {
        name: dataclasses.replace(
            shrink(config) if settings.small else config,
            data=str(settings.folder / "characters"),
            eval_tokens=10**9,
        )
        for name, config in configs.items()
    }
    yield (
        compared.title,
        functools.partial(
            measure_loss, dataclasses.replace(compared, configs=configs), settings.threads
        ),
    )


def measure_loss(compared: Comparison, threads: int) -> Result:
    """Measure the seconds to the target loss."""
    result = train.compare(compared, 1, threads)
    figures = {
        f"{name}, seconds to {compared.target_loss}": measured["seconds_to_target"]
        for name, measured in result["rounds"][0].items()
    }
    return result | {"table": train.comparison_table(result), "figures": figures}


# Serving.


def decode(settings: Settings) -> Iterator[Measurement]:
    """Measure decoding with each number of sequences, and prefill with two budgets of a step."""
    ((_, size),) = settings.sizes.items()
    streams = STREAMS[:2] if settings.small else STREAMS

    @functools.cache
    def engine() -> Engine:
        # Prompts are processed before the first of many sequences ends.
        model = size.build().to(settings.device)
        return TinyGPT(model, max(streams), "bfloat16", max_num_batched_tokens=4096).engine

    for num_seqs in streams:
        name = "1 sequence" if num_seqs == 1 else f"{num_seqs} sequences"
        yield f"decoding {name}", functools.partial(measure_decode, engine, name, num_seqs)
    for budget in (256, 4096):
        name = f"prompt of {PROMPT_LENGTH:,} tokens, --max-num-batched-tokens {budget}"
        yield name, functools.partial(measure_prefill, engine, name, budget)


DECODE_HEADER = ["GPT-2 124M in bfloat16", "tokens/s", "ms per token of a sequence"]


def measure_decode(engine: Callable[[], Engine], name: str, num_seqs: int) -> Result:
    """Measure decoding; the first round captures the CUDA graphs."""
    speeds = [serve.decode_speed(engine(), num_seqs, DECODE_STEPS) for _ in range(ROUNDS + 1)][1:]
    speed = statistics.median(speeds)
    row = report.format_median(speeds, "{:,.0f}".format), f"{1e3 * num_seqs / speed:.3f}"
    figures = {f"GPT-2 124M, decoding {name}, tokens/s": speed}
    return {"speeds": speeds, "row": row, "figures": figures}


def measure_prefill(engine: Callable[[], Engine], name: str, max_num_batched_tokens: int) -> Result:
    """Measure prefill with a budget of tokens per step; the first round selects kernels."""
    engine().max_num_batched_tokens = max_num_batched_tokens
    speeds = [serve.prefill_speed(engine(), PROMPT_LENGTH) for _ in range(ROUNDS + 1)][1:]
    figures = {f"GPT-2 124M, {name}, tokens/s": statistics.median(speeds)}
    row = report.format_median(speeds, "{:,.0f}".format), "–"
    return {"speeds": speeds, "row": row, "figures": figures}


def compare_engines(settings: Settings) -> Iterator[Measurement]:
    """Compare with `transformers`."""

    def measure() -> Result:
        results = comparison.compare_backends(
            settings.sizes,
            comparison.available_backends("cuda"),
            settings.threads,
            ROUNDS - 1,
            settings.device,
            comparison.WORKLOADS if settings.small else comparison.GPU_WORKLOADS,
        )
        return {"results": results, "table": comparison.backends_table(results)}

    yield "comparison", measure


def measure_load(settings: Settings) -> Iterator[Measurement]:
    """Measure clients of the engine, and of a server where its libraries are installed."""
    has_server = all(map(report.is_installed, ("fastapi", "uvicorn", "uvloop")))

    def measure(name: str, size: ModelSize, http: bool) -> Result:
        result = load.measure_load(
            name,
            size,
            num_prompts=8 if settings.small else 256,
            output_length=8 if settings.small else 64,
            max_num_seqs=64,
            dtype="bfloat16",
            rounds=1 if settings.small else 2,
            device=settings.device,
            http=http,
        )
        bandwidth = load.memory_bandwidth(settings.threads, settings.device)
        return result | {"bandwidth": bandwidth, "table": load.load_table(result, bandwidth)}

    sizes = settings.sizes if settings.small else {"10M": SIZES["10M"], **settings.sizes}
    for name, size in sizes.items():
        # A server of 124M parameters would spend the time on training a tokenizer.
        yield name, functools.partial(measure, name, size, has_server and name == "10M")


def context(settings: Settings) -> Iterator[Measurement]:
    """Measure the decode latency by context length."""

    def measure() -> Result:
        results = serve.measure_context(
            settings.sizes, settings.threads, ROUNDS, settings.device, ("float32", "bfloat16")
        )
        return {"results": results, "table": serve.context_table(results)}

    yield "context", measure


# Parts, each in a process of its own.


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the benchmark."""

    measurements: Callable[[Settings], Iterator[Measurement]]
    max_seconds: float
    title: str = ""
    header: Sequence[str] = ()
    """Of the table of its measurements' rows."""


PARTS = {
    "smoke": Part(smoke, 180, "### Smoke test, float32 losses", SMOKE_HEADER),
    "throughput": Part(throughput, 180),
    "decode": Part(decode, 60, "### Decoding and prefill", DECODE_HEADER),
    "loss": Part(loss, 180),
    "comparison": Part(compare_engines, 90),
    "load": Part(measure_load, 60),
    "context": Part(context, 45),
}
"""In the order of their importance: when the total time is spent, the last ones are missing."""
DEAD_WORKER = "the worker process died"
"""In an error: then the worker's own is in the part's output."""
MIN_SECONDS = 20.0
"""A part is not started with less time than this."""


def measure_part(name: str, settings: Settings, output: Path) -> None:
    """Run a part's measurements in this process; write all results so far after each."""
    results: list[Result] = []
    for label, measure in PARTS[name].measurements(settings):
        start = time.perf_counter()
        try:
            result = measure()
        except Exception:  # the others can still be measured
            result = {"error": traceback.format_exc()}
        seconds = round(time.perf_counter() - start, 2)
        results.append({"name": label, "seconds": seconds, **result})
        write_atomically(output, json.dumps(results))
        print(f"{name}, {label}: {'failed' if 'error' in result else 'done'}", flush=True)


def run_part(name: str, settings: Settings, max_seconds: float) -> Result:
    """Run a part in a process of its own; kill it, with its workers, when its time is up."""
    output, log = settings.folder / f"{name}.json", settings.folder / f"{name}.log"
    options = dataclasses.asdict(settings) | {"part": name, "output": output}
    arguments = [f"--{key}={value}" for key, value in options.items() if key != "small"]
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, *["--small"] * settings.small]
    environment = dict(os.environ)
    if settings.small and name != "smoke":
        environment |= {
            "PATH": "",
            "CXX": "",
        }  # compiling an engine's steps for a CPU takes minutes
    start, status = time.monotonic(), "done"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            if code := process.wait(max_seconds):
                status = f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after its limit of {max_seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    results = json.loads(output.read_text("utf-8")) if output.exists() else []
    part: Result = {"status": status, "seconds": time.monotonic() - start, "results": results}
    if status != "done" or any(DEAD_WORKER in result.get("error", "") for result in results):
        part["log"] = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-60:])
    return part


# The report.


def format_figure(name: str, value: float | None) -> str:
    """Format a figure, by the unit in its name."""
    if value is None:
        return "–"
    if "MFU" in name:
        return f"{value:.1%}"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def figures_table(parts: Mapping[str, Result]) -> str:
    """Format the figures of all parts beside their targets."""
    figures: dict[str, float | None] = {}
    for part in parts.values():
        for result in part["results"]:
            figures |= result.get("figures", {})
    rows = []
    for name in dict.fromkeys([*TARGETS, *figures]):
        target = TARGETS.get(name)
        cells = [format_figure(name, value) for value in (figures.get(name), target)]
        rows.append([name, *cells])
    table = report.markdown_table(["", "measured", "target for an H100 or H200"], rows)
    return "\n".join(["### Figures", "", *table]) + "\n"


def part_tables(name: str, part: Result) -> list[str]:
    """Format a part: its status, its tables, and its failures with their tracebacks."""
    results, definition = part["results"], PARTS[name]
    tables = []
    rows = [[result["name"], *result["row"]] for result in results if "row" in result]
    if rows:
        table = report.markdown_table(definition.header, rows)
        tables.append("\n".join([definition.title, "", *table]) + "\n")
    tables += [result["table"] for result in results if "table" in result]
    for result in results:
        if "error" in result:
            tables.append(f"**{name}, {result['name']}: failed**\n\n```\n{result['error']}```\n")
    if "log" in part:
        tables.append(
            f"**{name}: {part['status']}**; the end of its output:\n\n```\n{part['log']}\n```\n"
        )
    return tables


def has_failed(part: Result) -> bool:
    """Return whether a part or one of its measurements failed."""
    return part["status"] != "done" or any("error" in result for result in part["results"])


def benchmark(
    output: Path,
    *,
    threads: int,
    data: str | None,
    device: str,
    small: bool,
    seconds: float,
    only: Sequence[str],
    part: str | None,
    folder: Path | None,
) -> None:
    """Run the parts one after the other, and write the report."""
    report.check_at_least(1, threads=threads)
    if part is not None:
        assert folder is not None
        measure_part(part, Settings(device, small, threads, folder), output)
        return
    started = time.monotonic()
    if resolve_device(device).type != "cuda" and not small:
        raise ValueError(
            f"--device {device} is no GPU: `--small` tries the benchmark on it with tiny models, "
            "and `make bench` measures a CPU"
        )
    text, description = read_text(data)
    parts: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as temporary:
        settings = Settings(device, small, threads, Path(temporary))
        write_corpora(text, settings.folder)
        for name in only:
            limit = min(PARTS[name].max_seconds, seconds - (time.monotonic() - started))
            if limit < MIN_SECONDS:
                parts[name] = {"status": "skipped: no time was left", "seconds": 0, "results": []}
            else:
                print(f"{name}: at most {limit:.0f} s", flush=True)
                parts[name] = run_part(name, settings, limit)
            failures = sum("error" in result for result in parts[name]["results"])
            print(
                f"{name}: {parts[name]['status']} after {parts[name]['seconds']:.0f} s, "
                f"{failures} of {len(parts[name]['results'])} measurements failed",
                flush=True,
            )
    machine = report.machine_info()
    result: Result = {"machine": machine, "device": device, "small": small, "data": description}
    statuses = "; ".join(f"{name} {part['status']}" for name, part in parts.items())
    tables = [f"## tinygpt on {machine['gpu'] or device}\n", figures_table(parts)]
    for name, measured in parts.items():
        tables += part_tables(name, measured)
    tables.append(f"Data: {description}. Parts: {statuses}.\n")
    report.write(result | {"parts": parts}, tables, output)
    print(f"paste {output.with_suffix('.md')} into an issue")
    if any(map(has_failed, parts.values())):
        sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the benchmark."""
    parser = Parser(
        prog="python -m benchmarks.gpu",
        description="Check and measure everything on a GPU, in at most ten minutes.",
    )
    report.add_common_options(parser, "gpu.json")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="tinyshakespeare's input.txt (default: sources of the standard library, for which "
        "the published loss means nothing)",
    )
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (default: cuda)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--seconds", type=float, default=570, metavar="N", help="of all parts (default: 570)"
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="tiny models, to try the benchmark itself on any device",
    )
    hidden: dict[str, Any] = {"help": "of the benchmark's own processes"}
    parser.add_argument("--part", choices=list(PARTS), **hidden)
    parser.add_argument("--folder", type=Path, **hidden)
    report.run_command(parser, benchmark, arguments)


if __name__ == "__main__":
    main()
