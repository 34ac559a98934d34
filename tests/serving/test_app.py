import json
import math
import random
import shutil
import socket
import subprocess
import threading

import httpx
import openai
import pytest
import torch

from gpt import GPT, MODELS
from gpt.generation import generate
from gpt.models.encoder_decoder import EncoderDecoder
from gpt.sampling import SamplingParams
from serving.engine.async_engine import AsyncEngine
from serving.engine.engine import Engine
from serving.http.app import ModelRegistry, create_app
from serving.http.completions import ModelEntry
from serving.http.limits import Limits, Timeouts
from serving.http.server import Server
from serving.tokenization import token_text, tokenize_prompt
from tokenizer import END_OF_TEXT, byte_tokenizer

CONTEXT = 20_000  # longer than any test waits for
TOKENIZER = byte_tokenizer()
DEADLINE = 120  # of waiting for what should take a moment, on a machine that stalls


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(TOKENIZER.vocab_size, CONTEXT, width=16, depth=2, heads=2).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=3 * parameter.shape[-1] ** -0.5)
    with torch.no_grad():
        model.unembedding.weight[TOKENIZER.eos_token] = 0  # so that a greedy text does not end
    return model


class Running:
    """A server on a real socket, in a thread, with its engine in sight."""

    def __init__(
        self,
        model,
        rows,
        *,
        places=150,
        limits=None,
        deadlines=None,
        key=None,
        translates=False,
        runs=None,
        **options,
    ):
        self.engine = Engine(model, rows, **options)
        self.service = AsyncEngine(self.engine, max_queue=places)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "http://{}:{}".format(*self.listener.getsockname())
        self.catalog, ready = ModelRegistry(), threading.Event()

        async def load():
            await self.catalog.add(ModelEntry("tiny", self.service, TOKENIZER, 1, translates))
            self.catalog.missing = ""
            ready.set()

        app = create_app(self.catalog, limits, key=key, runs=runs)
        self.server = Server(
            app, self.catalog, load, deadlines or Timeouts(shutdown_timeout=0), key
        )
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.thread.start()
        assert ready.wait(DEADLINE)
        self.http = httpx.Client(base_url=self.address, timeout=DEADLINE)

    def post(self, **body):
        return self.http.post("/v1/completions", json=body)

    def close(self):
        self.http.close()
        self.server.should_exit = True
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def served(model):
    running = Running(model, 4)
    yield running
    running.close()


@pytest.fixture
def alone(model):
    """A server of one row for one test, which may break it."""
    running = Running(model, 1)
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.address + "/v1", api_key="none", max_retries=0) as client:
        yield client


def reference(model, prompt, sampling, max_tokens, choice=0):
    ids = tokenize_prompt(TOKENIZER, prompt).ids
    end = {TOKENIZER.eos_token}
    return TOKENIZER.decode(generate(model, ids, max_tokens, sampling, end, choice))


def read_stream(lines):
    """The texts, finish reasons and usage of a stream, which must be as OpenAI's streams are."""
    texts, finishes, usage = {}, {}, None
    lines = [line for line in lines if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        chunk = json.loads(line.removeprefix("data: "))
        if not chunk["choices"]:
            usage = chunk["usage"]
        for choice in chunk["choices"]:
            assert choice["index"] not in finishes
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            if choice["finish_reason"]:
                finishes[choice["index"]] = choice["finish_reason"]
    return texts, finishes, usage


def test_the_openai_client_completes_as_generate_does(model, client):
    answer = client.completions.create(model="tiny", prompt="def ", max_tokens=30, temperature=0)
    assert answer.choices[0].text == reference(model, "def ", SamplingParams(0.0), 30)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 30)
    assert answer.usage.total_tokens == 35
    assert client.completions.create(model="tiny", prompt="").usage.completion_tokens <= 16


def test_every_parameter_reaches_the_sampler(model, client):
    sampling = SamplingParams(1.2, 50, 0.9, 0.001, 1.1, 0.3, 0.2, seed=-7)
    answer = client.completions.create(
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
    assert [choice.text for choice in answer.choices] == texts
    assert len(set(texts)) == 3


def test_the_openai_client_streams(model, client):
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
    ("prompt", "same"),
    [
        (["a", "", "bc"], ["a", "", "bc"]),
        ([256, 97], ["a"]),
        ([[256, 97], [256]], ["a", ""]),
    ],
)
def test_the_four_forms_of_a_prompt(model, client, prompt, same):
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, n=2, seed=1)
    texts = [reference(model, text, SamplingParams(seed=1), 5, n) for text in same for n in (0, 1)]
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(2 * len(same)))


def test_without_a_seed_every_text_is_another(client):
    answer = client.completions.create(model="tiny", prompt=["a", "a"], n=2)
    again = client.completions.create(model="tiny", prompt=["a", "a"], n=2)
    assert len({choice.text for choice in (*answer.choices, *again.choices)}) == 8


