"""The server under load, with slow, broken and disconnecting clients."""

import json
import os
import sys
import threading
import time

import httpx
import pytest
import torch

from gpt import GPT
from serving.http.limits import Limits, Timeouts
from tests.serving.running_server import (
    CONTEXT_LENGTH,
    DEADLINE,
    JSON,
    LONG,
    TOKENIZER,
    Clients,
    RunningServer,
    connect,
    read_all,
    read_stream,
    request_and_disconnect,
    wait_until,
)
from tokenizer import train_bpe

SHORT_TIMEOUTS = Timeouts(
    header_timeout=0.2, body_timeout=0.4, shutdown_timeout=0.5, max_connections=8
)
JSON_FIELD = "content-type: application/json"


@pytest.fixture
def start(model):
    """Starts servers, and closes them after the test."""
    servers = []

    def start_server(max_num_seqs=2, **options):
        servers.append(RunningServer(model, max_num_seqs, **options))
        return servers[-1]

    yield start_server
    for server in servers:
        server.close()


def block_steps(server, monkeypatch):
    """Events: a step has started; steps may finish."""
    started, released, step = threading.Event(), threading.Event(), server.engine.step

    def blocking_step():
        started.set()
        released.wait(DEADLINE)
        return step()

    monkeypatch.setattr(server.engine, "step", blocking_step)
    return started, released


def error_of(response):
    """Status and error of a response from a plain connection."""
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_full_queue_is_429_with_retry_after(start):
    server = start(max_queue=3)
    clients = Clients(server, [{**LONG, "max_tokens": 300}] * 30)
    responses = clients.join()
    refused = [response for response in responses if response.status_code == 429]
    completed = [response for response in responses if response.status_code == 200]
    assert len(refused) + len(completed) == 30
    assert 5 <= len(completed) < 30
    for response in refused:
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert response.json()["error"]["type"] == "rate_limit_error"
    assert len({response.json()["choices"][0]["text"] for response in completed}) == 1
    assert server.complete(prompt="a").status_code == 200
    too_many = server.complete(prompt="a", n=6)
    assert too_many.status_code == 400
    assert "6 sequences, this server has capacity for 5" in too_many.json()["error"]["message"]


def test_a_full_server_refuses_with_a_retry_after_and_counts_it(start):
    server = start(1, max_queue=0, key="secret")
    headers = {"authorization": "Bearer secret"}
    with (
        httpx.Client(base_url=server.address, headers=headers, timeout=DEADLINE) as http,
        http.stream("POST", "/v1/completions", json={**LONG, "stream": True}),
    ):
        wait_until(lambda: server.async_engine.num_unfinished == 1)
        refused = http.post("/v1/completions", json=LONG)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1"
        assert server.complete(**LONG).status_code == 401
        assert http.get("/v1/models").status_code == 200
        assert "tinygpt:requests_refused_total" in http.get("/metrics").text
    wait_until(lambda: server.async_engine.num_unfinished == 0)
    with httpx.Client(base_url=server.address, headers=headers, timeout=DEADLINE) as http:
        assert http.post("/v1/completions", json={**LONG, "max_tokens": 3}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_disconnects_of_many_clients_leave_nothing_behind(start, stream):
    server = start(4, max_queue=400)
    body = {**LONG, "max_tokens": 60, "stream": stream}
    barrier = threading.Barrier(61)

    def disconnect():
        long_body = {**body, "max_tokens": CONTEXT_LENGTH - 1}
        request_and_disconnect(server, long_body, lambda _: barrier.wait(DEADLINE))

    threads = [threading.Thread(target=disconnect) for _ in range(60)]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.async_engine.num_unfinished == 60)
    clients = Clients(server, [body] * 140)
    barrier.wait(DEADLINE)
    assert {response.status_code for response in clients.join()} == {200}
    wait_until(lambda: server.engine.is_idle)
    assert not server.async_engine._streams
    assert server.async_engine.num_unfinished == 0


