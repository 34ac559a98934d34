"""The engine against `generate`, the reference implementation, and its other promises."""

import random

import pytest
import torch
from torch import nn

from gpt import LanguageModel
from gpt.beam_search import translate
from gpt.checkpoint import build_model
from gpt.generation import generate, recompute_logits
from gpt.sampling import SamplingParams
from serving.engine.engine import Engine
from serving.engine.sequence import InvalidRequestError, Request
from tests.gpt.test_contract import VARIANTS

VOCABULARY, CONTEXT = 30, 48
RUNGS = {variant: name for variant, (name, _) in VARIANTS.items() if variant == name}


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine, threads that wait for each other make tiny products take milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Recurrent(LanguageModel):
    """The opposite of a GPT: no length limit, and a state without positions that starts at one."""

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


def make_model(name, dtype=torch.float64):
    """A model whose next token varies and depends on all tokens before."""
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


class Collector:
    """Steps an engine, collects its outputs and checks their invariants."""

    def __init__(self, engine):
        self.engine = engine
        self.tokens, self.finish_reasons, self.logprobs, self.prompt_logprobs = {}, {}, {}, {}

    def step(self):
        for output in self.engine.step():
            key = output.request, output.choice
            assert key not in self.finish_reasons, "an output after the end"
            assert not output.error
            if output.prompt_logprobs:
                assert key not in self.tokens
                self.prompt_logprobs[output.request] = output.prompt_logprobs
            if output.token is not None:
                self.tokens.setdefault(key, []).append(output.token)
                self.logprobs.setdefault(key, []).append(output.logprobs)
            if output.finish_reason:
                self.finish_reasons[key] = output.finish_reason

    def run(self):
        while not self.engine.is_idle:
            self.step()
        assert not self.engine.running
        assert not self.engine.waiting
        assert not self.engine.beam_searches
        assert self.engine.prefill is None
        assert self.engine.step() == []
        return self

    def output(self, request, choice=0):
        return self.tokens.get((request, choice), [])


def run_requests(engine, *requests):
    """Add requests, run the engine until all have ended, and return the collected outputs."""
    for request in requests:
        engine.add_request(request)
    return Collector(engine).run()


def reference_output(model, request, choice=0):
    """The tokens that `generate` returns for a request."""
    return list(
        generate(
            model,
            request.prompt,
            request.max_tokens,
            request.sampling_params,
            request.stop_tokens,
            choice,
            request.allowed_first_tokens,
            request.decoder_start_token,
        )
    )


def run_random_arrivals(engine, rng, count, sampling_params):
    """Add requests of every kind at random times and abort a third of them; run the rest to the end."""
    collector, requests, aborted = Collector(engine), [], set()
    for i in range(count):
        request = Request(
            [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))],
            rng.randint(1, 30),
            sampling_params(i),
            {rng.randrange(VOCABULARY)},
            n=rng.choice([1, 1, 1, 2, 3]),
            allowed_first_tokens=rng.sample(range(VOCABULARY), 4) if i % 4 == 0 else (),
        )
        requests.append(request)
        engine.add_request(request)
        for _ in range(rng.choice([0, 0, 1, 5, 20])):
            collector.step()
        if rng.random() < 0.34:
            victim = rng.choice(requests[-8:])
            engine.abort(victim)
            choices = {(victim, choice) for choice in range(victim.n)}
            unfinished = choices - collector.finish_reasons.keys()
            aborted |= unfinished
            collector.finish_reasons.update(dict.fromkeys(unfinished, "aborted"))
    collector.run()
    assert len({request for request, _ in aborted}) > count // 25
    assert {"stop", "length"} <= set(collector.finish_reasons.values())
    return collector, requests, aborted


def mixed_sampling_params(i):
    return [
        SamplingParams(0.0),
        SamplingParams(seed=i),
        SamplingParams(0.8, 5, 0.9, 0.02, 1.2, 0.5, 0.5, seed=i),
        SamplingParams(float(i % 8 == 3), seed=i, min_tokens=i % 11),
    ][i % 4]


