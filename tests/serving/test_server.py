"""What a server promises to many clients, and to rude ones."""

import json
import os
import socket
import sys
import threading
import time

import httpx
import pytest

from gpt.sampling import SamplingParams
from serving.http.app import EarlyRefusal
from serving.http.limits import Limits, Timeouts
from tests.serving.test_app import (  # noqa: F401
    CONTEXT,
    DEADLINE,
    TOKENIZER,
    Running,
    hang_up,
    model,
    read_stream,
)

LONG = {"prompt": "", "temperature": 0, "max_tokens": 10_000}
QUICK = Timeouts(header_timeout=0.2, body_timeout=0.4, shutdown_timeout=0.5, max_connections=8)


@pytest.fixture
def start(model):  # noqa: F811
    """Starts servers, and closes them all."""
    running = []

    def begin(rows=2, **options):
        running.append(Running(model, rows, **options))
        return running[-1]

    yield begin
    for one in running:
        one.close()


def until(holds):
    """Wait until it does."""
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def raw(server, data=b""):
    """A plain connection on which something was said."""
    host, port = server.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=DEADLINE)
    connection.sendall(data)
    return connection


def whole(connection):
    """All that comes until the server closes."""
    received = b""
    while data := connection.recv(65536):
        received += data
    connection.close()
    return received


