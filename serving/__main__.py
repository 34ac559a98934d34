"""The command line of serving: a text in the terminal, or a server."""

import contextlib
import logging
import secrets
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, UseAppendAction, arg

from gpt import LanguageModel
from gpt.checkpoint import find_run, open_language_model
from gpt.cli import MaybeInt, MaybeRun, MaybeText, main
from gpt.describe import parameters
from gpt.device import find_device
from gpt.sampling import Sampling, generate
from serving.text import Text, read_prompt
from tokenizer import Tokenizer, from_utf8


@dataclass
class Sample:
    """Continue a text in the terminal, as it comes."""

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
        sampling = Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
        )
        _, model, tokenizer = open_run(self.run, self.device)
        prompt = self.prompt
        if prompt is None:
            stdin = sys.stdin
            prompt = "" if stdin.isatty() else from_utf8(stdin.buffer.read(), "standard input")
        ids, space, first = read_prompt(tokenizer, prompt)
        settle_threads([model])
        end = {tokenizer.end_of_text}
        for choice in range(self.n):
            text = Text(tokenizer, self.stop, space)
            tokens = generate(model, ids, self.max_tokens, sampling, end, choice, first)
            if choice:
                print("-" * 20)
            elif self.seed is None and not sampling.greedy:
                print(f"seed {seed}: the same text again with --seed {seed}", file=sys.stderr)
            print(prompt, end="", flush=True)
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
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, without a password."""
    port: int = 8000
    """Port to listen on; 0 takes any free one."""
    rows: int = 16
    """Texts made at once by each model; the others wait."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps, …"""

    def __call__(self) -> None:
        """Serve until SIGTERM or Ctrl-C."""
        # FastAPI takes longer to import than a small model to sample from.
        from serving.api import Served, Server
        from serving.engine import Engine
        from serving.service import Service

        logging.basicConfig(format="%(asctime)s %(message)s")
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
        with bind(self.host, self.port) as listener:
            models = []
            for run in self.run or (None,):
                path, model, tokenizer = open_run(run, self.device)
                created = int((path / "model.safetensors").stat().st_mtime)
                service = Service(Engine(model, self.rows))
                models.append(Served(path.resolve().name, service, tokenizer, created))
            names = [served.name for served in models]
            if len(set(names)) < len(names):
                raise ValueError(f"two runs have one name: {', '.join(names)}; rename a directory")
            settle_threads([served.service.engine.model for served in models])
            host = f"[{self.host}]" if ":" in self.host else self.host
            address = f"http://{host}:{listener.getsockname()[1]}"

            def ready() -> None:
                body = f'{{"model": "{names[0]}", "prompt": "", "max_tokens": 200, "stream": true}}'
                print(
                    f"{', '.join(names)} at {address}    try:  curl -N {address}/v1/completions "
                    f"-H 'Content-Type: application/json' -d '{body}'",
                    flush=True,
                )

            Server(models, ready).run([listener])


def open_run(run: Path | None, device: str) -> tuple[Path, LanguageModel, Tokenizer]:
    """The directory, model and tokenizer of a run; a ValueError says what is wrong with one of them."""
    path = find_run(run)
    model = open_language_model(path, find_device(device))
    tokenizer = Tokenizer.open(path)
    if model.vocabulary != tokenizer.vocabulary:
        raise ValueError(
            f"{path}: the model has {model.vocabulary} tokens and its tokenizer.json "
            f"{tokenizer.vocabulary}: they are not of the same run"
        )
    return path, model, tokenizer


def settle_threads(models: Sequence[LanguageModel]) -> None:
    """One thread for small models: their products are over before a second one has joined in.

    On a machine with other work, waiting for it can take a hundred times as long as the product.
    """
    if all(parameters(model) < 10_000_000 for model in models):
        torch.set_num_threads(1)


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


if __name__ == "__main__":
    main(
        "python -m serving",
        "Texts from a trained run: in the terminal, or over HTTP.",
        {"sample": Sample, "serve": Serve},
    )
