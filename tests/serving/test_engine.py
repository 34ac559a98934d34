import random

import pytest
import torch
from torch import nn

from gpt import LanguageModel
from gpt.beam_search import translate
from gpt.checkpoint import build_model
from gpt.sampling import SamplingParams, generate, recompute_logits
from serving.engine.engine import Engine, Request
from tests.gpt.test_contract import VARIANTS

VOCABULARY, CONTEXT = 30, 48
RUNGS = {variant: name for variant, (name, _) in VARIANTS.items() if variant == name}


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
        return {"hidden": torch.ones(rows, 24, dtype=self.embedding.weight.dtype)}

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


def make(name, dtype=torch.float64):
    """A model whose next token can be any, and depends on all before."""
    torch.manual_seed(0)
    if name == "recurrent":
        model = Recurrent()
    else:
        variant, own = VARIANTS[name]
        model = build_model(variant, {"vocab_size": VOCABULARY, "context_length": CONTEXT, **own})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


class Watch:
    """What an engine has given so far, held to what events must be."""

    def __init__(self, engine):
        self.engine = engine
        self.texts, self.ends, self.scores, self.prompts = {}, {}, {}, {}

    def step(self):
        for event in self.engine.step():
            key = event.request, event.choice
            assert key not in self.ends, "an event after the end"
            assert not event.error
            if event.prompt:
                assert key not in self.texts
                self.prompts[event.request] = event.prompt
            if event.token is not None:
                self.texts.setdefault(key, []).append(event.token)
                self.scores.setdefault(key, []).append(event.score)
            if event.finish:
                self.ends[key] = event.finish

    def run(self):
        while not self.engine.idle:
            self.step()
        assert not self.engine.live
        assert not self.engine.queue
        assert not self.engine.searches
        assert self.engine.reading is None
        assert self.engine.step() == []
        return self

    def text(self, request, choice=0):
        return self.texts.get((request, choice), [])


def alone(model, request, choice=0):
    """What the reference makes of a request."""
    return list(
        generate(
            model,
            request.prompt,
            request.max_tokens,
            request.sampling,
            request.stop,
            choice,
            request.first,
            request.begin,
        )
    )


def arrivals(engine, dice, count, sampling):
    """Requests of every kind come at random times, a third of them goes again; all that is left ends."""
    watch, requests, cancelled = Watch(engine), [], set()
    for i in range(count):
        request = Request(
            [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 40))],
            dice.randint(1, 30),
            sampling(i),
            {dice.randrange(VOCABULARY)},
            n=dice.choice([1, 1, 1, 2, 3]),
            allowed_first_tokens=dice.sample(range(VOCABULARY), 4) if i % 4 == 0 else (),
        )
        requests.append(request)
        engine.add(request)
        for _ in range(dice.choice([0, 0, 1, 5, 20])):
            watch.step()
        if dice.random() < 0.34:
            unlucky = dice.choice(requests[-8:])
            engine.cancel(unlucky)
            left = {(unlucky, choice) for choice in range(unlucky.n)} - watch.ends.keys()
            cancelled |= left
            watch.ends.update(dict.fromkeys(left, "cancelled"))
    watch.run()
    assert len({request for request, _ in cancelled}) > count // 25
    assert {"stop", "length"} <= set(watch.ends.values())
    return watch, requests, cancelled


def some_sampling(i):
    return [
        SamplingParams(0.0),
        SamplingParams(seed=i),
        SamplingParams(0.8, 5, 0.9, 0.02, 1.2, 0.5, 0.5, seed=i),
    ][i % 3]


@pytest.mark.parametrize("name", ["gpt", "recurrent", "transformer", "gpt-ngrams"])
@pytest.mark.parametrize(("size", "budget"), [(1, 5), (3, 100), (8, 16)])
def test_every_text_equals_the_reference_under_random_arrivals_and_cancellations(
    name, size, budget
):
    model = make(name)
    engine = Engine(model, size, max_num_batched_tokens=budget)
    watch, requests, cancelled = arrivals(engine, random.Random(size), 100, some_sampling)
    for request in requests:
        for choice in range(request.n):
            reference = alone(model, request, choice)
            assert not request.first or not reference or reference[0] in request.first
            text = watch.text(request, choice)
            if (request, choice) in cancelled:
                assert text == reference[: len(text)]
            else:
                assert text == reference
                # the last token there was room for, or one more that was a stop
                room = request.max_tokens
                if model.max_length:
                    room = min(room, model.max_length + 1 - len(request.prompt))
                full = len(text) == room
                assert watch.ends[request, choice] == ("length" if full else "stop")


