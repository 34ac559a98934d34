import pytest
import torch
from torch import nn

from gpt.checkpoint import build_model
from gpt.generation import generate
from gpt.kernels.quantization import Int8Linear, has_exact_logits, quantize
from gpt.models.gpt import GPT2
from gpt.sampling import SamplingParams
from serving.engine.engine import Engine
from serving.engine.sequence import Request
from tests.gpt.test_contract import VARIANTS


def test_product_error_is_at_most_half_a_quantization_step_of_each_factor():
    torch.manual_seed(0)
    linear = nn.Linear(96, 40)
    x_BTK = torch.randn(5, 3, 96)
    y_BTN = Int8Linear(linear)(x_BTK)
    error_BTN = (y_BTN - linear(x_BTK)).detach()
    # |w x - q p| <= K (|w| step_x + |x| step_w) / 2, with steps of max / 127
    bound = 96 * linear.weight.abs().max() * x_BTK.abs().max() / 127
    assert y_BTN.shape == (5, 3, 40)
    assert 0 < error_BTN.abs().max() < bound
    assert error_BTN.std() < 0.02 * linear(x_BTK).std()


def test_rows_are_quantized_independently_and_a_row_of_zeros_gives_the_bias():
    torch.manual_seed(0)
    linear = Int8Linear(nn.Linear(16, 8))
    x_BK = torch.randn(4, 16)
    x_BK[2] = 0
    y_BN = linear(x_BK)
    assert torch.equal(y_BN[2], linear.bias)
    for row in range(4):
        assert torch.equal(y_BN[row : row + 1], linear(x_BK[row : row + 1]))


def random_model(variant):
    torch.manual_seed(0)
    name, model_args = VARIANTS[variant]
    model = build_model(name, {"vocab_size": 50, "context_length": 24, **model_args}).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_model_generates_in_int8_from_nearly_the_same_probabilities(variant):
    model = random_model(variant)
    tokens_BT = torch.randint(50, (2, 24))
    with torch.no_grad():
        expected_BTV = model(tokens_BT).softmax(-1)
        actual_BTV = quantize(model, "int8")(tokens_BT).softmax(-1)
    assert (
        any(isinstance(module, Int8Linear) for module in model.modules())
        or VARIANTS[variant][0] == "softmax"
    )
    assert (expected_BTV - actual_BTV).abs().sum(-1).mean() < 0.25
    request = Request([1, 2, 3], 10, SamplingParams(temperature=0))
    engine = Engine(model, 2, num_scheduler_steps=2)
    engine.add_request(request)
    tokens = []
    while not engine.is_idle:
        tokens += [event.token for event in engine.step()]
    assert tokens == list(generate(model, [1, 2, 3], 10, SamplingParams(temperature=0)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_maps_of_every_model_are_nearly_the_same_in_int8(variant):
    model = random_model(variant)
    tokens_BT = torch.randint(50, (2, 12))
    expected = model.xray(tokens_BT)
    for before, after in zip(expected, quantize(model, "int8").xray(tokens_BT), strict=True):
        assert before.name == after.name
        error = (before.weights - after.weights).square().mean().sqrt()
        assert error <= 0.1 * before.weights.square().mean().sqrt(), before.name


def test_dequantized_weight_equals_the_matrix_of_the_product():
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    quantized = Int8Linear(linear)
    step_N = linear.weight.detach().abs().amax(dim=1) / 127
    assert ((quantized.weight - linear.weight).abs().amax(dim=1) <= 0.51 * step_N).all()
    identity_KK = torch.eye(16)  # quantization does not change these inputs
    torch.testing.assert_close(quantized(identity_KK) - linear.bias, quantized.weight.T)


def test_int8_needs_a_quarter_of_the_memory_of_matrices():
    model = GPT2(300, 16, width=64, depth=2, heads=2)
    weights = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)
    )
    engine = Engine(model, 1)
    before = engine.memory_bytes
    cache = 2 * sum(engine.state[name].nbytes for name in ("keys", "values"))
    embedding = model.embedding.weight.nbytes  # until now shared with the unembedding
    after = Engine(quantize(model, "int8"), 1).memory_bytes
    scales = sum(m.scale.nbytes for m in model.modules() if isinstance(m, Int8Linear))
    # The KV caches, that of the slots and that of the prefill, are halved.
    assert before - after == 3 * weights - embedding - scales + cache // 2


def test_logits_are_exact_only_in_float32_or_better_on_a_cpu():
    def model():
        return GPT2(50, 16, width=32, depth=1, heads=2)

    assert has_exact_logits(model())
    assert has_exact_logits(model().double())
    assert not has_exact_logits(quantize(model(), "int8"))
    assert not has_exact_logits(quantize(model(), "bfloat16"))
    with pytest.raises(ValueError, match="int8 is for a CPU: on meta take bfloat16"):
        quantize(model().to("meta"), "int8")