def error_of(answer):
    """The error of an answer as it came over a plain connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


class Clients:
    """Requests at once, each in a thread of its own, and their answers."""

    def __init__(self, server, bodies):
        self.answers = [None] * len(bodies)

        def ask(i):
            with httpx.Client(base_url=server.address, timeout=DEADLINE) as http:
                begun = time.perf_counter()
                answer = http.post("/v1/completions", json=bodies[i])
                self.answers[i] = answer, time.perf_counter() - begun

        self.threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
        for thread in self.threads:
            thread.start()

    def join(self):
        for thread in self.threads:
            thread.join(DEADLINE)
        assert all(self.answers)
        return self.answers


def test_who_finds_no_place_is_told_at_once_when_to_come_again(start):
    server = start(rows=2, places=3)
    clients = Clients(server, [{**LONG, "max_tokens": 300}] * 30)
    answers = clients.join()
    refused = [answer for answer, _ in answers if answer.status_code == 429]
    served = [answer for answer, _ in answers if answer.status_code == 200]
    assert len(refused) + len(served) == 30
    assert 5 <= len(served) < 30
    for answer in refused:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "rate_limit_error"
    assert len({answer.json()["choices"][0]["text"] for answer in served}) == 1
    assert server.post(prompt="a").status_code == 200
    too_many = server.post(prompt="a", n=6)
    assert too_many.status_code == 400
    assert "6 sequences, this server has capacity for 5" in too_many.json()["error"]["message"]


def request(body, *fields):
    """A request for a text, as it goes over a plain connection: its head, and its body."""
    lines = ["POST /v1/completions HTTP/1.1", "host: x", *fields, f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode(), body.encode()


def test_a_crowd_is_refused_at_the_door_and_the_application_asked_where_only_it_knows(start):
    server = start(rows=1, places=0, key="secret")
    key, kind = "Authorization: Bearer secret", "content-type: application/json"
    headers = {"authorization": "Bearer secret"}
    with (
        httpx.Client(base_url=server.address, headers=headers, timeout=DEADLINE) as http,
        http.stream("POST", "/v1/completions", json={**LONG, "stream": True}),
    ):
        until(lambda: server.service.num_unfinished == 1)
        head, body = request(json.dumps(LONG), key, kind)
        at_once, in_parts = raw(server, head + body), raw(server, head)
        for connection in (at_once, in_parts):
            received = connection.recv(65536)
            status, error = error_of(received)
            assert (status, error["type"]) == (429, "rate_limit_error")
            assert b"\r\nretry-after: 1\r\n" in received
            assert b"\r\nconnection: close\r\n" in received
        assert whole(at_once) == b""
        in_parts.sendall(body[:3])
        in_parts.settimeout(0.2)
        with pytest.raises(TimeoutError):  # the rest has still to come
            in_parts.recv(1)
        in_parts.settimeout(DEADLINE)
        in_parts.sendall(body[3:])
        assert whole(in_parts) == b""
        for name, fields in {"no key": [kind], "a page": [key, kind, "origin: http://x"]}.items():
            head, body = request(json.dumps(LONG), *fields, "connection: close")
            status, _ = error_of(whole(raw(server, head + body)))
            assert status == (401 if name == "no key" else 429)
        assert http.get("/v1/models").status_code == 200
        assert "tinygpt:requests_refused_total" in http.get("/metrics").text
    until(lambda: server.service.num_unfinished == 0)
    head, body = request(json.dumps({**LONG, "max_tokens": 3}), key, kind, "connection: close")
    assert whole(raw(server, head + body)).startswith(b"HTTP/1.1 200")


def test_of_a_crowd_that_comes_at_once_the_door_lets_in_as_many_as_there_is_room_for(start):
    server = start(rows=2, places=1)
    kind, short = "content-type: application/json", {**LONG, "max_tokens": 5}
    head, body = request(json.dumps(short), kind, "connection: close")
    with raw(server, head), raw(server, head[:-4]):
        bad = whole(raw(server, head + body.replace(b"{", b"[", 1)))
        assert bad.startswith(b"HTTP/1.1 400")
    until(lambda: not server.server.server_state.connections)
    answers = [whole(raw(server, head + body)) for _ in range(4)]
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)  # they had left the door
    door = EarlyRefusal(server.server.catalog)  # nobody goes on from this one
    refused = [door(client, head + body) is not None for client in range(20)]
    assert refused == [False] * 3 + [True] * 17
    door.coming.discard(1)
    assert [door(client, head + body) is None for client in (20, 21)] == [True, False]


@pytest.mark.parametrize("stream", [True, False])
def test_sixty_of_two_hundred_hang_up_and_nothing_of_them_is_left(start, stream):
    server = start(rows=4, places=400)
    body = {**LONG, "max_tokens": 60, "stream": stream}
    gone = threading.Barrier(61)

    def leave():
        hang_up(server.address, {**body, "max_tokens": CONTEXT - 1}, lambda _: gone.wait(DEADLINE))

    leaving = [threading.Thread(target=leave) for _ in range(60)]
    for thread in leaving:
        thread.start()
    until(lambda: server.service.num_unfinished == 60)
    staying = Clients(server, [body] * 140)
    gone.wait(DEADLINE)
    answers = staying.join()
    assert {answer.status_code for answer, _ in answers} == {200}
    until(lambda: server.engine.is_idle)
    assert not server.service._streams
    assert server.service.num_unfinished == 0


def test_a_server_that_is_told_to_stop_lets_texts_end_and_ends_the_others(start):
    server = start(rows=4, deadlines=Timeouts(shutdown_timeout=3.0))
    streams = Clients(
        server, [{**LONG, "stream": True}] * 3 + [{**LONG, "stream": True, "max_tokens": 30}]
    )
    until(lambda: server.service.num_unfinished == 4)
    server.server.should_exit = True
    until(lambda: not server.service.is_ready)
    late = server.post(prompt="a")
    assert late.status_code == 503
    assert late.headers["retry-after"] == "1"
    assert server.http.get("/ready").status_code == 503
    assert server.http.get("/health").status_code == 200
    begun = time.monotonic()
    answers = [answer.text.split("\n") for answer, _ in streams.join()]
    assert time.monotonic() - begun < 8
    for lines in answers:
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert ['"error"' in "".join(lines) for lines in answers] == [True, True, True, False]
    _, finishes, _ = read_stream(answers[3])
    assert finishes == {0: "length"}


def chunks(answer):
    """Those of a stream that tell of a text, and what else it says."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line]
    assert lines[-1] == "[DONE]"
    said = [json.loads(line) for line in lines[:-1]]
    return [one["choices"][0] for one in said if one.get("choices")], said[-1]


def test_tokens_that_come_fast_share_a_chunk_and_all_are_told(start):
    server, told = start(), []
    body = {**LONG, "max_tokens": 300, "stream": True, "return_token_ids": True}
    for interval in (1000, 0):
        server.service.stream_interval = interval
        told.append(chunks(server.post(**body))[0])
    assert len(told[0]) == 2
    assert len(told[0][0]["token_ids"]) <= 1
    assert len(told[1]) > 2
    texts = {"".join(chunk["text"] for chunk in one) for one in told}
    assert texts == {server.post(**{**body, "stream": False}).json()["choices"][0]["text"]}


def test_what_was_made_before_a_stream_is_ended_is_told(start):
    server = start()
    server.service.stream_interval = 1000
    clients = Clients(server, [{**LONG, "stream": True, "return_token_ids": True}])
    until(lambda: server.engine.running and len(server.engine.running[0].tokens) > 100)
    server.server.should_exit = True
    ((answer, _),) = clients.join()
    told, last = chunks(answer)
    assert "shutting down" in last["error"]["message"]
    assert sum(len(chunk["token_ids"]) for chunk in told) > 90


