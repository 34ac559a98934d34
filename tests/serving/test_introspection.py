"""Next-token distributions and X-rays over HTTP, compared with the models and with transformers."""

import asyncio
import json
import math
import threading

import pytest
import torch
from scipy import stats

from gpt import MODELS
from gpt.beam_search import translate
from gpt.generation import recompute_logits
from gpt.kernels.quantization import quantize
from gpt.sampling import SamplingParams
from serving.engine.engine import Engine
from serving.engine.sequence import Request
from serving.http.introspection import next_token_distribution
from serving.http.limits import Limits
from serving.tokenization import token_text, tokenize_prompt
from tests.gpt.test_sampling import EQUIVALENTS
from tests.serving.running_server import (
    DEADLINE,
    JSON,
    LONG,
    TOKENIZER,
    RunningServer,
    connect,
    wait_until,
)
from tests.training.test_xray import SMALL

EOS = TOKENIZER.eos_token
VOCAB_SIZE = 40


def small_model(name, context_length=64):
    torch.manual_seed(0)
    model = MODELS[name](TOKENIZER.vocab_size, context_length, **SMALL[name]).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def server(model):
    server = RunningServer(model, 4)
    yield server
    server.close()


@pytest.fixture
def start():
    """Starts servers, and closes them after the test."""
    servers = []

    def start_server(model, max_num_seqs=2, **options):
        servers.append(RunningServer(model, max_num_seqs, **options))
        return servers[-1]

    yield start_server
    for server in servers:
        server.close()


def post(server, route, **body):
    response = server.http.post(f"/v1/{route}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def tokens_json(ids):
    return [{"id": token, "text": token_text(TOKENIZER, token)} for token in ids]


# Next tokens.


@pytest.mark.parametrize(("sampling_params", "processors"), EQUIVALENTS)
def test_probabilities_equal_those_of_transformers(sampling_params, processors):
    for seed in range(5):
        torch.manual_seed(seed)
        logits_V = 2 * torch.randn(VOCAB_SIZE)
        prompt, output = [1, 2], logits_V.topk(3).indices.tolist()
        scores_1V = logits_V.double().unsqueeze(0)
        model_V = scores_1V.softmax(-1)[0]
        for processor in processors:
            scores_1V = processor(torch.tensor([prompt + output]), scores_1V)
        sampling_V = scores_1V.softmax(-1)[0]
        distribution = next_token_distribution(
            logits_V, sampling_params, prompt, output, num_candidates=10, include=[3, 39, 3]
        )
        candidates = distribution["candidates"]
        tokens = [candidate["id"] for candidate in candidates]
        likeliest = model_V.argsort(descending=True).tolist()
        assert tokens[:10] == likeliest[:10]
        assert set(tokens[10:]) == {3, 39} - {*likeliest[:10]}
        for candidate in candidates:
            token = candidate["id"]
            assert candidate["probability"] == pytest.approx(float(model_V[token]), rel=1e-6)
            expected = pytest.approx(float(sampling_V[token]), rel=1e-5)
            assert candidate["sampling_probability"] == expected
            assert candidate["rank"] == likeliest.index(token) + 1
        ranks = [candidate["rank"] for candidate in candidates]
        assert ranks == sorted(ranks)
        assert distribution["support_size"] == int((sampling_V > 0).sum())
        for name, expected_V in (("probability", model_V), ("sampling_probability", sampling_V)):
            bits = -sum(p * math.log2(p) for p in expected_V.tolist() if p)
            assert distribution["entropy"][name] == pytest.approx(bits, rel=1e-5, abs=1e-6)
            rest = 1 - sum(float(expected_V[token]) for token in tokens)
            assert distribution["rest"][name] == pytest.approx(rest, abs=1e-6)


def test_penalties_and_logit_bias_by_hand():
    logits_V = torch.tensor([1.0, 2.0, 0.5, -1.0])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((3, 2.0),))
    distribution = next_token_distribution(logits_V, params, [2], [0, 1, 1])
    expected_V = torch.tensor([1.0 - 0.75, 2.0 - 1.0, 0.5, 1.0]).softmax(-1)
    probabilities = {c["id"]: c["sampling_probability"] for c in distribution["candidates"]}
    assert probabilities == {token: pytest.approx(float(expected_V[token])) for token in range(4)}
    params = SamplingParams(0.0, frequency_penalty=1.0)
    greedy = next_token_distribution(logits_V, params, [2], [1, 1])
    assert [candidate["sampling_probability"] for candidate in greedy["candidates"]] == [0, 1, 0, 0]
    assert (greedy["support_size"], greedy["entropy"]["sampling_probability"]) == (1, 0)


