"""The commands `sample` and `serve`: text generation in the terminal and over HTTP."""

import asyncio
import contextlib
import functools
import gc
import ipaddress
import json
import logging
import secrets
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from tyro.conf import Positional, UseAppendAction, arg

from gpt import LanguageModel, cli, settings
from gpt.checkpoint import find_run, is_translation_run, load_language_model
from gpt.cli import OptionalInt, OptionalPath, OptionalRun, OptionalText
from gpt.device import has_cuda_graphs, resolve_device
from gpt.generation import generate
from gpt.kernels.quantization import DType
from gpt.sampling import SamplingParams
from gpt.summary import count_parameters
from serving.engine.autotune import (
    quantize_and_measure,
    run_in_own_thread,
    tune_num_threads,
    tune_scheduler_steps,
)
from serving.engine.engine import MAX_NUM_BATCHED_TOKENS, Engine
from serving.engine.sequence import STREAM_INTERVAL
from serving.http.limits import Limits, Timeouts, check_minimums
from serving.http.runs import RunBrowser, latest_metrics
from serving.tokenization import IncrementalDetokenizer, tokenize_prompt, tokenize_source
from tokenizer import Tokenizer, decode_utf8

if TYPE_CHECKING:
    from serving.engine.compilation import Compiler
    from serving.http.registry import ModelEntry, ModelRegistry

WATCH_INTERVAL = 2.0
"""Seconds between two scans of a watched folder."""
MAX_THREADS = 1024
"""Upper bound of --threads."""


@dataclass
class Sample:
    """Generate text in the terminal, token by token; with a translation run, translate the prompt."""

    run: OptionalRun = None
    """Run: a name in runs/, or a path; default: the newest in runs/."""
    prompt: OptionalText = None
    """Text to continue or translate; default: standard input, or in a terminal an empty prompt, which starts a new document."""
    temperature: float = 0.8
    """Divides the logits: above 1 more random, below 1 less; 0: greedy decoding."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample from the fewest likeliest tokens whose probabilities reach this sum (0 to 1)."""
    min_p: float = 0.0
    """Sample from tokens at least this fraction as likely as the likeliest (0 to 1)."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that are in the prompt or output become less likely."""
    max_tokens: int = 200
    """Maximum output tokens; an EOS token or a full context also ends the output."""
    min_tokens: int = 0
    """Output tokens before which neither EOS nor a stop string ends the output."""
    ignore_eos: bool = False
    """Continue after the EOS token."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """Stop string: the output ends before it; may be repeated."""
    seed: OptionalInt = None
    """The same seed gives the same output; default: a random seed, which is printed."""
    n: Annotated[int, arg(aliases=["-n"])] = 1
    """Number of outputs."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1, mps, …"""

    def __call__(self) -> None:
        """Print the prompt and each token of the output, and nothing else on standard output."""
        if self.n < 1:
            raise ValueError(f"-n must be at least 1, not {self.n}")
        check_minimums(self, max_tokens=0, min_tokens=0)
        seed = secrets.randbits(31) if self.seed is None else self.seed
        sampling_params = SamplingParams(
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            min_tokens=self.min_tokens,
            seed=seed,
        )
        path, model, tokenizer = load_run(self.run, self.device)
        prompt = self.prompt
        if prompt is None:
            is_terminal = sys.stdin.isatty()
            prompt = "" if is_terminal else decode_utf8(sys.stdin.buffer.read(), "standard input")
        is_translation = is_translation_run(path)
        tokens = (tokenize_source if is_translation else tokenize_prompt)(tokenizer, prompt)
        torch.set_num_threads(tune_num_threads(model))
        eos_token = tokenizer.eos_token
        start_token = eos_token if is_translation else None
        stop_tokens = set() if self.ignore_eos else {eos_token}
        arguments = model, tokens.ids, self.max_tokens, sampling_params, stop_tokens
        for choice in range(self.n):
            detokenizer = IncrementalDetokenizer(
                tokenizer,
                self.stop,
                tokens.trailing_space,
                prompt=tokens.ids,
                min_tokens=self.min_tokens,
            )
            output = generate(*arguments, choice, tokens.allowed_first_tokens, start_token)
            if choice:
                print("-" * 20)
            elif self.seed is None and not sampling_params.greedy:
                print(f"seed {seed}: --seed {seed} repeats this output", file=sys.stderr)
            print("" if is_translation else prompt, end="", flush=True)
            for token in output:
                print(detokenizer.push(token), end="", flush=True)
                if detokenizer.stopped:
                    break
            print(detokenizer.flush())


