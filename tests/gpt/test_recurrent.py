"""Chapters 8 to 10: the three cells against torch's, and the effects of their gates."""

import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.linear import Linear
from gpt.models.recurrent import (
    GRU,
    LSTM,
    RNN,
    Cell,
    GRUCell,
    LSTMCell,
    ManyToOne,
    RecurrentLM,
    RNNCell,
    gradient_by_distance,
)

TORCH_CLASSES = {RNN: nn.RNN, LSTM: nn.LSTM, GRU: nn.GRU}
OPEN = 1e3
"""A bias that opens a gate fully; its negative closes it."""


def as_torch(model: RecurrentLM) -> nn.RNNBase:
    """torch's network with our weights."""
    first = model.cells[0]
    theirs = TORCH_CLASSES[type(model)](
        first.input.in_features, first.width, len(model.cells), batch_first=True
    ).to(first.input.weight.dtype)
    with torch.no_grad():
        for layer, cell in enumerate(model.cells):
            getattr(theirs, f"weight_ih_l{layer}").copy_(cell.input.weight)
            getattr(theirs, f"weight_hh_l{layer}").copy_(cell.hidden.weight)
            getattr(theirs, f"bias_ih_l{layer}").copy_(cell.input.bias)
            bias = cell.hidden.bias
            getattr(theirs, f"bias_hh_l{layer}").copy_(torch.zeros(()) if bias is None else bias)
    return theirs


def as_torch_state(model: RecurrentLM, state: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
    states = tuple(state[name].transpose(0, 1).contiguous() for name in model.cell.state_names)
    return states if len(states) > 1 else states[0]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "model_class",
    [
        pytest.param(RNN, id="chapter_8_rnn"),
        pytest.param(LSTM, id="chapter_9_lstm"),
        pytest.param(GRU, id="chapter_10_gru"),
    ],
)
def test_equals_torch_weight_for_weight(model_class: type[RecurrentLM]) -> None:
    torch.manual_seed(0)
    model = model_class(30, 12, width=10, depth=2, embedding_width=7).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    theirs = as_torch(model)
    tokens_BT = torch.randint(30, (3, 12))
    state = {name: torch.randn_like(t) for name, t in model.init_state(3, 12).items()}
    expected_BTD, last = theirs(
        F.embedding(tokens_BT, model.embedding.weight.detach()), as_torch_state(model, state)
    )
    weights_BTD = torch.randn(3, 12, 10, dtype=torch.float64)
    (expected_BTD * weights_BTD).sum().backward()

    features_BTD = model.features(tokens_BT, state)
    (features_BTD * weights_BTD).sum().backward()
    torch.testing.assert_close(features_BTD, expected_BTD)
    last_states = last if isinstance(last, tuple) else (last,)
    for actual, expected in zip(state.values(), last_states, strict=True):
        torch.testing.assert_close(actual, expected.detach().transpose(0, 1))
    ours = gradients(model)
    for name, expected in gradients(theirs).items():
        kind, side, layer = name.split("_")
        module = "input" if side == "ih" else "hidden"
        actual = ours.get(f"cells.{layer[1:]}.{module}.{kind}")
        # Where torch adds two biases, both have the gradient of our one.
        actual = ours[f"cells.{layer[1:]}.input.bias"] if actual is None else actual
        torch.testing.assert_close(actual, expected)


def scalar(cell: Cell, weight: float) -> Cell:
    """Set the recurrent weight of a cell of width 1 and all other parameters to 0, in float64."""
    for parameter in cell.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(cell.double().hidden.weight, weight)
    return cell


@pytest.mark.parametrize(
    ("weight", "steps", "expected"),
    [(0.2, 5, 0.00032), (0.5, 100, 0.5**100), (2.0, 100, 2.0**100)],
)
def test_chapter_8_gradient_of_a_scalar_recurrence_vanishes_or_explodes(
    weight: float, steps: int, expected: float
) -> None:
    """At h = 0 the derivative of tanh is 1, so only the weight is multiplied."""
    cell = scalar(RNNCell(1, 1), weight)
    norms_T = gradient_by_distance(cell, torch.zeros(steps + 1, 1, 1, dtype=torch.float64))
    assert norms_T[0] == 1
    assert norms_T[steps].item() == pytest.approx(expected, rel=1e-12)


def test_chapter_8_gradient_of_the_rnn_falls_fastest_with_distance() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        x_TBD = torch.randn(60, 4, 64)
        rnn, lstm, gru = (
            gradient_by_distance(cell(64, 64), x_TBD) for cell in (RNNCell, LSTMCell, GRUCell)
        )
        for distance in (10, 20, 40, 59):
            assert rnn[distance] / rnn[0] < gru[distance] / gru[0] / 2
            assert rnn[distance] / rnn[0] < lstm[distance] / lstm[0] / 2


