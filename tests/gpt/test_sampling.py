import math

import pytest
import torch
import transformers
from scipy import stats

from gpt import GPT
from gpt.sampling import Sampler, SamplingParams, generate, mix

VOCABULARY = 40


def tiny(seed=0, dtype=torch.float64):
    """A GPT whose every weight is random: as it is made, its output projections are zero."""
    torch.manual_seed(seed)
    model = GPT(VOCABULARY, 256, width=32, depth=2, heads=2).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=4 * parameter.shape[-1] ** -0.5)
    return model


def draw(logits_V, sampling, times, prompt=(0,)):
    """What one stream draws at its first `times` positions, in one batch."""
    sampler = Sampler(times, len(logits_V))
    sampler.add_sequence(0, sampling, prompt)
    sampler.samplings = [sampling] * times
    for tensor in sampler.state.values():
        tensor[:] = tensor[:1].clone()
    sampler.state["position"] += torch.arange(times).unsqueeze(1)
    return sampler(logits_V.expand(times, -1))


def expected(logits_V, *processors, ids=(0,)):
    scores = logits_V.clone().unsqueeze(0)
    for processor in processors:
        scores = processor(torch.tensor([ids]), scores)
    return scores.softmax(-1)[0]


HF = transformers.generation.logits_process


PROCESSED = [
    (SamplingParams(), []),
    (SamplingParams(0.7), [HF.TemperatureLogitsWarper(0.7)]),
    (SamplingParams(1.5, top_k=5), [HF.TemperatureLogitsWarper(1.5), HF.TopKLogitsWarper(5)]),
    (SamplingParams(top_k=1), [HF.TopKLogitsWarper(1)]),
    (SamplingParams(top_k=1000), []),
    (SamplingParams(top_p=0.8), [HF.TopPLogitsWarper(0.8)]),
    (SamplingParams(top_p=0.0), [HF.TopPLogitsWarper(0.0)]),
    (SamplingParams(min_p=0.1), [HF.MinPLogitsWarper(0.1)]),
    (SamplingParams(min_p=1.0), [HF.MinPLogitsWarper(1.0)]),
    (SamplingParams(repetition_penalty=1.7), [HF.RepetitionPenaltyLogitsProcessor(1.7)]),
    (
        SamplingParams(0.8, 12, 0.7, 0.05, 1.3),
        [
            HF.RepetitionPenaltyLogitsProcessor(1.3),
            HF.TemperatureLogitsWarper(0.8),
            HF.TopKLogitsWarper(12),
            HF.TopPLogitsWarper(0.7),
            HF.MinPLogitsWarper(0.05),
        ],
    ),
]
"""Samplings, and what does the same in `transformers`."""


@pytest.mark.parametrize(("sampling", "processors"), PROCESSED)
def test_frequencies_are_those_of_transformers(sampling, processors):
    for seed in range(3):
        torch.manual_seed(seed)
        logits_V = 2 * torch.randn(VOCABULARY)
        prompt = [*logits_V.topk(3).indices.tolist(), 1, 2]
        probabilities_V = expected(logits_V, *processors, ids=prompt).double()
        drawn = draw(logits_V, sampling, 20_000, prompt)
        counts_V = torch.bincount(drawn, minlength=VOCABULARY)
        assert not counts_V[probabilities_V == 0].any(), "a token that was filtered out was drawn"
        # Rare tokens together, as the test asks for a handful of expected counts in each cell.
        often = probabilities_V * len(drawn) >= 5
        observed = [*counts_V[often].tolist(), int(counts_V[~often].sum())]
        wanted = [*probabilities_V[often].tolist(), float(probabilities_V[~often].sum())]
        wanted = [share / sum(wanted) * len(drawn) for share in wanted]
        if wanted[-1] == 0:
            observed.pop(), wanted.pop()
        if len(wanted) > 1:
            assert stats.chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_token_the_filters_leave_can_be_drawn_and_no_other(dtype):
    torch.manual_seed(1)
    logits_V = torch.randn(VOCABULARY, dtype=dtype)
    for k in range(1, VOCABULARY):
        drawn = draw(logits_V, SamplingParams(100.0, top_k=k), 2000)
        assert set(drawn.tolist()) == set(logits_V.topk(k).indices.tolist())
    for p in torch.linspace(0.01, 0.99, 25).tolist():
        kept = expected(logits_V, HF.TopPLogitsWarper(p)).nonzero().flatten().tolist()
        drawn = set(draw(logits_V, SamplingParams(top_p=p), 10_000).tolist())
        assert set(drawn) == set(kept)


def test_presence_and_frequency_penalties_count_the_text_and_not_the_prompt():
    sampling = SamplingParams(0.0, presence_penalty=1.0, frequency_penalty=0.5)
    sampler = Sampler(1, 4)
    sampler.add_sequence(0, sampling, prompt=[0, 0, 0])
    logits_BV = torch.tensor([[3.0, 2.0, 0.0, -5.0]])
    # token 0 costs 1.5 after its first time and 0.5 more each time after
    assert [int(sampler(logits_BV)) for _ in range(6)] == [0, 1, 0, 0, 0, 1]
    sampler.add_sequence(0, sampling, prompt=[0])
    assert int(sampler(logits_BV)) == 0, "a new text starts without the last one's counts"