@pytest.mark.parametrize("name", RUNGS)
def test_greedy_texts_in_float32_are_the_same_whatever_the_load(name):
    model = make(name, torch.float32)
    engine = Engine(model, 6, max_num_batched_tokens=21)
    watch, requests, cancelled = arrivals(
        engine, random.Random(1), 300, lambda _: SamplingParams(temperature=0)
    )
    for request in requests:
        if (request, 0) not in cancelled:
            assert watch.text(request) == alone(model, request)


@pytest.mark.parametrize("name", RUNGS)
def test_steps_taken_before_their_tokens_are_looked_at_change_no_text(name):
    model = make(name, torch.float32)
    engine = Engine(model, 6, max_num_batched_tokens=21, num_scheduler_steps=4)
    watch, requests, cancelled = arrivals(
        engine,
        random.Random(4),
        100,
        lambda i: SamplingParams(seed=i, temperature=float(i % 4 == 0)),
    )
    for request in requests:
        if (request, 0) not in cancelled and request.sampling.greedy:
            assert watch.text(request) == alone(model, request)


@pytest.mark.parametrize("name", RUNGS)
@pytest.mark.parametrize(("size", "ahead"), [(1, 1), (6, 3)])
def test_recorded_steps_of_padded_rows_give_the_texts_of_the_reference(name, size, ahead):
    """What a card records, here computed anew each time: the same sizes, addresses and idle rows."""
    model = make(name)
    engine = Engine(
        model, size, max_num_batched_tokens=30, num_scheduler_steps=ahead, cuda_graphs=True
    )
    watch, requests, cancelled = arrivals(engine, random.Random(6), 60, some_sampling)
    for request in requests:
        for choice in range(request.n):
            if (request, choice) not in cancelled:
                assert watch.text(request, choice) == alone(model, request, choice)
    sizes = {rows for rows, _, _ in engine.graph_runner.recordings}
    assert sizes == ({1} if size == 1 else {1, 2, 4, 6})


def test_recorded_steps_give_logprobs():
    model = make("gpt")
    engine = Engine(model, 3, num_scheduler_steps=4, cuda_graphs=True)
    plain = Engine(model, 3)
    found = []
    for one in (engine, plain):
        requests = [Request([i], 9, SamplingParams(seed=1), logprobs=i or None) for i in range(3)]
        for request in requests:
            one.add_request(request)
        watch = Watch(one).run()
        found.append([watch.scores[request, 0] for request in requests])
    for ours, theirs in zip(*found, strict=True):
        for score, wanted in zip(ours, theirs, strict=True):
            assert (score is None) == (wanted is None)
            assert score is None or score.token == wanted.token
            assert score is None or score.logprob == pytest.approx(wanted.logprob, abs=1e-9)


@pytest.mark.parametrize("name", ["gpt", "gpt-ngrams", "lstm", "mlp", "transformer"])
@pytest.mark.parametrize("ahead", [1, 4])
def test_a_step_whose_rounding_turned_a_near_tie_around_is_mended(name, ahead):
    """Every third choice of a row with neighbours is made wrong, by as little as rounding could."""
    model = make(name, torch.float32)
    engine = Engine(model, 3, num_scheduler_steps=ahead)
    step, taken = engine.steps["rows"], [0]

    def rounded(last_B1, *states):
        logits_BV, tokens_B, margin_B = step(last_B1, *states)
        taken[0] += 1
        if taken[0] % 3 == 0:
            tokens_B = (tokens_B + 1) % VOCABULARY
            last_B1.copy_(tokens_B.unsqueeze(1))
            margin_B = torch.full_like(margin_B, 1e-5)
        return logits_BV, tokens_B, margin_B

    engine.steps["rows"] = rounded
    requests = [Request([i, i + 1], 25, SamplingParams(temperature=0)) for i in range(5)]
    for request in requests:
        engine.add_request(request)
    watch = Watch(engine).run()
    assert taken[0] > 9
    for request in requests:
        assert watch.text(request) == alone(model, request)


