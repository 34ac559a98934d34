"""A server on a real socket in a thread of the test process, and clients for it."""

import json
import socket
import threading
import time

import httpx

from gpt.generation import generate
from serving.engine.async_engine import AsyncEngine
from serving.engine.engine import Engine
from serving.http.app import create_app
from serving.http.limits import Timeouts
from serving.http.registry import ModelEntry, ModelRegistry
from serving.http.server import Server
from serving.tokenization import tokenize_prompt
from tokenizer import byte_tokenizer

CONTEXT_LENGTH = 20_000  # more tokens than any test waits for
TOKENIZER = byte_tokenizer()
DEADLINE = 120  # seconds to wait for what takes a moment, on a machine that stalls
JSON = {"content-type": "application/json"}
LONG = {"prompt": "", "temperature": 0, "max_tokens": 10_000}


class RunningServer:
    """Serves a model as `tiny`; tests have access to its engine."""

    def __init__(
        self,
        model,
        max_num_seqs=2,
        *,
        max_queue=150,
        limits=None,
        timeouts=None,
        key=None,
        is_translation=False,
        runs=None,
        tokenizer=TOKENIZER,
        **engine_options,
    ):
        self.engine = Engine(model, max_num_seqs, **engine_options)
        self.async_engine = AsyncEngine(self.engine, max_queue=max_queue)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self.listener.getsockname()
        self.address = f"http://{self.host}:{self.port}"
        self.registry, loaded = ModelRegistry(), threading.Event()

        async def load():
            entry = ModelEntry("tiny", self.async_engine, tokenizer, 1, is_translation)
            await self.registry.add(entry)
            self.registry.loading_message = ""
            loaded.set()

        self.server = Server(
            create_app(self.registry, limits, key=key, runs=runs),
            self.registry,
            load,
            timeouts or Timeouts(shutdown_timeout=0),
        )
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.thread.start()
        assert loaded.wait(DEADLINE)
        self.http = httpx.Client(base_url=self.address, timeout=DEADLINE)

    def complete(self, **body):
        return self.http.post("/v1/completions", json=body)

    def close(self):
        self.http.close()
        self.server.should_exit = True
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()


def reference(model, prompt, sampling_params, max_tokens, choice=0):
    """The text that `generate` returns."""
    ids = tokenize_prompt(TOKENIZER, prompt).ids
    stop_tokens = {TOKENIZER.eos_token}
    return TOKENIZER.decode(generate(model, ids, max_tokens, sampling_params, stop_tokens, choice))


def read_stream(lines):
    """Texts, finish reasons and usage of a stream, which must have the form of OpenAI's streams."""
    texts, finish_reasons, usage = {}, {}, None
    lines = [line for line in lines if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        chunk = json.loads(line.removeprefix("data: "))
        if not chunk["choices"]:
            usage = chunk["usage"]
        for choice in chunk["choices"]:
            assert choice["index"] not in finish_reasons
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            if choice["finish_reason"]:
                finish_reasons[choice["index"]] = choice["finish_reason"]
    return texts, finish_reasons, usage


def wait_until(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def connect(server, data=b""):
    """A plain connection on which `data` was sent."""
    connection = socket.create_connection((server.host, server.port), timeout=DEADLINE)
    connection.sendall(data)
    return connection


def read_all(connection):
    """All bytes until the server closes the connection."""
    received = b""
    while data := connection.recv(65536):
        received += data
    connection.close()
    return received


def completion_head(length, *fields):
    """The head of a completion request with a body of `length` bytes."""
    lines = ["POST /v1/completions HTTP/1.1", "host: x", *fields, f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def request_and_disconnect(server, body, until):
    """Send a request over a plain connection, call `until` with it and disconnect."""
    raw_body = json.dumps(body).encode()
    head = completion_head(len(raw_body), "content-type: application/json")
    with connect(server, head + raw_body) as connection:
        until(connection)


class Clients:
    """Concurrent completion requests, each in a thread of its own, and their responses."""

    def __init__(self, server, bodies):
        self.responses = [None] * len(bodies)

        def send(i):
            with httpx.Client(base_url=server.address, timeout=DEADLINE) as http:
                self.responses[i] = http.post("/v1/completions", json=bodies[i])

        self.threads = [threading.Thread(target=send, args=(i,)) for i in range(len(bodies))]
        for thread in self.threads:
            thread.start()

    def join(self):
        for thread in self.threads:
            thread.join(DEADLINE)
        assert all(response is not None for response in self.responses)
        return self.responses