def test_a_server_that_loads_says_so(model):  # noqa: F811
    server = Running(model, 1)
    server.catalog.missing, served = "the server is loading its models", server.catalog.entries
    kept = dict(served)
    served.clear()
    try:
        for answer in (server.post(prompt="a"), server.http.get("/ready")):
            assert answer.status_code == 503
            assert "loading" in answer.text
        assert server.http.get("/health").status_code == 200
    finally:
        served.update(kept)
        server.close()


def held(server, monkeypatch):
    """Events: the engine has begun a step; it may go on with it."""
    begun, go_on, step = threading.Event(), threading.Event(), server.engine.step

    def waiting():
        begun.set()
        go_on.wait(DEADLINE)
        return step()

    monkeypatch.setattr(server.engine, "step", waiting)
    return begun, go_on


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_the_engine_lets_others_go_first(start, monkeypatch):
    server, found = start(), []
    step = server.engine.step

    def looked():
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return step()

    monkeypatch.setattr(server.engine, "step", looked)
    assert server.post(prompt="a").status_code == 200
    assert set(found) == {min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)}


def test_health_is_red_while_a_step_hangs(start, monkeypatch):
    server = start(rows=1)
    server.service.stall_timeout = 0.05
    begun, go_on = held(server, monkeypatch)
    clients = Clients(server, [{"prompt": "a", "max_tokens": 2}])
    assert begun.wait(DEADLINE)
    until(lambda: server.http.get("/health").status_code == 503)
    go_on.set()
    clients.join()
    assert server.http.get("/health").status_code == 200


def test_a_head_or_a_body_that_does_not_end_is_closed_with_408(start):
    server = start(deadlines=QUICK)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for data, what in (
        (b"", "head"),
        (head[:30], "head"),
        (head + b'Content-Length: 50\r\n\r\n{"prompt"', "body"),
        (head + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"pro', "body"),
    ):
        status, error = error_of(whole(raw(server, data)))
        assert status == 408
        assert f"the {what} of the request did not end within" in error["message"]


def test_a_slow_answer_is_no_slow_request(start, monkeypatch):
    server = start(deadlines=QUICK)
    begun, go_on = held(server, monkeypatch)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(server.post(prompt="a")))
    asking.start()
    assert begun.wait(DEADLINE)
    end = time.monotonic() + 2 * QUICK.body_timeout
    until(lambda: time.monotonic() > end)
    go_on.set()
    asking.join(DEADLINE)
    answers.append(server.post(prompt="a"))  # on the same connection
    assert [answer.status_code for answer in answers] == [200, 200]


def test_one_connection_too_many_is_told_so(start):
    server = start(deadlines=Timeouts(max_connections=3, shutdown_timeout=0))
    idle = [raw(server) for _ in range(3)]
    until(lambda: len(server.server.server_state.connections) >= 3)
    status, error = error_of(whole(raw(server)))
    assert status == 503
    assert "too many connections" in error["message"]
    for connection in idle:
        connection.close()
    until(lambda: not server.server.server_state.connections)
    assert server.post(prompt="a").status_code == 200


