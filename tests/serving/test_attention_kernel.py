"""The kernel of compiled steps, beside torch's own attention in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from serving.engine import attention_kernel as attend
from serving.engine import compilation as compiled

LONGEST, LAYER = 300, 1


class Attention(nn.Module):
    """Of one query to what a state keeps of a layer, in two formats and of two widths."""

    def forward(self, queries, wide, narrow):
        places = torch.arange(wide["keys"].shape[3])
        mask_B11S = (places <= wide["position"].unsqueeze(1)).unsqueeze(1).unsqueeze(1)
        found = []
        for state in (wide, narrow):
            query_BH1K = queries[..., : state["keys"].shape[-1]]
            kept = (state[name][:, LAYER].type_as(query_BH1K) for name in ("keys", "values"))
            found.append(F.scaled_dot_product_attention(query_BH1K, *kept, mask_B11S))
        return tuple(found)


def given(rows, reach, seed=0, heads=3):
    """Queries and two states, of which so many positions are looked at; each row is somewhere else."""
    dice = torch.Generator().manual_seed(seed)
    queries = 4 * torch.randn(rows, heads, 1, 64, generator=dice)
    states = []
    for width, dtype in ((64, torch.float32), (16, torch.bfloat16)):
        shape = (rows, LAYER + 2, heads, LONGEST, width)
        kept = {name: torch.randn(shape, generator=dice).to(dtype) for name in ("keys", "values")}
        part = {name: tensor[..., :reach, :] for name, tensor in kept.items()}
        states.append(part)
    last = torch.randint(reach, (rows,), generator=dice)
    last[0] = reach - 1
    states[0]["position"] = last
    return queries, *states


@pytest.mark.skipif(not compiled.find_cpp_compiler(), reason="there is no C++ compiler")
@pytest.mark.filterwarnings("default")  # torch has its own about itself
@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernel_computes_what_torch_does(tmp_path, threads, monkeypatch):
    rows = {0: Dim.DYNAMIC}
    state = {name: {**rows, 3: Dim.DYNAMIC} for name in ("keys", "values")}
    shapes = (rows, {**state, "position": rows}, state)
    program = torch.export.export(Attention(), given(3, 40), dynamic_shapes=shapes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    compiled.compile_step(program, tmp_path / "part.pt2")
    assert [node.target for node in program.graph.nodes].count(
        torch.ops.tinygpt.attend.default
    ) == 2
    part = torch._inductor.aoti_load_package(str(tmp_path / "part.pt2"))
    for count, length in ((1, 2), (1, 17), (3, 16), (5, 128), (2, 131), (1, 256), (4, LONGEST)):
        queries, *states = given(count, length, seed=length)
        doubled = ({name: x.double() for name, x in state.items()} for state in states)
        wanted = Attention()(queries.double(), *doubled)
        for got, exact in zip(part(queries, *states), wanted, strict=True):
            torch.testing.assert_close(got, exact.float(), rtol=0, atol=1e-5)
    alone = part(*given(1, 200, seed=9))
    for found, other in zip(alone, part(*twice(given(1, 200, seed=9))), strict=True):
        assert torch.equal(found, other[:1])


def twice(tensors):
    """The same with a second row like the first."""
    return tuple(
        {name: x.repeat(2, *[1] * (x.ndim - 1)) for name, x in given.items()}
        if isinstance(given, dict)
        else given.repeat(2, 1, 1, 1)
        for given in tensors
    )


@pytest.mark.parametrize(("width", "queries", "masked"), [(24, 1, 1), (16, 2, 1), (16, 1, 0)])
def test_what_the_kernel_does_not_compute_is_left_to_torch(width, queries, masked):
    class Other(nn.Module):
        def forward(self, queries_BHTK, keys_BHSK, mask_B1TS=None):
            return F.scaled_dot_product_attention(queries_BHTK, keys_BHSK, keys_BHSK, mask_B1TS)

    tensors = torch.randn(1, 2, queries, width), torch.randn(1, 2, 5, width)
    mask = [torch.ones(1, 1, queries, 5, dtype=torch.bool)] * masked
    program = torch.export.export(Other(), (*tensors, *mask))
    before = str(program.graph)
    attend.substitute_kernel(program)
    assert str(program.graph) == before