def test_gradient_by_distance_equals_finite_differences() -> None:
    torch.manual_seed(0)
    cell = LSTMCell(3, 1).double()
    x_TBD = torch.randn(6, 1, 3, dtype=torch.float64)
    norms_T = gradient_by_distance(cell, x_TBD)

    def last_output(distance: int, epsilon: float) -> float:
        """The last output when the hidden state at `distance` is changed by `epsilon`."""
        states = (torch.zeros(1, 1, dtype=torch.float64),) * 2
        for position, input_BF in enumerate(cell.input(x_TBD)):
            hidden_BD, cell_BD = cell.step(input_BF, *states)
            states = (hidden_BD + epsilon * (position == 5 - distance), cell_BD)
        return states[0].item()

    for distance in range(6):
        slope = (last_output(distance, 1e-6) - last_output(distance, -1e-6)) / 2e-6
        assert norms_T[distance].item() == pytest.approx(abs(slope), rel=1e-6)


def with_gates(cell: Cell, **biases: float) -> Cell:
    """Set the biases of some gates, to fix these gates open or closed."""
    order = {LSTMCell: "ifgo", GRUCell: "rzn"}[type(cell)]
    for gate, bias in biases.items():
        start = order.index(gate) * cell.width
        nn.init.constant_(cell.input.bias[start : start + cell.width], bias)
    return cell


@pytest.fixture
def states_BD() -> tuple[Tensor, Tensor]:
    """h and C. Also seeds the random numbers of the test."""
    torch.manual_seed(0)
    return torch.rand(4, 8) * 2 - 1, torch.randn(4, 8)


def step(cell: Cell, x_BD: Tensor, *states_BD: Tensor) -> tuple[Tensor, ...]:
    return cell.step(cell.input(x_BD), *states_BD)


def test_chapter_9_f_1_and_i_0_keep_the_cell_state(states_BD) -> None:
    cell = with_gates(LSTMCell(8, 8), f=OPEN, i=-OPEN)
    x_TBD = torch.randn(50, 4, 8)
    _, (_, cell_BD) = cell(x_TBD, states_BD)
    assert torch.equal(cell_BD, states_BD[1])


def test_chapter_9_f_0_erases_the_cell_state(states_BD) -> None:
    cell = with_gates(LSTMCell(8, 8), f=-OPEN)
    x_BD, (hidden_BD, cell_BD) = torch.randn(4, 8), states_BD
    _, next_cell_BD = step(cell, x_BD, hidden_BD, cell_BD)
    assert torch.equal(next_cell_BD, step(cell, x_BD, hidden_BD, cell_BD + 5)[1])
    i_BD, _, g_BD, _ = cell.gates(cell.input(x_BD), hidden_BD)
    torch.testing.assert_close(next_cell_BD, i_BD * g_BD)
    with_gates(cell, i=-OPEN)
    assert not step(cell, x_BD, hidden_BD, cell_BD)[1].any()


def test_chapter_9_o_0_makes_h_zero(states_BD) -> None:
    cell = with_gates(LSTMCell(8, 8), o=-OPEN)
    hidden_BD, cell_BD = step(cell, torch.randn(4, 8), *states_BD)
    assert not hidden_BD.any()
    assert cell_BD.all()


def test_chapter_10_z_1_keeps_h(states_BD) -> None:
    cell = with_gates(GRUCell(8, 8), z=OPEN)
    outputs_TBD, (hidden_BD,) = cell(torch.randn(50, 4, 8), states_BD[:1])
    assert outputs_TBD.shape == (50, 4, 8)
    torch.testing.assert_close(hidden_BD, states_BD[0])


def test_chapter_10_z_0_takes_the_candidate(states_BD) -> None:
    cell = with_gates(GRUCell(8, 8), z=-OPEN)
    x_BD = torch.randn(4, 8)
    (hidden_BD,) = step(cell, x_BD, states_BD[0])
    assert torch.equal(hidden_BD, cell.gates(cell.input(x_BD), states_BD[0])[2])


def test_chapter_10_r_0_ignores_the_past(states_BD) -> None:
    cell = with_gates(GRUCell(8, 8), r=-OPEN)
    x_BD = torch.randn(4, 8)
    candidates = [cell.gates(cell.input(x_BD), hidden_BD)[2] for hidden_BD in states_BD]
    assert torch.equal(*candidates)
    with_gates(cell, z=-OPEN)
    assert torch.equal(*(step(cell, x_BD, hidden_BD)[0] for hidden_BD in states_BD))


def test_many_to_one_equals_torchs_rnn_and_a_linear_layer() -> None:
    torch.manual_seed(0)
    model = ManyToOne(RNNCell(3, 5), Linear(5)).double()
    theirs = nn.RNN(3, 5, batch_first=True).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(model.cell.input.weight)
        theirs.weight_hh_l0.copy_(model.cell.hidden.weight)
        theirs.bias_ih_l0.copy_(model.cell.input.bias)
        theirs.bias_hh_l0.zero_()
    x_BTD, y_B = torch.randn(4, 6, 3).double(), torch.randn(4).double()
    _, last_1BD = theirs(x_BTD)
    expected_B = last_1BD[0] @ model.head.weight + model.head.bias
    torch.testing.assert_close(model(x_BTD), expected_B)
    torch.testing.assert_close(model.loss(x_BTD, y_B), nn.functional.mse_loss(expected_B, y_B))
    torch.testing.assert_close(model.trace(x_BTD)["hidden"], theirs(x_BTD)[0])