@pytest.mark.parametrize("name", ["gpt", "gpt-grouped", "recurrent", "transformer", "gpt-ngrams"])
@pytest.mark.parametrize(("max_num_seqs", "budget"), [(1, 5), (3, 100), (8, 16)])
def test_output_equals_the_reference_under_random_arrivals_and_aborts(name, max_num_seqs, budget):
    model = make_model(name)
    engine = Engine(model, max_num_seqs, max_num_batched_tokens=budget)
    collector, requests, aborted = run_random_arrivals(
        engine, random.Random(max_num_seqs), 70, mixed_sampling_params
    )
    for request in requests:
        for choice in range(request.n):
            reference = reference_output(model, request, choice)
            allowed = request.allowed_first_tokens
            assert not allowed or not reference or reference[0] in allowed
            output = collector.output(request, choice)
            if (request, choice) in aborted:
                assert output == reference[: len(output)]
            else:
                assert output == reference
                max_tokens = request.max_tokens
                if model.max_length:
                    max_tokens = min(max_tokens, model.max_length + 1 - len(request.prompt))
                reason = "length" if len(output) == max_tokens else "stop"
                assert collector.finish_reasons[request, choice] == reason


@pytest.mark.parametrize("name", RUNGS)
def test_greedy_output_does_not_depend_on_batch_composition(name):
    model = make_model(name, torch.float32)
    engine = Engine(model, 6, max_num_batched_tokens=21)
    collector, requests, aborted = run_random_arrivals(
        engine, random.Random(1), 150, lambda _: SamplingParams(temperature=0)
    )
    for request in requests:
        if (request, 0) not in aborted:
            assert collector.output(request) == reference_output(model, request)


@pytest.mark.parametrize("name", RUNGS)
def test_multi_step_decode_does_not_change_greedy_output(name):
    model = make_model(name, torch.float32)
    engine = Engine(model, 6, max_num_batched_tokens=21, num_scheduler_steps=4)
    collector, requests, aborted = run_random_arrivals(
        engine,
        random.Random(4),
        100,
        lambda i: SamplingParams(seed=i, temperature=float(i % 4 == 0)),
    )
    for request in requests:
        if (request, 0) not in aborted and request.sampling_params.greedy:
            assert collector.output(request) == reference_output(model, request)


@pytest.mark.parametrize("name", RUNGS)
@pytest.mark.parametrize(("max_num_seqs", "num_steps"), [(1, 1), (6, 3)])
def test_graph_runner_output_equals_the_reference(name, max_num_seqs, num_steps):
    """On the CPU each step is computed eagerly, with the sizes, addresses and padding of a graph."""
    model = make_model(name)
    engine = Engine(
        model,
        max_num_seqs,
        max_num_batched_tokens=30,
        num_scheduler_steps=num_steps,
        cuda_graphs=True,
    )
    collector, requests, aborted = run_random_arrivals(
        engine, random.Random(6), 60, mixed_sampling_params
    )
    for request in requests:
        for choice in range(request.n):
            if (request, choice) not in aborted:
                assert collector.output(request, choice) == reference_output(model, request, choice)
    batch_sizes = {count for count, _, _ in engine.graph_runner.graphs}
    assert batch_sizes == ({1} if max_num_seqs == 1 else {1, 2, 4, 6})


def test_graph_runner_returns_logprobs():
    model = make_model("gpt")
    graphs = Engine(model, 3, num_scheduler_steps=4, cuda_graphs=True)
    logprobs = []
    for engine in (graphs, Engine(model, 3)):
        requests = [Request([i], 9, SamplingParams(seed=1), logprobs=i or None) for i in range(3)]
        collector = run_requests(engine, *requests)
        logprobs.append([collector.logprobs[request, 0] for request in requests])
    for sequence, expected_sequence in zip(*logprobs, strict=True):
        for actual, expected in zip(sequence, expected_sequence, strict=True):
            assert (actual is None) == (expected is None)
            assert actual is None or actual.token == expected.token
            assert actual is None or actual.logprob == pytest.approx(expected.logprob, abs=1e-9)


