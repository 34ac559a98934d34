import json
import math
import random
import shutil
import subprocess
import threading

import openai
import pytest
import torch

from gpt import GPT, MODELS
from gpt.models.encoder_decoder import EncoderDecoder
from gpt.sampling import SamplingParams
from serving.http.limits import Limits
from serving.tokenization import token_text, tokenize_prompt
from tests.serving.running_server import (
    CONTEXT_LENGTH,
    DEADLINE,
    JSON,
    TOKENIZER,
    RunningServer,
    read_stream,
    reference,
    request_and_disconnect,
)
from tokenizer import END_OF_TEXT

PROMPT = b'{"prompt": "a", '


@pytest.fixture(scope="module")
def server(model):
    server = RunningServer(model, 4)
    yield server
    server.close()


@pytest.fixture
def one_slot_server(model):
    """A server of one slot for one test, which may break it."""
    server = RunningServer(model, 1)
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.address + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_client_completion_equals_generate(model, client):
    response = client.completions.create(model="tiny", prompt="def ", max_tokens=30, temperature=0)
    assert response.choices[0].text == reference(model, "def ", SamplingParams(0.0), 30)
    assert response.choices[0].finish_reason == "length"
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (5, 30)
    assert response.usage.total_tokens == 35
    assert client.completions.create(model="tiny", prompt="").usage.completion_tokens <= 16


def test_all_sampling_params_reach_the_sampler(model, client):
    sampling = SamplingParams(1.2, 50, 0.9, 0.001, 1.1, 0.3, 0.2, seed=-7)
    response = client.completions.create(
        model="tiny",
        prompt="ab",
        max_tokens=25,
        temperature=1.2,
        top_p=0.9,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        seed=-7,
        n=3,
        user="someone",
        extra_body={"top_k": 50, "min_p": 0.001, "repetition_penalty": 1.1},
    )
    texts = [reference(model, "ab", sampling, 25, choice) for choice in range(3)]
    assert [choice.text for choice in response.choices] == texts
    assert len(set(texts)) == 3


def test_openai_client_streaming(model, client):
    stream = client.completions.create(
        model="tiny",
        prompt="é",
        max_tokens=20,
        n=2,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, usage = ["", ""], None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage or usage
    assert texts == [reference(model, "é", SamplingParams(seed=3), 20, choice) for choice in (0, 1)]
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 40)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["a", "", "bc"], ["a", "", "bc"]),
        ([256, 97], ["a"]),
        ([[256, 97], [256]], ["a", ""]),
    ],
)
def test_four_prompt_forms(model, client, prompt, texts):
    response = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, n=2, seed=1)
    expected = [
        reference(model, text, SamplingParams(seed=1), 5, n) for text in texts for n in (0, 1)
    ]
    assert [choice.text for choice in response.choices] == expected
    assert [choice.index for choice in response.choices] == list(range(2 * len(texts)))


def test_outputs_without_seed_differ(client):
    response = client.completions.create(model="tiny", prompt=["a", "a"], n=2)
    again = client.completions.create(model="tiny", prompt=["a", "a"], n=2)
    assert len({choice.text for choice in (*response.choices, *again.choices)}) == 8