def test_greedy_takes_the_first_of_ties_and_a_cold_temperature_stays_finite():
    logits_V = torch.tensor([0.0, 7.0, 7.0, 6.0])
    assert draw(logits_V, SamplingParams(0.0), 3).tolist() == [1, 1, 1]
    assert draw(logits_V, SamplingParams(1e-300), 3).tolist() == [1, 1, 1]
    assert set(draw(logits_V, SamplingParams(1e-4), 100).tolist()) == {1, 2}
    assert set(draw(logits_V, SamplingParams(100.0), 300).tolist()) == {0, 1, 2, 3}
    assert set(draw(logits_V.bfloat16(), SamplingParams(top_k=1), 50).tolist()) == {1, 2}


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(2)
    choices = [
        SamplingParams(seed=1),
        SamplingParams(0.0),
        SamplingParams(0.8, top_k=7, seed=2),
        SamplingParams(top_p=0.9, seed=3),
        SamplingParams(min_p=0.05, seed=4),
        SamplingParams(top_k=20, top_p=0.5, repetition_penalty=1.2, seed=5),
        SamplingParams(0.0, presence_penalty=2.0),
    ]
    for vocabulary in (17, 257, 1000):
        steps = [torch.randn(len(choices), vocabulary) for _ in range(40)]
        together = Sampler(len(choices), vocabulary)
        for row, sampling in enumerate(choices):
            together.add_sequence(row, sampling, [row])
        rows = torch.stack([together(step_BV) for step_BV in steps])
        for row, sampling in enumerate(choices):
            alone = Sampler(1, vocabulary)
            alone.add_sequence(0, sampling, [row])
            assert rows[:, row].tolist() == [
                int(alone(step_BV[row : row + 1])) for step_BV in steps
            ]


def test_a_moved_row_goes_on_as_before():
    steps = [torch.randn(1, 50, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    sampling = SamplingParams(repetition_penalty=1.5, frequency_penalty=1.0, seed=9)
    stays, moves = Sampler(1, 50), Sampler(3, 50)
    stays.add_sequence(0, sampling, [1])
    moves.add_sequence(2, sampling, [1])
    before = [int(moves(logits_BV, first=2)) for logits_BV in steps[:10]]
    moves.move(2, 0)
    after = [int(moves(logits_BV, first=0)) for logits_BV in steps[10:]]
    assert before + after == [int(stays(logits_BV)) for logits_BV in steps]


def test_the_hash_is_splitmix64():
    # The first outputs for seed 1234567, as the algorithm's reference programs print them.
    state = torch.tensor(1234567) - 0x61C8864680B583EB * torch.arange(3)
    assert [number % 2**64 for number in mix(state).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_seeds_and_choices_give_texts_of_their_own():
    model = tiny(dtype=torch.float32)

    def text(seed, choice=0):
        return tuple(generate(model, [1, 2], 20, SamplingParams(seed=seed), choice=choice))

    assert text(3) == text(3)
    texts = {text(seed, choice) for seed in (-(2**63), -1, 0, 1, 2**63 - 1) for choice in range(4)}
    assert len(texts) == 20


@pytest.mark.parametrize("length", [1, 2, 17, 56])
def test_greedy_with_a_cache_equals_recomputing_from_scratch(length):
    model = tiny(seed=5)  # one whose greedy text does not soon go round in circles
    prompt = torch.randint(VOCABULARY, (length,)).tolist()
    tokens = list(generate(model, prompt, 200, SamplingParams(0.0)))
    assert len(set(tokens)) > 10
    for position, token in enumerate(tokens):
        with torch.inference_mode():
            logits_BTV = model(torch.tensor([prompt + tokens[:position]]))
        assert token == int(logits_BTV[0, -1].argmax())


def test_generation_ends_at_a_stop_token_at_max_tokens_and_at_the_context():
    model = tiny()
    tokens = list(generate(model, [5], 50, SamplingParams(seed=1)))
    assert len(tokens) == 50
    stop = tokens[30]
    assert (
        list(generate(model, [5], 50, SamplingParams(seed=1), [stop]))
        == tokens[: tokens.index(stop)]
    )
    # the last token is predicted and never looked back on
    assert len(list(generate(model, [5] * 256, 50, SamplingParams()))) == 1
    assert len(list(generate(model, [5] * 250, 50, SamplingParams()))) == 7


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([1] * 300, 5, "300 tokens long, the model's context holds 256: shorten it by 44"),
        ([], 5, "the prompt is empty"),
        ([1, 40], 5, "token 40, the model knows 0 to 39"),
        ([-1], 5, "token -1"),
        ([1], -1, "max_tokens must be at least 0, not -1"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_before_the_first_token(
    prompt, max_tokens, message
):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), prompt, max_tokens, SamplingParams())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -3, 2**80])
@pytest.mark.parametrize(
    "name",
    [
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
    ],
)
def test_values_out_of_range_are_refused_by_name(name, bad):
    if (name, bad) == ("seed", -3):
        return
    with pytest.raises(ValueError, match=f"{name} must be between"):
        SamplingParams(**{name: bad})