def test_logits_that_are_not_finite_are_an_error():
    for bad in (math.nan, math.inf):
        for params in (SamplingParams(), SamplingParams(0.0)):
            with pytest.raises(FloatingPointError, match="not numbers"):
                next_token_distribution(torch.tensor([0.0, bad]), params, [0])


def test_engine_samples_from_the_returned_distribution(model):
    params = SamplingParams(0.9, 20, 0.9, 0.01, 1.3, seed=5)
    prompt = tokenize_prompt(TOKENIZER, "abc").ids
    engine = Engine(model, 50)
    engine.add_request(Request(prompt, 1, params, n=4000))
    counts = torch.zeros(TOKENIZER.vocab_size)
    while not engine.is_idle:
        for output in engine.step():
            counts[output.token] += 1
    with torch.inference_mode():
        distribution = next_token_distribution(
            recompute_logits(model, prompt, []), params, prompt, num_candidates=100
        )
    probabilities = {c["id"]: c["sampling_probability"] for c in distribution["candidates"]}
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-6)
    frequent = [token for token, p in probabilities.items() if p * 4000 >= 5]
    assert len(frequent) > 3
    assert all(probabilities.get(token, 0) > 0 for token in counts.nonzero().flatten().tolist())
    observed = counts[frequent]
    expected = torch.tensor([probabilities[token] for token in frequent])
    expected = expected / expected.sum() * observed.sum()
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


def test_next_tokens_response_equals_the_models_distribution(server, model):
    body = {"prompt": "def f", "tokens": [40, 120], "temperature": 0.7, "top_p": 0.8}
    response = post(server, "next", **body, candidates=5, include=[EOS, 0])
    ids = [*tokenize_prompt(TOKENIZER, "def f").ids, 40, 120]
    with torch.inference_mode():
        logits_V = model(torch.tensor([ids]))[0, -1].double()
    probability_V, params = logits_V.softmax(-1), SamplingParams(0.7, top_p=0.8)
    expected = next_token_distribution(
        logits_V, params, ids[:-2], [40, 120], num_candidates=5, include=[EOS, 0]
    )
    assert set(response) == {"model", "candidates", "entropy", "support_size", "rest"}
    assert response["model"] == "tiny"
    for candidate, expected_candidate in zip(
        response["candidates"], expected["candidates"], strict=True
    ):
        assert set(candidate) == {"id", "text", "probability", "sampling_probability", "rank"}
        assert (candidate["id"], candidate["rank"]) == (
            expected_candidate["id"],
            expected_candidate["rank"],
        )
        assert candidate["text"] == token_text(TOKENIZER, expected_candidate["id"])
        assert candidate["probability"] == pytest.approx(
            float(probability_V[expected_candidate["id"]]), rel=1e-4
        )
        sampling_probability = pytest.approx(expected_candidate["sampling_probability"], rel=1e-4)
        assert candidate["sampling_probability"] == sampling_probability
    assert response["support_size"] == expected["support_size"]
    for name in ("probability", "sampling_probability"):
        assert response["entropy"][name] == pytest.approx(expected["entropy"][name], rel=1e-4)
        total = sum(candidate[name] for candidate in response["candidates"])
        assert total + response["rest"][name] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "is_translation"),
    [(name, task == "translation") for name in MODELS for task in MODELS[name].supported_tasks],
)
def test_greedy_next_token_equals_the_completions_token(start, name, is_translation):
    server = start(small_model(name), is_translation=is_translation)
    body = {"prompt": "some text", "temperature": 0}
    completion = server.complete(**body, max_tokens=12, return_token_ids=True).json()
    choice = completion["choices"][0]
    ids = choice["token_ids"] + [EOS] * (choice["finish_reason"] == "stop")

    def sampled_tokens(**fields):
        candidates = post(server, "next", **{**body, **fields})["candidates"]
        return [c["id"] for c in candidates if c["sampling_probability"]]

    for i, token in enumerate(ids):
        assert sampled_tokens(tokens=ids[:i]) == [token]
    body["prompt"] = "some "
    completion = server.complete(**body, max_tokens=1, return_token_ids=True).json()
    assert sampled_tokens() == (completion["choices"][0]["token_ids"] or [EOS])


