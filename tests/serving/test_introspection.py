"""What a model may say next and what it listens to, over HTTP: against the models and against others."""

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
from tests.serving.test_app import DEADLINE, TOKENIZER, Running, model  # noqa: F401
from tests.serving.test_server import LONG, raw, until
from tests.training.test_xray import SMALL

END = TOKENIZER.eos_token
VOCABULARY = 40


def small(name, context=64):
    torch.manual_seed(0)
    made = MODELS[name](TOKENIZER.vocab_size, context, **SMALL[name]).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return made


@pytest.fixture(scope="module")
def served(model):  # noqa: F811
    running = Running(model, 4)
    yield running
    running.close()


@pytest.fixture
def start():
    """Starts servers of models, and closes them all."""
    running = []

    def begin(made, rows=2, **options):
        running.append(Running(made, rows, **options))
        return running[-1]

    yield begin
    for one in running:
        one.close()


def ask(running, route, **body):
    answer = running.http.post(f"/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts_of(ids):
    return [{"id": token, "text": token_text(TOKENIZER, token)} for token in ids]


# What may follow.


@pytest.mark.parametrize(("sampling", "processors"), EQUIVALENTS)
def test_probabilities_are_those_of_transformers(sampling, processors):
    for seed in range(5):
        torch.manual_seed(seed)
        logits_V = 2 * torch.randn(VOCABULARY)
        prompt, text = [1, 2], logits_V.topk(3).indices.tolist()
        scores_1V = logits_V.double().unsqueeze(0)
        alone_V = scores_1V.softmax(-1)[0]
        for processor in processors:
            scores_1V = processor(torch.tensor([prompt + text]), scores_1V)
        drawn_V = scores_1V.softmax(-1)[0]
        found = next_token_distribution(
            logits_V, sampling, prompt, text, most=10, include=[3, 39, 3]
        )
        told = [one.id for one in found.candidates]
        likeliest = alone_V.argsort(descending=True).tolist()
        assert told[:10] == likeliest[:10]
        assert set(told[10:]) == {3, 39} - {*likeliest[:10]}
        for one in found.candidates:
            assert one.probability == pytest.approx(float(alone_V[one.id]), rel=1e-6)
            assert one.sampled == pytest.approx(float(drawn_V[one.id]), rel=1e-5)
            assert one.rank == likeliest.index(one.id) + 1
        assert [one.rank for one in found.candidates] == sorted(
            one.rank for one in found.candidates
        )
        assert found.kept == int((drawn_V > 0).sum())
        for place, wanted_V in enumerate((alone_V, drawn_V)):
            bits = -sum(p * math.log2(p) for p in wanted_V.tolist() if p)
            assert found.entropy[place] == pytest.approx(bits, rel=1e-5, abs=1e-6)
            rest = 1 - sum(float(wanted_V[token]) for token in told)
            assert found.rest[place] == pytest.approx(rest, abs=1e-6)


def test_penalties_and_biases_are_counted_by_hand():
    logits_V = torch.tensor([1.0, 2.0, 0.5, -1.0])
    sampling = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((3, 2.0),))
    found = next_token_distribution(logits_V, sampling, [2], [0, 1, 1])
    wanted_V = torch.tensor([1.0 - 0.75, 2.0 - 1.0, 0.5, 1.0]).softmax(-1)
    sampled = {one.id: one.sampled for one in found.candidates}
    assert sampled == {token: pytest.approx(float(wanted_V[token])) for token in range(4)}
    greedy = next_token_distribution(
        logits_V, SamplingParams(0.0, frequency_penalty=1.0), [2], [1, 1]
    )
    assert [one.sampled for one in greedy.candidates] == [0, 1, 0, 0]
    assert (greedy.kept, greedy.entropy[1]) == (1, 0)


def test_what_is_not_a_number_is_no_answer():
    for bad in (math.nan, math.inf):
        for sampling in (SamplingParams(), SamplingParams(0.0)):
            with pytest.raises(FloatingPointError, match="not numbers"):
                next_token_distribution(torch.tensor([0.0, bad]), sampling, [0])