@dataclass
class Serve:
    """Serve runs over HTTP with an OpenAI-compatible completions API and a web page."""

    run: Annotated[Positional[tuple[str, ...]], arg(metavar="[RUN …]", help_behavior_hint="")] = ()
    """Runs: names in runs/, or paths; default: the newest in runs/."""
    watch: OptionalPath = None
    """Also serve each run in this folder as soon as its training has finished."""
    runs_dir: OptionalPath = None
    """Folder of runs whose metrics the web page shows; default: the folder of the first run, or --watch."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is reachable from other machines and needs an API key."""
    port: int = 8000
    """Port to listen on; 0 chooses a free one."""
    api_key: OptionalText = None
    """API key that clients must send as a bearer token; the environment variable TINYGPT_API_KEY is not shown by `ps`."""
    no_api_key: bool = False
    """Allow an address that other machines can reach without an API key."""
    allowed_origins: UseAppendAction[tuple[str, ...]] = ()
    """Origin of another web page that may send requests, such as https://example.org (CORS); may be repeated."""
    max_num_seqs: int = 16
    """Maximum running sequences of each model: the batch size of decoding."""
    max_queue: int = 64
    """Maximum waiting sequences of each model; requests above it get a 429 response."""
    max_model_len: OptionalInt = None
    """Maximum tokens of a sequence, prompt and output together; default: the maximum length of the model, if it has one."""
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    """Maximum tokens of an engine step: longer prompts are processed in chunks and delay no running sequence."""
    dtype: DType = "float32"
    """Number format of weights and products; int8, for CPUs, takes a quarter of the memory and time. Its cost in perplexity is printed."""
    threads: OptionalInt = None
    """CPU threads of each model; default: the fastest number, measured at the start."""
    no_compile: bool = False
    """Do not compile steps in the background (CPU with a C++ compiler) or capture CUDA graphs (GPU)."""
    deterministic: bool = False
    """Compute each sequence in a batch of one: outputs are bit-identical under any load, but many sequences take longer."""
    stream_interval: float = STREAM_INTERVAL
    """Minimum seconds between two chunks of a stream: tokens that come faster share a chunk; the first and the last are sent at once. 0: a chunk for each step."""
    stall_timeout: float = 60.0
    """Seconds without a finished engine step, while there is work, after which /health returns 503."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1, mps, …"""
    config: OptionalPath = None
    """TOML file of options, such as port = 8000. Environment variables such as TINYGPT_PORT win over it, and options that are typed over both."""
    limits: Limits = field(default_factory=Limits)
    timeouts: Timeouts = field(default_factory=Timeouts)

    def __post_init__(self) -> None:
        check_minimums(self, max_num_seqs=1, max_queue=0, max_num_batched_tokens=1)
        check_minimums(self, max_model_len=1, threads=1, stream_interval=0)
        if (self.threads or 1) > MAX_THREADS:
            raise ValueError(f"--threads must be at most {MAX_THREADS}, not {self.threads}")
        if not 0 < self.stall_timeout < 1e6:
            raise ValueError(f"--stall-timeout must be above 0, not {self.stall_timeout}")

    def __call__(self) -> None:
        """Serve until SIGTERM or Ctrl-C."""
        # Imported here since FastAPI takes longer to import than `sample` takes with a small model.
        from serving.engine.compilation import Compiler
        from serving.http.app import create_app
        from serving.http.registry import ModelRegistry
        from serving.http.server import Server

        key = self.checked_key()
        logging.basicConfig(format="%(asctime)s %(message)s")
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
        paths = self.find_runs()
        runs = self.run_browser(paths)
        with bind(self.host, self.port) as listener, contextlib.closing(Compiler()) as compiler:
            ip, port, *_ = listener.getsockname()
            is_loopback = ipaddress.ip_address(ip.partition("%")[0]).is_loopback
            if not (key or self.no_api_key or is_loopback):
                raise ValueError(
                    f"--host {self.host} can be reached from other machines: give --api-key KEY, "
                    "or --no-api-key to allow requests without a key"
                )
            host = f"[{self.host}]" if ":" in self.host else self.host
            address = f"http://{host}:{port}"
            registry = ModelRegistry()

            async def load_all() -> None:
                await self.load_runs(paths, registry, compiler, runs)
                print(_startup_message(list(registry.entries), address, key), flush=True)
                await self.watch_runs(registry, compiler, runs)

            app = create_app(
                registry, self.limits, key=key, allowed_origins=self.allowed_origins, runs=runs
            )
            server = Server(app, registry, load_all, self.timeouts)
            server.run([listener])
            if server.load_error:
                raise server.load_error

    def checked_key(self) -> str | None:
        """Return the API key; a ValueError if no client could send it."""
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("--api-key must be printable ASCII without spaces, and not empty")
        return key

    def find_runs(self) -> list[Path]:
        """Return the directories of the runs to serve from the start; a ValueError if one is missing."""
        paths = [] if self.watch and not self.run else [find_run(r) for r in self.run or (None,)]
        names = [path.resolve().name for path in paths]
        if len(set(names)) < len(names):
            raise ValueError(f"two runs have one name: {', '.join(names)}; rename a directory")
        for option, folder in (("--watch", self.watch), ("--runs-dir", self.runs_dir)):
            if folder and not folder.is_dir():
                raise ValueError(f"{option} {folder}: no such folder")
        return paths

    def run_browser(self, paths: Sequence[Path]) -> RunBrowser:
        """Return the folder of runs for the web page of a server of these runs."""
        return RunBrowser(self.runs_dir or (paths[0].resolve().parent if paths else self.watch))

    async def load_runs(
        self,
        paths: Sequence[Path],
        registry: "ModelRegistry",
        compiler: "Compiler",
        runs: RunBrowser,
    ) -> None:
        """Load runs and serve them, while the event loop goes on."""
        for path in paths:
            work = functools.partial(self.load_entry, path, compiler, runs)
            await registry.add(await asyncio.to_thread(run_in_own_thread, work))
        registry.loading_message = ""
        gc.freeze()  # a collection that traverses the models takes a tenth of a second

    async def watch_runs(
        self, registry: "ModelRegistry", compiler: "Compiler", runs: RunBrowser
    ) -> None:
        """Serve each run in the watched folder, if there is one, once its training has finished."""
        while self.watch:
            for path in finished_runs(self.watch):
                name = path.resolve().name
                if name in registry.entries:
                    continue
                try:
                    await self.load_runs([path], registry, compiler, runs)
                    print(f"{name}: now served", flush=True)
                except (ValueError, OSError) as error:  # the other models stay served
                    logging.getLogger(__name__).error("%s", error)
            await asyncio.sleep(WATCH_INTERVAL)

    def load_entry(
        self,
        run: str | Path | None,
        compiler: "Compiler | None" = None,
        runs: RunBrowser | None = None,
    ) -> "ModelEntry":
        """Load a run, print its size and return its entry, whose engine is not started yet.

        Args:
            run: A name in runs/, or a path; None: the newest in runs/.
            compiler: Compiles the engine's steps in the background, unless `no_compile`.
            runs: The folder of runs in which the web page looks the run up.
        """
        from serving.engine.async_engine import AsyncEngine
        from serving.http.registry import ModelEntry
        from serving.metrics import Metrics

        path, model, tokenizer = load_run(run, self.device)
        name = path.resolve().name
        num_parameters = count_parameters(model)
        model, quantization_cost = quantize_and_measure(model, self.dtype, path)
        threads = self.threads or tune_num_threads(model)
        torch.set_num_threads(threads)
        engine = Engine(
            model,
            self.max_num_seqs,
            self.max_model_len,
            max_num_batched_tokens=self.max_num_batched_tokens,
            deterministic=self.deterministic,
            num_scheduler_steps=1 if self.deterministic else tune_scheduler_steps(model),
            cuda_graphs=not self.no_compile and has_cuda_graphs(next(model.parameters()).device),
        )
        size = (
            f"{num_parameters:,} parameters in {self.dtype}; {self.max_num_seqs} slots of "
            f"{engine.cache_length:,} tokens, {engine.memory_bytes / 2**20:,.1f} MiB with the weights; "
            f"threads: {threads}"
        )
        for line in filter(None, (size, quantization_cost)):
            print(f"{name}: {line}", file=sys.stderr)
        async_engine = AsyncEngine(
            engine,
            max_queue=self.max_queue,
            stall_timeout=self.stall_timeout,
            metrics=Metrics(name),
            threads=threads,
            stream_interval=self.stream_interval,
        )
        if compiler and not self.no_compile:
            compiler.add(engine, threads)
        return ModelEntry(
            name,
            async_engine,
            tokenizer,
            int((path / "model.safetensors").stat().st_mtime),
            is_translation_run(path),
            dtype=self.dtype,
            num_parameters=num_parameters,
            bits_per_byte=latest_metrics(path).get("final_bits_per_byte"),
            run=runs.name_of(path) if runs else None,
        )