def test_shutdown_lets_sequences_finish_within_the_timeout(start, monkeypatch):
    server = start(4, timeouts=Timeouts(shutdown_timeout=3.0))
    _, released = block_steps(server, monkeypatch)  # the short one must not end before all came
    clients = Clients(
        server, [{**LONG, "stream": True}] * 3 + [{**LONG, "stream": True, "max_tokens": 30}]
    )
    wait_until(lambda: server.async_engine.num_unfinished == 4)
    server.server.should_exit = True
    wait_until(lambda: not server.async_engine.is_ready)
    released.set()
    late = server.complete(prompt="a")
    assert late.status_code == 503
    assert late.headers["retry-after"] == "1"
    assert server.http.get("/ready").status_code == 503
    assert server.http.get("/health").status_code == 200
    start_time = time.monotonic()
    streams = [response.text.split("\n") for response in clients.join()]
    assert time.monotonic() - start_time < 8
    for lines in streams:
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert ['"error"' in "".join(lines) for lines in streams] == [True, True, True, False]
    _, finish_reasons, _ = read_stream(streams[3])
    assert finish_reasons == {0: "length"}


def read_chunks(response):
    """The choices in the chunks of a stream, and its last event before [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    return [event["choices"][0] for event in events if event.get("choices")], events[-1]


def test_stream_interval_joins_tokens_to_chunks_and_loses_none(start):
    server, streams = start(), []
    body = {**LONG, "max_tokens": 300, "stream": True, "return_token_ids": True}
    for interval in (1000, 0):
        server.async_engine.stream_interval = interval
        streams.append(read_chunks(server.complete(**body))[0])
    assert len(streams[0]) == 2
    assert len(streams[0][0]["token_ids"]) <= 1
    assert len(streams[1]) > 2
    texts = {"".join(chunk["text"] for chunk in chunks) for chunks in streams}
    body["stream"] = False
    assert texts == {server.complete(**body).json()["choices"][0]["text"]}


def test_shutdown_sends_buffered_tokens_before_the_error(start):
    server = start()
    server.async_engine.stream_interval = 1000
    clients = Clients(server, [{**LONG, "stream": True, "return_token_ids": True}])
    wait_until(lambda: server.engine.running and len(server.engine.running[0].tokens) > 100)
    server.server.should_exit = True
    (response,) = clients.join()
    chunks, last = read_chunks(response)
    assert "shutting down" in last["error"]["message"]
    assert sum(len(chunk["token_ids"]) for chunk in chunks) > 90


def test_loading_server_responds_with_503(model):
    server = RunningServer(model, 1)
    entries = dict(server.registry.entries)
    server.registry.loading_message = "the server is loading its models"
    server.registry.entries.clear()
    try:
        for response in (server.complete(prompt="a"), server.http.get("/ready")):
            assert response.status_code == 503
            assert "loading" in response.text
        assert server.http.get("/health").status_code == 200
    finally:
        server.registry.entries.update(entries)
        server.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_engine_thread_has_lower_priority(start, monkeypatch):
    server, priorities = start(), []
    step = server.engine.step

    def recording_step():
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return step()

    monkeypatch.setattr(server.engine, "step", recording_step)
    assert server.complete(prompt="a").status_code == 200
    assert set(priorities) == {min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)}


def test_health_is_503_while_a_step_stalls(start, monkeypatch):
    server = start(1)
    server.async_engine.stall_timeout = 0.05
    started, released = block_steps(server, monkeypatch)
    clients = Clients(server, [{"prompt": "a", "max_tokens": 2}])
    assert started.wait(DEADLINE)
    wait_until(lambda: server.http.get("/health").status_code == 503)
    released.set()
    clients.join()
    assert server.http.get("/health").status_code == 200


def test_incomplete_head_or_body_is_408(start):
    server = start(timeouts=SHORT_TIMEOUTS)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for data, part in (
        (b"", "head"),
        (head[:30], "head"),
        (head + b'Content-Length: 50\r\n\r\n{"prompt"', "body"),
        (head + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"pro', "body"),
    ):
        status, error = error_of(read_all(connect(server, data)))
        assert status == 408
        assert f"the {part} of the request was not complete within" in error["message"]


def test_timeouts_do_not_apply_to_responses(start, monkeypatch):
    server = start(timeouts=SHORT_TIMEOUTS)
    started, released = block_steps(server, monkeypatch)
    responses = []
    thread = threading.Thread(target=lambda: responses.append(server.complete(prompt="a")))
    thread.start()
    assert started.wait(DEADLINE)
    time.sleep(2 * SHORT_TIMEOUTS.body_timeout)
    released.set()
    thread.join(DEADLINE)
    responses.append(server.complete(prompt="a"))  # on the same connection
    assert [response.status_code for response in responses] == [200, 200]


def test_connections_above_the_limit_are_503(start):
    server = start(timeouts=Timeouts(max_connections=3, shutdown_timeout=0))
    idle = [connect(server) for _ in range(3)]
    wait_until(lambda: len(server.server.server_state.connections) >= 3)
    status, error = error_of(read_all(connect(server)))
    assert status == 503
    assert "too many connections" in error["message"]
    for connection in idle:
        connection.close()
    wait_until(lambda: not server.server.server_state.connections)
    assert server.complete(prompt="a").status_code == 200


def test_invalid_http_is_400_in_openai_shape(start):
    status, error = error_of(read_all(connect(start(), b"\x16\x03\x01 hello\r\n\r\n")))
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_body_above_the_limit_is_413(start):
    server = start(limits=Limits(max_body_bytes=1000))
    response = server.complete(prompt="a" * 1000)
    assert response.status_code == 413
    assert "larger than 1,000 bytes" in response.json()["error"]["message"]
    chunks = (b'{"prompt": "', *([b"a" * 100] * 20), b'"}')
    response = server.http.post("/v1/completions", content=iter(chunks), headers=JSON)
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert server.complete(prompt="a" * 900).status_code == 200


def test_max_prompt_tokens(start):
    server = start(limits=Limits(max_prompt_tokens=10))
    assert server.complete(prompt="a" * 9, max_tokens=1).status_code == 200
    response = server.complete(prompt="a" * 10)
    assert response.status_code == 400
    assert "11 tokens long, this server allows 10" in response.json()["error"]["message"]


def test_all_routes_but_health_need_the_api_key(start):
    key = "sésame".encode().hex()
    server = start(key=key)
    headers = {"authorization": f"Bearer {key}"}
    for path in ("/v1/models", "/docs", "/metrics", "/ready", "/nowhere"):
        for wrong in ({}, {"authorization": "Bearer x"}, {"authorization": key}):
            response = server.http.get(path, headers=wrong)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/v1/models", headers=headers).status_code == 200
    body = {"prompt": "a", "max_tokens": 1}
    assert server.http.post("/v1/completions", json=body).status_code == 401
    assert server.http.post("/v1/completions", json=body, headers=headers).status_code == 200


def test_other_origins_are_not_allowed_by_default(start):
    response = start().http.get("/v1/models", headers={"origin": "http://elsewhere"})
    assert "access-control-allow-origin" not in response.headers


def test_metrics_count_requests_and_tokens(start):
    server = start()

    def value(name):
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total")
    before = {name: value("tinygpt:" + name) for name in names}
    assert server.complete(prompt="abc", max_tokens=7, temperature=0, n=2).status_code == 200
    after = {name: value("tinygpt:" + name) for name in names}
    assert {name: after[name] - before[name] for name in names} == {
        "prompt_tokens_total": 4,
        "generation_tokens_total": 14,
        "request_success_total": 2,
    }
    for name in (
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "request_queue_time_seconds_count",
    ):
        assert value("tinygpt:" + name) > 0
    assert value("tinygpt:num_requests_running") == 0
    assert value("tinygpt:num_requests_waiting") == 0


def test_tokenize_and_detokenize(start):
    http = start().http
    response = http.post("/tokenize", json={"prompt": "aé"}).json()
    expected = {"count": 4, "max_model_len": CONTEXT_LENGTH, "tokens": [256, 97, 195, 169]}
    assert response == expected
    bare = http.post("/tokenize", json={"prompt": "aé", "add_special_tokens": False}).json()
    assert bare["tokens"] == [97, 195, 169]
    assert http.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": "aé"}
    assert http.post("/detokenize", json={"tokens": [257]}).status_code == 400
    assert http.post("/tokenize", json={"prompt": "a", "x": 1}).status_code == 400


def test_echo_and_logprobs_are_those_of_the_model(start, model):
    body = {"prompt": "aé ", "max_tokens": 12, "seed": 3, "echo": True, "logprobs": 3}
    choice = start().complete(**body).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("aé ")
    ids = [256, *TOKENIZER.encode("aé")]
    count = len(logprobs["tokens"])
    assert {len(values) for values in logprobs.values()} == {count}
    assert logprobs["tokens"][:3] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"][:4] == [0, 1, 1, 2]
    logprobs_TV = model(torch.tensor([ids]))[0].log_softmax(-1).detach()
    for position, token in enumerate(ids[1:]):
        expected = float(logprobs_TV[position, token])
        assert logprobs["token_logprobs"][position] == pytest.approx(expected, abs=1e-4)
        assert len(logprobs["top_logprobs"][position]) == 3
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset : offset + len(token)] == token


@pytest.fixture(scope="module")
def bpe_server():
    """A server whose tokenizer leaves a trailing space to the next token, and its model."""
    torch.manual_seed(0)
    bpe_model = GPT(BPE.vocab_size, 64, width=16, depth=1, heads=2).eval()
    server = RunningServer(bpe_model, 2, tokenizer=BPE)
    server.async_engine.stream_interval = 0
    yield server
    server.close()


BPE = train_bpe(["the cat sat on the mat, naïve 日本 the end " * 20], 300)
PROMPTS = ["the cat ", "the cat  ", " ", "", "the cat", "👩 naïve 日本", "👩 日 "]


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echoed_tokens_join_to_the_prompt_and_all_are_scored(bpe_server, max_tokens, as_ids):
    body = {"max_tokens": max_tokens, "n": 2, "seed": 1, "temperature": 0.1}
    body |= {"echo": True, "logprobs": 1, "return_token_ids": True}
    for prompt in PROMPTS:
        tokenized = bpe_server.http.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
        assert tokenized == [BPE.eos_token, *BPE.encode(prompt)]
        given = tokenized if as_ids else prompt
        response = bpe_server.complete(prompt=given, **body)
        streamed = bpe_server.complete(prompt=given, **body, stream=True).text
        scores_TV = bpe_server.engine.model(torch.tensor([tokenized]))[0].log_softmax(-1)
        expected = [float(scores_TV[i, token].detach()) for i, token in enumerate(tokenized[1:])]
        for choice in response.json()["choices"]:
            assert choice["prompt_token_ids"] == tokenized
            assert choice["text"].startswith(prompt)
            logprobs = choice["logprobs"]
            names, scores, offsets = (
                logprobs[key] for key in ("tokens", "token_logprobs", "text_offset")
            )
            if as_ids:  # then EOS is a token of the prompt, which nothing predicts and has no text
                assert (names.pop(0), scores.pop(0), offsets.pop(0)) == ("<|endoftext|>", None, 0)
            count = len(tokenized) - 1
            echoed = b"".join(map(token_name_bytes, names[:count]))
            assert echoed.decode() == prompt
            assert scores[:count] == pytest.approx(expected, abs=1e-4)
            assert None not in scores
            ends = [len(echoed[:end].decode(errors="ignore")) for end in range(len(echoed))]
            starts = [len(b"".join(map(token_name_bytes, names[:i]))) for i in range(count)]
            assert offsets[:count] == [ends[start] for start in starts]
            chunks = [
                delta
                for line in streamed.split("\n")
                if line.startswith("data: {")
                for delta in json.loads(line[6:])["choices"]
                if delta["index"] == choice["index"]
            ]
            assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
            streamed_names = [name for chunk in chunks for name in chunk["logprobs"]["tokens"]]
            assert streamed_names[as_ids:] == names


def token_name_bytes(name):
    """The bytes of a token in logprobs."""
    if name.startswith("bytes:"):
        return bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))
    return name.encode()


def test_trailing_space_is_left_to_the_first_token_unless_the_prompts_tokens_are_returned(
    bpe_server,
):
    body = {"prompt": "the cat ", "max_tokens": 3, "temperature": 0}
    plain = bpe_server.complete(**body).json()
    assert plain["usage"]["prompt_tokens"] == 1 + len(BPE.encode("the cat"))
    echoed = bpe_server.complete(**body, echo=True).json()
    assert echoed["choices"][0]["text"] == "the cat " + plain["choices"][0]["text"]
    assert echoed["usage"] == plain["usage"]
    ids = bpe_server.complete(**body, echo=True, return_token_ids=True).json()["choices"][0]
    assert BPE.decode(ids["token_ids"]) == ids["text"]


def test_output_completes_the_last_character_of_echoed_token_ids(start):
    server = start()
    body = {"prompt": [97, 0xE2, 0x82], "echo": True, "logprobs": 0, "temperature": 0, "n": 2}
    body["logit_bias"] = {str(0xAC): 100}
    for max_tokens, text in ((0, "a\ufffd"), (1, "a€"), (2, "a€\ufffd")):
        for choice in server.complete(**body, max_tokens=max_tokens).json()["choices"]:
            assert choice["text"] == text
            assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 2][: 3 + max_tokens]


def test_prompt_logprobs_of_token_ids_as_evaluation_harnesses_expect(start, model):
    ids = [5, 9, 100, 7]
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    logprobs = start().complete(**body).json()["choices"][0]["logprobs"]
    logprobs_TV = model(torch.tensor([ids]))[0].log_softmax(-1).detach()
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    expected = [float(logprobs_TV[i, ids[i + 1]]) for i in range(3)]
    assert logprobs["token_logprobs"][1:4] == pytest.approx(expected, abs=1e-4)
    assert len(logprobs["tokens"]) == 5


def test_streamed_logprobs_equal_unstreamed_logprobs(start):
    server = start()
    for seed in range(12):
        body = {
            "prompt": "x",
            "max_tokens": 25,
            "seed": seed,
            "logprobs": 2,
            "echo": seed % 2 == 0,
            "temperature": 2,
            "stop": ["\ufffd", "a"],
        }
        choice = server.complete(**body).json()["choices"][0]
        streamed = server.complete(**body, stream=True).text
        lists = {name: [] for name in choice["logprobs"]}
        for line in streamed.split("\n"):
            if line.startswith("data: {"):
                (delta,) = json.loads(line[6:])["choices"]
                for name in lists:
                    lists[name] += delta["logprobs"][name]
        assert lists == choice["logprobs"]
        assert all(offset < len(choice["text"]) for offset in lists["text_offset"])


def test_echo_with_max_tokens_0_returns_the_prompt(start):
    response = start().complete(prompt="abc", max_tokens=0, echo=True).json()
    assert response["choices"][0]["text"] == "abc"
    assert response["choices"][0]["finish_reason"] == "length"
    assert response["usage"]["completion_tokens"] == 0


def test_long_prompt_does_not_delay_running_sequences(start):
    """A running sequence gets tokens between the chunks of a prompt."""
    server = start(max_num_batched_tokens=64)
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        long = Clients(server, [{"prompt": "b" * 3000, "max_tokens": 1}])
        wait_until(lambda: server.engine.prefill is not None)
        before = len(server.engine.running[0].tokens)
        long.join()
        assert len(server.engine.running[0].tokens) - before > 3000 / 64 / 2


def test_deterministic_outputs_do_not_depend_on_load(start):
    server = start(3, deterministic=True, max_model_len=200)
    bodies = [{"prompt": str(i), "seed": i, "max_tokens": 30, "top_p": 0.9} for i in range(9)]
    alone = [server.complete(**body).json()["choices"] for body in bodies]
    together = [response.json()["choices"] for response in Clients(server, bodies).join()]
    assert together == alone