@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_long_prompt_is_processed_in_chunks(start, name, monkeypatch):
    model = small_model(name, 700)
    server = start(model)
    lengths = []

    def recording_features(ids_BT, state):
        lengths.append(ids_BT.shape[1])
        return type(model).features(model, ids_BT, state)

    monkeypatch.setattr(model, "features", recording_features)
    ids = torch.randint(256, (650,), generator=torch.Generator().manual_seed(0)).tolist()
    response = post(server, "next", prompt=ids[:600], tokens=ids[600:])
    assert lengths == [256, 256, 88, 50]
    monkeypatch.undo()
    with torch.inference_mode():
        probability_V = model(torch.tensor([ids]))[0, -1].softmax(-1)
    for candidate in response["candidates"]:
        expected = float(probability_V[candidate["id"]])
        assert candidate["probability"] == pytest.approx(expected, rel=1e-3)


# X-rays.


def assert_equals_xray(response, expected, layer=None):
    """Compare a response with the activation maps of the model."""
    assert [m["name"] for m in response["maps"]] == [m.name for m in expected]
    for m, expected_map in zip(response["maps"], expected, strict=True):
        weights_LHTS = expected_map.weights[0]
        assert (m["num_layers"], m["num_heads"]) == weights_LHTS.shape[:2]
        assert m["first_layer"] == (layer or 0)
        if layer is not None:
            weights_LHTS = weights_LHTS[layer : layer + 1]
        actual_LHTS = torch.tensor(m["weights"])
        torch.testing.assert_close(actual_LHTS, weights_LHTS.float(), atol=1e-5, rtol=0)
        assert m["rows"] == tokens_json(expected_map.rows[0].tolist())
        if isinstance(expected_map.columns, str):
            assert (m["columns"], m["column_label"]) == (None, expected_map.columns)
        else:
            assert m["columns"] == tokens_json(expected_map.columns[0].tolist())
            assert m["column_label"] is None
        assert m["min"] == pytest.approx(float(weights_LHTS.min()), abs=1e-6)
        assert m["max"] == pytest.approx(float(weights_LHTS.max()), abs=1e-6)
        if "attention" in m["name"] or "alignment" in m["name"]:
            assert actual_LHTS.sum(-1).allclose(torch.ones(()), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_xray_equals_the_models(start, name, dtype):
    model = quantize(small_model(name), dtype)
    server = start(model)
    response = post(server, "xray", prompt="some text é")
    ids = [EOS, *TOKENIZER.encode("some text é")]
    assert (response["model"], response["target_tokens"]) == ("tiny", None)
    assert response["tokens"] == tokens_json(ids)
    assert_equals_xray(response, model.xray(torch.tensor([ids])))
    assert post(server, "xray", prompt=ids) == response


@pytest.mark.parametrize(
    "name", [name for name in MODELS if "translation" in MODELS[name].supported_tasks]
)
def test_xray_of_a_translation(start, name):
    model = small_model(name)
    server = start(model, is_translation=True)
    ids = TOKENIZER.encode("un chat")
    response = post(server, "xray", prompt="un chat", translation="a cat")
    decoder_ids = [EOS, *TOKENIZER.encode("a cat")]
    assert response["tokens"] == tokens_json(ids)
    assert response["target_tokens"] == tokens_json(decoder_ids)
    source = torch.tensor([ids]), torch.tensor([len(ids)])
    assert_equals_xray(response, model.xray(*source, torch.tensor([decoder_ids])))
    assert post(server, "xray", prompt=ids, translation=decoder_ids[1:]) == response
    (target,) = translate(
        model, [ids], decoder_start_token=EOS, eos_token=EOS, max_tokens=256 - len(ids) - 1
    )
    decoder_ids = [EOS, *target][: model.max_target_length(len(ids))]
    own = post(server, "xray", prompt="un chat")
    assert own["target_tokens"] == tokens_json(decoder_ids)
    assert_equals_xray(own, model.xray(*source, torch.tensor([decoder_ids])))


def test_xray_of_one_layer_or_one_map(start):
    model = small_model("transformer")
    server = start(model)
    ids = [EOS, *TOKENIZER.encode("ab cd")]
    maps = model.xray(torch.tensor([ids]))
    assert_equals_xray(post(server, "xray", prompt="ab cd", layer=1), maps, layer=1)
    cross = post(server, "xray", prompt="ab cd", map_name="cross")
    assert_equals_xray(cross, [m for m in maps if m.name == "cross-attention"])


INVALID = [
    ("next", {}, "prompt: Field required"),
    ("next", {"prompt": ["a"]}, "prompt: expected a string or token ids"),
    ("next", {"prompt": [True]}, "prompt: expected a string or token ids"),
    ("next", {"prompt": []}, "the prompt is empty"),
    ("next", {"prompt": [257]}, "the prompt has token 257, the model knows 0 to 256"),
    ("next", {"prompt": "a\ud800"}, "half of a surrogate pair"),
    ("next", {"prompt": "a", "tokens": [-1]}, "tokens has token -1"),
    ("next", {"prompt": "a", "tokens": ["b"]}, "tokens.0: Input should be a valid integer"),
    ("next", {"prompt": "a", "include": [10**30]}, "include has token 1"),
    ("next", {"prompt": "a", "include": [1] * 17}, "include: List should have at most 16 items"),
    ("next", {"prompt": "a", "candidates": 0}, "candidates: "),
    ("next", {"prompt": "a", "candidates": 101}, "candidates: "),
    ("next", {"prompt": "a", "temperature": -1}, "temperature must be between 0 and 100"),
    ("next", {"prompt": "a", "logit_bias": {"257": 1}}, "logit_bias has token 257"),
    ("next", {"prompt": "a" * 70}, "71 tokens long, the model's context holds 64"),
    ("next", {"prompt": "a", "tokens": [1] * 63}, "prompt and tokens are 65 tokens long"),
    ("next", {"prompt": "a", "max_tokens": 1}, "unknown field 'max_tokens'"),
    ("xray", {}, "prompt: Field required"),
    ("xray", {"prompt": []}, "the prompt is empty"),
    ("xray", {"prompt": [300]}, "the prompt has token 300"),
    ("xray", {"prompt": "a" * 64}, "65 tokens do not fit in the context of 64"),
    (
        "xray",
        {"prompt": "a" * 100},
        "the X-ray would have 101 tokens, this server allows 100: shorten the text by 1",
    ),
    ("xray", {"prompt": "a", "translation": "b"}, "translation is only for translation models"),
    ("xray", {"prompt": "a", "layer": 3}, "layer = 3: there are 3 layers, counted from 0"),
    ("xray", {"prompt": "a", "layer": -1}, "layer: "),
    ("xray", {"prompt": "a", "map_name": "gate"}, "no map's name contains this; maps: attention"),
    ("xray", {"prompt": "a", "map_name": "x" * 9999}, "no map's name contains this"),
]


@pytest.fixture(scope="module")
def gpt_server():
    server = RunningServer(small_model("gpt"), 1, limits=Limits(max_xray_tokens=100))
    yield server
    server.close()


@pytest.mark.parametrize(("route", "body", "message"), INVALID)
def test_invalid_request_is_400_with_reason(gpt_server, route, body, message):
    response = gpt_server.http.post(f"/v1/{route}", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(response.content) < 1000


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("next", {"logit_bias": {"999": 1}}, "logit_bias"),
        ("next", {"top_p": 2}, "top_p"),
        ("next", {"include": [999]}, "include"),
        ("xray", {"layer": 99}, "layer"),
        ("xray", {"map_name": "x"}, "map_name"),
        ("xray", {"translation": "x"}, "translation"),
    ],
)
def test_error_names_the_field_at_fault(gpt_server, route, fields, param):
    response = gpt_server.http.post(f"/v1/{route}", json={"prompt": "a", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_full_context_is_allowed(gpt_server):
    post(gpt_server, "next", prompt="a" * 63)
    post(gpt_server, "next", prompt="a", tokens=[1] * 62)
    post(gpt_server, "xray", prompt="a" * 63)


@pytest.mark.parametrize("name", MODELS)
def test_no_prompt_length_is_a_server_error(start, name):
    server = start(small_model(name, 16), limits=Limits(max_xray_tokens=100))
    for length in (1, 16, 17, 31, 32, 40, 99):
        for route in ("xray", "next"):
            response = server.http.post(f"/v1/{route}", json={"prompt": [7] * length})
            assert response.status_code in (200, 400), (route, length, response.text)


def test_too_many_weights_are_refused_with_what_to_send_instead(start):
    model = MODELS["gpt"](TOKENIZER.vocab_size, 256, width=16, depth=4, heads=8).eval()
    server = start(model)
    response = server.http.post("/v1/xray", json={"prompt": "a" * 255})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "2,097,152 weights, this server returns 1,000,000: send a `layer` below 4" in message
    (attention,) = post(server, "xray", prompt="a" * 255, layer=3)["maps"]
    assert torch.tensor(attention["weights"]).shape == (1, 8, 256, 256)


# Concurrent requests.


def test_introspection_changes_no_concurrent_completion(server):
    bodies = [{"prompt": str(i), "seed": i, "max_tokens": 60} for i in range(6)]
    alone = [server.complete(**body).json()["choices"] for body in bodies]
    requests = [("next", {"prompt": "a" * 600}), ("xray", {"prompt": "some text"})] * 8
    expected = [post(server, route, **body) for route, body in requests[:2]] * 8
    together = [None] * (len(bodies) + len(requests))

    def complete(i):
        together[i] = server.complete(**bodies[i]).json()["choices"]

    def introspect(i):
        route, body = requests[i - len(bodies)]
        together[i] = post(server, route, **body)

    threads = [
        threading.Thread(target=complete if i < len(bodies) else introspect, args=(i,))
        for i in range(len(together))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert together == alone + expected


def test_model_error_fails_only_its_request(start, monkeypatch):
    model = small_model("gpt")
    server = start(model)

    def fail(*_):
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(model, "xray", fail)
        patch.setattr(model, "logits", fail)
        for route in ("next", "xray"):
            response = server.http.post(f"/v1/{route}", json={"prompt": "a"})
            assert response.status_code == 500
            assert response.json()["error"]["message"] == "the model failed on this request"
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", lambda features: features.new_full((1, 257), math.nan))
        assert server.http.post("/v1/next", json={"prompt": "a"}).status_code == 500
    assert server.http.get("/health").status_code == 200
    post(server, "next", prompt="a")
    post(server, "xray", prompt="a")
    assert server.complete(prompt="a").status_code == 200


@pytest.fixture
def blocked_server(start, monkeypatch):
    """A server whose model blocks in an X-ray until `released` is set."""
    model = small_model("gpt")
    server = start(model, 1, max_queue=1)
    server.blocked, server.released = threading.Event(), threading.Event()
    xray = model.xray

    def blocking_xray(*batch):
        server.blocked.set()
        assert server.released.wait(DEADLINE)
        return xray(*batch)

    monkeypatch.setattr(model, "xray", blocking_xray)
    yield server
    server.released.set()


class BackgroundRequest(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, server, route, **body):
        super().__init__()
        self.server, self.route, self.body = server, route, body
        self.start()

    def run(self):
        self.response = self.server.http.post(f"/v1/{self.route}", json=self.body)

    def status(self):
        self.join(DEADLINE)
        return self.response.status_code


def test_waiting_requests_above_the_limit_are_429(blocked_server):
    first = BackgroundRequest(blocked_server, "xray", prompt="a")
    assert blocked_server.blocked.wait(DEADLINE)
    second = BackgroundRequest(blocked_server, "next", prompt="a")
    wait_until(lambda: blocked_server.async_engine._num_calls == 2)
    refused = blocked_server.http.post("/v1/next", json={"prompt": "a"})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    blocked_server.released.set()
    assert (first.status(), second.status()) == (200, 200)


def test_disconnect_cancels_a_waiting_request(blocked_server):
    first = BackgroundRequest(blocked_server, "xray", prompt="a")
    assert blocked_server.blocked.wait(DEADLINE)
    body = b'{"prompt": "gone"}'
    head = b"POST /v1/xray HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection = connect(blocked_server, head + b"content-length: %d\r\n\r\n" % len(body) + body)
    wait_until(lambda: blocked_server.async_engine._num_calls == 2)
    connection.close()
    wait_until(lambda: blocked_server.async_engine._num_calls == 1)
    blocked_server.released.set()
    assert first.status() == 200
    post(blocked_server, "next", prompt="a")


def test_shutdown_completes_the_current_request_and_refuses_waiting_ones(blocked_server):
    first = BackgroundRequest(blocked_server, "xray", prompt="a")
    assert blocked_server.blocked.wait(DEADLINE)
    second = BackgroundRequest(blocked_server, "next", prompt="a")
    wait_until(lambda: blocked_server.async_engine._num_calls == 2)
    blocked_server.server.should_exit = True
    wait_until(lambda: not blocked_server.async_engine.is_ready)
    blocked_server.released.set()
    assert (first.status(), second.status()) == (200, 503)
    assert "shutting down" in second.response.json()["error"]["message"]


def test_engine_failure_is_503_for_waiting_requests(start, monkeypatch):
    server = start(small_model("gpt"), 1)
    started, released = threading.Event(), threading.Event()

    def failing_step():
        started.set()
        assert released.wait(DEADLINE)
        raise RuntimeError("broken")

    monkeypatch.setattr(server.engine, "step", failing_step)
    completion = BackgroundRequest(server, "completions", **LONG)
    assert started.wait(DEADLINE)
    next_tokens = BackgroundRequest(server, "next", prompt="a")
    wait_until(lambda: server.async_engine._current_call)
    released.set()
    assert (next_tokens.status(), completion.status()) == (503, 503)
    assert server.http.post("/v1/xray", json={"prompt": "a"}).status_code == 503
    assert server.http.get("/health").status_code == 503


def test_one_introspection_call_between_two_steps(start, monkeypatch):
    server = start(small_model("rnn"))
    async_engine, engine = server.async_engine, server.engine
    order, step, are_queued = [], engine.step, threading.Event()

    def recording_step():
        order.append("step")
        if len(order) > 3:
            are_queued.wait(DEADLINE)  # so that the completion has not ended before the calls
        return step()

    monkeypatch.setattr(engine, "step", recording_step)
    completion = BackgroundRequest(
        server, "completions", prompt="a", max_tokens=3000, temperature=0
    )
    wait_until(lambda: len(order) > 3)

    async def call_many():
        calls = [
            asyncio.ensure_future(async_engine.run_on_engine(lambda: order.append("call")))
            for _ in range(20)
        ]
        await asyncio.sleep(0)  # each now waits for its turn
        are_queued.set()
        await asyncio.gather(*calls)

    asyncio.run_coroutine_threadsafe(call_many(), async_engine._loop).result(DEADLINE)
    assert completion.status() == 200
    calls = [i for i, event in enumerate(order) if event == "call"]
    assert len(calls) == 20
    last_step = len(order) - 1 - order[::-1].index("step")  # then the engine is idle
    during = [i for i in calls if i < last_step]
    assert len(during) > 1
    assert all(order[i + 1] == "step" for i in during)


# Similar words.


def test_nearest_tokens_are_those_of_the_largest_cosine(gpt_server):
    token = TOKENIZER.word_token("a")
    answer = post(gpt_server, "nearest", word="a", k=5)
    assert answer["token"] == tokens_json([token])[0]
    vectors_VD = small_model("gpt").embedding.weight.detach()
    cosine_V = torch.cosine_similarity(vectors_VD, vectors_VD[token : token + 1])
    cosine_V[token] = -1
    expected = cosine_V.topk(5)
    neighbors = answer["neighbors"]
    texts = [{key: n[key] for key in ("id", "text")} for n in neighbors]
    assert texts == tokens_json(expected.indices.tolist())
    assert [n["cosine"] for n in neighbors] == pytest.approx(expected.values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"word": "xyz"}, "word", "'xyz' is 3 tokens"),
        ({"word": ""}, "word", "at least 1 character"),
        ({"word": "x" * 201}, "word", "at most 200 characters"),
        ({"word": "\ud800"}, "word", "unicode string"),
        ({}, "word", "required"),
        ({"word": "a", "k": 0}, "k", "greater than or equal to 1"),
    ],
)
def test_a_word_without_neighbors_is_explained(gpt_server, fields, param, message):
    response = gpt_server.http.post("/v1/nearest", content=json.dumps(fields), headers=JSON)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]


def test_a_model_without_an_embedding_has_no_nearest_tokens(start):
    server = start(small_model("softmax"))
    response = server.http.post("/v1/nearest", json={"word": "a"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
    assert "BigramLM has no embedding" in response.json()["error"]["message"]