def finished_runs(folder: Path) -> list[Path]:
    """Return the runs in a folder whose training has finished, the oldest first."""
    finished = [
        weights
        for weights in folder.glob("*/model.safetensors")
        if weights.with_name("tokenizer.json").exists()
        and any(key.startswith("final_") for key in latest_metrics(weights.parent))
    ]
    return [file.parent for file in sorted(finished, key=lambda file: file.stat().st_mtime)]


def _startup_message(names: Sequence[str], address: str, key: str | None) -> str:
    """Return what is served where, and a command to try it with."""
    if not names:
        return f"no finished run to serve yet; listening at {address}"
    body = json.dumps({"model": names[0], "prompt": "", "max_tokens": 200, "stream": True})
    header = " -H 'Authorization: Bearer KEY'" if key else ""
    return (
        f"{', '.join(names)} at {address}    try:  curl -N {address}/v1/completions "
        f"-H 'Content-Type: application/json'{header} -d {shlex.quote(body)}"
    )


def load_run(run: str | Path | None, device: str) -> tuple[Path, LanguageModel, Tokenizer]:
    """Return directory, model and tokenizer of a run; a ValueError says what is wrong with it."""
    path = find_run(run)
    model = load_language_model(path, resolve_device(device))
    tokenizer = Tokenizer.load(path)
    if model.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{path}: the vocabulary of the model has {model.vocab_size} tokens, that of "
            f"tokenizer.json {tokenizer.vocab_size}: they are not of the same run"
        )
    return path, model, tokenizer


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; an OSError says why it is impossible."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be between 0 and 65535, not {port}")
    try:
        first, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = first
        with contextlib.ExitStack() as on_error:
            listener = on_error.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            on_error.pop_all()
    except OSError as error:
        reason = f"cannot listen on {host}, port {port}: {error.strerror}"
        raise OSError(f"{reason}; choose others with --host, --port") from error
    return listener


