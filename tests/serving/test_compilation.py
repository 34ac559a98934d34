"""Compiled steps. Most tests need a C++ compiler; one tests that without it nothing is compiled."""

import contextlib
import gc
import random
import shutil
import threading

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gpt.kernels.quantization import quantize
from gpt.sampling import RANDOM_STATE, Sampler, SamplingParams
from serving.engine import compilation
from serving.engine.compiled_step import CompiledStep
from serving.engine.engine import Engine
from serving.engine.sequence import Request
from serving.engine.steps import DecodeStep
from tests.gpt.test_contract import VARIANTS
from tests.serving.test_engine import (
    make_model,
    one_thread,  # noqa: F401 (a fixture)
    reference_output,
    run_random_arrivals,
    run_requests,
)

needs_compiler = pytest.mark.skipif(
    not compilation.find_cpp_compiler(), reason="there is no C++ compiler"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of compiled steps, not created yet."""
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    return tmp_path / "steps"


@pytest.fixture(scope="module")
def gpt_cache(tmp_path_factory):
    """A folder with the compiled steps of a GPT."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYGPT_CACHE", str(folder))
        compile_steps(Engine(make_model("gpt", torch.float32), 4))
    return folder / "steps"


def compile_steps(engine):
    compiler = compilation.Compiler()
    compiler.add(engine, 1)
    compiler.wait()
    compiler.close()


def compiled_kinds(engine):
    return {kind for kind, step in engine.steps.items() if type(step) is CompiledStep}


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((variant, "float32") for variant in VARIANTS), ("gpt2", "int8"), ("lstm", "int8")],
)
def test_traced_steps_equal_eager_ones_for_any_number_of_rows_and_length(variant, dtype):
    model = quantize(make_model(variant, torch.float32), dtype)
    cache_length = Engine(model, 5).cache_length
    decode_one, decode = (
        compilation.trace_step(model, cache_length, kind).module()
        for kind in ("decode_one", "decode")
    )
    for rows, length in (
        (1, 17),
        (1, cache_length - 1),
        (5, 17),
        (5, cache_length - 1),
        (12, 17),
    ):
        logits, tokens = [], []
        for step in (DecodeStep(model), decode_one if rows == 1 else decode):
            state = model.prefix_view(model.init_state(rows, cache_length), length)
            last_tokens_B1 = torch.arange(rows).unsqueeze(1)
            sampler = Sampler(rows, 30)
            for row in range(rows):
                sampler.add_sequence(row, SamplingParams(row % 2 * 1.3, min_p=0.01, seed=row), ())
            random_state = {name: sampler.state[name] for name in RANDOM_STATE}
            with torch.no_grad():
                outputs = [step(last_tokens_B1, state, random_state) for _ in range(3)]
            logits.append(outputs[-1][0])
            tokens.append([tokens_B.tolist() for _, tokens_B, _ in outputs])
            assert outputs[-1][2].isinf().tolist() == [row % 2 == 1 for row in range(rows)]
            assert random_state["position"].tolist() == [[3]] * rows
        assert logits[1].shape == (rows, 30)
        assert torch.allclose(*logits, atol=1e-4 if dtype == "float32" else 0.2)
        assert tokens[0] == tokens[1]


@needs_compiler
@pytest.mark.long
def test_compiled_greedy_output_equals_the_reference(gpt_cache, cache):
    shutil.copytree(gpt_cache, cache)
    model = make_model("gpt", torch.float32)
    for max_num_seqs, num_steps in ((4, 3), (9, 1)):
        engine = Engine(
            model, max_num_seqs, max_num_batched_tokens=40, num_scheduler_steps=num_steps
        )
        compile_steps(engine)
        assert compiled_kinds(engine) == {"decode_one", "decode", "prefill"}
        collector, requests, aborted = run_random_arrivals(
            engine,
            random.Random(5),
            60,
            lambda i: SamplingParams(temperature=0, min_tokens=9 * (i % 8 == 0)),
        )
        for request in requests:
            if (request, 0) not in aborted:
                assert collector.output(request) == reference_output(model, request)
    assert {path.name for path in cache.iterdir()} == {path.name for path in gpt_cache.iterdir()}


class SlowModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1500, 1500)

    def forward(self, x):
        for _ in range(10):
            x = self.linear(x).tanh()
        return (x,)


@needs_compiler
@pytest.mark.long
@pytest.mark.filterwarnings("default")  # torch warns about itself
def test_compiled_code_releases_the_gil_and_the_weights(tmp_path):
    torch.manual_seed(0)
    module, x = SlowModule().requires_grad_(False), torch.randn(1500, 1500)
    compilation.compile_step(torch.export.export(SlowModule(), (x,)), tmp_path / "step.pt2")
    step = CompiledStep(tmp_path / "step.pt2", module)
    outputs, turns = [], 0
    worker = threading.Thread(target=lambda step: outputs.extend(step(x)), args=(step,))
    worker.start()
    while worker.is_alive():
        turns += 1
        worker.join(0.001)  # to continue, this thread needs the GIL again
    assert torch.allclose(outputs[0], module(x)[0], atol=1e-5)
    assert turns > 5  # at most two if the code holds the GIL
    memory = StorageWeakRef(module.linear.weight.untyped_storage())
    del module, step, worker
    gc.collect()
    assert memory.expired()


@needs_compiler
@pytest.mark.long
def test_wrong_and_damaged_compiled_code_is_not_used(gpt_cache, cache, caplog, monkeypatch):
    monkeypatch.setattr(compilation.Compiler, "_compile", lambda *_: False)
    shutil.copytree(gpt_cache, cache)
    model = make_model("gpt", torch.float32)
    intact, damaged, *_ = sorted(cache.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:1000])
    engine = Engine(model, 4)
    compile_steps(engine)
    assert len(compiled_kinds(engine)) == 2
    assert "cannot be used" in caplog.text
    assert not damaged.exists()
    features = type(model).features
    monkeypatch.setattr(type(model), "features", lambda *args: features(*args).sin())
    engine = Engine(model, 4)
    compile_steps(engine)
    assert not compiled_kinds(engine)
    assert "its output differs from the model's by" in caplog.text
    assert not intact.exists()


@needs_compiler
@pytest.mark.long
def test_decode_is_compiled_where_prefill_cannot_be_traced(cache, caplog):
    model = quantize(make_model("rnn", torch.float32), "int8")
    engine = Engine(model, 1)
    with caplog.at_level("INFO"):
        compile_steps(engine)
    assert compiled_kinds(engine) == {"decode_one"}
    assert "the prefill step is not compiled" in caplog.text
    assert len(list(cache.iterdir())) == 1
    request = Request([1, 2], 20, SamplingParams(temperature=0))
    assert len(run_requests(engine, request).output(request)) == 20


def test_nothing_is_compiled_without_a_compiler_or_for_a_deterministic_engine(cache, monkeypatch):
    model = make_model("gpt", torch.float32)
    engine = Engine(model, 2, deterministic=True)
    compile_steps(engine)
    assert not compiled_kinds(engine)
    monkeypatch.setattr(compilation.shutil, "which", lambda _: None)
    engine = Engine(model, 2)
    compile_steps(engine)
    assert not compiled_kinds(engine)
    assert not cache.exists()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_code_that_others_can_write_is_not_loaded(mode, cache, caplog):
    cache.mkdir()
    cache.chmod(mode)
    with contextlib.closing(compilation.Compiler()) as compiler:
        folder = compiler._folder
        assert folder != cache
        assert folder.stat().st_mode & 0o777 == 0o700
        assert f"{cache} belongs to another user, or others can write to it" in caplog.text
    assert not folder.exists()


def test_the_folder_of_compiled_steps_is_private(cache):
    with contextlib.closing(compilation.Compiler()) as compiler:
        assert compiler._folder == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o755)  # others can read it
    with contextlib.closing(compilation.Compiler()) as compiler:
        assert compiler._folder == cache