def test_what_is_no_http_is_a_400_in_openais_shape(start):
    status, error = error_of(whole(raw(start(), b"\x16\x03\x01 hello\r\n\r\n")))
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_a_body_that_is_too_large_is_a_413(start):
    server = start(limits=Limits(max_body_bytes=1000))
    answer = server.post(prompt="a" * 1000)
    assert answer.status_code == 413
    assert "larger than 1,000 bytes" in answer.json()["error"]["message"]
    parts = (b'{"prompt": "', *([b"a" * 100] * 20), b'"}')
    headers = {"content-type": "application/json"}
    answer = server.http.post("/v1/completions", content=iter(parts), headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert server.post(prompt="a" * 900).status_code == 200


def test_a_prompt_may_be_limited(start):
    server = start(limits=Limits(max_prompt_tokens=10))
    assert server.post(prompt="a" * 9, max_tokens=1).status_code == 200
    answer = server.post(prompt="a" * 10)
    assert answer.status_code == 400
    assert "11 tokens long, this server takes 10" in answer.json()["error"]["message"]


def test_a_key_is_asked_for_everywhere_but_for_health(start):
    server = start(key="sésame".encode().hex())
    key = {"authorization": "Bearer " + "sésame".encode().hex()}
    for path in ("/v1/models", "/docs", "/metrics", "/ready", "/nowhere"):
        for headers in (
            {},
            {"authorization": "Bearer x"},
            {"authorization": key["authorization"][7:]},
        ):
            answer = server.http.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/v1/models", headers=key).status_code == 200
    body = {"prompt": "a", "max_tokens": 1}
    assert server.http.post("/v1/completions", json=body).status_code == 401
    assert server.http.post("/v1/completions", json=body, headers=key).status_code == 200


def test_no_other_page_may_ask_unless_it_is_let(start):
    answer = start().http.get("/v1/models", headers={"origin": "http://elsewhere"})
    assert "access-control-allow-origin" not in answer.headers


def test_metrics_count_what_has_happened(start):
    server = start(rows=2)

    def value(name):
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total")
    before = {name: value("tinygpt:" + name) for name in names}
    assert server.post(prompt="abc", max_tokens=7, temperature=0, n=2).status_code == 200
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


def test_tokens_and_texts_are_made_of_each_other(start):
    http = start().http
    answer = http.post("/tokenize", json={"prompt": "aé"}).json()
    assert answer == {"count": 4, "max_model_len": CONTEXT, "tokens": [256, 97, 195, 169]}
    bare = http.post("/tokenize", json={"prompt": "aé", "add_special_tokens": False}).json()
    assert bare["tokens"] == [97, 195, 169]
    assert http.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": "aé"}
    assert http.post("/detokenize", json={"tokens": [257]}).status_code == 400
    assert http.post("/tokenize", json={"prompt": "a", "x": 1}).status_code == 400


def test_echo_and_logprobs_are_those_of_the_model(start, model):  # noqa: F811
    import torch

    server = start()
    body = {"prompt": "aé ", "max_tokens": 12, "seed": 3, "echo": True, "logprobs": 3}
    answer = server.post(**body).json()["choices"][0]
    logprobs = answer["logprobs"]
    assert answer["text"].startswith("aé ")
    ids = [256, *TOKENIZER.encode("aé")]
    count = len(logprobs["tokens"])
    assert {len(values) for values in logprobs.values()} == {count}
    assert logprobs["tokens"][:3] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"][:4] == [0, 1, 1, 2]
    logs_TV = model(torch.tensor([ids]))[0].log_softmax(-1).detach()
    for place, token in enumerate(ids[1:]):
        assert logprobs["token_logprobs"][place] == pytest.approx(
            float(logs_TV[place, token]), abs=1e-4
        )
        assert len(logprobs["top_logprobs"][place]) == 3
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert answer["text"][offset : offset + len(token)] == token


def test_logprobs_of_ids_are_what_evaluation_harnesses_read(start, model):  # noqa: F811
    import torch

    ids = [5, 9, 100, 7]
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    logprobs = start().post(**body).json()["choices"][0]["logprobs"]
    logs_TV = model(torch.tensor([ids]))[0].log_softmax(-1).detach()
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    expected = [float(logs_TV[i, ids[i + 1]]) for i in range(3)]
    assert logprobs["token_logprobs"][1:4] == pytest.approx(expected, abs=1e-4)
    assert len(logprobs["tokens"]) == 5


def test_streamed_logprobs_are_the_unstreamed_ones(start):
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
        choice = server.post(**body).json()["choices"][0]
        streamed = server.post(**body, stream=True).text
        lists = {name: [] for name in choice["logprobs"]}
        for line in streamed.split("\n"):
            if line.startswith("data: {"):
                (part,) = json.loads(line[6:])["choices"]
                for name in lists:
                    lists[name] += part["logprobs"][name]
        assert lists == choice["logprobs"]
        assert all(offset < len(choice["text"]) for offset in lists["text_offset"])


def test_a_text_that_needs_no_model_is_echoed(start):
    answer = start().post(prompt="abc", max_tokens=0, echo=True).json()
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_a_long_prompt_holds_up_nobody(start):
    """Tokens of a running text come between the parts of a prompt."""
    server = start(rows=2, budget=64)
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        long = Clients(server, [{"prompt": "b" * 3000, "max_tokens": 1}])
        until(lambda: server.engine.prefill is not None)
        before = len(server.engine.running[0].tokens)
        long.join()
        assert len(server.engine.running[0].tokens) - before > 3000 / 64 / 2


def test_a_seeded_text_is_the_same_under_load_when_the_server_is_deterministic(start):
    server = start(rows=3, deterministic=True, length=200)
    bodies = [{"prompt": str(i), "seed": i, "max_tokens": 30, "top_p": 0.9} for i in range(9)]
    alone = [server.post(**body).json()["choices"] for body in bodies]
    together = [answer.json()["choices"] for answer, _ in Clients(server, bodies).join()]
    assert together == alone


def test_sampling_of_the_reference_has_what_the_api_has():
    assert SamplingParams(logit_bias=((1, 2.0),)).adjusted
