import pytest
import torch

from gpt import GPT
from gpt.generation import generate
from gpt.sampling import SamplingParams

VOCAB_SIZE = 40


def random_gpt(seed=0, dtype=torch.float64):
    """Return a small GPT with random weights; a new model's output projections are zero."""
    torch.manual_seed(seed)
    model = GPT(VOCAB_SIZE, 256, width=32, depth=2, heads=2).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=4 * parameter.shape[-1] ** -0.5)
    return model


def test_every_seed_and_choice_gives_another_output():
    model = random_gpt(dtype=torch.float32)

    def output(seed, choice=0):
        return tuple(generate(model, [1, 2], 20, SamplingParams(seed=seed), choice=choice))

    assert output(3) == output(3)
    seeds = (-(2**63), -1, 0, 1, 2**63 - 1)
    assert len({output(seed, choice) for seed in seeds for choice in range(4)}) == 20


@pytest.mark.parametrize("length", [1, 2, 17, 56])
def test_greedy_with_a_cache_equals_recomputing_from_scratch(length):
    model = random_gpt(seed=5)  # its greedy output does not repeat itself soon
    prompt = torch.randint(VOCAB_SIZE, (length,)).tolist()
    tokens = list(generate(model, prompt, 200, SamplingParams(0.0)))
    assert len(set(tokens)) > 10
    for position, token in enumerate(tokens):
        with torch.inference_mode():
            logits_BTV = model(torch.tensor([prompt + tokens[:position]]))
        assert token == int(logits_BTV[0, -1].argmax())


def test_generation_ends_at_a_stop_token_at_max_tokens_and_at_the_context():
    model = random_gpt()
    tokens = list(generate(model, [5], 50, SamplingParams(seed=1)))
    assert len(tokens) == 50
    stop = tokens[30]
    assert (
        list(generate(model, [5], 50, SamplingParams(seed=1), [stop]))
        == tokens[: tokens.index(stop)]
    )
    # the last token is predicted and never fed back
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
def test_invalid_prompts_are_refused_before_the_first_token(prompt, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(random_gpt(), prompt, max_tokens, SamplingParams())
