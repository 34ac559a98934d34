"""The command line of serving: a text in the terminal, or a server."""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from tyro.conf import Positional, UseAppendAction, arg

from gpt import LanguageModel, cli
from gpt.checkpoint import find_run, is_translation_run, load_language_model
from gpt.cli import MaybeInt, MaybePath, MaybeRun, MaybeText
from gpt.device import resolve_device
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
from serving.http.limits import STREAM_INTERVAL, Limits, Timeouts, check_minimums
from serving.tokenization import IncrementalDetokenizer, tokenize_prompt, tokenize_source
from tokenizer import Tokenizer, decode_utf8

if TYPE_CHECKING:
    from serving.engine.compilation import Compiler
    from serving.http.app import ModelRegistry
    from serving.http.completions import ModelEntry
    from serving.http.runs import RunBrowser


@dataclass
class Sample:
    """Continue a text in the terminal, as it comes; with a run that translates, translate it."""

    run: MaybeRun = None
    """Run directory; without one, the newest in runs/."""
    prompt: MaybeText = None
    """Text to continue; without one, standard input, or the beginning of a document."""
    temperature: float = 0.8
    """Above 1 more surprising, below 1 less, 0 always the most likely."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that make up this probability."""
    min_p: float = 0.0
    """Choose among tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, what has been said is less likely to be said again."""
    max_tokens: int = 200
    """The most tokens; the model or its context may end the text before."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """End before this text; may be given several times."""
    seed: MaybeInt = None
    """The same seed gives the same text; without one, it is drawn and told."""
    n: Annotated[int, arg(aliases=["-n"])] = 1
    """How many texts."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps, …"""

    def __call__(self) -> None:
        """Print prompt and text, flushed token by token, and nothing else on standard output."""
        if self.n < 1:
            raise ValueError(f"-n must be at least 1, not {self.n}")
        seed = secrets.randbits(31) if self.seed is None else self.seed
        sampling = SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
        )
        path, model, tokenizer = load_run(self.run, self.device)
        prompt = self.prompt
        if prompt is None:
            stdin = sys.stdin
            prompt = "" if stdin.isatty() else decode_utf8(stdin.buffer.read(), "standard input")
        source = is_translation_run(path)
        ids, space, first, *_ = (tokenize_source if source else tokenize_prompt)(tokenizer, prompt)
        torch.set_num_threads(tune_num_threads(model))
        end = tokenizer.eos_token
        begin = end if source else None
        for choice in range(self.n):
            text = IncrementalDetokenizer(tokenizer, self.stop, space)
            tokens = generate(model, ids, self.max_tokens, sampling, {end}, choice, first, begin)
            if choice:
                print("-" * 20)
            elif self.seed is None and not sampling.greedy:
                print(f"seed {seed}: the same text again with --seed {seed}", file=sys.stderr)
            print("" if source else prompt, end="", flush=True)
            for token in tokens:
                print(text.push(token), end="", flush=True)
                if text.stopped:
                    break
            print(text.flush())


