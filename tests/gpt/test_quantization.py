import pytest
import torch
from torch import nn

from gpt.checkpoint import build_model
from gpt.kernels.quantization import Int8Linear, has_exact_logits, quantize
from gpt.models.gpt import GPT2
from gpt.sampling import SamplingParams, generate
from serving.engine.engine import Engine
from serving.engine.sequence import Request
from tests.gpt.test_contract import VARIANTS


def test_a_product_is_off_by_no_more_than_half_a_step_of_each_side():
    torch.manual_seed(0)
    linear = nn.Linear(96, 40)
    x_BTK = torch.randn(5, 3, 96)
    ours_BTN = Int8Linear(linear)(x_BTK)
    off = (ours_BTN - linear(x_BTK)).detach()
    # |w x - q p| <= K (|w| step_x + |x| step_w) / 2, with steps of max / 127
    steps = 96 * linear.weight.abs().max() * x_BTK.abs().max() / 127
    assert ours_BTN.shape == (5, 3, 40)
    assert 0 < off.abs().max() < steps
    assert off.std() < 0.02 * linear(x_BTK).std()


def test_rows_are_rounded_alone_and_a_row_of_zeros_gives_the_bias():
    torch.manual_seed(0)
    linear = Int8Linear(nn.Linear(16, 8))
    x_BK = torch.randn(4, 16)
    x_BK[2] = 0
    together = linear(x_BK)
    assert torch.equal(together[2], linear.bias)
    for row in range(4):
        assert torch.equal(together[row : row + 1], linear(x_BK[row : row + 1]))


def made(variant):
    torch.manual_seed(0)
    name, own = VARIANTS[variant]
    model = build_model(name, {"vocab_size": 50, "context_length": 24, **own}).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_model_speaks_with_8_bits_and_says_nearly_the_same(variant):
    model = made(variant)
    tokens_BT = torch.randint(50, (2, 24))
    with torch.no_grad():
        wanted = model(tokens_BT).softmax(-1)
        got = quantize(model, "int8")(tokens_BT).softmax(-1)
    assert (
        any(isinstance(module, Int8Linear) for module in model.modules())
        or VARIANTS[variant][0] == "softmax"
    )
    assert (wanted - got).abs().sum(-1).mean() < 0.25
    request = Request([1, 2, 3], 10, SamplingParams(temperature=0))
    engine = Engine(model, 2, num_scheduler_steps=2)
    engine.add_request(request)
    tokens = []
    while not engine.is_idle:
        tokens += [event.token for event in engine.step()]
    assert tokens == list(generate(model, [1, 2, 3], 10, SamplingParams(temperature=0)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_x_ray_of_every_model_with_8_bits_is_nearly_the_same(variant):
    model = made(variant)
    tokens_BT = torch.randint(50, (2, 12))
    wanted = model.xray(tokens_BT)
    for one, other in zip(wanted, quantize(model, "int8").xray(tokens_BT), strict=True):
        assert one.name == other.name
        off = (one.weights - other.weights).square().mean().sqrt()
        assert off <= 0.1 * one.weights.square().mean().sqrt(), one.name


def test_the_matrix_that_8_bits_stand_for_is_that_of_the_product():
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    rounded = Int8Linear(linear)
    step_N = linear.weight.detach().abs().amax(dim=1) / 127
    assert ((rounded.weight - linear.weight).abs().amax(dim=1) <= 0.51 * step_N).all()
    ones_KK = torch.eye(16)  # inputs that rounding does not change
    torch.testing.assert_close(rounded(ones_KK) - linear.bias, rounded.weight.T)


def test_int8_takes_a_quarter_of_the_memory_of_what_is_multiplied():
    model = GPT2(300, 16, width=64, depth=2, heads=2)
    multiplied = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)
    )
    whole = Engine(model, 1)
    before, kept = (
        whole.memory_bytes,
        2 * sum(whole.state[name].nbytes for name in ("keys", "values")),
    )
    embedding = model.embedding.weight.nbytes  # shared until now with the unembedding
    after = Engine(quantize(model, "int8"), 1).memory_bytes
    scales = sum(m.scale.nbytes for m in model.modules() if isinstance(m, Int8Linear))
    # Of keys and values, of the row and of the prompt that is read, a half.
    assert before - after == 3 * multiplied - embedding - scales + kept // 2


def test_only_what_computes_in_float32_or_better_on_a_cpu_is_exact():
    def model():
        return GPT2(50, 16, width=32, depth=1, heads=2)

    assert has_exact_logits(model())
    assert has_exact_logits(model().double())
    assert not has_exact_logits(quantize(model(), "int8"))
    assert not has_exact_logits(quantize(model(), "bfloat16"))
    with pytest.raises(ValueError, match="int8 is for a CPU: on meta take bfloat16"):
        quantize(model().to("meta"), "int8")
