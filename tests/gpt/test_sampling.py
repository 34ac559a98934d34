import math

import pytest
import torch
import transformers
from scipy import stats

from gpt.sampling import Sampler, SamplingParams, mix

VOCAB_SIZE = 40


def draw(logits_V, params, count, prompt=(0,)):
    """Return the first `count` tokens of one random stream, sampled in one batch."""
    sampler = Sampler(count, len(logits_V))
    sampler.add_sequence(0, params, prompt)
    sampler.params = [params] * count
    for tensor in sampler.state.values():
        tensor[:] = tensor[:1].clone()
    sampler.state["position"] += torch.arange(count).unsqueeze(1)
    return sampler(logits_V.expand(count, -1))


def hf_probabilities(logits_V, *processors, ids=(0,)):
    scores = logits_V.clone().unsqueeze(0)
    for processor in processors:
        scores = processor(torch.tensor([ids]), scores)
    return scores.softmax(-1)[0]


HF = transformers.generation.logits_process

EQUIVALENTS = [
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
"""Sampling parameters, and the logits processors of `transformers` that are equivalent."""


@pytest.mark.parametrize(("params", "processors"), EQUIVALENTS)
def test_token_frequencies_match_transformers(params, processors):
    for seed in range(3):
        torch.manual_seed(seed)
        logits_V = 2 * torch.randn(VOCAB_SIZE)
        prompt = [*logits_V.topk(3).indices.tolist(), 1, 2]
        probabilities_V = hf_probabilities(logits_V, *processors, ids=prompt).double()
        tokens = draw(logits_V, params, 20_000, prompt)
        counts_V = torch.bincount(tokens, minlength=VOCAB_SIZE)
        assert not counts_V[probabilities_V == 0].any(), "a token that was filtered out was drawn"
        # Rare tokens are counted together: a chi-square test needs a few expected counts per cell.
        frequent = probabilities_V * len(tokens) >= 5
        observed = [*counts_V[frequent].tolist(), int(counts_V[~frequent].sum())]
        expected = [*probabilities_V[frequent].tolist(), float(probabilities_V[~frequent].sum())]
        expected = [probability / sum(expected) * len(tokens) for probability in expected]
        if expected[-1] == 0:
            observed.pop(), expected.pop()
        if len(expected) > 1:
            assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exactly_the_tokens_that_pass_the_filters_are_drawn(dtype):
    torch.manual_seed(1)
    logits_V = torch.randn(VOCAB_SIZE, dtype=dtype)
    for k in range(1, VOCAB_SIZE):
        tokens = draw(logits_V, SamplingParams(100.0, top_k=k), 2000)
        assert set(tokens.tolist()) == set(logits_V.topk(k).indices.tolist())
    for p in torch.linspace(0.01, 0.99, 25).tolist():
        expected = hf_probabilities(logits_V, HF.TopPLogitsWarper(p)).nonzero().flatten()
        tokens = draw(logits_V, SamplingParams(top_p=p), 10_000)
        assert set(tokens.tolist()) == set(expected.tolist())


def test_presence_and_frequency_penalties_count_the_output_and_not_the_prompt():
    params = SamplingParams(0.0, presence_penalty=1.0, frequency_penalty=0.5)
    sampler = Sampler(1, 4)
    sampler.add_sequence(0, params, prompt=[0, 0, 0])
    logits_BV = torch.tensor([[3.0, 2.0, 0.0, -5.0]])
    # token 0 loses 1.5 after its first occurrence and 0.5 after each further one
    assert [int(sampler(logits_BV)) for _ in range(6)] == [0, 1, 0, 0, 0, 1]
    sampler.add_sequence(0, params, prompt=[0])
    assert int(sampler(logits_BV)) == 0, "a new sequence starts without the counts of the last"


def test_no_stop_token_before_min_tokens_and_other_slots_are_unchanged():
    logits_BV = torch.tensor([5.0, 1.0, 9.0, 0.0]).repeat(3, 1)
    sampler, alone = Sampler(3, 4), Sampler(1, 4)
    sampler.add_sequence(0, SamplingParams(0.0, min_tokens=2), [0], stop_tokens={2})
    sampler.add_sequence(1, SamplingParams(seed=1, min_tokens=3), [0], stop_tokens=[2, 0])
    for slots, slot in ((sampler, 2), (alone, 0)):
        slots.add_sequence(slot, SamplingParams(9.0, seed=1), [0], stop_tokens={2})
    tokens = torch.stack([sampler(logits_BV) for _ in range(20)])
    assert tokens[:, 0].tolist() == [0, 0, *[2] * 18]
    assert {*tokens[:3, 1].tolist()} <= {1, 3}
    assert 2 in tokens[3:, 1]
    assert tokens[:, 2].tolist() == [int(alone(logits_BV[:1])) for _ in range(20)]
    # A sequence that is continued after an output counts it.
    alone.add_sequence(0, SamplingParams(0.0, min_tokens=2), [0], output=[1, 1], stop_tokens={2})
    assert int(alone(logits_BV[:1])) == 2


def test_greedy_takes_the_first_of_ties_and_a_tiny_temperature_stays_finite():
    logits_V = torch.tensor([0.0, 7.0, 7.0, 6.0])
    assert draw(logits_V, SamplingParams(0.0), 3).tolist() == [1, 1, 1]
    assert draw(logits_V, SamplingParams(1e-300), 3).tolist() == [1, 1, 1]
    assert set(draw(logits_V, SamplingParams(1e-4), 100).tolist()) == {1, 2}
    assert set(draw(logits_V, SamplingParams(100.0), 300).tolist()) == {0, 1, 2, 3}
    assert set(draw(logits_V.bfloat16(), SamplingParams(top_k=1), 50).tolist()) == {1, 2}


def test_tokens_do_not_depend_on_batch_composition():
    torch.manual_seed(2)
    all_params = [
        SamplingParams(seed=1),
        SamplingParams(0.0),
        SamplingParams(0.8, top_k=7, seed=2),
        SamplingParams(top_p=0.9, seed=3),
        SamplingParams(min_p=0.05, seed=4),
        SamplingParams(top_k=20, top_p=0.5, repetition_penalty=1.2, seed=5),
        SamplingParams(0.0, presence_penalty=2.0),
    ]
    for vocab_size in (17, 257, 1000):
        steps = [torch.randn(len(all_params), vocab_size) for _ in range(40)]
        sampler = Sampler(len(all_params), vocab_size)
        for slot, params in enumerate(all_params):
            sampler.add_sequence(slot, params, [slot])
        tokens = torch.stack([sampler(logits_BV) for logits_BV in steps])
        for slot, params in enumerate(all_params):
            single = Sampler(1, vocab_size)
            single.add_sequence(0, params, [slot])
            assert tokens[:, slot].tolist() == [
                int(single(logits_BV[slot : slot + 1])) for logits_BV in steps
            ]


def test_a_moved_sequence_continues_as_before():
    steps = [torch.randn(1, 50, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=1.0, seed=9)
    reference, sampler = Sampler(1, 50), Sampler(3, 50)
    reference.add_sequence(0, params, [1])
    sampler.add_sequence(2, params, [1])
    before = [int(sampler(logits_BV, first=2)) for logits_BV in steps[:10]]
    sampler.move(2, 0)
    after = [int(sampler(logits_BV, first=0)) for logits_BV in steps[10:]]
    assert before + after == [int(reference(logits_BV)) for logits_BV in steps]


def test_the_hash_is_splitmix64():
    # The first outputs for seed 1234567 of the algorithm's reference implementations.
    state = torch.tensor(1234567) - 0x61C8864680B583EB * torch.arange(3)
    assert [number % 2**64 for number in mix(state).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -3, 2**80])
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
        "min_tokens",
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    if (name, value) == ("seed", -3):
        return
    with pytest.raises(ValueError, match=f"{name} must be between"):
        SamplingParams(**{name: value})