def test_the_engine_draws_as_often_as_is_told(model):  # noqa: F811
    sampling = SamplingParams(0.9, 20, 0.9, 0.01, 1.3, seed=5)
    prompt = tokenize_prompt(TOKENIZER, "abc").ids
    engine = Engine(model, 50)
    engine.add_request(Request(prompt, 1, sampling, n=4000))
    counts = torch.zeros(TOKENIZER.vocab_size)
    while not engine.is_idle:
        for event in engine.step():
            counts[event.token] += 1
    with torch.inference_mode():
        found = next_token_distribution(
            recompute_logits(model, prompt, []), sampling, prompt, most=100
        )
    told = {one.id: one.sampled for one in found.candidates}
    assert sum(told.values()) == pytest.approx(1, abs=1e-6)
    often = [token for token, share in told.items() if share * 4000 >= 5]
    assert len(often) > 3
    assert all(told.get(token, 0) > 0 for token in counts.nonzero().flatten().tolist())
    observed, wanted = counts[often], torch.tensor([told[token] for token in often])
    wanted = wanted / wanted.sum() * observed.sum()
    assert stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-3


def test_what_follows_is_told_as_the_model_says_it(served, model):  # noqa: F811
    body = {"prompt": "def f", "tokens": [40, 120], "temperature": 0.7, "top_p": 0.8}
    told = ask(served, "next", **body, candidates=5, include=[END, 0])
    ids = [*tokenize_prompt(TOKENIZER, "def f").ids, 40, 120]
    with torch.inference_mode():
        logits_V = model(torch.tensor([ids]))[0, -1].double()
    probability_V, sampling = logits_V.softmax(-1), SamplingParams(0.7, top_p=0.8)
    found = next_token_distribution(
        logits_V, sampling, ids[:-2], [40, 120], most=5, include=[END, 0]
    )
    assert set(told) == {"model", "candidates", "entropy", "kept", "rest"}
    assert told["model"] == "tiny"
    for one, wanted in zip(told["candidates"], found.candidates, strict=True):
        assert set(one) == {"id", "text", "probability", "sampled", "rank"}
        assert (one["id"], one["rank"]) == (wanted.id, wanted.rank)
        assert one["text"] == token_text(TOKENIZER, wanted.id)
        assert one["probability"] == pytest.approx(float(probability_V[wanted.id]), rel=1e-4)
        assert one["sampled"] == pytest.approx(wanted.sampled, rel=1e-4)
    assert told["kept"] == found.kept
    for place, name in enumerate(("probability", "sampled")):
        assert told["entropy"][name] == pytest.approx(found.entropy[place], rel=1e-4)
        total = sum(one[name] for one in told["candidates"]) + told["rest"][name]
        assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "translates"),
    [(name, kind == "translation") for name in MODELS for kind in MODELS[name].supported_tasks],
)
def test_of_every_rung_the_token_that_is_drawn_from_is_the_one_that_came(start, name, translates):
    running = start(small(name), translates=translates)
    body = {"prompt": "some text", "temperature": 0}
    choice = running.post(**body, max_tokens=12, return_token_ids=True).json()["choices"][0]
    ids = choice["token_ids"] + [END] * (choice["finish_reason"] == "stop")
    for place, token in enumerate(ids):
        told = ask(running, "next", **body, tokens=ids[:place])
        assert [one["id"] for one in told["candidates"] if one["sampled"]] == [token]
    spaced = {**body, "prompt": "some "}
    first = running.post(**spaced, max_tokens=1, return_token_ids=True).json()["choices"][0]
    drawn = [one["id"] for one in ask(running, "next", **spaced)["candidates"] if one["sampled"]]
    assert drawn == (first["token_ids"] or [END])