def test_the_openai_client_understands_the_errors(client):
    with pytest.raises(openai.NotFoundError, match="no model 'other' here; there is tiny"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature must be between 0 and 100"):
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tinygpt"


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_streams(model, served):
    body = json.dumps({"prompt": "x", "max_tokens": 12, "temperature": 0, "stream": True})
    command = ["curl", "-sN", "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(
        [*command, served.address + "/v1/completions"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    texts, finishes, usage = read_stream(done.stdout.splitlines())
    assert texts == {0: reference(model, "x", SamplingParams(0.0), 12)}
    assert finishes == {0: "length"}
    assert usage is None


JSON = {"content-type": "application/json"}
PROMPT = b'{"prompt": "a", '


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
        (b'{"prompt": []}', "prompt: expected a text"),
        (b'{"prompt": [[]]}', "the prompt is empty"),
        (b'{"prompt": {}}', "prompt: expected a text"),
        (b'{"prompt": ["a", 1]}', "prompt: expected a text"),
        (b'{"prompt": [1, true]}', "prompt: expected a text"),
        (b'{"prompt": [1.5]}', "prompt: expected a text"),
        (b'{"prompt": [257]}', "token 257, the model knows 0 to 256"),
        (b'{"prompt": [-1]}', "token -1"),
        (b'{"prompt": [1' + b"0" * 400 + b"]}", "the model knows 0 to 256"),
        (b'{"prompt": [1' + b"0" * 5000 + b"]}", "body"),
        (b'{"prompt": "a\\ud800"}', "U+D800, half of a surrogate pair"),
        (b'{"\\ud800": 1, "prompt": "a"}', "unicode"),
        (PROMPT + b'"model": 1}', "model: Input should be a valid string"),
        (b'{"prompt": "' + b"a" * CONTEXT + b'"}', "20001 tokens long, the model's context holds"),
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
        (PROMPT + b'"n": 129}', "1 prompts with n = 129 are 129 texts: this server allows 128"),
        (b'{"prompt": ["a", "b"], "n": 65}', "2 prompts with n = 65 are 130 texts"),
        (PROMPT + b'"stop": ["1", "2", "3", "4", "5"]}', "this server allows 4"),
        (PROMPT + b'"stop": "' + b"a" * 257 + b'"}', "this server allows 256"),
        (PROMPT + b'"stop": ""}', "stop: expected a text or a list of texts, none of them empty"),
        (PROMPT + b'"stop": [1]}', "stop: expected a text"),
        (PROMPT + b'"stream": "yes"}', "stream"),
        (PROMPT + b'"stream_options": {"include_usage": true}}', "without stream: true"),
        (PROMPT + b'"stream": true, "stream_options": {"x": 1}}', "'stream_options.x'"),
        (PROMPT + b'"logprobs": 6}', "logprobs = 6: this server allows 5"),
        (PROMPT + b'"logprobs": true}', "logprobs"),
        (PROMPT + b'"echo": 1}', "echo"),
        (PROMPT + b'"best_of": 2}', "best_of must be n, 1, or left out, not 2"),
        (PROMPT + b'"suffix": "x"}', "suffix is not possible"),
        (PROMPT + b'"logit_bias": [5]}', "logit_bias: expected an object"),
        (PROMPT + b'"logit_bias": {"5": 101}}', "logit_bias must be"),
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
def test_a_wrong_request_is_a_400_that_says_what_is_wrong(served, body, message, stream):
    if stream and body.startswith(PROMPT) and b"stream" not in body:
        body = body.replace(PROMPT, PROMPT + b'"stream": true, ')
    answer = served.http.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert len(answer.content) < 1000, "the body is not sent back"
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
def test_unknown_routes_have_openais_error_shape(served, method, path, status):
    answer = served.http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert ("allow" in answer.headers) == (status == 405)


def test_a_model_whose_name_is_no_text_is_only_unknown(served):
    answer = served.http.post(
        "/v1/completions", content=b'{"prompt": "a", "model": "\\ud800"}', headers=JSON
    )
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_a_body_that_is_not_called_json_is_refused_with_the_header_to_send(served):
    answer = served.http.post("/v1/completions", data={"prompt": "a"})
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_null_means_the_default_and_neutral_values_are_taken(served):
    nulls = dict.fromkeys(["temperature", "n", "stop", "stream", "logprobs", "suffix", "best_of"])
    assert served.post(prompt="a", echo=False, logit_bias={}, **nulls).status_code == 200
    assert served.post(prompt="a", temperature=1, top_p=1, min_p=0).status_code == 200
    assert served.post(prompt="a", suffix="", best_of=1, user="x").status_code == 200
    assert served.post(prompt="a", max_tokens=1, n=Limits.max_sequences).status_code == 200


def test_a_streamed_text_is_the_unstreamed_text(served):
    dice = random.Random(0)
    for seed in range(40):
        body = {
            "prompt": "".join(dice.choices("ab é👩\n", k=dice.randrange(6))),
            "temperature": dice.choice([0, 0.5, 1, 3]),
            "seed": seed,
            "n": dice.choice([1, 3]),
            "max_tokens": dice.randint(1, 40),
            "stop": dice.choice([None, "I", ["9", "\ufffd\ufffd", "ab"]]),
        }
        whole = served.post(**body).json()
        with served.http.stream(
            "POST",
            "/v1/completions",
            json={**body, "stream": True, "stream_options": {"include_usage": True}},
        ) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            texts, finishes, usage = read_stream("".join(answer.iter_text()).split("\n"))
        for choice in whole["choices"]:
            assert texts.get(choice["index"], "") == choice["text"]
            assert finishes[choice["index"]] == choice["finish_reason"]
            stops = [body["stop"]] if isinstance(body["stop"], str) else body["stop"] or []
            assert not any(stop in choice["text"] for stop in stops)
        assert usage == whole["usage"]


@pytest.mark.parametrize("logprobs", [None, 2])
def test_token_ids_are_those_of_the_text_streamed_or_not(served, logprobs):
    dice = random.Random(1)
    for seed in range(30):
        prompt = "".join(dice.choices("ab é👩\n", k=dice.randrange(1, 6))).rstrip()
        body = {
            "prompt": dice.choice([prompt, TOKENIZER.encode(prompt) or [97]]),
            "temperature": dice.choice([0, 1, 3]),
            "seed": seed,
            "n": dice.choice([1, 3]),
            "max_tokens": dice.randint(0, 40),
            "stop": dice.choice([None, "I", ["9", "\ufffd\ufffd", "ab"]]),
            "echo": dice.choice([False, True]),
            "logprobs": logprobs,
            "return_token_ids": True,
        }
        read = body["prompt"]
        if isinstance(read, str):
            read = tokenize_prompt(TOKENIZER, read).ids
        whole = served.post(**body).json()["choices"]
        streamed = {choice["index"]: [] for choice in whole}
        for line in served.post(**body, stream=True).text.split("\n"):
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    first = not streamed[choice["index"]]
                    assert ("prompt_token_ids" in choice) == first
                    streamed[choice["index"]].append(choice)
        for choice in whole:
            assert choice["prompt_token_ids"] == read
            parts = streamed[choice["index"]]
            assert parts[0]["prompt_token_ids"] == read
            ids = choice["token_ids"]
            assert [token for part in parts for token in part["token_ids"]] == ids
            decoded = TOKENIZER.decode(ids)
            if choice["finish_reason"] == "stop" and TOKENIZER.eos_token not in ids:
                # What a stop string cut through the middle of is no character of the text.
                assert decoded.startswith(choice["text"])
            else:
                assert decoded == choice["text"]
            if logprobs is not None:
                told = choice["logprobs"]["tokens"]
                assert [token_text(TOKENIZER, token) for token in ids] == told[: len(ids)]
                assert told[len(ids) :] in ([], [END_OF_TEXT])


def test_nobody_is_told_ids_who_did_not_ask(served):
    choice = served.post(prompt="a").json()["choices"][0]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}


def test_models_say_what_they_are(served, model):
    (told,) = served.http.get("/v1/models").json()["data"]
    assert told == served.http.get("/v1/models/tiny").json()
    assert told["rung"] == "gpt"
    assert (told["chapter"], told["year"], told["paper"]) == (15, GPT.year, GPT.paper)
    assert told["idea"] == GPT.idea
    assert told["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert (told["vocab_size"], told["eos_token"], told["dtype"]) == (257, 256, "float32")
    assert (told["translates"], told["bits_per_byte"], told["run"]) == (False, None, None)


def test_a_text_is_the_same_alone_and_among_others(served):
    bodies = [{"prompt": str(i), "seed": i, "max_tokens": 40} for i in range(12)]
    alone = [served.post(**body).json()["choices"] for body in bodies]
    together = [None] * len(bodies)

    def ask(i):
        together[i] = served.post(**bodies[i]).json()["choices"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert together == alone


def test_a_stop_string_frees_the_row_at_once(alone, model):
    text = reference(model, "", SamplingParams(0.0), 40)
    stop = text[-2:]
    answer = alone.post(prompt="", temperature=0, max_tokens=CONTEXT, stop=stop).json()
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert alone.post(prompt="", max_tokens=1).status_code == 200  # the only row is free


def hang_up(address, body, until):
    """Ask over a plain socket, read until `until` holds, and leave without a word."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as connection:
        raw = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw)
        until(connection)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows_and_its_places_in_the_queue(
    alone, monkeypatch, stream
):
    """One row and three texts asked for: one runs, two wait."""
    engine, step, cancel = alone.engine, alone.engine.step, alone.engine.abort
    busy, freed = threading.Event(), threading.Event()

    def watched_step():
        events = step()
        if engine.running and engine.prefill and engine.prefill.num_started == 1:
            busy.set()
        return events

    def watched_cancel(request, choice):
        cancel(request, choice)
        if engine.is_idle:
            freed.set()

    monkeypatch.setattr(engine, "step", watched_step)
    monkeypatch.setattr(engine, "abort", watched_cancel)
    body = {"prompt": "", "temperature": 0, "max_tokens": CONTEXT, "n": 3, "stream": stream}

    def until(connection):
        assert busy.wait(DEADLINE)
        if stream:
            received = b""
            while b'"text":' not in received:
                received += connection.recv(1000)

    hang_up(alone.address, body, until)
    assert freed.wait(DEADLINE)
    assert alone.post(prompt="", max_tokens=1).status_code == 200
    assert not alone.service._streams


def test_a_request_on_which_the_model_fails_is_a_500_or_an_error_event_and_the_next_is_served(
    alone, model, monkeypatch
):
    with monkeypatch.context() as patch:

        def fault(features_BTD):
            raise RuntimeError("secret")

        patch.setattr(model, "logits", fault)
        answer = alone.post(prompt="a")
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "the model failed on this request"
        streamed = alone.post(prompt="a", stream=True)
        events = [line for line in streamed.text.split("\n") if line]
        assert json.loads(events[0].removeprefix("data: "))["error"]["type"] == "server_error"
        assert events[1:] == ["data: [DONE]"]
    assert alone.post(prompt="a").status_code == 200
    assert alone.http.get("/health").json() == {"status": "ok"}


def test_health_is_red_once_the_engine_is_gone(alone, monkeypatch):
    monkeypatch.setattr(alone.engine, "step", lambda: 1 / 0)
    answer = alone.post(prompt="a")
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    assert alone.post(prompt="a", stream=True).status_code == 503
    assert alone.http.get("/health").status_code == 503
    assert alone.http.get("/ready").status_code == 503


def test_a_closing_server_answers_503_to_who_waits_for_a_whole_text(model, monkeypatch):
    running = Running(model, 1)
    step, busy, answers = running.engine.step, threading.Event(), []

    def watched_step():
        events = step()
        busy.set()
        return events

    monkeypatch.setattr(running.engine, "step", watched_step)

    def ask():
        answers.append(running.post(prompt="", temperature=0, max_tokens=CONTEXT))

    asking = threading.Thread(target=ask)
    asking.start()
    assert busy.wait(DEADLINE)
    running.server.should_exit = True
    asking.join(DEADLINE)
    running.close()
    assert answers[0].status_code == 503
    assert "shutting down" in answers[0].json()["error"]["message"]


def test_the_documentation_is_there(served):
    fields = served.http.get("/openapi.json").json()["components"]["schemas"]["Completion"]
    assert {"prompt", "top_k", "stream_options"} <= set(fields["properties"])
    assert all("description" in field for field in fields["properties"].values())
    docs = served.http.get("/docs")  # a view of the page: no other host is asked
    assert (docs.status_code, docs.headers["location"]) == (307, "./#docs")
    assert served.http.get("/docs", follow_redirects=True).text.startswith("<!doctype html>")
    assert math.isclose(fields["properties"]["temperature"]["default"], 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_every_rung_streams_what_its_recomputation_says(name):
    torch.manual_seed(0)
    model = MODELS[name](TOKENIZER.vocab_size, 64).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    running = Running(model, 2)
    try:
        body = {"prompt": "def f(", "max_tokens": 20, "temperature": 0, "stream": True}
        with running.http.stream("POST", "/v1/completions", json=body) as stream:
            texts, finishes, _ = read_stream(list(stream.iter_lines()))
    finally:
        running.close()
    # Each token anew from all that is before it, without a state.
    prompt = tokenize_prompt(TOKENIZER, body["prompt"]).ids
    ids: list[int] = []
    with torch.inference_mode():
        while len(ids) < 20:
            told_BT = torch.tensor([prompt])
            if isinstance(model, EncoderDecoder):
                source_length_B = torch.tensor([len(prompt)])
                written_BT = torch.tensor([[prompt[-1], *ids]])
                features_BTD = model.decode(written_BT, model.encode(told_BT, source_length_B))
            else:
                features_BTD = model.features(torch.tensor([[*prompt, *ids]]))
            token = int(model.logits(features_BTD[:, -1]).argmax())
            if token == TOKENIZER.eos_token:
                break
            ids.append(token)
    assert texts[0] == TOKENIZER.decode(ids)
    assert finishes == {0: "length" if len(ids) == 20 else "stop"}