@pytest.mark.parametrize("ahead", [1, 4])
def test_logits_that_are_no_numbers_end_a_text_and_not_its_neighbours(ahead):
    model = make("gpt", torch.float32)
    engine = Engine(model, 2, num_scheduler_steps=ahead)
    poisoned, other = (Request([i], 20, SamplingParams(temperature=0)) for i in (1, 2))
    engine.add_request(poisoned)
    engine.add_request(other)
    engine.step()
    rows = [text.request for text in engine.running]
    engine.state["values"][rows.index(poisoned), 0] = torch.nan
    events = []

    def damaged(model, prompt, text, begin):
        logits_V = recompute_logits(model, prompt, text, begin)
        return logits_V * torch.nan if prompt == poisoned.prompt else logits_V

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.engine.engine.anew", damaged)  # as weights would be
        while not engine.idle:
            events += engine.step()
    ends = {event.request: event for event in events if event.finish}
    assert ends[poisoned].finish == "error"
    assert "not numbers" in ends[poisoned].error
    assert ends[other].finish == "length"


@pytest.mark.parametrize("name", RUNGS)
def test_a_deterministic_engine_gives_sampled_texts_to_the_last_bit(name):
    model = make(name, torch.float32)

    def engine():
        return Engine(model, 4, max_num_batched_tokens=16, deterministic=True)

    watch, requests, cancelled = arrivals(engine(), random.Random(2), 60, some_sampling)
    for request in requests:
        again = engine()
        again.add_request(request)
        solo = Watch(again).run()
        for choice in range(request.n):
            if (request, choice) not in cancelled:
                assert watch.text(request, choice) == solo.text(request, choice)


def test_a_deterministic_engine_gives_the_same_logprobs_to_the_last_bit():
    model = make("gpt", torch.float32)
    dice = random.Random(3)

    def requests():
        prompts = [[dice.randrange(VOCABULARY) for _ in range(20)] for _ in range(12)]
        return [Request(prompt, 20, SamplingParams(seed=1), logprobs=3) for prompt in prompts]

    together = requests()
    engine = Engine(model, 5, max_num_batched_tokens=8, deterministic=True)
    for request in together:
        engine.add_request(request)
    crowd = Watch(engine).run()
    for request in together:
        engine = Engine(model, 5, max_num_batched_tokens=8, deterministic=True)
        engine.add_request(request)
        assert Watch(engine).run().scores[request, 0] == crowd.scores[request, 0]


def test_a_long_prompt_costs_the_others_no_token_and_no_more_than_the_budget(monkeypatch):
    model = make("gpt")
    engine = Engine(model, 4, max_num_batched_tokens=20)
    first = Request([1], 40, SamplingParams())
    engine.add_request(first)
    engine.step()
    engine.add_request(Request([2] * 45, 3, SamplingParams()))
    read = []
    features = type(model).features

    def watched(self, tokens_BT, state=None):
        read.append(tokens_BT.numel())
        return features(self, tokens_BT, state)

    monkeypatch.setattr(type(model), "features", watched)
    for _ in range(3):
        read.clear()
        events = engine.step()
        assert [event.request for event in events].count(first) == 1
        assert sum(read) <= 20
    assert len(engine.running) == 2


def test_choices_share_one_reading_of_the_prompt(monkeypatch):
    model = make("gpt")
    engine = Engine(model, 3)
    request = Request([5] * 30, 4, SamplingParams(seed=1), n=8)
    engine.add_request(request)
    read = []
    features = type(model).features

    def watched(self, tokens_BT, state=None):
        read.append(tokens_BT.shape[1])
        return features(self, tokens_BT, state)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "features", watched)
        watch = Watch(engine).run()
    assert sorted(read)[-2:] == [1, 30]
    for choice in range(8):
        assert watch.text(request, choice) == alone(model, request, choice)


def test_a_text_of_a_request_can_be_cancelled_alone():
    model = make("gpt")
    engine = Engine(model, 3)
    request = Request([5], 10, SamplingParams(seed=1), n=3)
    engine.add_request(request)
    watch = Watch(engine)
    watch.step()
    engine.abort(request, 1)
    watch.run()
    assert len(watch.text(request, 1)) == 1
    for choice in (0, 2):
        assert watch.text(request, choice) == alone(model, request, choice)


@pytest.mark.parametrize("name", ["gpt", "lstm", "mlp"])
def test_logprobs_are_those_of_one_pass_over_the_whole_text(name):
    model = make(name)
    engine = Engine(model, 3, max_num_batched_tokens=7)
    prompts = [[1, 2, 3], [4] * 20, [7]]
    requests = [
        Request(
            prompt,
            6,
            SamplingParams(0.5, repetition_penalty=1.3, seed=3),
            logprobs=4,
            prompt_logprobs=True,
        )
        for prompt in prompts
    ]
    for request in requests:
        engine.add_request(request)
    watch = Watch(engine).run()
    for request in requests:
        ids = [*request.prompt, *watch.text(request)]
        logs_TV = model(torch.tensor([ids]))[0].log_softmax(-1).detach()
        scores = [*watch.prompts.get(request, ()), *watch.scores[request, 0]]
        assert len(scores) == len(ids) - 1
        for place, score in enumerate(scores):
            assert score.logprob == pytest.approx(float(logs_TV[place, ids[place + 1]]), abs=1e-5)
            values, tokens = logs_TV[place].topk(4)
            assert [token for token, _ in score.likeliest] == tokens.tolist()
            assert [log for _, log in score.likeliest] == pytest.approx(values.tolist(), abs=1e-5)