@dataclass
class Serve:
    """Answer OpenAI's completion requests over HTTP."""

    run: Annotated[Positional[tuple[Path, ...]], arg(metavar="[RUN …]", help_behavior_hint="")] = ()
    """Run directories; without any, the newest in runs/."""
    watch: MaybePath = None
    """Serve each run in this folder too, as soon as it has finished."""
    runs_dir: MaybePath = None
    """Folder of runs whose curves the page shows; when not given, the one that the first run lies in, or --watch."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, for which a key is asked."""
    port: int = 8000
    """Port to listen on; 0 takes any free one."""
    api_key: MaybeText = None
    """What clients must say to be answered; TINYGPT_API_KEY in the environment when not given, where `ps` does not show it."""
    no_api_key: bool = False
    """Listen on an address that other machines reach, and ask for no key."""
    allowed_origins: UseAppendAction[tuple[str, ...]] = ()
    """Let web pages of this address ask too (CORS); may be given several times."""
    max_num_seqs: int = 16
    """Texts made at once by each model."""
    max_queue: int = 64
    """Texts that may wait for a row of each model; more are refused with 429."""
    max_model_len: MaybeInt = None
    """Positions of a row, prompt and text together; the model's context when not given."""
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    """Tokens that a step takes in: a longer prompt is read in parts, so that it holds up nobody."""
    dtype: DType = "float32"
    """What to compute with: int8, for a CPU, takes a quarter of the memory and time, and says what that costs in perplexity."""
    threads: MaybeInt = None
    """Cores for each model's products; measured when not given."""
    compile: bool = True
    """On a CPU with a C++ compiler, compile each model's steps in the background; on a card, record them as graphs."""
    deterministic: bool = False
    """Compute each text by itself: the same to the last bit whoever else asks, and many take longer."""
    stream_interval: float = STREAM_INTERVAL
    """Seconds: tokens of a stream that come faster share a chunk, but for its first and its last; 0 tells each at once."""
    stall_timeout: float = 60.0
    """Seconds without a step, though there is work, after which /health is red."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps, …"""
    limits: Limits = field(default_factory=Limits)
    timeouts: Timeouts = field(default_factory=Timeouts)

    def __post_init__(self) -> None:
        check_minimums(
            self,
            max_num_seqs=1,
            max_queue=0,
            max_num_batched_tokens=1,
            max_model_len=1,
            threads=1,
            stream_interval=0,
        )

    def __call__(self) -> None:
        """Serve until SIGTERM or Ctrl-C."""
        # FastAPI takes longer to import than a small model to sample from.
        from serving.engine.compilation import Compiler
        from serving.http.app import ModelRegistry, create_app
        from serving.http.runs import RunBrowser
        from serving.http.server import Server

        key = self._key()
        logging.basicConfig(format="%(asctime)s %(message)s")
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
        folders = [] if self.watch and not self.run else [find_run(r) for r in self.run or (None,)]
        names = [folder.resolve().name for folder in folders]
        if len(set(names)) < len(names):
            raise ValueError(f"two runs have one name: {', '.join(names)}; rename a directory")
        for name, folder in (("watch", self.watch), ("runs", self.runs_dir)):
            if folder and not folder.is_dir():
                raise ValueError(f"--{name} {folder}: no such folder")
        runs = RunBrowser(self.runs_dir or (folders[0].resolve().parent if folders else self.watch))
        with (
            bind(self.host, self.port) as listener,
            contextlib.closing(Compiler()) as compiler,
        ):
            host = f"[{self.host}]" if ":" in self.host else self.host
            address = f"http://{host}:{listener.getsockname()[1]}"
            catalog = ModelRegistry()

            async def load() -> None:
                for folder in folders:
                    await catalog.add(await self._load(folder, compiler, runs))
                catalog.missing = ""
                gc.freeze()  # what stays is not looked through again, which takes a tenth of a second
                print(_invitation(list(catalog.entries), address, key), flush=True)
                while self.watch:
                    for folder in finished_runs(self.watch):
                        if folder.resolve().name not in catalog.entries:
                            await self._join(catalog, folder, compiler, runs)
                    await asyncio.sleep(WATCH)

            app = create_app(catalog, self.limits, key=key, origins=self.allowed_origins, runs=runs)
            server = Server(app, catalog, load, self.timeouts, key)
            server.run([listener])
            if server.failure:
                raise server.failure

    def _key(self) -> str | None:
        """The key that clients must say, if any; a ValueError where there must be one."""
        key = self.api_key or os.environ.get("TINYGPT_API_KEY")
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("--api-key must be printable ASCII without spaces, and not empty")
        if not key and not self.no_api_key and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} can be reached from other machines: give --api-key KEY, or "
                "--no-api-key to let everybody in"
            )
        return key

    async def _load(self, folder: Path, compiler: "Compiler", runs: "RunBrowser") -> "ModelEntry":
        return await asyncio.to_thread(
            run_in_own_thread, partial(self._open, folder, compiler, runs)
        )

    def _open(self, folder: Path, compiler: "Compiler", runs: "RunBrowser") -> "ModelEntry":
        """Load a run, and say what it will take."""
        from serving.engine.async_engine import AsyncEngine
        from serving.http.completions import ModelEntry
        from serving.http.runs import latest_metrics
        from serving.metrics import Metrics

        path, model, tokenizer = load_run(folder, self.device)
        name = path.resolve().name
        size = count_parameters(model)
        model, cost = quantize_and_measure(model, self.dtype, path)
        threads = self.threads or tune_num_threads(model)
        torch.set_num_threads(threads)
        engine = Engine(
            model,
            self.max_num_seqs,
            self.max_model_len,
            max_num_batched_tokens=self.max_num_batched_tokens,
            deterministic=self.deterministic,
            num_scheduler_steps=1 if self.deterministic else tune_scheduler_steps(model),
            cuda_graphs=self.compile and next(model.parameters()).device.type == "cuda",
        )
        mebibytes = engine.memory_bytes / 2**20
        print(
            f"{name}: {size:,} parameters in {self.dtype}; {self.max_num_seqs} rows of "
            f"{engine.cache_length:,} positions, {mebibytes:,.1f} MiB with the weights; threads: {threads}",
            file=sys.stderr,
        )
        if cost:
            print(f"{name}: {cost}", file=sys.stderr)
        service = AsyncEngine(
            engine,
            max_queue=self.max_queue,
            stall_timeout=self.stall_timeout,
            metrics=Metrics(name),
            threads=threads,
            stream_interval=self.stream_interval,
        )
        if self.compile:
            compiler.add(engine, threads)
        created = int((path / "model.safetensors").stat().st_mtime)
        return ModelEntry(
            name,
            service,
            tokenizer,
            created,
            is_translation_run(path),
            dtype=self.dtype,
            num_parameters=size,
            bits_per_byte=latest_metrics(path).get("final_bits_per_byte"),
            run=runs.name_of(path),
        )

    async def _join(
        self, catalog: "ModelRegistry", folder: Path, compiler: "Compiler", runs: "RunBrowser"
    ) -> None:
        """Serve one more run; one that cannot be is named, and the others go on."""
        try:
            await catalog.add(await self._load(folder, compiler, runs))
            print(f"{folder.resolve().name} is served too", flush=True)
        except (ValueError, OSError) as error:
            logging.getLogger(__name__).error("%s", error)


