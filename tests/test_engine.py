import random

import pytest
import torch
from torch import nn

from gpt import GPT, LanguageModel
from gpt.sampling import Sampling, generate
from serving.engine import Engine, Request

VOCABULARY = 30


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine make tiny products take milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Recurrent(LanguageModel):
    """Not a GPT in anything: no limit, a state without positions that does not start at zero."""

    def __init__(self):
        super().__init__(VOCABULARY, 16)
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.cell = nn.GRUCell(24, 24)
        self.unembedding = nn.Linear(24, VOCABULARY)

    def init_state(self, rows, length):
        return {"hidden": torch.ones(rows, 24, dtype=torch.float64)}

    def features(self, tokens_BT, state=None):
        hidden_BD = (
            self.init_state(len(tokens_BT), 0)["hidden"] if state is None else state["hidden"]
        )
        steps = []
        for token_B in tokens_BT.unbind(1):
            steps.append(self.cell(self.embedding(token_B), steps[-1] if steps else hidden_BD))
        if state is not None:
            state["hidden"].copy_(steps[-1])
        return torch.stack(steps, 1)

    def logits(self, features_BTD):
        return self.unembedding(features_BTD)


def make(kind):
    torch.manual_seed(0)
    model = Recurrent() if kind == "recurrent" else GPT(VOCABULARY, 48, width=16, depth=2, heads=2)
    model = model.double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=4 * parameter.shape[-1] ** -0.5)
    return model


def run(engine, texts, ends):
    for request, token, finish, error in engine.step():
        assert not error
        assert request not in ends, "an event after the end"
        if token is not None:
            texts.setdefault(request, []).append(token)
        if finish:
            ends[request] = finish


@pytest.mark.parametrize("kind", ["gpt", "recurrent"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_text_equals_the_reference_under_random_arrivals_and_cancellations(kind, size):
    model = make(kind)
    engine = Engine(model, size)
    dice = random.Random(size)
    requests, cancelled, texts, ends = [], set(), {}, {}
    for i in range(120):
        prompt = [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 40))]
        sampling = dice.choice(
            [Sampling(0.0), Sampling(seed=i), Sampling(0.8, 5, 0.9, 0.02, 1.2, 0.5, 0.5, seed=i)]
        )
        requests.append(
            Request(
                prompt,
                dice.randint(1, 30),
                sampling,
                {dice.randrange(VOCABULARY)},
                i % 3,
                dice.sample(range(VOCABULARY), 4) if i % 4 == 0 else (),
            )
        )
        engine.add(requests[-1])
        for _ in range(dice.choice([0, 0, 1, 5])):
            run(engine, texts, ends)
        if dice.random() < 0.3:
            unlucky = dice.choice(requests[-8:])
            engine.cancel(unlucky)
            if unlucky not in ends:
                cancelled.add(unlucky)
                ends[unlucky] = "cancelled"
    while not engine.idle:
        run(engine, texts, ends)
    assert not engine.live
    assert not engine.queue
    assert engine.step() == []
    assert len(cancelled) > 10
    assert {"stop", "length"} <= set(ends.values())
    for request in requests:
        reference = list(
            generate(
                model,
                request.prompt,
                request.max_tokens,
                request.sampling,
                request.stop,
                request.choice,
                request.first,
            )
        )
        assert not request.first or not reference or reference[0] in request.first
        text = texts.get(request, [])
        if request in cancelled:
            assert text == reference[: len(text)]
        else:
            assert text == reference
            # the last token there was room for, or one more that was a stop
            room = 49 - len(request.prompt) if kind == "gpt" else request.max_tokens
            full = len(text) == min(request.max_tokens, room)
            assert ends[request] == ("length" if full else "stop")


def test_an_arrival_costs_the_others_one_prompt_and_no_token():
    engine = Engine(make("gpt"), 4)
    first = Request([1], 40, Sampling())
    engine.add(first)
    engine.step()
    for _ in range(3):
        engine.add(Request([1, 2, 3], 40, Sampling()))
    for live in (2, 3, 4):
        events = engine.step()
        assert [event.request for event in events].count(first) == 1
        assert len(engine.live) == live


def test_a_request_that_fails_fails_alone():
    model = make("gpt")
    engine = Engine(model, 3)
    good, bad, queued = (Request([i], 10, Sampling(0.0)) for i in (1, 2, 3))
    engine.add(good)
    engine.step()
    engine.add(bad)
    engine.add(queued)
    bad.prompt = [VOCABULARY]  # after the check, as a fault of the device would be
    texts, failed = {}, []
    while not engine.idle:
        for request, token, _, error in engine.step():
            texts.setdefault(request, []).append(token)
            if error:
                failed.append(request)
    assert failed == [bad]
    assert texts[good] == list(generate(model, [1], 10, Sampling(0.0)))[1:]
    assert texts[queued] == list(generate(model, [3], 10, Sampling(0.0)))


def test_a_step_that_fails_ends_the_live_requests_and_serves_the_next(monkeypatch):
    model = make("gpt")
    engine = Engine(model, 2)
    requests = [Request([i], 10, Sampling(0.0)) for i in (1, 2, 3)]
    for request in requests:
        engine.add(request)
    engine.step(), engine.step()

    def fault(features_BTD):
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", fault)
        events = engine.step()
    assert [event.request for event in events if event.finish == "error"] == requests
    assert "MemoryError: no more" in events[0].error
    assert engine.idle
    engine.add(requests[0])
    tokens = []
    while not engine.idle:
        tokens += [event.token for event in engine.step()]
    assert tokens == list(generate(model, [1], 10, Sampling(0.0)))


def test_rows_may_be_shorter_than_the_model_allows():
    engine = Engine(make("gpt"), 2, length=10)
    with pytest.raises(ValueError, match=r"11 tokens long, .* holds 10: shorten it by 1"):
        engine.add(Request([1] * 11, 5, Sampling()))
    engine.add(Request([1] * 8, 5, Sampling()))
    events = []
    while not engine.idle:
        events += engine.step()
    assert [event.finish for event in events] == [None, None, "length"]
    with pytest.raises(ValueError, match="at least 1 row, not 0"):
        Engine(make("gpt"), 0)