@pytest.mark.parametrize("model_class", TORCH_CLASSES)
def test_state_size_does_not_depend_on_length(model_class: type[RecurrentLM]) -> None:
    model = model_class(20, 8, width=6, depth=3)
    assert model.max_length is None
    for length in (1, 8, 100_000):
        for tensor in model.init_state(5, length).values():
            assert tensor.shape == (5, 3, 6)


@pytest.mark.parametrize("model_class", TORCH_CLASSES)
def test_states_but_no_gradients_cross_windows(model_class) -> None:
    torch.manual_seed(0)
    model = model_class(20, 8, width=6)
    tokens_BT = torch.randint(20, (2, 16))
    state = model.init_state(2, 8)
    first_BTD = model.features(tokens_BT[:, :8], state)
    second_BTD = model.features(tokens_BT[:, 8:], state)
    torch.testing.assert_close(second_BTD, model.features(tokens_BT)[:, 8:])
    assert not any(tensor.requires_grad for tensor in state.values())
    # The first window's backward pass runs after the state was overwritten.
    first_BTD.sum().backward()
    expected = gradients(model)["cells.0.hidden.weight"].clone()
    model.zero_grad()
    model.features(tokens_BT[:, :8]).sum().backward()
    torch.testing.assert_close(gradients(model)["cells.0.hidden.weight"], expected)
    model.zero_grad()
    second_BTD.sum().backward()
    window_tokens = tokens_BT[:, 8:].unique()
    other_tokens = [token for token in range(20) if token not in window_tokens]
    assert other_tokens
    assert not model.embedding.weight.grad[other_tokens].any()


def test_outputs_are_freed_without_the_garbage_collector() -> None:
    """What the backward pass of all steps needs does not keep the graph alive that leads to it."""
    cell, x_TBD = LSTMCell(4, 4), torch.randn(3, 2, 4)
    output_TBD = cell(x_TBD, cell.zero_states(x_TBD))[0]
    reference = weakref.ref(output_TBD)
    del output_TBD
    assert reference() is None


def test_dropout_is_between_layers_and_never_between_steps() -> None:
    """With all values dropped, states are still passed from step to step."""
    torch.manual_seed(0)
    model = LSTM(20, 8, width=6, dropout=1.0)
    nn.init.normal_(model.cells[0].input.bias)
    state = model.init_state(2, 8)
    features_BTD = model.features(torch.randint(20, (2, 8)), state)
    assert not features_BTD.any()
    assert state["hidden"].all()
    assert model.eval().features(torch.randint(20, (2, 8))).all()


def test_init_range_and_the_forget_gates_initial_bias() -> None:
    model = LSTM(50, 8, width=16, init_range=0.1)
    for parameter in model.parameters():
        assert 0.05 < parameter.abs().max() <= 0.1
    forget_bias = LSTM(50, 8, width=16).cells[0].input.bias[16:32]
    assert torch.equal(forget_bias, torch.ones(16))


def test_flops_count_each_matrix() -> None:
    matrices = 4 * (16 * 16 + 16 * 16) + 50 * 16
    for tied in (False, True):
        assert LSTM(50, 8, width=16, tied=tied).flops_per_token(8) == 6 * matrices


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"width": 0}, "at least 1.*not 0"),
        ({"depth": 0}, "at least 1"),
        ({"embedding_width": -1}, "at least 0"),
        ({"init_range": -0.1}, "at least 0"),
        ({"tied": True, "width": 8, "embedding_width": 4}, "embedding_width 4 is not 8"),
    ],
)
def test_invalid_arguments_raise(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        GRU(20, 8, **kwargs)


class Fused(nn.Module):
    """A layer of a recurrent model, computed by torch's fused network."""

    def __init__(self, theirs: nn.RNNBase) -> None:
        super().__init__()
        self.theirs = theirs

    def forward(self, x_TBD: Tensor, states_BD: tuple[Tensor, ...]):
        states = tuple(state_BD.unsqueeze(0) for state_BD in states_BD)
        output_TBD, last = self.theirs(x_TBD, states if len(states) > 1 else states[0])
        return output_TBD, tuple(t[0] for t in (last if isinstance(last, tuple) else (last,)))


@pytest.mark.long
@pytest.mark.parametrize("model_class", [LSTM, GRU])
def test_trains_at_least_at_half_the_speed_of_torchs_fused_network(model_class) -> None:
    """Measures CPU time on one thread, so that other load on the machine matters little."""
    ours, theirs = (model_class(4096, 128, width=256, depth=2) for _ in range(2))
    theirs.cells = nn.ModuleList(Fused(TORCH_CLASSES[model_class](256, 256)) for _ in range(2))
    tokens_BT = torch.randint(4096, (32, 129))
    times = {ours: [], theirs: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(4):
            for model, seconds in times.items():
                start = time.process_time()
                model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
                seconds.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(times[ours]) < 2 * min(times[theirs])