@pytest.mark.parametrize("name", ["gpt", "gpt-ngrams", "lstm", "mlp", "transformer"])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_near_tie_that_rounding_swaps_is_corrected(name, num_steps):
    """Every third batched step samples wrong tokens, by a margin that rounding could explain."""
    model = make_model(name, torch.float32)
    engine = Engine(model, 3, num_scheduler_steps=num_steps)
    step, calls = engine.steps["decode"], 0

    def wrong_step(last_tokens_B1, *states):
        nonlocal calls
        logits_BV, tokens_B, margin_B = step(last_tokens_B1, *states)
        calls += 1
        if calls % 3 == 0:
            tokens_B = (tokens_B + 1) % VOCABULARY
            last_tokens_B1.copy_(tokens_B.unsqueeze(1))
            margin_B = torch.full_like(margin_B, 1e-5)
        return logits_BV, tokens_B, margin_B

    engine.steps["decode"] = wrong_step
    requests = [Request([i, i + 1], 25, SamplingParams(temperature=0)) for i in range(5)]
    collector = run_requests(engine, *requests)
    assert calls > 9
    for request in requests:
        assert collector.output(request) == reference_output(model, request)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_nan_state_fails_only_its_sequence(num_steps):
    model = make_model("gpt", torch.float32)
    engine = Engine(model, 2, num_scheduler_steps=num_steps)
    bad, good = (Request([i], 20, SamplingParams(temperature=0)) for i in (1, 2))
    engine.add_request(bad)
    engine.add_request(good)
    engine.step()
    slots = [sequence.request for sequence in engine.running]
    engine.state["values"][slots.index(bad), 0] = torch.nan
    outputs = []

    def damaged(model, prompt, output, decoder_start_token):
        logits_V = recompute_logits(model, prompt, output, decoder_start_token)
        return logits_V * torch.nan if prompt == bad.prompt else logits_V

    with pytest.MonkeyPatch.context() as patch:
        # As damaged weights would give again.
        patch.setattr("serving.engine.engine.recompute_logits", damaged)
        while not engine.is_idle:
            outputs += engine.step()
    last = {output.request: output for output in outputs if output.finish_reason}
    assert last[bad].finish_reason == "error"
    assert "not numbers" in last[bad].error
    assert last[good].finish_reason == "length"


@pytest.mark.parametrize("name", RUNGS)
def test_deterministic_output_is_the_same_alone(name):
    model = make_model(name, torch.float32)

    def engine():
        return Engine(model, 4, max_num_batched_tokens=16, deterministic=True)

    collector, requests, aborted = run_random_arrivals(
        engine(), random.Random(2), 60, mixed_sampling_params
    )
    for request in requests:
        alone = run_requests(engine(), request)
        for choice in range(request.n):
            if (request, choice) not in aborted:
                assert collector.output(request, choice) == alone.output(request, choice)


def test_deterministic_logprobs_are_the_same_alone():
    model = make_model("gpt", torch.float32)
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(20)] for _ in range(12)]
    requests = [Request(prompt, 20, SamplingParams(seed=1), logprobs=3) for prompt in prompts]

    def engine():
        return Engine(model, 5, max_num_batched_tokens=8, deterministic=True)

    together = run_requests(engine(), *requests)
    for request in requests:
        alone = run_requests(engine(), request)
        assert alone.logprobs[request, 0] == together.logprobs[request, 0]


def test_chunked_prefill_keeps_to_the_token_budget_and_delays_no_sequence(monkeypatch):
    model = make_model("gpt")
    engine = Engine(model, 4, max_num_batched_tokens=20)
    first = Request([1], 40, SamplingParams())
    engine.add_request(first)
    engine.step()
    engine.add_request(Request([2] * 45, 3, SamplingParams()))
    num_tokens = []
    features = type(model).features

    def counted_features(self, tokens_BT, state=None):
        num_tokens.append(tokens_BT.numel())
        return features(self, tokens_BT, state)

    monkeypatch.setattr(type(model), "features", counted_features)
    for _ in range(3):
        num_tokens.clear()
        outputs = engine.step()
        assert [output.request for output in outputs].count(first) == 1
        assert sum(num_tokens) <= 20
    assert len(engine.running) == 2