@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_a_long_prompt_is_read_in_parts(start, name, monkeypatch):
    made = small(name, 700)
    running = start(made)
    lengths = []
    monkeypatch.setattr(
        made,
        "features",
        lambda ids_BT, state: (
            lengths.append(ids_BT.shape[1]) or type(made).features(made, ids_BT, state)
        ),
    )
    ids = torch.randint(256, (650,), generator=torch.Generator().manual_seed(0)).tolist()
    told = ask(running, "next", prompt=ids[:600], tokens=ids[600:])
    assert lengths == [256, 256, 88, 50]
    monkeypatch.undo()
    with torch.inference_mode():
        probability_V = made(torch.tensor([ids]))[0, -1].softmax(-1)
    for one in told["candidates"]:
        assert one["probability"] == pytest.approx(float(probability_V[one["id"]]), rel=1e-3)


# X-rays.


def shown(told, found, layer=None):
    """Hold an answer to a model's X-ray."""
    assert [one["name"] for one in told["maps"]] == [one.name for one in found]
    for one, wanted in zip(told["maps"], found, strict=True):
        weights_LHTS = wanted.weights[0]
        assert (one["layers"], one["heads"]) == weights_LHTS.shape[:2]
        assert one["layer"] == (layer or 0)
        if layer is not None:
            weights_LHTS = weights_LHTS[layer : layer + 1]
        got_LHTS = torch.tensor(one["weights"])
        torch.testing.assert_close(got_LHTS, weights_LHTS.float(), atol=1e-5, rtol=0)
        assert one["rows"] == texts_of(wanted.rows[0].tolist())
        if isinstance(wanted.columns, str):
            assert (one["columns"], one["counts"]) == (None, wanted.columns)
        else:
            assert one["columns"] == texts_of(wanted.columns[0].tolist())
            assert one["counts"] is None
        assert one["least"] == pytest.approx(float(weights_LHTS.min()), abs=1e-6)
        assert one["most"] == pytest.approx(float(weights_LHTS.max()), abs=1e-6)
        if "attention" in one["name"] or "alignment" in one["name"]:
            assert got_LHTS.sum(-1).allclose(torch.ones(()), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_the_x_ray_of_every_rung_is_the_models(start, name, dtype):
    made = quantize(small(name), dtype)
    running = start(made)
    told = ask(running, "xray", prompt="some text é")
    ids = [END, *TOKENIZER.encode("some text é")]
    assert (told["model"], told["tokens"], told["written"]) == ("tiny", texts_of(ids), None)
    shown(told, made.xray(torch.tensor([ids])))
    again = ask(running, "xray", prompt=ids)
    assert again == told


@pytest.mark.parametrize(
    "name", [name for name in MODELS if "translation" in MODELS[name].supported_tasks]
)
def test_the_x_ray_of_a_translation_is_of_both_texts(start, name):
    made = small(name)
    running = start(made, translates=True)
    ids = TOKENIZER.encode("un chat")
    given = ask(running, "xray", prompt="un chat", translation="a cat")
    fed = [END, *TOKENIZER.encode("a cat")]
    assert (given["tokens"], given["written"]) == (texts_of(ids), texts_of(fed))
    batch = torch.tensor([ids]), torch.tensor([len(ids)]), torch.tensor([fed])
    shown(given, made.xray(*batch))
    assert ask(running, "xray", prompt=ids, translation=fed[1:]) == given
    (written,) = translate(
        made, [ids], decoder_start_token=END, eos_token=END, max_tokens=256 - len(ids) - 1
    )
    fed = [END, *written][: made.max_target_length(len(ids))]
    own = ask(running, "xray", prompt="un chat")
    assert own["written"] == texts_of(fed)
    shown(own, made.xray(*batch[:2], torch.tensor([fed])))


def test_one_layer_and_one_kind_are_told_alone(start):
    made = small("transformer")
    running = start(made)
    ids = [END, *TOKENIZER.encode("ab cd")]
    found = made.xray(torch.tensor([ids]))
    shown(ask(running, "xray", prompt="ab cd", layer=1), found, layer=1)
    cross = ask(running, "xray", prompt="ab cd", only="cross")
    shown(cross, [one for one in found if one.name == "cross-attention"])


WRONG = [
    ("next", {}, "prompt: Field required"),
    ("next", {"prompt": ["a"]}, "prompt: expected a text or token ids"),
    ("next", {"prompt": [True]}, "prompt: expected a text or token ids"),
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
        "101 tokens are to be shown, this server shows 100: shorten the text by 1",
    ),
    ("xray", {"prompt": "a", "translation": "b"}, "translation is for models that translate"),
    ("xray", {"prompt": "a", "layer": 3}, "layer = 3: there are 3 layers, counted from 0"),
    ("xray", {"prompt": "a", "layer": -1}, "layer: "),
    ("xray", {"prompt": "a", "only": "gate"}, "no map has this in its name; there are attention"),
    ("xray", {"prompt": "a", "only": "x" * 9999}, "no map has this in its name"),
]


