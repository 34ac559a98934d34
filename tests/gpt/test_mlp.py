"""Chapters 5 and 6: MLPs and gated experts, and how they extrapolate."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gpt.models.base import Model
from gpt.models.linear import SigmaPi
from gpt.models.mlp import (
    ACTIVATIONS,
    MLP,
    MLPLM,
    Experts,
    ExpertsLM,
    GatedExperts,
    Layers,
    MLPClassifier,
    backpropagate,
    backpropagate_layers,
)
from training.chapters import fitting
from training.tasks.tables import BROWN, CURVES, FRANKEN, WHITE, grain_rows


def fit_many(
    make: Callable[[], Model], x_NBD: Tensor, y_NB: Tensor, steps: int
) -> Callable[[Tensor], Tensor]:
    """Fit N models with seeds 0 to N - 1 to N data sets in parallel; return their predictions."""
    models = fitting.fit_many(make, x_NBD, y_NB, steps, 0.05)
    return lambda x_NBD: torch.stack(
        [m(x_BD) for m, x_BD in zip(models, x_NBD, strict=True)]
    ).detach()


def num_parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_chapter_2_a_relu_network_fitted_to_five_cups_fails_at_ten() -> None:
    x_BD, y_B = grain_rows(torch.linspace(1, 5, 9), WHITE, BROWN)
    x_NBD, y_NB = x_BD.expand(5, -1, -1), y_B.expand(5, -1)
    network = fit_many(lambda: MLP(2, (10,)), x_NBD, y_NB, steps=1000)
    assert (network(x_NBD) - y_NB).abs().mean(-1).median() < 0.2
    far_BD, far_B = grain_rows(torch.tensor([10.0]), WHITE, BROWN)
    assert (network(far_BD.expand(5, -1, -1)) - far_B).abs().mean(-1).median() > 0.5
    sigma_pi = SigmaPi()
    with torch.no_grad():
        sigma_pi.weight.copy_(torch.tensor([2.0, 2.0, 0.0]))
    torch.testing.assert_close(sigma_pi(far_BD), far_B)


def test_chapter_5_two_linear_layers_equal_one() -> None:
    torch.manual_seed(0)
    model = MLP(3, (5,), "none").double()
    first, last = model.hidden.layers[0], model.output
    weight_D = (last.weight @ first.weight)[0]
    bias = (last.weight @ first.bias + last.bias)[0]
    x_BD = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x_BD), x_BD @ weight_D + bias)


def test_chapter_5_activations_equal_their_formulas() -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    sigmoid, tanh = ACTIVATIONS["sigmoid"], ACTIVATIONS["tanh"]
    torch.testing.assert_close(sigmoid(x), 1 / (1 + (-x).exp()))
    torch.testing.assert_close(tanh(x), 2 * sigmoid(2 * x) - 1)
    torch.testing.assert_close(tanh(x), (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()))
    torch.testing.assert_close(ACTIVATIONS["relu"](x), x.clamp(min=0))
    torch.testing.assert_close(ACTIVATIONS["step"](x), (x > 0).double())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_chapter_5_an_mlp_equals_torch_layers(activation: str) -> None:
    torch.manual_seed(0)
    model = MLP(3, (5, 4), activation).double()
    first, second = model.hidden.layers
    activate = {
        "step": lambda a: (a > 0).double(),
        "sigmoid": nn.Sigmoid(),
        "tanh": nn.Tanh(),
        "relu": nn.ReLU(),
        "none": nn.Identity(),
    }[activation]
    x_BD, y_B = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(
        model(x_BD), model.output(activate(second(activate(first(x_BD)))))[:, 0]
    )
    torch.testing.assert_close(model.loss(x_BD, y_B), nn.functional.mse_loss(model(x_BD), y_B))


def test_chapter_5_three_relus_make_at_most_three_kinks() -> None:
    x_BD = torch.linspace(-20, 20, 4001, dtype=torch.float64).unsqueeze(1)
    max_kinks = 0
    for seed in range(30):
        torch.manual_seed(seed)
        model = MLP(1, (3,)).double()
        is_kink_B = model(x_BD).detach().diff().diff().abs() > 1e-9
        # A kink between two grid points changes the slope at one point or at two neighbors.
        kinks = int(is_kink_B[0]) + int((is_kink_B[1:] & ~is_kink_B[:-1]).sum())
        assert kinks <= 3
        max_kinks = max(max_kinks, kinks)
    assert max_kinks == 3


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_chapter_5_more_units_fit_curves_better(activation: str) -> None:
    x_B = torch.linspace(-1.5, 2.5, 60)
    y_NB = torch.stack([curve(x_B) for _, curve in CURVES.values()])
    x_NBD = x_B.view(1, -1, 1).expand(len(CURVES), -1, -1)
    errors = []
    for units in (2, 20):
        model = fit_many(lambda units=units: MLP(1, (units,), activation), x_NBD, y_NB, steps=500)
        errors.append((model(x_NBD) - y_NB).square().mean(-1) / y_NB.var(-1))
    assert (errors[1] < errors[0]).all()
    assert (errors[1] < 0.02).all()


def test_chapter_5_backpropagation_by_hand_equals_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    weights_L, biases_L = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    weights_L.requires_grad_()
    biases_L.requires_grad_()
    x, y = torch.tensor(0.7).double(), torch.tensor(0.2).double()
    a = x
    for weight, bias in zip(weights_L, biases_L, strict=True):
        a = torch.sigmoid(weight * a + bias)
    cost = (a - y) ** 2
    expected = torch.autograd.grad(cost, (weights_L, biases_L))
    by_hand = backpropagate(weights_L.detach(), biases_L.detach(), x, y)
    torch.testing.assert_close(by_hand, (cost.detach(), *expected))


def test_chapter_5_backpropagation_by_hand_through_layers_equals_autograd() -> None:
    torch.manual_seed(0)
    layers = Layers([5, 4, 3, 2], "sigmoid").double()
    x_BF, y_BF = torch.rand(6, 5).double(), torch.rand(6, 2).double()
    cost = ((layers(x_BF) - y_BF) ** 2).sum(-1).mean()
    cost.backward()
    weights, biases = (
        [getattr(layer, name) for layer in layers.layers] for name in ("weight", "bias")
    )
    by_hand = backpropagate_layers(
        [w.detach() for w in weights], [b.detach() for b in biases], x_BF, y_BF
    )
    expected = cost.detach(), [w.grad for w in weights], [b.grad for b in biases]
    torch.testing.assert_close(by_hand, expected)


def test_chapter_5_a_chain_is_layers_of_one_neuron() -> None:
    weights_L, biases_L = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()
    x, y = torch.tensor(0.7).double(), torch.tensor(0.2).double()
    cost, weight_gradients_L, bias_gradients_L = backpropagate(weights_L, biases_L, x, y)
    as_layers = backpropagate_layers(
        [weight.view(1, 1) for weight in weights_L],
        [bias.view(1) for bias in biases_L],
        x.view(1, 1),
        y.view(1, 1),
    )
    torch.testing.assert_close(as_layers[0], cost)
    torch.testing.assert_close(torch.cat(as_layers[1])[:, 0], weight_gradients_L)
    torch.testing.assert_close(torch.cat(as_layers[2]), bias_gradients_L)


def test_chapter_5_a_classifier_is_softmax_regression_on_hidden_layers() -> None:
    torch.manual_seed(0)
    model = MLPClassifier(3, 4, (5, 6), "tanh").double()
    x_BD, class_B = torch.randn(7, 3).double(), torch.randint(4, (7,))
    hidden, output = model.scores
    logits_BV = output(hidden(x_BD))
    torch.testing.assert_close(model(x_BD), logits_BV.softmax(-1))
    torch.testing.assert_close(
        model.loss(x_BD, class_B), nn.functional.cross_entropy(logits_BV, class_B)
    )


def test_chapter_6_gated_experts_equal_their_formula() -> None:
    torch.manual_seed(0)
    model = GatedExperts(3, 2, 4, 5).double()
    u_BF, v_BF = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    gates_BE = model.gates(v_BF).softmax(-1)
    expected = torch.zeros(6, 5).double()
    for i in range(4):
        weight, bias = (p[5 * i : 5 * i + 5] for p in model.experts.parameters())
        expected += gates_BE[:, i : i + 1] * (u_BF @ weight.T + bias)
    torch.testing.assert_close(model(u_BF, v_BF), expected)
    torch.testing.assert_close(model.gate_weights(v_BF), gates_BE)


def test_chapter_6_gates_and_experts_may_have_different_inputs() -> None:
    torch.manual_seed(0)
    model = Experts(2, 3, u=(0,), v=(1,))
    assert num_parameters(model) == 3 * (1 + 1) + 3 * (1 + 1)
    x_BD = torch.rand(5, 2)
    more_BD = x_BD + torch.tensor([1.0, 0.0])
    assert torch.equal(model.gate_weights(x_BD), model.gate_weights(more_BD))
    torch.testing.assert_close(model.gate_weights(x_BD).sum(-1), torch.ones(5))
    slope_B = (model.gate_weights(x_BD) * model.mixture.experts.weight[:, 0]).sum(-1)
    torch.testing.assert_close(model(more_BD) - model(x_BD), slope_B)


@pytest.mark.parametrize("split_inputs", [False, True], ids=["u = v", "u cups, v darkness"])
def test_chapter_6_white_brown_and_franken_grain_together(split_inputs: bool) -> None:
    """The best of several fits. Only experts that see the cups alone find the law."""
    kwargs = {"u": (0,), "v": (1,)} if split_inputs else {}
    x_BD, y_B = grain_rows(torch.linspace(1, 5, 9), WHITE, BROWN, FRANKEN)
    x_NBD, y_NB = x_BD.expand(8, -1, -1), y_B.expand(8, -1)
    model = fit_many(lambda: Experts(2, 5, **kwargs), x_NBD, y_NB, steps=1200)
    loss_N = (model(x_NBD) - y_NB).square().mean(-1)
    assert loss_N.min() < 0.01
    far_BD, far_B = grain_rows(torch.tensor([10.0]), WHITE, BROWN, FRANKEN)
    far_N = (model(far_BD.expand(8, -1, -1)) - far_B).abs().amax(-1)
    assert (far_N[loss_N.argmin()] < 0.5) == split_inputs


def test_chapter_5_mlp_lm_concatenates_the_embeddings_of_the_window() -> None:
    torch.manual_seed(0)
    model = MLPLM(20, 8, window=3, width=5, hidden=4, depth=2).double()
    tokens_BT = torch.randint(20, (2, 8))
    embeddings_BTD = model.embedding(tokens_BT)
    for t in range(8):
        window_BWD = torch.zeros(2, 3, 5).double()  # oldest first; zeros before the start
        for j in range(min(3, t + 1)):
            window_BWD[:, 2 - j] = embeddings_BTD[:, t - j]
        hidden_BF = model.layers(window_BWD.transpose(1, 2).flatten(1))
        expected = hidden_BF / hidden_BF.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(model.features(tokens_BT)[:, t], expected)


def test_chapter_6_experts_lm_is_an_mlp_lm_with_gated_experts() -> None:
    torch.manual_seed(0)
    model = ExpertsLM(20, 8, window=3, width=5, hidden=4, experts=3).double()
    tokens_BT = torch.randint(20, (2, 8))
    hidden_BTF = model.hidden(tokens_BT, None)
    mixed_BTF = model.mixture(hidden_BTF, hidden_BTF)
    expected = mixed_BTF / mixed_BTF.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(model.features(tokens_BT), expected)


@pytest.mark.parametrize("make", [MLPLM, ExpertsLM])
def test_features_depend_on_window_tokens_only(make: type[MLPLM]) -> None:
    torch.manual_seed(0)
    model = make(20, 4, window=3, width=5, hidden=4).double()
    assert model.max_length is None
    tokens_BT = torch.randint(20, (1, 9))
    changed_BT = tokens_BT.clone()
    changed_BT[:, 4] = (changed_BT[:, 4] + 1) % 20
    differs_T = (model.features(tokens_BT) - model.features(changed_BT)).abs().amax((0, 2)) > 0
    assert differs_T.tolist() == [4 <= t < 7 for t in range(9)]


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ValueError, match="no activation 'gelu'; there are step, sigmoid"):
        MLP(2, (3,), "gelu")
    with pytest.raises(ValueError, match=r"at least 1 wide, not \[2, 0\]"):
        Layers([2, 0], "relu")
    with pytest.raises(ValueError, match="experts must be at least 1, not 0"):
        Experts(2, 0)
    with pytest.raises(ValueError, match=r"indices of the 2 inputs.*\[0, 2\] and \[0, 1\]"):
        Experts(2, 3, u=(0, 2))
    with pytest.raises(ValueError, match=r"indices of the 2 inputs.*\[0, 1\] and \[\]"):
        Experts(2, 3, v=())
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        MLPLM(20, 4, depth=0)


def test_networks_and_experts_are_written_out_unit_by_unit() -> None:
    """The equations, evaluated as Python, compute what the model does."""
    x_BD = torch.tensor([[0.5, -1.0], [2.0, 0.25]])

    def softmax(scores: list[float]) -> list[float]:
        return torch.tensor(scores).softmax(0).tolist()

    def value(sum_: str, values: dict[str, float]) -> float:
        expression = re.sub(r"(\d) ([a-z])", r"\1 * \2", sum_)
        return float(eval(expression, {"tanh": math.tanh}, values))

    for make in (lambda: MLP(2, (3, 2), "tanh"), lambda: Experts(2, 3, (0,), (1,))):
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter * 100).round() / 100)
        y, *lines = model.formulas(["x", "z"], [])
        equations = dict(part.split(" = ") for line in lines for part in re.split("  +", line))
        for (x, z), expected in zip(x_BD.tolist(), model(x_BD).tolist(), strict=True):
            values = {"x": x, "z": z}
            for name, sum_ in equations.items():
                values[name] = value(sum_, values)
            if isinstance(model, Experts):
                assert y == "y = sum_i g_i f_i, g = softmax(s)"
                gates = softmax([values[f"s{i}"] for i in (1, 2, 3)])
                found = sum(g * values[f"f{i}"] for i, g in enumerate(gates, 1))
            else:
                found = value(y.removeprefix("y = "), values)
            assert found == pytest.approx(expected, abs=1e-5)