def test_choices_share_one_prefill(monkeypatch):
    model = make_model("gpt")
    engine = Engine(model, 3)
    request = Request([5] * 30, 4, SamplingParams(seed=1), n=8)
    engine.add_request(request)
    num_tokens = []
    features = type(model).features

    def counted_features(self, tokens_BT, state=None):
        num_tokens.append(tokens_BT.shape[1])
        return features(self, tokens_BT, state)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "features", counted_features)
        collector = Collector(engine).run()
    assert sorted(num_tokens)[-2:] == [1, 30]
    for choice in range(8):
        assert collector.output(request, choice) == reference_output(model, request, choice)


def test_one_choice_can_be_aborted():
    model = make_model("gpt")
    engine = Engine(model, 3)
    request = Request([5], 10, SamplingParams(seed=1), n=3)
    engine.add_request(request)
    collector = Collector(engine)
    collector.step()
    engine.abort(request, 1)
    collector.run()
    assert len(collector.output(request, 1)) == 1
    for choice in (0, 2):
        assert collector.output(request, choice) == reference_output(model, request, choice)


@pytest.mark.parametrize("name", ["gpt", "lstm", "mlp"])
def test_logprobs_equal_those_of_one_forward_pass(name):
    model = make_model(name)
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
    collector = run_requests(engine, *requests)
    for request in requests:
        tokens = [*request.prompt, *collector.output(request)]
        logprobs_TV = model(torch.tensor([tokens]))[0].log_softmax(-1).detach()
        logprobs = [*collector.prompt_logprobs.get(request, ()), *collector.logprobs[request, 0]]
        assert len(logprobs) == len(tokens) - 1
        for logprobs_V, token, entry in zip(logprobs_TV, tokens[1:], logprobs, strict=False):
            assert entry.token == token
            assert entry.logprob == pytest.approx(float(logprobs_V[token]), abs=1e-5)
            top, top_tokens = logprobs_V.topk(4)
            assert [token for token, _ in entry.top_logprobs] == top_tokens.tolist()
            values = [logprob for _, logprob in entry.top_logprobs]
            assert values == pytest.approx(top.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_scheduler_steps": 4},
        {"num_scheduler_steps": 4, "cuda_graphs": True},
        {"deterministic": True},
    ],
)
def test_stop_tokens_are_not_sampled_before_min_tokens(options):
    """Compared with a forward pass over the whole sequence for each token."""
    model, rng, requests = make_model("gpt"), random.Random(7), []
    for i in range(24):
        stop_tokens = {*rng.sample(range(VOCABULARY), 10)}
        params = SamplingParams(0.0, min_tokens=i % 8)
        requests.append(Request([i, i + 1], 12, params, stop_tokens))
    collector = run_requests(Engine(model, 5, **options), *requests)
    for request in requests:
        tokens, token, min_tokens = [], None, request.sampling_params.min_tokens
        while len(tokens) < 12:
            logits_V = model(torch.tensor([[*request.prompt, *tokens]]))[0, -1].detach()
            if len(tokens) < min_tokens:
                logits_V[list(request.stop_tokens)] = -torch.inf
            token = int(logits_V.argmax())
            if token in request.stop_tokens:
                break
            tokens.append(token)
        assert collector.output(request) == tokens
        assert len(tokens) >= min_tokens
        reason = "length" if len(tokens) == 12 else "stop"
        assert collector.finish_reasons[request, 0] == reason
    assert sum(map(len, collector.tokens.values())) < 24 * 12


def test_min_tokens_that_leave_no_token_are_refused():
    engine, params = Engine(make_model("gpt"), 1), SamplingParams(min_tokens=1)
    every = Request([1], 5, params, set(range(VOCABULARY)))
    first = Request([1], 5, params, {3, 4, 5}, allowed_first_tokens=[3, 4])
    for request in (every, first):
        with pytest.raises(InvalidRequestError, match="leaves no token") as refused:
            engine.add_request(request)
        assert refused.value.param == "min_tokens"


