"""A server in a process of its own, and a client that times the tokens of its streams."""

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.backends import ModelSize
from gpt.checkpoint import save_config, save_tensors, unique_state_dict
from tokenizer import train_bpe

HOST = "127.0.0.1"


@dataclasses.dataclass
class RequestTiming:
    """One request as its client saw it; times in seconds since the start of the measurement."""

    sent: float
    first_token: float = math.nan
    last_token: float = math.nan
    end: float = math.nan
    num_tokens: int = 0
    status: int = 200


def save_run(folder: Path, size: ModelSize) -> None:
    """Write a run directory with an untrained model, and a tokenizer of its vocabulary size."""
    model_args = dataclasses.asdict(size)
    save_config(folder, "gpt2", model_args)
    save_tensors(folder / "model.safetensors", unique_state_dict(size.build()))
    stdlib = Path(os.__file__).parent
    texts = (file.read_text("utf-8", errors="replace") for file in sorted(stdlib.glob("*.py")))
    train_bpe(texts, size.vocab_size).save(folder / "tokenizer.json")


@contextlib.contextmanager
def running_server(size: ModelSize, options: Sequence[object]) -> Iterator[tuple[int, float]]:
    """Start `python -m serving serve`; yield its port and the seconds that it took to start."""
    with tempfile.TemporaryDirectory() as folder:
        save_run(Path(folder), size)
        command = [sys.executable, "-m", "serving", "serve", folder, "--port", "0"]
        start = time.perf_counter()
        with subprocess.Popen(
            [*command, *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            try:
                assert process.stdout
                line = process.stdout.readline()
                address = re.search(r"http://[^ ]*:(\d+)", line)
                if not address:
                    raise ValueError(f"the server did not start: {line!r}")
                yield int(address[1]), time.perf_counter() - start
            finally:
                process.terminate()


async def wait_until_compiled(port: int, num_steps: int) -> None:
    """Wait until the server reports this number of compiled steps in its metrics."""
    while True:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        compiled = re.search(rb"compiled_steps{[^}]*} (\d+)", await reader.read())
        writer.close()
        if compiled and int(compiled[1]) >= num_steps:
            return
        await asyncio.sleep(0.2)


class StreamClient(asyncio.Protocol):
    """A connection that sends one request and times the chunks of its stream; it parses them at the end."""

    def __init__(self, body: bytes, start: float) -> None:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.request, self.start = head.encode() + body, start
        self.timing = RequestTiming(time.perf_counter() - start)
        self.done = asyncio.get_running_loop().create_future()
        self.received = bytearray()

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # type: ignore[override]
        """Send the request."""
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Record the time of the first and the last chunk that has text."""
        now = time.perf_counter() - self.start
        self.received += data
        if math.isnan(self.timing.first_token) and b'"text":' in self.received:
            self.timing.first_token = now
        if b'"text":' in data:
            self.timing.last_token = now

    def connection_lost(self, error: Exception | None) -> None:
        """Parse the status and the usage."""
        self.timing.end = time.perf_counter() - self.start
        self.timing.status = int(self.received[9:12] or 0) if not error else 0
        usage = re.search(rb'"completion_tokens":(\d+)', self.received)
        self.timing.num_tokens = int(usage[1]) if usage else 0
        self.done.set_result(self.timing)


async def send_request(
    port: int, prompt: Sequence[int], max_tokens: int, start: float
) -> RequestTiming:
    """Stream one greedy completion."""
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    raw_body = json.dumps(body).encode()
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: StreamClient(raw_body, start), HOST, port)
    return await client.done
