"""Chapters 1 to 4 against published numbers, closed forms and autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.models.base import Model
from gpt.models.linear import (
    NO_TOKEN,
    BigramLM,
    Linear,
    Logistic,
    SigmaPi,
    SigmaPiLM,
    Softmax,
    format_sum,
    gradient_step,
    softmax,
)
from gpt.models.mlp import MLP
from training.tasks.tables import BROWN, FRANKEN, WHITE, grain_rows

CUPS = torch.linspace(1, 5, 9, dtype=torch.float64)


def fit(model: Model, *batch: Tensor, steps: int = 100) -> float:
    """Fit a model with L-BFGS and return the final loss."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        tolerance_grad=1e-10,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(*batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.loss(*batch).item()


def basketball() -> tuple[Linear, Tensor, Tensor]:
    model = Linear(1)
    with torch.no_grad():
        model.weight.fill_(4.0)
        model.bias.fill_(5.0)
    return model, torch.tensor([[10.0]]), torch.tensor([50.0])


def test_chapter_1_the_basketball_shot_by_hand() -> None:
    model, x_BD, y_B = basketball()
    results = model.gradient_step_by_hand(0.001, x_BD, y_B)
    assert [result.item() for result in results] == [45, 25, -100, -10]
    assert model.weight.item() == pytest.approx(4.1)
    assert model.bias.item() == pytest.approx(
        5.01
    )  # the 5.2 of the source document needs another rate


def test_chapter_1_the_basketball_shot_by_autograd() -> None:
    model, x_BD, y_B = basketball()
    assert gradient_step(model, 0.001, x_BD, y_B).item() == 25
    assert model.weight.item() == pytest.approx(4.1)
    assert model.bias.item() == pytest.approx(5.01)
    assert model.weight.grad is None


def test_chapter_1_by_hand_equals_autograd_and_torch_sgd() -> None:
    torch.manual_seed(0)
    x_BD, y_B = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    start = Linear(3).double()
    models = [Linear(3).double() for _ in range(3)]
    for model in models:
        model.load_state_dict(start.state_dict())
    by_hand, by_autograd, by_torch = models
    sgd = torch.optim.SGD(by_torch.parameters(), lr=0.1)
    for _ in range(20):
        by_hand.gradient_step_by_hand(0.1, x_BD, y_B)
        gradient_step(by_autograd, 0.1, x_BD, y_B)
        sgd.zero_grad()
        F.mse_loss(by_torch(x_BD), y_B).backward()
        sgd.step()
    for model in (by_autograd, by_torch):
        torch.testing.assert_close(model.weight, by_hand.weight)
        torch.testing.assert_close(model.bias, by_hand.bias)


def test_chapter_1_white_rice_needs_two_cups_of_water_to_one() -> None:
    torch.manual_seed(0)
    x_BD, y_B = grain_rows(CUPS, WHITE)
    model = Linear(1).double()
    for _ in range(500):
        gradient_step(model, 0.05, x_BD[:, :1], y_B)
    assert model.weight.item() == pytest.approx(2, abs=1e-3)
    assert model.bias.item() == pytest.approx(0, abs=3e-3)


