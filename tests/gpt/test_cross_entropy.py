"""linear_cross_entropy equals torch's cross-entropy, keeps no logits and computes none twice."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gpt.kernels.cross_entropy import linear_cross_entropy

N, D, V = 23, 8, 50


@pytest.fixture
def inputs():
    """features_ND, weight_VD, bias_V in float64, and targets_N, some of them ignored."""
    torch.manual_seed(0)
    targets_N = torch.randint(V, (N,))
    targets_N[3:9] = -100
    tensors = [torch.randn(size, dtype=torch.float64) for size in ((N, D), (V, D), (V,))]
    return *(tensor.requires_grad_() for tensor in tensors), targets_N


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("chunk_size", [N, 7, 1])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradients_equal_torch(chunk_size, has_bias, smoothing, inputs):
    features_ND, weight_VD, bias_V, targets_N = inputs
    tensors = (features_ND, weight_VD, bias_V)[: 2 + has_bias]
    bias_V = bias_V if has_bias else None
    logits_NV = F.linear(features_ND, weight_VD, bias_V)
    expected = F.cross_entropy(logits_NV, targets_N, reduction="sum", label_smoothing=smoothing)
    loss = linear_cross_entropy(features_ND, weight_VD, bias_V, targets_N, chunk_size, smoothing)
    torch.testing.assert_close(loss, expected)
    # The incoming gradient is not 1, as for a mean over several micro-batches.
    torch.testing.assert_close(gradients(loss / 17, *tensors), gradients(expected / 17, *tensors))


def test_a_tied_weight_gets_both_gradients(inputs):
    _, weight_VD, _, targets_N = inputs
    tokens_N = torch.arange(N)
    loss = linear_cross_entropy(weight_VD[tokens_N].tanh(), weight_VD, None, targets_N, 5)
    expected = F.cross_entropy(weight_VD[tokens_N].tanh() @ weight_VD.T, targets_N, reduction="sum")
    torch.testing.assert_close(gradients(loss, weight_VD), gradients(expected, weight_VD))


def test_loss_and_gradients_are_zero_if_all_targets_are_ignored(inputs):
    features_ND, weight_VD, bias_V, targets_N = inputs
    loss = linear_cross_entropy(features_ND, weight_VD, bias_V, targets_N * 0 - 100, 7)
    assert loss.item() == 0
    assert all(not grad.any() for grad in gradients(loss, features_ND, weight_VD, bias_V))


def test_under_autocast_products_are_bfloat16_and_the_softmax_float32(inputs):
    features_ND, weight_VD, bias_V, targets_N = inputs
    features_ND, weight_VD, bias_V = (
        tensor.detach().float().requires_grad_() for tensor in (features_ND, weight_VD, bias_V)
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits_NV = F.linear(features_ND, weight_VD, bias_V)
        loss = linear_cross_entropy(features_ND, weight_VD, bias_V, targets_N, 7)
    assert logits_NV.dtype == torch.bfloat16
    expected = F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
    torch.testing.assert_close(loss, expected)
    tensors = (features_ND, weight_VD, bias_V)
    actual = gradients(loss, *tensors)
    assert {grad.dtype for grad in actual} == {torch.float32}
    torch.testing.assert_close(actual, gradients(expected, *tensors), rtol=0.01, atol=0.02)


def test_no_logits_are_saved_and_none_are_computed_twice(inputs):
    features_ND, weight_VD, _, targets_N = inputs
    saved = []
    counter = FlopCounterMode(display=False)
    with (
        counter,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        linear_cross_entropy(features_ND, weight_VD, None, targets_N, 7).backward()
    assert {tensor.shape for tensor in saved} == {features_ND.shape, weight_VD.shape}
    assert counter.get_total_flops() == 3 * 2 * N * D * V


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch itself
def test_compiles_to_one_graph_with_equal_results(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    *tensors, targets_N = inputs
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    loss, expected = (
        function(*tensors, targets_N, 7) for function in (compiled, linear_cross_entropy)
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, *tensors), gradients(expected, *tensors))


def test_gradients_in_float16_do_not_overflow():
    """Of 20,000 equal positions, whose gradients of up to 8 add up to more than 65,504."""
    features_ND = torch.full((20_000, 2), 8.0, requires_grad=True)
    weight_VD = torch.zeros(3, 2, requires_grad=True)
    targets_N = torch.zeros(20_000, dtype=torch.long)
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(features_ND, weight_VD, None, targets_N, 20_000)
    (loss / 20_000).backward()
    expected = torch.tensor([-2.0, 1.0, 1.0]).mul(8 / 3).unsqueeze(1).expand(3, 2)
    torch.testing.assert_close(weight_VD.grad, expected, atol=0.01, rtol=0.01)