def test_openai_client_raises_its_error_types(client):
    with pytest.raises(openai.NotFoundError, match="no model named 'other'; available: tiny"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature must be between 0 and 100"):
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tinygpt"


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_streaming(model, server):
    body = json.dumps({"prompt": "x", "max_tokens": 12, "temperature": 0, "stream": True})
    command = ["curl", "-sN", "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(
        [*command, server.address + "/v1/completions"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    texts, finish_reasons, usage = read_stream(done.stdout.splitlines())
    assert texts == {0: reference(model, "x", SamplingParams(0.0), 12)}
    assert finish_reasons == {0: "length"}
    assert usage is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected a JSON object"),
        (b"{", "the body is not JSON"),
        (b'{"prompt": "\xff"}', "body"),
        (b"[1]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'"a"', "expected a JSON object"),
        (b"[" * 100_000, "body"),
        (b"{}", "prompt"),
        (b'{"prompt": null}', "prompt"),
        (b'{"prompt": []}', "prompt: expected a string"),
        (b'{"prompt": [[]]}', "the prompt is empty"),
        (b'{"prompt": {}}', "prompt: expected a string"),
        (b'{"prompt": ["a", 1]}', "prompt: expected a string"),
        (b'{"prompt": [1, true]}', "prompt: expected a string"),
        (b'{"prompt": [1.5]}', "prompt: expected a string"),
        (b'{"prompt": [257]}', "token 257, the model knows 0 to 256"),
        (b'{"prompt": [-1]}', "token -1"),
        (b'{"prompt": [1' + b"0" * 400 + b"]}", "the model knows 0 to 256"),
        (b'{"prompt": [1' + b"0" * 5000 + b"]}", "body"),
        (b'{"prompt": "a\\ud800"}', "U+D800, half of a surrogate pair"),
        (b'{"\\ud800": 1, "prompt": "a"}', "unicode"),
        (PROMPT + b'"model": 1}', "model: Input should be a valid string"),
        (
            b'{"prompt": "' + b"a" * CONTEXT_LENGTH + b'"}',
            "20001 tokens long, the model's context holds",
        ),
        (PROMPT + b'"temperature": NaN}', "temperature: Input should be a finite number"),
        (PROMPT + b'"temperature": Infinity}', "temperature: Input should be a finite number"),
        (PROMPT + b'"temperature": 1e999}', "temperature: Input should be a finite number"),
        (PROMPT + b'"temperature": 1' + b"0" * 400 + b"}", "temperature"),
        (PROMPT + b'"temperature": "1"}', "temperature"),
        (PROMPT + b'"temperature": true}', "temperature"),
        (PROMPT + b'"temperature": 101}', "temperature must be between 0 and 100, not 101"),
        (PROMPT + b'"top_p": 1.1}', "top_p must be between 0 and 1"),
        (PROMPT + b'"top_k": -1}', "top_k must be between"),
        (PROMPT + b'"top_k": 1.5}', "top_k"),
        (PROMPT + b'"min_p": 2}', "min_p must be between 0 and 1"),
        (PROMPT + b'"repetition_penalty": 0}', "repetition_penalty must be between"),
        (PROMPT + b'"presence_penalty": 3}', "presence_penalty must be between -2 and 2"),
        (PROMPT + b'"frequency_penalty": -3}', "frequency_penalty must be between -2 and 2"),
        (PROMPT + b'"seed": 9223372036854775808}', "seed must be between"),
        (PROMPT + b'"seed": 1' + b"0" * 400 + b"}", "seed"),
        (PROMPT + b'"max_tokens": -1}', "max_tokens"),
        (PROMPT + b'"max_tokens": 65537}', "max_tokens = 65537: this server allows 65536"),
        (PROMPT + b'"max_tokens": 1' + b"0" * 99 + b"}", "max_tokens"),
        (PROMPT + b'"n": 0}', "n: "),
        (PROMPT + b'"n": 129}', "prompts times n = 129: this server allows 128"),
        (b'{"prompt": ["a", "b"], "n": 65}', "prompts times n = 130: this server allows 128"),
        (PROMPT + b'"stop": ["1", "2", "3", "4", "5"]}', "stop strings = 5: this server allows 4"),
        (PROMPT + b'"stop": "' + b"a" * 257 + b'"}', "length of a stop string = 257"),
        (
            PROMPT + b'"stop": ""}',
            "stop: expected a string or a list of strings, none of them empty",
        ),
        (PROMPT + b'"stop": [1]}', "stop: expected a string"),
        (PROMPT + b'"stream": "yes"}', "stream"),
        (
            PROMPT + b'"stream_options": {"include_usage": true}}',
            "stream_options needs stream: true",
        ),
        (PROMPT + b'"stream": true, "stream_options": {"x": 1}}', "'stream_options.x'"),
        (PROMPT + b'"logprobs": 6}', "logprobs = 6: this server allows 5"),
        (PROMPT + b'"logprobs": true}', "logprobs"),
        (PROMPT + b'"echo": 1}', "echo"),
        (PROMPT + b'"best_of": 2}', "best_of must equal n = 1 or be omitted, not 2"),
        (PROMPT + b'"suffix": "x"}', "suffix is not supported"),
        (PROMPT + b'"logit_bias": [5]}', "logit_bias: expected an object"),
        (PROMPT + b'"logit_bias": {"5": 101}}', "logit_bias must map token ids"),
        (PROMPT + b'"logit_bias": {"5": NaN}}', "logit_bias"),
        (PROMPT + b'"logit_bias": {"a": 1}}', "logit_bias: expected token ids"),
        (PROMPT + b'"logit_bias": {"257": 1}}', "logit_bias has token 257, the model knows 0 to"),
        (PROMPT + b'"logit_bias": {"' + b"9" * 5000 + b'": 1}}', "logit_bias"),
        (PROMPT + b'"num_beams": 2}', "num_beams is for translation models"),
        (PROMPT + b'"num_beams": 17}', "num_beams = 17: this server allows 16"),
        (PROMPT + b'"temprature": 1}', "unknown field 'temprature'"),
        (PROMPT + b'"' + b"x" * 100_000 + b'": 1}', "unknown field"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_invalid_request_is_400_with_reason(server, body, message, stream):
    if stream and body.startswith(PROMPT) and b"stream" not in body:
        body = body.replace(PROMPT, PROMPT + b'"stream": true, ')
    response = server.http.post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert len(response.content) < 1000, "the error does not contain the body"
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/page/nothing.js", 404),
        ("POST", "/", 405),
        ("POST", "/v1/chat/completions", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/%ff%00", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
    ],
)
def test_unknown_routes_return_openai_errors(server, method, path, status):
    response = server.http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert ("allow" in response.headers) == (status == 405)


def test_model_name_with_lone_surrogate_is_unknown(server):
    response = server.http.post(
        "/v1/completions", content=b'{"prompt": "a", "model": "\\ud800"}', headers=JSON
    )
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_body_without_json_content_type_is_refused_with_expected_header(server):
    response = server.http.post("/v1/completions", data={"prompt": "a"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_null_means_default_and_neutral_values_are_accepted(server):
    nulls = dict.fromkeys(["temperature", "n", "stop", "stream", "logprobs", "suffix", "best_of"])
    assert server.complete(prompt="a", echo=False, logit_bias={}, **nulls).status_code == 200
    assert server.complete(prompt="a", temperature=1, top_p=1, min_p=0).status_code == 200
    assert server.complete(prompt="a", suffix="", best_of=1, user="x").status_code == 200
    assert server.complete(prompt="a", max_tokens=1, n=Limits.max_sequences).status_code == 200


def test_streamed_text_equals_unstreamed_text(server):
    rng = random.Random(0)
    for seed in range(40):
        body = {
            "prompt": "".join(rng.choices("ab é👩\n", k=rng.randrange(6))),
            "temperature": rng.choice([0, 0.5, 1, 3]),
            "seed": seed,
            "n": rng.choice([1, 3]),
            "max_tokens": rng.randint(1, 40),
            "stop": rng.choice([None, "I", ["9", "\ufffd\ufffd", "ab"]]),
        }
        whole = server.complete(**body).json()
        with server.http.stream(
            "POST",
            "/v1/completions",
            json={**body, "stream": True, "stream_options": {"include_usage": True}},
        ) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            texts, finish_reasons, usage = read_stream("".join(response.iter_text()).split("\n"))
        for choice in whole["choices"]:
            assert texts.get(choice["index"], "") == choice["text"]
            assert finish_reasons[choice["index"]] == choice["finish_reason"]
            stops = [body["stop"]] if isinstance(body["stop"], str) else body["stop"] or []
            assert not any(stop in choice["text"] for stop in stops)
        assert usage == whole["usage"]


@pytest.mark.parametrize("logprobs", [None, 2])
def test_token_ids_decode_to_the_text_streamed_and_unstreamed(server, logprobs):
    rng = random.Random(1)
    for seed in range(30):
        prompt = "".join(rng.choices("ab é👩\n", k=rng.randrange(1, 6))).rstrip()
        body = {
            "prompt": rng.choice([prompt, TOKENIZER.encode(prompt) or [97]]),
            "temperature": rng.choice([0, 1, 3]),
            "seed": seed,
            "n": rng.choice([1, 3]),
            "max_tokens": rng.randint(0, 40),
            "stop": rng.choice([None, "I", ["9", "\ufffd\ufffd", "ab"]]),
            "echo": rng.choice([False, True]),
            "logprobs": logprobs,
            "return_token_ids": True,
        }
        prompt_ids = body["prompt"]
        if isinstance(prompt_ids, str):
            prompt_ids = tokenize_prompt(TOKENIZER, prompt_ids).ids
        whole = server.complete(**body).json()["choices"]
        streamed = {choice["index"]: [] for choice in whole}
        for line in server.complete(**body, stream=True).text.split("\n"):
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    first = not streamed[choice["index"]]
                    assert ("prompt_token_ids" in choice) == first
                    streamed[choice["index"]].append(choice)
        for choice in whole:
            assert choice["prompt_token_ids"] == prompt_ids
            chunks = streamed[choice["index"]]
            assert chunks[0]["prompt_token_ids"] == prompt_ids
            ids = choice["token_ids"]
            assert [token for chunk in chunks for token in chunk["token_ids"]] == ids
            decoded = TOKENIZER.decode(ids)
            if choice["finish_reason"] == "stop" and TOKENIZER.eos_token not in ids:
                # The last token may contain the start of the stop string.
                assert decoded.startswith(choice["text"])
            else:
                assert decoded == choice["text"]
            if logprobs is not None:
                tokens = choice["logprobs"]["tokens"]
                assert [token_text(TOKENIZER, token) for token in ids] == tokens[: len(ids)]
                assert tokens[len(ids) :] in ([], [END_OF_TEXT])


def test_token_ids_are_returned_only_on_request(server):
    choice = server.complete(prompt="a").json()["choices"][0]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}


def test_models_endpoint_describes_the_model(server, model):
    (info,) = server.http.get("/v1/models").json()["data"]
    assert info == server.http.get("/v1/models/tiny").json()
    assert info["rung"] == "gpt"
    assert (info["chapter"], info["year"], info["paper"]) == (15, GPT.year, GPT.paper)
    assert info["idea"] == GPT.idea
    assert info["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert (info["vocab_size"], info["eos_token_id"], info["dtype"]) == (257, 256, "float32")
    assert (info["translates"], info["bits_per_byte"], info["run"]) == (False, None, None)


def test_output_does_not_depend_on_concurrent_requests(server):
    bodies = [{"prompt": str(i), "seed": i, "max_tokens": 40} for i in range(12)]
    alone = [server.complete(**body).json()["choices"] for body in bodies]
    together = [None] * len(bodies)

    def send(i):
        together[i] = server.complete(**bodies[i]).json()["choices"]

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert together == alone


def test_stop_string_frees_its_slot(one_slot_server, model):
    text = reference(model, "", SamplingParams(0.0), 40)
    stop = text[-2:]
    response = one_slot_server.complete(
        prompt="", temperature=0, max_tokens=CONTEXT_LENGTH, stop=stop
    ).json()
    assert response["choices"][0]["text"] == text[: text.index(stop)]
    assert response["choices"][0]["finish_reason"] == "stop"
    # The only slot is free.
    assert one_slot_server.complete(prompt="", max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_aborts_running_and_waiting_sequences(one_slot_server, monkeypatch, stream):
    """One slot and three sequences: one runs, two wait."""
    engine = one_slot_server.engine
    step, abort = engine.step, engine.abort
    busy, freed = threading.Event(), threading.Event()

    def watched_step():
        events = step()
        if engine.running and engine.prefill and engine.prefill.num_started == 1:
            busy.set()
        return events

    def watched_abort(request, choice):
        abort(request, choice)
        if engine.is_idle:
            freed.set()

    monkeypatch.setattr(engine, "step", watched_step)
    monkeypatch.setattr(engine, "abort", watched_abort)
    body = {"prompt": "", "temperature": 0, "max_tokens": CONTEXT_LENGTH, "n": 3, "stream": stream}

    def until(connection):
        assert busy.wait(DEADLINE)
        if stream:
            received = b""
            while b'"text":' not in received:
                received += connection.recv(1000)

    request_and_disconnect(one_slot_server, body, until)
    assert freed.wait(DEADLINE)
    assert one_slot_server.complete(prompt="", max_tokens=1).status_code == 200
    assert not one_slot_server.async_engine._streams


def test_model_error_fails_only_its_request(one_slot_server, model, monkeypatch):
    with monkeypatch.context() as patch:

        def fail(features_BTD):
            raise RuntimeError("secret")

        patch.setattr(model, "logits", fail)
        response = one_slot_server.complete(prompt="a")
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "the model failed on this request"
        streamed = one_slot_server.complete(prompt="a", stream=True)
        events = [line for line in streamed.text.split("\n") if line]
        assert json.loads(events[0].removeprefix("data: "))["error"]["type"] == "server_error"
        assert events[1:] == ["data: [DONE]"]
    assert one_slot_server.complete(prompt="a").status_code == 200
    assert one_slot_server.http.get("/health").json() == {"status": "ok"}


def test_health_is_503_after_engine_failure(one_slot_server, monkeypatch):
    monkeypatch.setattr(one_slot_server.engine, "step", lambda: 1 / 0)
    response = one_slot_server.complete(prompt="a")
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
    assert one_slot_server.complete(prompt="a", stream=True).status_code == 503
    assert one_slot_server.http.get("/health").status_code == 503
    assert one_slot_server.http.get("/ready").status_code == 503


def test_shutdown_ends_unstreamed_request_with_503(model, monkeypatch):
    server = RunningServer(model, 1)
    step, busy, responses = server.engine.step, threading.Event(), []

    def watched_step():
        events = step()
        busy.set()
        return events

    monkeypatch.setattr(server.engine, "step", watched_step)

    def send():
        responses.append(server.complete(prompt="", temperature=0, max_tokens=CONTEXT_LENGTH))

    sending = threading.Thread(target=send)
    sending.start()
    assert busy.wait(DEADLINE)
    server.server.should_exit = True
    sending.join(DEADLINE)
    server.close()
    assert responses[0].status_code == 503
    assert "shutting down" in responses[0].json()["error"]["message"]


def test_openapi_describes_every_field_and_docs_is_on_the_page(server):
    fields = server.http.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
    assert {"prompt", "top_k", "stream_options"} <= set(fields["properties"])
    assert all("description" in field for field in fields["properties"].values())
    docs = server.http.get("/docs")  # a view of the page, which loads nothing from other hosts
    assert (docs.status_code, docs.headers["location"]) == (307, "./#docs")
    assert server.http.get("/docs", follow_redirects=True).text.startswith("<!doctype html>")
    assert math.isclose(fields["properties"]["temperature"]["default"], 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_streamed_text_equals_stateless_greedy_decoding(name):
    torch.manual_seed(0)
    model = MODELS[name](TOKENIZER.vocab_size, 64).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    server = RunningServer(model)
    try:
        body = {"prompt": "def f(", "max_tokens": 20, "temperature": 0, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as stream:
            texts, finish_reasons, _ = read_stream(list(stream.iter_lines()))
    finally:
        server.close()
    # Each token from all tokens before it, without a state.
    prompt = tokenize_prompt(TOKENIZER, body["prompt"]).ids
    ids: list[int] = []
    with torch.inference_mode():
        while len(ids) < 20:
            if isinstance(model, EncoderDecoder):
                source_length_B = torch.tensor([len(prompt)])
                target_BT = torch.tensor([[prompt[-1], *ids]])
                state = model.encode(torch.tensor([prompt]), source_length_B)
                features_BTD = model.decode(target_BT, state)
            else:
                features_BTD = model.features(torch.tensor([[*prompt, *ids]]))
            token = int(model.logits(features_BTD[:, -1]).argmax())
            if token == TOKENIZER.eos_token:
                break
            ids.append(token)
    assert texts[0] == TOKENIZER.decode(ids)
    assert finish_reasons == {0: "length" if len(ids) == 20 else "stop"}