def test_zero_max_tokens_returns_prompt_logprobs():
    model = make_model("gpt")
    engine = Engine(model, 2)
    request = Request([1, 2, 3], 0, SamplingParams(), logprobs=0, prompt_logprobs=True)
    collector = run_requests(engine, request)
    assert collector.finish_reasons == {(request, 0): "length"}
    assert len(collector.prompt_logprobs[request]) == 2
    with pytest.raises(ValueError, match="cannot return logprobs of the prompt"):
        Engine(make_model("transformer"), 1).add_request(request)


def test_logit_bias_bans_and_forces_tokens():
    model = make_model("gpt")
    engine = Engine(model, 2)
    banned = Request([1], 20, SamplingParams(seed=1, logit_bias=((3, -100), (4, -100))))
    forced = Request([1], 5, SamplingParams(0.0, logit_bias=((9, 100),)))
    plain = Request([1], 20, SamplingParams(seed=1))
    collector = run_requests(engine, banned, forced, plain)
    assert not {3, 4} & set(collector.output(banned))
    assert collector.output(forced) == [9] * 5
    assert collector.output(plain) == reference_output(model, plain)
    with pytest.raises(ValueError, match="logit_bias has token 30, the model knows 0 to 29"):
        engine.add_request(Request([1], 5, SamplingParams(logit_bias=((30, 1.0),))))


@pytest.mark.parametrize("name", ["gpt", "gpt2", "transformer", "seq2seq", "attention"])
def test_translations_equal_those_of_translate(name):
    model = make_model(name)
    engine = Engine(model, 3)
    rng, end = random.Random(4), 0
    sources = [[rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 20))] for _ in range(9)]

    def make_request(source, num_beams):
        params = SamplingParams(0.0)
        return Request(source, 12, params, {end}, decoder_start_token=end, num_beams=num_beams)

    requests = [make_request(source, num_beams) for source in sources for num_beams in (3, 1)]
    collector = run_requests(engine, *requests)
    for request in requests:
        (expected,) = translate(
            model,
            [request.prompt],
            decoder_start_token=end,
            eos_token=end,
            max_tokens=12,
            num_beams=request.num_beams,
        )
        assert collector.output(request) == expected
        if request.num_beams == 1:
            assert reference_output(model, request) == expected
        reason = "length" if len(expected) == 12 else "stop"
        assert collector.finish_reasons[request, 0] == reason


def test_source_and_translation_together_may_exceed_the_context():
    model, end = make_model("transformer"), 0
    engine = Engine(model, 3, num_scheduler_steps=4)
    rng = random.Random(5)
    sources = [[rng.randrange(1, VOCABULARY) for _ in range(CONTEXT - i)] for i in range(6)]
    requests = [
        Request(source, CONTEXT, SamplingParams(0.0), {end}, decoder_start_token=end)
        for source in sources
    ]
    collector = run_requests(engine, *requests)
    expected = translate(model, sources, decoder_start_token=end, eos_token=end, max_tokens=CONTEXT)
    assert [collector.output(request) for request in requests] == expected
    assert max(map(len, expected)) > 10


def test_invalid_beam_search_requests_are_refused():
    request = Request([1, 2], 5, SamplingParams(0.0), {0}, num_beams=2)
    with pytest.raises(ValueError, match="num_beams is for translation models"):
        Engine(make_model("gpt"), 1).add_request(request)
    with pytest.raises(ValueError, match="one sequence, the best"):
        Engine(make_model("gpt"), 1).add_request(
            Request([1, 2], 5, SamplingParams(), {0}, decoder_start_token=0, num_beams=2)
        )
    with pytest.raises(ValueError, match="source sentence is 48 tokens long"):
        Engine(make_model("gpt"), 1).add_request(
            Request([1] * 48, 5, SamplingParams(), {0}, decoder_start_token=0)
        )