def test_chapter_1_no_plane_fits_white_and_brown_rice() -> None:
    torch.manual_seed(0)
    x_BD, y_B = grain_rows(CUPS, WHITE, BROWN)
    loss = fit(Linear(2).double(), x_BD, y_B)
    design = torch.cat([x_BD, torch.ones(len(x_BD), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, y_B.unsqueeze(1)).solution.squeeze(1)
    minimum = F.mse_loss(design @ solution, y_B).item()
    assert loss == pytest.approx(minimum)
    assert minimum > 0.3


def test_chapter_1_targets_of_another_shape_raise() -> None:
    with pytest.raises(ValueError, match=r"\[4\].*not \[4, 1\]"):
        Linear(2).loss(torch.zeros(4, 2), torch.zeros(4, 1))


@pytest.fixture(scope="module")
def polynomial() -> SigmaPi:
    """y = p xz + qx + b, fitted to white and brown rice."""
    model = SigmaPi(products=((0, 1), (0,), ())).double()
    assert fit(model, *grain_rows(CUPS, WHITE, BROWN)) < 1e-12
    return model


def test_chapter_2_sigma_pi_equals_its_formula() -> None:
    torch.manual_seed(0)
    model = SigmaPi(3, ((0, 0, 2), (1, 2), (1,), ())).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([2.0, -1.0, 3.0, 5.0]))
    x_BD = torch.randn(6, 3, dtype=torch.float64)
    a, b, c = x_BD.unbind(-1)
    torch.testing.assert_close(model(x_BD), 2 * a * a * c - b * c + 3 * b + 5)


def test_chapter_2_a_product_fits_both_kinds_of_rice_exactly(polynomial: SigmaPi) -> None:
    torch.testing.assert_close(
        polynomial.weight.data, torch.tensor([2.0, 2.0, 0.0]).double(), rtol=0, atol=1e-5
    )


def test_chapter_2_a_product_extrapolates_to_ten_cups(polynomial: SigmaPi) -> None:
    """A ReLU network does not: see test_mlp.py."""
    x_BD, y_B = grain_rows(torch.tensor([10.0], dtype=torch.float64), WHITE, BROWN)
    torch.testing.assert_close(polynomial(x_BD), y_B, rtol=0, atol=1e-4)


def test_chapter_2_parameter_counts() -> None:
    def size(model: Model) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    assert size(SigmaPi()) == 3
    assert [size(MLP(2, (n,))) for n in (2, 10)] == [4 * 2 + 1, 4 * 10 + 1] == [9, 41]


def test_chapter_2_a_smooth_law_cannot_switch_to_the_franken_grain(polynomial: SigmaPi) -> None:
    x_BD, y_B = grain_rows(torch.ones(1, dtype=torch.float64), FRANKEN)
    assert polynomial(x_BD).item() == pytest.approx(4, abs=1e-4)
    assert y_B.item() == 1
    assert fit(SigmaPi().double(), *grain_rows(CUPS, WHITE, BROWN, FRANKEN)) > 0.3


@pytest.mark.parametrize("products", [(), ((0, -1),), ((2,),)])
def test_chapter_2_invalid_products_raise(products: tuple[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="indices of the 2 inputs"):
        SigmaPi(products=products)


def binary_problem() -> tuple[Logistic, Tensor, Tensor]:
    torch.manual_seed(0)
    x_BD = torch.randn(50, 3, dtype=torch.float64)
    y_B = (x_BD @ torch.tensor([1.0, -2.0, 0.5]).double() + 0.3 > 0).double()
    return Logistic(3).double(), x_BD, y_B


def test_chapter_3_gradient_is_the_mean_of_error_times_input() -> None:
    model, x_BD, y_B = binary_problem()
    model.loss(x_BD, y_B).backward()
    error_B = (model(x_BD) - y_B).detach()
    torch.testing.assert_close(model.score.weight.grad, (error_B.unsqueeze(1) * x_BD).mean(0))
    torch.testing.assert_close(model.score.bias.grad, error_B.mean())


def test_chapter_3_loss_is_the_negative_log_likelihood() -> None:
    model, x_BD, y_B = binary_problem()
    p_B = model(x_BD)
    likelihood = (p_B**y_B * (1 - p_B) ** (1 - y_B)).prod()
    torch.testing.assert_close(model.loss(x_BD, y_B), -likelihood.log() / len(y_B))
    torch.testing.assert_close(model.loss(x_BD, y_B), F.binary_cross_entropy(p_B, y_B))
    assert model.loss(1e4 * x_BD, y_B).isfinite()


def test_chapter_3_derivative_of_the_sigmoid() -> None:
    z = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    p = torch.sigmoid(z)
    (derivative,) = torch.autograd.grad(p.sum(), z)
    torch.testing.assert_close(derivative, p * (1 - p))
    torch.testing.assert_close(p, 1 / (1 + (-z).exp()))


def test_chapter_3_class_1_starts_at_a_probability_of_a_half() -> None:
    model, x_BD, y_B = binary_problem()
    fit(model, x_BD, y_B, steps=30)
    assert torch.equal(model.classify(x_BD), y_B.long())
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.bias.zero_()
    assert model.classify(x_BD).all()


def test_chapter_4_softmax_of_1_2_8() -> None:
    probabilities_V = softmax(torch.tensor([1.0, 2.0, 8.0]))
    torch.testing.assert_close(
        probabilities_V, torch.tensor([0.001, 0.002, 0.997]), rtol=0, atol=5e-4
    )


def test_chapter_4_softmax_equals_torch_and_ignores_constants() -> None:
    logits_BV = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(softmax(logits_BV), logits_BV.softmax(-1))
    torch.testing.assert_close(softmax(logits_BV, 0.3), (logits_BV / 0.3).softmax(-1))
    torch.testing.assert_close(softmax(logits_BV + 1e4), softmax(logits_BV), rtol=0, atol=1e-10)
    assert softmax(logits_BV.float() + 1e4).isfinite().all()


def test_chapter_4_gradient_is_error_times_input() -> None:
    torch.manual_seed(0)
    model = Softmax(3, 4).double()
    x_BD, class_B = torch.randn(9, 3, dtype=torch.float64), torch.randint(4, (9,))
    loss = model.loss(x_BD, class_B)
    torch.testing.assert_close(loss, F.cross_entropy(model.scores(x_BD), class_B))
    loss.backward()
    error_BV = (model(x_BD) - F.one_hot(class_B, 4)).detach()
    torch.testing.assert_close(model.scores.weight.grad, error_BV.T @ x_BD / 9)
    torch.testing.assert_close(model.scores.bias.grad, error_BV.mean(0))


def test_chapter_4_two_classes_equal_the_sigmoid_of_the_difference() -> None:
    torch.manual_seed(0)
    model = Softmax(3, 2)
    x_BD = torch.randn(9, 3)
    z_BV = model.scores(x_BD)
    torch.testing.assert_close(model(x_BD)[:, 1], torch.sigmoid(z_BV[:, 1] - z_BV[:, 0]))


def test_chapter_4_entropy_grows_with_temperature_and_0_is_argmax() -> None:
    torch.manual_seed(0)
    model = Softmax(3, 5)
    x_BD = torch.randn(6, 3)
    entropies = []
    for temperature in (0.1, 0.3, 1.0, 3.0, 10.0, 1e4):
        model.temperature = temperature
        p_BV = model(x_BD)
        entropies.append(torch.special.entr(p_BV).sum(-1))
    assert (torch.stack(entropies).diff(dim=0) > 0).all()
    torch.testing.assert_close(p_BV, torch.full_like(p_BV, 1 / 5), rtol=0, atol=1e-3)
    model.temperature = 1e-6
    assert torch.equal(model(x_BD), F.one_hot(model.scores(x_BD).argmax(-1), 5).float())


def test_chapter_4_grains_are_classified_by_darkness() -> None:
    torch.manual_seed(0)
    model = Softmax(1, 3).double()
    darkness_BD = grain_rows(CUPS, WHITE, BROWN, FRANKEN)[0][:, 1:]
    kind_B = torch.arange(3).repeat_interleave(len(darkness_BD) // 3)
    fit(model, darkness_BD, kind_B, steps=30)
    assert torch.equal(model(darkness_BD).argmax(-1), kind_B)


def test_chapter_4_a_trained_bigram_table_equals_the_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens_BT, targets_BT = torch.randint(6, (2, 2, 300), generator=generator)
    counts_VV = torch.zeros(6, 6)
    counts_VV.index_put_(
        (tokens_BT.flatten(), targets_BT.flatten()), torch.ones(()), accumulate=True
    )
    model = BigramLM(6, 300).double()
    fit(model, tokens_BT, targets_BT)
    torch.testing.assert_close(
        model(torch.arange(6).unsqueeze(0))[0].softmax(-1),
        (counts_VV / counts_VV.sum(-1, keepdim=True)).double(),
        rtol=0,
        atol=1e-4,
    )


def test_chapter_2_a_feature_of_sigma_pi_lm_is_the_sum_of_all_products() -> None:
    torch.manual_seed(0)
    model = SigmaPiLM(20, 8, window=3, width=5, hidden=4).double()
    tokens_BT = torch.randint(20, (2, 8))
    embeddings_BTD = model.embedding(tokens_BT)
    weights_WFD = model.factors.weight.view(3, 4, 5)
    for t in range(8):
        factors = [  # token j back has the weights of window position W - 1 - j
            embeddings_BTD[:, t - j] @ weights_WFD[2 - j].T for j in range(3) if t - j >= 0
        ]
        expected = torch.zeros(2, 4).double()
        for subset in range(2 ** len(factors)):  # of the tokens in the window
            product = torch.ones(2, 4).double()
            for j, factor in enumerate(factors):
                if subset >> j & 1:
                    product = product * factor
            expected = expected + product
        expected = expected / expected.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(model.features(tokens_BT)[:, t], expected)


def test_a_window_model_depends_on_the_last_tokens_only() -> None:
    torch.manual_seed(0)
    model = SigmaPiLM(20, 8, window=3, width=5, hidden=4).double()
    torch.nn.init.normal_(model.unembedding.weight)
    tokens_BT = torch.randint(20, (2, 8))
    changed_BT = tokens_BT.clone()
    changed_BT[:, 2] = (changed_BT[:, 2] + 1) % 20
    differs_T = (model(tokens_BT) - model(changed_BT)).abs().amax((0, 2)) > 0
    assert differs_T.tolist() == [False, False, True, True, True, False, False, False]
    state = model.init_state(2, 8)
    assert state["last"].tolist() == [[NO_TOKEN] * 2] * 2
    address = state["last"].data_ptr()
    model(tokens_BT[:, :1], state)
    model(tokens_BT[:, 1:5], state)
    assert torch.equal(state["last"], tokens_BT[:, 3:5])
    assert state["last"].data_ptr() == address


def test_sequences_may_be_longer_than_the_context_length() -> None:
    for model in (BigramLM(20, 4), SigmaPiLM(20, 4, window=3, width=5, hidden=4)):
        assert model.max_length is None
        assert model(torch.zeros(1, 9, dtype=torch.long)).shape == (1, 9, 20)


@pytest.mark.parametrize("kwargs", [{"window": 0}, {"width": 0}, {"hidden": 0}])
def test_invalid_sizes_raise(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1, not"):
        SigmaPiLM(20, 4, **kwargs)


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ValueError, match="inputs must be at least 1, not 0"):
        Linear(0)
    with pytest.raises(ValueError, match=r"temperature above 0.*0\.0"):
        Softmax(2, 3, 0.0)


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        ([(2.0, "x z"), (2.0, "x"), (0.001, "")], "2.00 x z + 2.00 x"),
        ([(-0.004, "x"), (-1.5, "z"), (-0.25, "")], "-1.50 z - 0.25"),
        ([(0.0, "x")], "0"),
    ],
)
def test_a_sum_is_written_as_a_person_would(terms: list[tuple[float, str]], text: str) -> None:
    assert format_sum(terms) == text


def test_models_are_written_out_with_their_weights() -> None:
    models = {
        Linear(2): ["y = 1.00 x + 2.00 z + 3.00"],
        SigmaPi(2, ((0, 1), (0, 0), ())): ["y = 1.00 x z + 2.00 x x + 3.00"],
        Logistic(2): ["p(yes) = sigmoid(1.00 x + 2.00 z + 3.00)"],
        Softmax(2, 2, 0.5): [
            "p = softmax(score / 0.5)",
            "score(no) = 1.00 x + 2.00 z + 5.00",
            "score(yes) = 3.00 x + 4.00 z + 6.00",
        ],
    }
    for model, formulas in models.items():
        numbers = iter(range(1, 9))
        with torch.no_grad():
            for parameter in model.parameters():
                values = [next(numbers) for _ in range(parameter.numel())]
                parameter.copy_(torch.tensor(values).view_as(parameter))
        assert model.formulas(["x", "z"], ["no", "yes"]) == formulas
    assert BigramLM(20, 4).formulas([], []) == []
