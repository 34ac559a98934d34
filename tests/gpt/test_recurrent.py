"""Chapters 8 to 10: the three cells against torch's, and what their gates can do."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.recurrent import (
    GRU,
    LSTM,
    RNN,
    Cell,
    GRUCell,
    LSTMCell,
    RecurrentLM,
    RNNCell,
    gradient_by_distance,
)

THEIRS = {RNN: nn.RNN, LSTM: nn.LSTM, GRU: nn.GRU}
FAR = 1e3
"""A bias that opens a gate fully; its negative shuts it."""


def torchs_own(model: RecurrentLM) -> nn.RNNBase:
    """torch's network with the weights of ours."""
    first = model.cells[0]
    theirs = THEIRS[type(model)](
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


def their_state(model: RecurrentLM, state: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
    memories = tuple(state[name].transpose(0, 1).contiguous() for name in model.cell.memories)
    return memories if len(memories) > 1 else memories[0]


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
def test_equals_torchs_own_weight_for_weight(model_class: type[RecurrentLM]) -> None:
    torch.manual_seed(0)
    model = model_class(30, 12, width=10, depth=2, embedding_width=7).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    theirs = torchs_own(model)
    tokens_BT = torch.randint(30, (3, 12))
    state = {name: torch.randn_like(t) for name, t in model.init_state(3, 12).items()}
    expected_BTD, last = theirs(
        F.embedding(tokens_BT, model.embedding.weight.detach()), their_state(model, state)
    )
    weights_BTD = torch.randn(3, 12, 10, dtype=torch.float64)
    (expected_BTD * weights_BTD).sum().backward()

    features_BTD = model.features(tokens_BT, state)
    (features_BTD * weights_BTD).sum().backward()
    torch.testing.assert_close(features_BTD, expected_BTD)
    for ours, their in zip(
        state.values(), last if isinstance(last, tuple) else (last,), strict=True
    ):
        torch.testing.assert_close(ours, their.detach().transpose(0, 1))
    got = gradients(model)
    for name, expected in gradients(theirs).items():
        kind, side, layer = name.split("_")
        part = "input" if side == "ih" else "hidden"
        mine = got.get(f"cells.{layer[1:]}.{part}.{kind}")
        # Where torch has two biases that are only ever added, both have our one's gradient.
        mine = got[f"cells.{layer[1:]}.input.bias"] if mine is None else mine
        torch.testing.assert_close(mine, expected)


def scalar(cell: Cell, weight: float) -> Cell:
    """A cell of width 1 that reads nothing, with this weight from h to h, in float64."""
    for parameter in cell.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(cell.double().hidden.weight, weight)
    return cell


@pytest.mark.parametrize(
    ("weight", "steps", "expected"),
    [(0.2, 5, 0.00032), (0.5, 100, 0.5**100), (2.0, 100, 2.0**100)],
)
def test_chapter_8_a_scalar_gradient_vanishes_or_explodes(
    weight: float, steps: int, expected: float
) -> None:
    """At h = 0 tanh is the line y = x, so that nothing but the weight is multiplied."""
    cell = scalar(RNNCell(1, 1), weight)
    norms_T = gradient_by_distance(cell, torch.zeros(steps + 1, 1, 1, dtype=torch.float64))
    assert norms_T[0] == 1
    assert norms_T[steps].item() == pytest.approx(expected, rel=1e-12)


def test_chapter_8_the_gradient_of_the_rnn_falls_fastest_with_distance() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        x_TBD = torch.randn(60, 4, 64)
        rnn, lstm, gru = (
            gradient_by_distance(cell(64, 64), x_TBD) for cell in (RNNCell, LSTMCell, GRUCell)
        )
        for distance in (10, 20, 40, 59):
            assert rnn[distance] / rnn[0] < gru[distance] / gru[0] / 2
            assert rnn[distance] / rnn[0] < lstm[distance] / lstm[0] / 2


def test_gradient_by_distance_is_the_slope() -> None:
    """Move h_t a little, run on, and see how far the last output moves."""
    torch.manual_seed(0)
    cell = LSTMCell(3, 1).double()
    x_TBD = torch.randn(6, 1, 3, dtype=torch.float64)
    norms_T = gradient_by_distance(cell, x_TBD)

    def last(distance: int, nudge: float) -> float:
        memory = (torch.zeros(1, 1, dtype=torch.float64),) * 2
        for place, input_BF in enumerate(cell.input(x_TBD)):
            hidden_BD, cell_BD = cell.step(input_BF, *memory)
            memory = (hidden_BD + nudge * (place == 5 - distance), cell_BD)
        return memory[0].item()

    for distance in range(6):
        slope = (last(distance, 1e-6) - last(distance, -1e-6)) / 2e-6
        assert norms_T[distance].item() == pytest.approx(abs(slope), rel=1e-6)


def with_gates(cell: Cell, **biases: float) -> Cell:
    """The cell with some gates held at a value, by their biases; the others do as they like."""
    order = {LSTMCell: "ifgo", GRUCell: "rzn"}[type(cell)]
    for gate, bias in biases.items():
        start = order.index(gate) * cell.width
        nn.init.constant_(cell.input.bias[start : start + cell.width], bias)
    return cell


@pytest.fixture
def memory_BD() -> tuple[Tensor, Tensor]:
    """h and C, and with them the seed of what follows."""
    torch.manual_seed(0)
    return torch.rand(4, 8) * 2 - 1, torch.randn(4, 8)


def read(cell: Cell, *memory_BD: Tensor, x_BD: Tensor) -> tuple[Tensor, ...]:
    return cell.step(cell.input(x_BD), *memory_BD)


def test_chapter_9_f_1_and_i_0_carry_the_cell_unchanged(memory_BD) -> None:
    cell = with_gates(LSTMCell(8, 8), f=FAR, i=-FAR)
    x_TBD = torch.randn(50, 4, 8)
    _, (_, cell_BD) = cell(x_TBD, memory_BD)
    assert torch.equal(cell_BD, memory_BD[1])


def test_chapter_9_f_0_erases_the_cell(memory_BD) -> None:
    cell = with_gates(LSTMCell(8, 8), f=-FAR)
    x_BD, (hidden_BD, cell_BD) = torch.randn(4, 8), memory_BD
    one = read(cell, hidden_BD, cell_BD, x_BD=x_BD)
    other = read(cell, hidden_BD, cell_BD + 5, x_BD=x_BD)
    assert torch.equal(one[1], other[1])
    i_BD, _, g_BD, _ = cell.gate(cell.input(x_BD), hidden_BD)
    torch.testing.assert_close(one[1], i_BD * g_BD)
    with_gates(cell, i=-FAR)
    assert not read(cell, hidden_BD, cell_BD, x_BD=x_BD)[1].any()


def test_chapter_9_o_0_silences_h(memory_BD) -> None:
    cell = with_gates(LSTMCell(8, 8), o=-FAR)
    hidden_BD, cell_BD = read(cell, *memory_BD, x_BD=torch.randn(4, 8))
    assert not hidden_BD.any()
    assert cell_BD.all()


def test_chapter_10_z_1_carries_everything_forward(memory_BD) -> None:
    cell = with_gates(GRUCell(8, 8), z=FAR)
    outputs_TBD, (hidden_BD,) = cell(torch.randn(50, 4, 8), memory_BD[:1])
    assert outputs_TBD.shape == (50, 4, 8)
    torch.testing.assert_close(hidden_BD, memory_BD[0])


def test_chapter_10_z_0_takes_the_candidate(memory_BD) -> None:
    cell = with_gates(GRUCell(8, 8), z=-FAR)
    x_BD = torch.randn(4, 8)
    (hidden_BD,) = read(cell, memory_BD[0], x_BD=x_BD)
    assert torch.equal(hidden_BD, cell.gate(cell.input(x_BD), memory_BD[0])[2])


def test_chapter_10_r_0_ignores_the_past(memory_BD) -> None:
    cell = with_gates(GRUCell(8, 8), r=-FAR)
    x_BD = torch.randn(4, 8)
    one, other = (cell.gate(cell.input(x_BD), h_BD)[2] for h_BD in (memory_BD[0], memory_BD[1]))
    assert torch.equal(one, other)
    with_gates(cell, z=-FAR)
    one, other = (read(cell, h_BD, x_BD=x_BD)[0] for h_BD in (memory_BD[0], memory_BD[1]))
    assert torch.equal(one, other)


@pytest.mark.parametrize("model_class", THEIRS)
def test_a_row_costs_one_vector_a_layer_however_long(model_class: type[RecurrentLM]) -> None:
    model = model_class(20, 8, width=6, depth=3)
    assert model.max_length is None
    for length in (1, 8, 100_000):
        for tensor in model.init_state(5, length).values():
            assert tensor.shape == (5, 3, 6)


@pytest.mark.parametrize("model_class", THEIRS)
def test_training_carries_a_state_and_no_gradient_across_windows(model_class) -> None:
    torch.manual_seed(0)
    model = model_class(20, 8, width=6)
    tokens_BT = torch.randint(20, (2, 16))
    state = model.init_state(2, 8)
    first_BTD = model.features(tokens_BT[:, :8], state)
    second_BTD = model.features(tokens_BT[:, 8:], state)
    torch.testing.assert_close(second_BTD, model.features(tokens_BT)[:, 8:])
    assert not any(tensor.requires_grad for tensor in state.values())
    # The first window's backward pass comes after the state has moved on.
    first_BTD.sum().backward()
    expected = gradients(model)["cells.0.hidden.weight"].clone()
    model.zero_grad()
    model.features(tokens_BT[:, :8]).sum().backward()
    torch.testing.assert_close(gradients(model)["cells.0.hidden.weight"], expected)
    model.zero_grad()
    second_BTD.sum().backward()
    seen = tokens_BT[:, 8:].unique()
    unseen = [token for token in range(20) if token not in seen]
    assert unseen
    assert not model.embedding.weight.grad[unseen].any()


def test_dropout_is_between_layers_and_never_between_steps() -> None:
    """All is dropped: what a step hands to the next is still there."""
    torch.manual_seed(0)
    model = LSTM(20, 8, width=6, dropout=1.0)
    nn.init.normal_(model.cells[0].input.bias)
    state = model.init_state(2, 8)
    features_BTD = model.features(torch.randint(20, (2, 8)), state)
    assert not features_BTD.any()
    assert state["hidden"].all()
    whole = model.eval().features(torch.randint(20, (2, 8)))
    assert whole.all()


def test_first_weights_in_a_range() -> None:
    model = LSTM(50, 8, width=16, init_range=0.1)
    for parameter in model.parameters():
        assert 0.05 < parameter.abs().max() <= 0.1
    forgets = LSTM(50, 8, width=16).cells[0].input.bias[16:32]
    assert torch.equal(forgets, torch.ones(16))


def test_flops_are_those_of_the_matrices() -> None:
    matrices = 4 * (16 * 16 + 16 * 16) + 50 * 16
    for tied in (False, True):
        assert LSTM(50, 8, width=16, tied=tied).flops_per_token(8) == 6 * matrices


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"width": 0}, "at least 1.*not 0"),
        ({"depth": 0}, "at least 1"),
        ({"embedding_width": -1}, "at least 0"),
        ({"init_range": -0.1}, "at least 0"),
        ({"tied": True, "width": 8, "embedding_width": 4}, "embedding_width 4 is not 8"),
    ],
)
def test_bad_arguments_are_refused(own, message) -> None:
    with pytest.raises(ValueError, match=message):
        GRU(20, 8, **own)