def test_no_token_at_all_scores_a_prompt():
    model = make("gpt")
    engine = Engine(model, 2)
    request = Request([1, 2, 3], 0, SamplingParams(), logprobs=0, prompt_logprobs=True)
    engine.add_request(request)
    watch = Watch(engine).run()
    assert watch.ends == {(request, 0): "length"}
    assert len(watch.prompts[request]) == 2
    with pytest.raises(ValueError, match="read as a whole"):
        Engine(make("transformer"), 1).add_request(request)


def test_a_bias_bans_and_forces_tokens():
    model = make("gpt")
    engine = Engine(model, 2)
    banned = Request([1], 20, SamplingParams(seed=1, logit_bias=((3, -100), (4, -100))))
    forced = Request([1], 5, SamplingParams(0.0, logit_bias=((9, 100),)))
    plain = Request([1], 20, SamplingParams(seed=1))
    for request in (banned, forced, plain):
        engine.add_request(request)
    watch = Watch(engine).run()
    assert not {3, 4} & set(watch.text(banned))
    assert watch.text(forced) == [9] * 5
    assert watch.text(plain) == alone(model, plain)
    with pytest.raises(ValueError, match="logit_bias has token 30, the model knows 0 to 29"):
        engine.add_request(Request([1], 5, SamplingParams(logit_bias=((30, 1.0),))))


@pytest.mark.parametrize("name", ["gpt", "gpt2", "transformer", "seq2seq", "attention"])
def test_a_translator_writes_what_the_search_finds(name):
    model = make(name)
    engine = Engine(model, 3)
    dice, end = random.Random(4), 0
    sources = [
        [dice.randrange(1, VOCABULARY) for _ in range(dice.randint(1, 20))] for _ in range(9)
    ]
    greedy, wide = {}, {}
    for source in sources:
        wide[tuple(source)] = Request(
            source, 12, SamplingParams(0.0), {end}, decoder_start_token=end, num_beams=3
        )
        greedy[tuple(source)] = Request(
            source, 12, SamplingParams(0.0), {end}, decoder_start_token=end
        )
        engine.add_request(wide[tuple(source)])
        engine.add_request(greedy[tuple(source)])
    watch = Watch(engine).run()
    for beams, requests in ((1, greedy), (3, wide)):
        for source in sources:
            request = requests[tuple(source)]
            (found,) = translate(
                model,
                [source],
                decoder_start_token=end,
                eos_token=end,
                max_tokens=12,
                num_beams=beams,
            )
            assert watch.text(request) == found
            if beams == 1:
                assert alone(model, request) == found
            assert watch.ends[request, 0] == ("length" if len(found) == 12 else "stop")


def test_a_translation_and_its_source_may_together_be_longer_than_the_context():
    model, end = make("transformer"), 0
    engine = Engine(model, 3, num_scheduler_steps=4)
    dice = random.Random(5)
    sources = [[dice.randrange(1, VOCABULARY) for _ in range(CONTEXT - i)] for i in range(6)]
    requests = [
        Request(one, CONTEXT, SamplingParams(0.0), {end}, decoder_start_token=end)
        for one in sources
    ]
    for request in requests:
        engine.add_request(request)
    watch = Watch(engine).run()
    found = translate(model, sources, decoder_start_token=end, eos_token=end, max_tokens=CONTEXT)
    assert [watch.text(request) for request in requests] == found
    assert max(map(len, found)) > 10


def test_what_beams_cannot_do_is_refused():
    request = Request([1, 2], 5, SamplingParams(0.0), {0}, num_beams=2)
    with pytest.raises(ValueError, match="beams are for models that translate"):
        Engine(make("gpt"), 1).add_request(request)
    with pytest.raises(ValueError, match="one text, the best"):
        Engine(make("gpt"), 1).add_request(
            Request([1, 2], 5, SamplingParams(), {0}, decoder_start_token=0, num_beams=2)
        )
    with pytest.raises(ValueError, match="source sentence is 48 tokens long"):
        Engine(make("gpt"), 1).add_request(
            Request([1] * 48, 5, SamplingParams(), {0}, decoder_start_token=0)
        )