WATCH = 2.0
"""Seconds between two looks at a watched folder."""


def finished_runs(folder: Path) -> list[Path]:
    """The runs in a folder whose training has ended, the oldest first."""
    found = []
    for metrics in folder.glob("*/metrics.jsonl"):
        run = metrics.parent
        whole = (run / "model.safetensors").exists() and (run / "tokenizer.json").exists()
        if whole and b'"final_' in metrics.read_bytes()[-4096:]:
            found.append(run)
    return sorted(found, key=lambda run: (run / "model.safetensors").stat().st_mtime)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address; True for one that there is not."""
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)
    except OSError:
        return True  # `bind` says it better
    return all(
        ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback for *_, address in found
    )


def _invitation(names: Sequence[str], address: str, key: str | None) -> str:
    """What is served where, and a command to try it with."""
    if not names:
        return f"nothing to serve yet at {address}"
    body = f'{{"model": "{names[0]}", "prompt": "", "max_tokens": 200, "stream": true}}'
    header = " -H 'Authorization: Bearer KEY'" if key else ""
    return (
        f"{', '.join(names)} at {address}    try:  curl -N {address}/v1/completions "
        f"-H 'Content-Type: application/json'{header} -d '{body}'"
    )


def load_run(run: Path | None, device: str) -> tuple[Path, LanguageModel, Tokenizer]:
    """The directory, model and tokenizer of a run; a ValueError says what is wrong with one of them."""
    path = find_run(run)
    model = load_language_model(path, resolve_device(device))
    tokenizer = Tokenizer.load(path)
    if model.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{path}: the model has {model.vocab_size} tokens and its tokenizer.json "
            f"{tokenizer.vocab_size}: they are not of the same run"
        )
    return path, model, tokenizer


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address, not listening yet; an OSError says why there can be none."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be between 0 and 65535, not {port}")
    with contextlib.ExitStack() as undo:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, address = found[0]
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise OSError(
                f"cannot listen on {host}, port {port}: {error.strerror}; "
                "choose others with --host, --port"
            ) from error
        undo.pop_all()
    return listener


def main(prog: str = "python -m serving", arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    cli.main(
        prog,
        "Text from a trained run: in the terminal, or over HTTP.",
        {"sample": Sample, "serve": Serve},
        arguments,
    )