class Fused(nn.Module):
    """A cell's layer by torch's own fused network."""

    def __init__(self, theirs: nn.RNNBase) -> None:
        super().__init__()
        self.theirs = theirs

    def forward(self, x_TBD: Tensor, memory_BD: tuple[Tensor, ...]):
        memory = tuple(one_BD.unsqueeze(0) for one_BD in memory_BD)
        output_TBD, last = self.theirs(x_TBD, memory if len(memory) > 1 else memory[0])
        return output_TBD, tuple(t[0] for t in (last if isinstance(last, tuple) else (last,)))


@pytest.mark.long
@pytest.mark.parametrize("model_class", [LSTM, GRU])
def test_trains_at_no_less_than_half_the_speed_of_torchs_fused_network(model_class) -> None:
    """Processor time on one thread, so that what else the machine does counts for little."""
    ours, theirs = (model_class(4096, 128, width=256, depth=2) for _ in range(2))
    theirs.cells = nn.ModuleList(Fused(THEIRS[model_class](256, 256)) for _ in range(2))
    tokens_BT = torch.randint(4096, (32, 129))
    times = {ours: [], theirs: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(4):
            for model, taken in times.items():
                begun = time.process_time()
                model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
                taken.append(time.process_time() - begun)
    finally:
        torch.set_num_threads(threads)
    assert min(times[ours]) < 2 * min(times[theirs])