def test_a_cancelled_request_leaves_nothing_wherever_it_is():
    model = make("transformer")
    engine = Engine(model, 2)
    translating = Request([1] * 5, 20, SamplingParams(0.0), {0}, decoder_start_token=0, num_beams=2)
    engine.add_request(translating)
    engine.step()
    engine.abort(translating)
    assert engine.idle
    engine = Engine(make("gpt"), 2, max_num_batched_tokens=16)
    live, reading, queued = (Request([i] * 40, 8, SamplingParams()) for i in (1, 2, 3))
    engine.add_request(live)
    for _ in range(3):
        engine.step()
    engine.add_request(reading)
    engine.add_request(queued)
    engine.step()
    assert (len(engine.running), engine.prefill.request) == (1, reading)
    for request in (reading, queued, live):
        engine.abort(request)
        engine.abort(request)
    assert engine.idle
    again = Request([2] * 40, 8, SamplingParams(seed=1))
    engine.add_request(again)
    assert Watch(engine).run().text(again) == alone(engine.model, again)


def test_a_request_that_fails_fails_alone():
    model = make("gpt")
    engine = Engine(model, 3)
    good, bad, queued = (Request([i], 10, SamplingParams(0.0)) for i in (1, 2, 3))
    engine.add_request(good)
    engine.step()
    engine.add_request(bad)
    engine.add_request(queued)
    bad.prompt = [VOCABULARY]  # after the check, as a fault of the device would be
    texts, failed = {}, []
    while not engine.idle:
        for event in engine.step():
            texts.setdefault(event.request, []).append(event.token)
            if event.error:
                failed.append(event.request)
    assert failed == [bad]
    assert texts[good] == alone(model, good)[1:]
    assert texts[queued] == alone(model, queued)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(0.0), SamplingParams(), SamplingParams(presence_penalty=1)]
)
def test_logits_that_are_no_numbers_fail_their_text_alone(sampling):
    model = make("gpt")
    with torch.no_grad():
        model.embedding.weight[7] = torch.nan
    engine = Engine(model, 3)
    good, bad = (
        Request([1], 10, SamplingParams(0.0, logit_bias=((7, -100),))),
        Request([7], 10, sampling),
    )
    engine.add_request(good)
    engine.add_request(bad)
    texts, errors = {}, {}
    while not engine.idle:
        for event in engine.step():
            if event.error:
                errors[event.request] = event.error
            texts.setdefault(event.request, []).append(event.token)
    assert list(errors) == [bad]
    assert "not numbers" in errors[bad]
    assert texts[good] == alone(model, good)


def test_a_step_that_fails_ends_the_live_requests_and_serves_the_next(monkeypatch):
    model = make("gpt")
    engine = Engine(model, 2)
    requests = [Request([i], 10, SamplingParams(0.0)) for i in (1, 2)]
    for request in requests:
        engine.add_request(request)
    engine.step()

    def fault(features_BTD):
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", fault)
        events = engine.step()
    assert [event.request for event in events if event.finish_reason == "error"] == requests
    assert "MemoryError: no more" in events[0].error
    assert engine.idle
    engine.add_request(requests[0])
    assert Watch(engine).run().text(requests[0]) == alone(model, requests[0])


def test_rows_may_be_shorter_than_the_model_allows():
    engine = Engine(make("gpt"), 2, max_model_len=10)
    with pytest.raises(ValueError, match=r"11 tokens long, .* holds 10: shorten it by 1"):
        engine.add_request(Request([1] * 11, 5, SamplingParams()))
    request = Request([1] * 8, 5, SamplingParams())
    engine.add_request(request)
    watch = Watch(engine).run()
    assert len(watch.text(request)) == 3
    assert watch.ends[request, 0] == "length"
    with pytest.raises(ValueError, match="at least 1 row"):
        Engine(make("gpt"), 0)


def test_memory_is_what_the_engine_says():
    model = make("gpt", torch.float32)
    weights = sum(p.numel() * 4 for p in model.parameters())
    small, large = Engine(model, 1).memory_bytes, Engine(model, 11).memory_bytes
    cache = 2 * 2 * CONTEXT * 32 * 4  # keys and values, layers, positions, width, bytes
    assert 10 * cache < large - small < 10 * cache + 10 * 16 * VOCABULARY + 10 * 200
    assert weights + cache < small < weights + 3 * cache + 10_000
