"""Needs a C++ compiler; without one nothing is compiled, which a test holds too."""

import gc
import random
import shutil
import threading

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gpt.kernels.quantization import quantize
from gpt.sampling import RANDOM_STATE, Sampler, SamplingParams
from serving.engine import compilation as compiled
from serving.engine.engine import DecodeStep, Engine, Request
from tests.gpt.test_contract import VARIANTS
from tests.serving.test_engine import Watch, alone, arrivals, make, one_thread  # noqa: F401 (a fixture)

needs_compiler = pytest.mark.skipif(
    not compiled.find_cpp_compiler(), reason="there is no C++ compiler"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    return tmp_path / "steps"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What is compiled for a GPT, once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYGPT_CACHE", str(folder))
        compile_for(Engine(make("gpt", torch.float32), 4))
    return folder / "steps"


def compile_for(engine):
    compiler = compiled.Compiler()
    compiler.add(engine, 1)
    compiler.wait()
    compiler.close()


def is_compiled(engine):
    return {kind: type(part) is compiled.CompiledStep for kind, part in engine.parts.items()}


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((variant, "float32") for variant in VARIANTS), ("gpt2", "int8"), ("lstm", "int8")],
)
def test_every_model_can_be_traced_for_any_number_of_rows_and_any_reach(variant, dtype):
    model = quantize(make(variant, torch.float32), dtype)
    engine = Engine(model, 5)
    few, many = (
        compiled.trace_step(model, engine.cache_length, kind).module() for kind in ("row", "rows")
    )
    for rows, reach in (
        (1, 17),
        (1, engine.cache_length - 1),
        (5, 17),
        (5, engine.cache_length - 1),
        (12, 17),
    ):
        found, tokens = [], []
        for run in (DecodeStep(model), few if rows == 1 else many):
            state = model.prefix_view(model.init_state(rows, engine.cache_length), reach)
            last_B1 = torch.arange(rows).unsqueeze(1)
            sampler = Sampler(rows, 30)
            for row in range(rows):
                sampler.add_sequence(row, SamplingParams(row % 2 * 1.3, min_p=0.01, seed=row), ())
            drawn = {name: sampler.state[name] for name in RANDOM_STATE}
            with torch.no_grad():
                steps = [run(last_B1, state, drawn) for _ in range(3)]
            found.append(steps[-1][0])
            tokens.append([tokens_B.tolist() for _, tokens_B, _ in steps])
            assert steps[-1][2].isinf().tolist() == [row % 2 == 1 for row in range(rows)]
            assert drawn["position"].tolist() == [[3]] * rows
        assert found[1].shape == (rows, 30)
        assert torch.allclose(*found, atol=1e-4 if dtype == "float32" else 0.2)
        assert tokens[0] == tokens[1]


@needs_compiler
@pytest.mark.long
def test_compiled_steps_give_the_same_greedy_texts_with_any_number_of_rows(kept, cache):
    shutil.copytree(kept, cache)
    model = make("gpt", torch.float32)
    for size, ahead in ((4, 3), (9, 1)):
        engine = Engine(model, size, max_num_batched_tokens=40, num_scheduler_steps=ahead)
        compile_for(engine)
        assert all(is_compiled(engine).values())
        watch, requests, cancelled = arrivals(
            engine, random.Random(5), 60, lambda _: SamplingParams(temperature=0)
        )
        for request in requests:
            if (request, 0) not in cancelled:
                assert watch.text(request) == alone(model, request)
    assert {path.name for path in cache.iterdir()} == {path.name for path in kept.iterdir()}


class Long(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1500, 1500)

    def forward(self, x):
        for _ in range(10):
            x = self.linear(x).tanh()
        return (x,)


@needs_compiler
@pytest.mark.long
@pytest.mark.filterwarnings("default")  # torch has its own about itself
def test_others_go_on_while_compiled_code_runs_and_it_keeps_no_weights_that_nobody_else_does(
    tmp_path,
):
    torch.manual_seed(0)
    module, x = Long().requires_grad_(False), torch.randn(1500, 1500)
    compiled.compile_step(torch.export.export(Long(), (x,)), tmp_path / "long.pt2")
    part = compiled.CompiledStep(tmp_path / "long.pt2", module)
    found, turns = [], 0
    worker = threading.Thread(target=lambda part: found.extend(part(x)), args=(part,))
    worker.start()
    while worker.is_alive():
        turns += 1
        worker.join(0.001)  # to go on, this thread needs Python's lock again
    assert torch.allclose(found[0], module(x)[0], atol=1e-5)
    assert turns > 5  # two at most, where code keeps Python's lock
    memory = StorageWeakRef(module.linear.weight.untyped_storage())
    del module, part, worker
    gc.collect()
    assert memory.expired()


@needs_compiler
@pytest.mark.long
def test_what_computes_something_else_or_is_damaged_is_not_used(kept, cache, caplog, monkeypatch):
    monkeypatch.setattr(compiled.Compiler, "_compile", lambda *_: False)
    shutil.copytree(kept, cache)
    model = make("gpt", torch.float32)
    whole, half, *_ = sorted(cache.iterdir())
    half.write_bytes(half.read_bytes()[:1000])
    engine = Engine(model, 4)
    compile_for(engine)
    assert sorted(is_compiled(engine).values()) == [False, True, True]
    assert "cannot be used" in caplog.text
    assert not half.exists()
    features = type(model).features
    monkeypatch.setattr(type(model), "features", lambda *given: features(*given).sin())
    engine = Engine(model, 4)
    compile_for(engine)
    assert not any(is_compiled(engine).values())
    assert "it is off by" in caplog.text
    assert not whole.exists()


@needs_compiler
@pytest.mark.long
def test_a_model_that_reads_a_prompt_token_by_token_is_compiled_but_for_that(cache, caplog):
    model = quantize(make("rnn", torch.float32), "int8")
    engine = Engine(model, 1)
    with caplog.at_level("INFO"):
        compile_for(engine)
    assert is_compiled(engine) == {"row": True, "rows": False, "prompt": False}
    assert "prompt stays uncompiled" in caplog.text
    assert len(list(cache.iterdir())) == 1
    request = Request([1, 2], 20, SamplingParams(temperature=0))
    engine.add_request(request)
    assert len(Watch(engine).run().text(request)) == 20


def test_without_a_compiler_and_where_it_would_break_a_promise_nothing_is_compiled(
    cache, monkeypatch
):
    model = make("gpt", torch.float32)
    exact = Engine(model, 2, deterministic=True)
    compile_for(exact)
    assert not any(is_compiled(exact).values())
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    engine = Engine(model, 2)
    compile_for(engine)
    assert not any(is_compiled(engine).values())
    assert not cache.exists()
