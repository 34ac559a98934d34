"""`/openapi.json` tells the truth: the shapes and statuses that it declares are those of a server."""

import json

import httpx
import pytest

from serving.http import schemas
from serving.http.limits import Limits
from serving.http.runs import RunBrowser
from tests.serving.running_server import DEADLINE, LONG, RunningServer, wait_until
from tests.serving.test_runs import FINAL, LINES, write_run

HEADERS = {"authorization": "Bearer key"}


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "run", [*LINES, FINAL])
    write_run(folder / "new").joinpath("metrics.jsonl").unlink()
    row = {"rung": "rnn", "chapter": 8, "bits_per_byte": 2.0, "sample": "x"}
    (folder / "ladder").mkdir()
    (folder / "ladder" / "ladder.json").write_text(json.dumps([row]))
    limits = Limits(max_body_bytes=1000)
    server = RunningServer(model, 1, runs=RunBrowser(folder), key="key", max_queue=0, limits=limits)
    yield server
    server.close()


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.address, headers=HEADERS, timeout=DEADLINE) as http:
        yield http


@pytest.fixture(scope="module")
def paths(http):
    return http.get("/openapi.json").json()["paths"]


def check(response, route):
    """Check that a response has a declared status, media type and shape; return its shape's name."""
    declared = route["responses"][str(response.status_code)]["content"]
    media_type = response.headers["content-type"].partition(";")[0]
    schema = declared[media_type]["schema"]
    if "$ref" not in schema:
        return schema
    name = schema["$ref"].removeprefix("#/components/schemas/")
    getattr(schemas, name).model_validate_json(response.content, strict=True, extra="forbid")
    return name


COMPLETION = {"prompt": "a", "logprobs": 1, "echo": True, "return_token_ids": True}
CHUNKED = {**COMPLETION, "stream": True, "stream_options": {"include_usage": True}}
REQUESTS = [
    ("POST", "/v1/completions", COMPLETION),
    ("POST", "/v1/completions", {}),
    ("POST", "/v1/completions", CHUNKED),
    ("POST", "/v1/next", {"prompt": "a"}),
    ("POST", "/v1/xray", {"prompt": "a"}),
    ("POST", "/v1/nearest", {"word": "a"}),
    ("GET", "/v1/runs", None),
    ("GET", "/v1/runs/{name}", None),
    ("GET", "/v1/ladder", None),
    ("GET", "/tokenizer_info", None),
    ("POST", "/tokenize", {"prompt": "a"}),
    ("POST", "/detokenize", {"tokens": [97]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/{name}", None),
    ("GET", "/version", None),
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("GET", "/metrics", None),
]


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
def test_response_has_the_declared_shape(http, paths, method, path, body):
    names = {"/v1/runs/{name}": "run", "/v1/models/{name}": "tiny"}
    response = http.request(method, path.replace("{name}", names.get(path, "")), json=body)
    assert response.status_code == 200
    assert check(response, paths[path][method.lower()])


def test_every_route_is_declared_and_none_answers_422(paths):
    declared = {(method.upper(), path) for path in paths for method in paths[path]}
    assert declared == {(method, path) for method, path, _ in REQUESTS}
    for path, methods in paths.items():
        for route in methods.values():
            assert "422" not in route["responses"]
            if path != "/health":
                assert {"401", "500", "default"} <= route["responses"].keys()


def test_events_have_the_declared_shape(http, paths):
    content = paths["/v1/completions"]["post"]["responses"]["200"]["content"]
    assert content["text/event-stream"]["schema"]["title"] == "CompletionChunk"
    events = http.post("/v1/completions", json=CHUNKED).text.split("\n\n")[:-2]
    assert len(events) > 1
    for event in events:
        data = event.removeprefix("data: ")
        schemas.CompletionChunk.model_validate_json(data, strict=True, extra="forbid")


def test_errors_have_the_declared_statuses_and_shape(server, http, paths, monkeypatch):
    def check_errors(status, requests, client=http):
        for method, path, body in requests:
            response = client.request(method, path.replace("{name}", "nothing"), json=body)
            assert response.status_code == status, (path, response.text)
            if path != "/ready":
                assert check(response, paths[path][method.lower()]) == "ErrorResponse"

    posts = [(method, path, body) for method, path, body in REQUESTS if body is not None]
    check_errors(401, [r for r in REQUESTS if r[1] != "/health"], server.http)
    check_errors(400, [(method, path, {"unknown": 1}) for method, path, _ in posts])
    check_errors(404, [(method, path, {**body, "model": "x"}) for method, path, body in posts])
    check_errors(404, [("GET", "/v1/runs/{name}", None), ("GET", "/v1/models/{name}", None)])
    check_errors(413, [(method, path, {"prompt": "a" * 1000}) for method, path, _ in posts])
    with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}):
        wait_until(lambda: server.async_engine.num_unfinished == 1)
        check_errors(429, [("POST", "/v1/completions", COMPLETION)])
    wait_until(lambda: server.async_engine.num_unfinished == 0)
    monkeypatch.setattr(server.async_engine, "_unavailable", "shutting down")
    check_errors(503, [r for r in posts if r[1] in ("/v1/completions", "/v1/next", "/v1/xray")])
    check_errors(503, [("GET", "/ready", None)])
