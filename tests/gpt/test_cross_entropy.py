"""The loss behind a linear unembedding is torch's, in less memory and without computing anything twice."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gpt.kernels.cross_entropy import linear_cross_entropy

N, D, V = 23, 8, 50


@pytest.fixture
def given():
    """features_ND, weight_VD, bias_V, targets_N in float64, of which a few do not count."""
    torch.manual_seed(0)
    targets_N = torch.randint(V, (N,))
    targets_N[3:9] = -100
    tensors = [torch.randn(size, dtype=torch.float64) for size in ((N, D), (V, D), (V,))]
    return *(tensor.requires_grad_() for tensor in tensors), targets_N


def gradients_of(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("size", [N, 7, 1])
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients_are_torchs(size, biased, given):
    features_ND, weight_VD, bias_V, targets_N = given
    tensors = (features_ND, weight_VD, bias_V)[: 2 + biased]
    logits_NV = F.linear(features_ND, weight_VD, bias_V if biased else None)
    expected = F.cross_entropy(logits_NV, targets_N, reduction="sum")
    loss = linear_cross_entropy(features_ND, weight_VD, bias_V if biased else None, targets_N, size)
    torch.testing.assert_close(loss, expected)
    # A mean, and a part of a batch: what comes from behind is not 1.
    found = gradients_of(loss / 17, *tensors)
    for one, other in zip(found, gradients_of(expected / 17, *tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_a_tied_weight_gets_both_gradients(given):
    _, weight_VD, _, targets_N = given
    tokens_N = torch.arange(N)
    loss = linear_cross_entropy(weight_VD[tokens_N].tanh(), weight_VD, None, targets_N, 5)
    expected = F.cross_entropy(weight_VD[tokens_N].tanh() @ weight_VD.T, targets_N, reduction="sum")
    (found,), (wanted,) = gradients_of(loss, weight_VD), gradients_of(expected, weight_VD)
    torch.testing.assert_close(found, wanted)


def test_where_no_target_counts_nothing_is_learned(given):
    features_ND, weight_VD, bias_V, targets_N = given
    loss = linear_cross_entropy(features_ND, weight_VD, bias_V, targets_N * 0 - 100, 7)
    assert loss.item() == 0
    assert all(not by.any() for by in gradients_of(loss, features_ND, weight_VD, bias_V))


def test_under_autocast_products_are_bfloat16_and_the_softmax_is_not(given):
    features_ND, weight_VD, bias_V, targets_N = given
    features_ND, weight_VD, bias_V = (
        tensor.detach().float().requires_grad_() for tensor in (features_ND, weight_VD, bias_V)
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits_NV = F.linear(features_ND, weight_VD, bias_V)
        loss = linear_cross_entropy(features_ND, weight_VD, bias_V, targets_N, 7)
    assert logits_NV.dtype == torch.bfloat16
    expected = F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
    torch.testing.assert_close(loss, expected)
    found = gradients_of(loss, features_ND, weight_VD, bias_V)
    wanted = gradients_of(expected, features_ND, weight_VD, bias_V)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.02)


def test_no_logits_are_kept_and_none_are_computed_twice(given):
    features_ND, weight_VD, _, targets_N = given
    kept = []
    counter = FlopCounterMode(display=False)
    with (
        counter,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        linear_cross_entropy(features_ND, weight_VD, None, targets_N, 7).backward()
    assert {tensor.shape for tensor in kept} == {features_ND.shape, weight_VD.shape}
    assert counter.get_total_flops() == 3 * 2 * N * D * V


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of itself
def test_compiled_it_is_one_graph_and_the_same(given, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    *tensors, targets_N = given
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    loss, expected = (
        function(*tensors, targets_N, 7) for function in (compiled, linear_cross_entropy)
    )
    torch.testing.assert_close(loss, expected)
    for one, other in zip(
        gradients_of(loss, *tensors), gradients_of(expected, *tensors), strict=True
    ):
        torch.testing.assert_close(one, other)
