"""The attention kernel of compiled steps against torch's own attention in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from gpt.kernels.quantization import is_int_mm_exact
from serving.engine import cpu_kernels
from serving.engine.compilation import compile_step, find_cpp_compiler
from serving.engine.compiled_step import CompiledStep
from serving.engine.cpu_kernels import substitute_attention

CACHE_LENGTH, LAYER = 300, 1


class Attention(nn.Module):
    """Attention of one query to one layer of two states, of different head widths, dtypes and heads."""

    def forward(self, queries_BH1K, wide, narrow):
        positions_S = torch.arange(wide["keys"].shape[3])
        mask_BS = positions_S <= wide["position"].unsqueeze(1)
        mask_B11S = mask_BS.unsqueeze(1).unsqueeze(1)
        outputs = []
        for state in (wide, narrow):
            query_BH1K = queries_BH1K[..., : state["keys"].shape[-1]]
            keys, values = (
                state[name][:, LAYER].type_as(query_BH1K) for name in ("keys", "values")
            )
            grouped = {"enable_gqa": True} if keys.shape[1] < query_BH1K.shape[1] else {}
            outputs.append(
                F.scaled_dot_product_attention(query_BH1K, keys, values, mask_B11S, **grouped)
            )
        return tuple(outputs)


def make_inputs(rows, length, seed=0, heads=6):
    """Queries and two states, cut to `length` positions, of which each row attends to another number."""
    rng = torch.Generator().manual_seed(seed)
    queries_BH1K = 4 * torch.randn(rows, heads, 1, 64, generator=rng)
    states = []
    for width, dtype, kv_heads in ((64, torch.float32, heads), (16, torch.bfloat16, heads // 3)):
        shape = (rows, LAYER + 2, kv_heads, CACHE_LENGTH, width)
        state = {name: torch.randn(shape, generator=rng).to(dtype) for name in ("keys", "values")}
        states.append({name: tensor[..., :length, :] for name, tensor in state.items()})
    position_B = torch.randint(length, (rows,), generator=rng)
    position_B[0] = length - 1
    states[0]["position"] = position_B
    return queries_BH1K, *states


@pytest.mark.skipif(not find_cpp_compiler(), reason="there is no C++ compiler")
@pytest.mark.long
@pytest.mark.filterwarnings("default")  # torch warns about itself
def test_kernel_equals_torch_attention(tmp_path, monkeypatch):
    batch = {0: Dim.DYNAMIC}
    state = {name: {**batch, 3: Dim.DYNAMIC} for name in ("keys", "values")}
    shapes = (batch, {**state, "position": batch}, state)
    program = torch.export.export(Attention(), make_inputs(3, 40), dynamic_shapes=shapes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    compile_step(program, tmp_path / "step.pt2")
    operators = [node.target for node in program.graph.nodes]
    assert operators.count(torch.ops.tinygpt.attend.default) == 2
    step = torch._inductor.aoti_load_package(str(tmp_path / "step.pt2"))
    for rows, length in (
        (1, 2),
        (1, 17),
        (3, 16),
        (5, 128),
        (2, 131),
        (1, 256),
        (4, CACHE_LENGTH),
    ):
        queries, *states = make_inputs(rows, length, seed=length)
        in_float64 = ({name: x.double() for name, x in state.items()} for state in states)
        expected = Attention()(queries.double(), *in_float64)
        for actual, exact in zip(step(queries, *states), expected, strict=True):
            torch.testing.assert_close(actual, exact.float(), rtol=0, atol=1e-5)
    inputs = make_inputs(1, 200, seed=9)
    for one_row, two_rows in zip(step(*inputs), step(*repeat_rows(inputs)), strict=True):
        assert torch.equal(one_row, two_rows[:1])


def repeat_rows(inputs):
    """The inputs with each row twice."""
    return tuple(
        {name: x.repeat(2, *[1] * (x.ndim - 1)) for name, x in value.items()}
        if isinstance(value, dict)
        else value.repeat(2, 1, 1, 1)
        for value in inputs
    )


@pytest.mark.parametrize(("width", "queries", "masked"), [(24, 1, 1), (16, 2, 1), (16, 1, 0)])
def test_unsupported_attention_is_not_replaced(width, queries, masked):
    class Other(nn.Module):
        def forward(self, queries_BHTK, keys_BHSK, mask_B1TS=None):
            return F.scaled_dot_product_attention(queries_BHTK, keys_BHSK, keys_BHSK, mask_B1TS)

    tensors = torch.randn(1, 2, queries, width), torch.randn(1, 2, 5, width)
    mask = [torch.ones(1, 1, queries, 5, dtype=torch.bool)] * masked
    program = torch.export.export(Other(), (*tensors, *mask))
    before = str(program.graph)
    substitute_attention(program)
    assert str(program.graph) == before


class Products(nn.Module):
    """8-bit products of one input with weights of various shapes."""

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        for n, (out_features, in_features) in enumerate(((3, 2), (7, 64), (65, 77), (130, 320))):
            weight = torch.randint(-128, 128, (out_features, in_features), generator=rng)
            self.register_buffer(f"weight{n}", weight.to(torch.int8))

    def forward(self, x_BK):
        return tuple(
            torch.ops.tinygpt.int8_mm(x_BK[:, : weight_NK.shape[1]].contiguous(), weight_NK)
            for weight_NK in self.buffers()
        )


@pytest.mark.skipif(not find_cpp_compiler(), reason="there is no C++ compiler")
@pytest.mark.long
@pytest.mark.filterwarnings("default")  # torch warns about itself
@pytest.mark.parametrize("is_exact", [True, False])
def test_int8_kernel_is_exact(tmp_path, is_exact, monkeypatch):
    if is_exact and not is_int_mm_exact():
        pytest.skip("torch._int_mm is not exact on this processor")
    monkeypatch.setattr(cpu_kernels, "is_int_mm_exact", lambda: is_exact)
    monkeypatch.setattr(cpu_kernels, "MIN_INT8_WEIGHTS", 7 * 64)
    products = Products()
    examples = torch.full((3, 320), -128, dtype=torch.int8)
    program = torch.export.export(products, (examples,), dynamic_shapes=({0: Dim.DYNAMIC},))
    compile_step(program, tmp_path / "step.pt2")
    step = CompiledStep(tmp_path / "step.pt2", products)
    rng = torch.Generator().manual_seed(1)
    for rows in (1, 2, 5, 8, 9, 33):
        x_BK = torch.randint(-128, 128, (rows, 320), generator=rng).to(torch.int8)
        x_BK[0], x_BK[-1] = 127, -128
        for actual, weight_NK in zip(step(x_BK), products.buffers(), strict=True):
            expected = x_BK[:, : weight_NK.shape[1]].long() @ weight_NK.long().T
            assert torch.equal(actual.long(), expected)