def main(prog: str = "python -m serving", arguments: Sequence[str] | None = None) -> None:
    """Run one command; `serve` takes its defaults from the environment and from its --config file."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    serve, note = Serve(), ""
    if arguments[:1] == ["serve"]:
        with cli.reported_errors(prog):
            serve, note = _configured(serve, prog, arguments)
    cli.main(
        prog,
        "Generate text from a trained run, in the terminal or over HTTP.",
        {"sample": Sample, "serve": Serve},
        arguments,
        {"serve": serve},
        note,
    )


def _configured(serve: Serve, prog: str, arguments: Sequence[str]) -> tuple[Serve, str]:
    """Return the command with the options of file and environment, and a note on where they come from."""
    config = settings.find_option(arguments, "--config")
    found = read_settings(prog, settings.option_names(serve), config)
    (serve,) = settings.apply(found, arguments, serve)
    return serve, settings.describe_sources(found)


def read_settings(prog: str, options: Sequence[str], config: str | None) -> settings.Settings:
    """Return the options of the configuration file and of the environment, which may name the file."""
    found = settings.read_environment(prog, [*options, "config"])
    from_environment = found.pop("config", None)
    if config is None and from_environment:
        config = from_environment.value
    if config is not None:
        found = settings.read_settings(Path(config), ("limits", "timeouts")) | found
    return found