@pytest.fixture(scope="module")
def narrow():
    running = Running(small("gpt"), 1, limits=Limits(max_xray_tokens=100))
    yield running
    running.close()


@pytest.mark.parametrize(("route", "body", "message"), WRONG)
def test_a_wrong_question_is_a_400_that_says_what_is_wrong(narrow, route, body, message):
    answer = narrow.http.post(
        f"/v1/{route}", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(answer.content) < 1000


def test_the_context_is_used_to_its_last_place(narrow):
    ask(narrow, "next", prompt="a" * 63)
    ask(narrow, "next", prompt="a", tokens=[1] * 62)
    ask(narrow, "xray", prompt="a" * 63)


@pytest.mark.parametrize("name", MODELS)
def test_of_no_rung_a_long_text_is_a_fault(start, name):
    running = start(small(name, 16), limits=Limits(max_xray_tokens=100))
    for length in (1, 16, 17, 31, 32, 40, 99):
        for route in ("xray", "next"):
            answer = running.http.post(f"/v1/{route}", json={"prompt": [7] * length})
            assert answer.status_code in (200, 400), (route, length, answer.text)


def test_too_many_numbers_are_refused_with_what_to_send_instead(start):
    wide = MODELS["gpt"](TOKENIZER.vocab_size, 256, width=16, depth=4, heads=8).eval()
    running = start(wide)
    answer = running.http.post("/v1/xray", json={"prompt": "a" * 255})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "2,097,152 numbers, this server tells 1,000,000: send a `layer` below 4" in message
    (one,) = ask(running, "xray", prompt="a" * 255, layer=3)["maps"]
    assert torch.tensor(one["weights"]).shape == (1, 8, 256, 256)


# Beside those who are served.


def test_questions_among_streams_change_no_text(served):
    bodies = [{"prompt": str(i), "seed": i, "max_tokens": 60} for i in range(6)]
    alone = [served.post(**body).json()["choices"] for body in bodies]
    questions = [("next", {"prompt": "a" * 600}), ("xray", {"prompt": "some text"})] * 8
    told = [ask(served, route, **body) for route, body in questions[:2]] * 8
    together = [None] * (len(bodies) + len(questions))

    def stream(i):
        together[i] = served.post(**bodies[i]).json()["choices"]

    def question(i):
        route, body = questions[i - len(bodies)]
        together[i] = ask(served, route, **body)

    threads = [
        threading.Thread(target=stream if i < len(bodies) else question, args=(i,))
        for i in range(len(together))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert together == alone + told


def test_a_fault_in_one_question_is_its_own(start, monkeypatch):
    made = small("gpt")
    running = start(made)

    def fault(*_):
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(made, "xray", fault)
        patch.setattr(made, "logits", fault)
        for route in ("next", "xray"):
            answer = running.http.post(f"/v1/{route}", json={"prompt": "a"})
            assert answer.status_code == 500
            assert answer.json()["error"]["message"] == "the model failed on this request"
    with monkeypatch.context() as patch:
        patch.setattr(made, "logits", lambda features: features.new_full((1, 257), math.nan))
        assert running.http.post("/v1/next", json={"prompt": "a"}).status_code == 500
    assert running.http.get("/health").status_code == 200
    ask(running, "next", prompt="a")
    ask(running, "xray", prompt="a")
    assert running.post(prompt="a").status_code == 200


@pytest.fixture
def held(start, monkeypatch):
    """A server whose model waits in the middle of an X-ray until it is let go."""
    made = small("gpt")
    running = start(made, rows=1, places=1)
    running.inside, running.go_on = threading.Event(), threading.Event()
    xray = made.xray

    def waiting(*batch):
        running.inside.set()
        assert running.go_on.wait(DEADLINE)
        return xray(*batch)

    monkeypatch.setattr(made, "xray", waiting)
    yield running
    running.go_on.set()


class Asking(threading.Thread):
    """A question in a thread of its own."""

    def __init__(self, running, route, **body):
        super().__init__()
        self.running, self.route, self.body = running, route, body
        self.start()

    def run(self):
        self.answer = self.running.http.post(f"/v1/{self.route}", json=self.body)

    def status(self):
        self.join(DEADLINE)
        return self.answer.status_code


def test_more_questions_than_may_wait_are_told_to_come_again(held):
    first = Asking(held, "xray", prompt="a")
    assert held.inside.wait(DEADLINE)
    second = Asking(held, "next", prompt="a")
    until(lambda: held.service._num_calls == 2)
    refused = held.http.post("/v1/next", json={"prompt": "a"})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    held.go_on.set()
    assert (first.status(), second.status()) == (200, 200)


def test_a_client_that_leaves_while_it_waits_is_not_answered_and_the_next_is(held):
    first = Asking(held, "xray", prompt="a")
    assert held.inside.wait(DEADLINE)
    body = b'{"prompt": "gone"}'
    head = b"POST /v1/xray HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    leaving = raw(held, head + b"content-length: %d\r\n\r\n" % len(body) + body)
    until(lambda: held.service._num_calls == 2)
    leaving.close()
    until(lambda: held.service._num_calls == 1)
    held.go_on.set()
    assert first.status() == 200
    ask(held, "next", prompt="a")


def test_a_question_that_is_being_answered_is_answered_before_a_server_closes(held):
    first = Asking(held, "xray", prompt="a")
    assert held.inside.wait(DEADLINE)
    second = Asking(held, "next", prompt="a")
    until(lambda: held.service._num_calls == 2)
    held.server.should_exit = True
    until(lambda: not held.service.is_ready)
    held.go_on.set()
    assert (first.status(), second.status()) == (200, 503)
    assert "shutting down" in second.answer.json()["error"]["message"]


def test_who_asks_an_engine_that_fails_is_told_so(start, monkeypatch):
    running = start(small("gpt"), rows=1)
    inside, go_on = threading.Event(), threading.Event()

    def failing():
        inside.set()
        assert go_on.wait(DEADLINE)
        raise RuntimeError("broken")

    monkeypatch.setattr(running.engine, "step", failing)
    text = Asking(running, "completions", **LONG)
    assert inside.wait(DEADLINE)
    question = Asking(running, "next", prompt="a")
    until(lambda: running.service._current_call)
    go_on.set()
    assert (question.status(), text.status()) == (503, 503)
    assert running.http.post("/v1/xray", json={"prompt": "a"}).status_code == 503
    assert running.http.get("/health").status_code == 503


def test_one_question_is_asked_between_two_steps(start, monkeypatch):
    running = start(small("rnn"))
    service, engine = running.service, running.engine
    order, step = [], engine.step

    def stepped():
        order.append("step")
        return step()

    monkeypatch.setattr(engine, "step", stepped)
    text = Asking(running, "completions", prompt="a", max_tokens=3000, temperature=0)
    until(lambda: len(order) > 3)

    async def ask_many():
        async def one():
            await service.run_on_engine(lambda: order.append("question"))

        await asyncio.gather(*(one() for _ in range(20)))

    asyncio.run_coroutine_threadsafe(ask_many(), service._loop).result(DEADLINE)
    assert text.status() == 200
    asked = [place for place, what in enumerate(order) if what == "question"]
    assert len(asked) == 20
    assert all(order[place + 1] == "step" for place in asked if place + 1 < len(order))