def test_aborted_request_is_removed_wherever_it_is():
    model = make_model("transformer")
    engine = Engine(model, 2)
    searching = Request([1] * 5, 20, SamplingParams(0.0), {0}, decoder_start_token=0, num_beams=2)
    engine.add_request(searching)
    engine.step()
    engine.abort(searching)
    assert engine.is_idle
    engine = Engine(make_model("gpt"), 2, max_num_batched_tokens=16)
    running, prefilling, waiting = (Request([i] * 40, 8, SamplingParams()) for i in (1, 2, 3))
    engine.add_request(running)
    for _ in range(3):
        engine.step()
    engine.add_request(prefilling)
    engine.add_request(waiting)
    engine.step()
    assert (len(engine.running), engine.prefill.request) == (1, prefilling)
    for request in (prefilling, waiting, running):
        engine.abort(request)
        engine.abort(request)
    assert engine.is_idle
    request = Request([2] * 40, 8, SamplingParams(seed=1))
    output = run_requests(engine, request).output(request)
    assert output == reference_output(engine.model, request)


def run_to_end(engine):
    """The tokens and the errors of each request, without the checks of a `Collector`."""
    tokens, errors = {}, {}
    while not engine.is_idle:
        for output in engine.step():
            tokens.setdefault(output.request, []).append(output.token)
            assert output.request not in errors, "an output after the end"
            if output.error:
                errors[output.request] = output.error
    return tokens, errors


def test_failing_request_does_not_affect_others():
    model = make_model("gpt")
    engine = Engine(model, 3)
    good, bad, waiting = (Request([i], 10, SamplingParams(0.0)) for i in (1, 2, 3))
    engine.add_request(good)
    engine.step()
    engine.add_request(bad)
    engine.add_request(waiting)
    bad.prompt = [VOCABULARY]  # after validation, as a device error would occur
    tokens, errors = run_to_end(engine)
    assert list(errors) == [bad]
    assert tokens[good] == reference_output(model, good)[1:]
    assert tokens[waiting] == reference_output(model, waiting)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(0.0), SamplingParams(), SamplingParams(presence_penalty=1)]
)
def test_nan_logits_fail_only_their_sequence(sampling):
    model = make_model("gpt")
    with torch.no_grad():
        model.embedding.weight[7] = torch.nan
    engine = Engine(model, 3)
    good, bad = (
        Request([1], 10, SamplingParams(0.0, logit_bias=((7, -100),))),
        Request([7], 10, sampling),
    )
    engine.add_request(good)
    engine.add_request(bad)
    tokens, errors = run_to_end(engine)
    assert list(errors) == [bad]
    assert "not numbers" in errors[bad]
    assert tokens[good] == reference_output(model, good)


def test_failing_step_ends_running_sequences_only(monkeypatch):
    model = make_model("gpt")
    engine = Engine(model, 2)
    requests = [Request([i], 10, SamplingParams(0.0)) for i in (1, 2)]
    for request in requests:
        engine.add_request(request)
    engine.step()

    def fail(features_BTD):
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", fail)
        outputs = engine.step()
    assert [output.request for output in outputs if output.finish_reason == "error"] == requests
    assert "MemoryError: no more" in outputs[0].error
    assert engine.is_idle
    output = run_requests(engine, requests[0]).output(requests[0])
    assert output == reference_output(model, requests[0])


def test_max_model_len_limits_prompt_and_output():
    engine = Engine(make_model("gpt"), 2, max_model_len=10)
    with pytest.raises(ValueError, match=r"11 tokens long, .* holds 10: shorten it by 1"):
        engine.add_request(Request([1] * 11, 5, SamplingParams()))
    request = Request([1] * 8, 5, SamplingParams())
    collector = run_requests(engine, request)
    assert len(collector.output(request)) == 3
    assert collector.finish_reasons[request, 0] == "length"
    with pytest.raises(ValueError, match="must be at least 1, not 0, 256 and 1"):
        Engine(make_model("gpt"), 0)


def test_memory_bytes_counts_weights_and_states():
    model = make_model("gpt", torch.float32)
    weights = sum(p.numel() * 4 for p in model.parameters())
    small, large = Engine(model, 1).memory_bytes, Engine(model, 11).memory_bytes
    cache = 2 * 2 * CONTEXT * 32 * 4  # keys and values, layers, positions, width, bytes
    assert 10 * cache < large - small < 10 * cache + 10 * 16 * VOCABULARY + 10 * 200
    assert weights + cache < small < weights + 3 * cache + 10_000
