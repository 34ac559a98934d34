"""Which runs are compiled, what happens without a compiler, and that nothing is compiled twice."""

import dataclasses
import functools
import json
import re

import pytest
import torch

from gpt.checkpoint import load_tensors
from gpt.device import GPU_SPECS
from tests.training.helpers import make_trainer, read_log, write_corpus
from tests.training.test_cli import training
from tests.training.test_trainer import TINY
from training import compilation, trainer
from training.compilation import should_compile
from training.config import new_model
from training.presets import PRESETS
from training.run_directory import load_training_config, save_training_config
from training.tasks import TASKS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch

CONFIG = dataclasses.replace(
    TINY,
    steps=6,
    eval_interval=2,
    eval_tokens=200,
    log_interval=1,
    precision="float32",
)
STATEFUL = dataclasses.replace(
    CONFIG,
    model="lstm",
    model_args={"width": 8},
    context_length=4,
    optimizer="sgd",
    stateful=True,
    gradient_accumulation_steps=1,
)
NO_COMPILER = (
    r"(InvalidCxxCompiler: No working C\+\+ compiler|FileNotFoundError: .* No such file .*\+\+)"
)
"""Torch looks for a compiler once in a process, and later only misses the one it found."""
BIGRAM = dataclasses.replace(CONFIG, model="softmax", model_args={})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()


@functools.cache
def meta_model(name):
    config = PRESETS[name]
    with torch.device("meta"):
        return new_model(config, TASKS[config.task].expected_model_args(config))


def choose(name, gpu, monkeypatch, device="cuda", num_devices=1, **settings):
    """Whether a preset is compiled on a GPU of that name, and why."""
    config = dataclasses.replace(PRESETS[name], **settings)
    monkeypatch.setattr(compilation, "peak_flops", lambda _: gpu and GPU_SPECS[gpu].flops)
    device, fixed_shapes = torch.device(device), config.task == "text"
    return should_compile(config, meta_model(name), device, num_devices, fixed_shapes)


@pytest.mark.parametrize("name", ["gpt-micro", "gpt-small", "gpt2-124m", "nanogpt-gpu"])
def test_auto_compiles_long_runs_on_every_gpu(name, monkeypatch):
    for gpu in (*GPU_SPECS, None):
        enabled, reason = choose(name, gpu, monkeypatch)
        assert enabled, gpu
        assert reason.startswith("auto: about ")
        assert reason.endswith(" s of compiling")


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("gpt-nano", {}, "s of training without, 4 s of compiling"),
        ("gpt-micro", {"steps": 100}, "s of training without, 12 s of compiling"),
        ("gpt-micro", {"num_devices": 8}, "s of training without, 12 s of compiling"),
        ("gpt-small", {"device": "cpu"}, "on a GPU only, not on cpu"),
        ("gpt-small", {"device": "mps"}, "on a GPU only, not on mps"),
        ("gpt-small", {"fsdp": True}, "does not compile with --fsdp"),
        ("zaremba", {}, "loops over tokens"),
        ("grain-mlp", {}, "batches differ in shape"),
        ("translate-gpt", {}, "batches differ in shape"),
    ],
)
def test_auto_leaves_other_runs_eager(name, settings, reason, monkeypatch):
    enabled, why = choose(name, "H100", monkeypatch, **settings)
    assert not enabled
    assert reason in why


def test_on_and_off_are_obeyed(monkeypatch):
    for device in ("cpu", "cuda"):
        assert choose("gpt-nano", "H100", monkeypatch, device, compile="on")[0]
        assert not choose("gpt-small", "H100", monkeypatch, device, compile="off")[0]


def with_backend(monkeypatch, backend="aot_eager"):
    """Let torch.compile trace as ever, but generate no code, which takes long on a CPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


@pytest.mark.parametrize("config", [CONFIG, STATEFUL], ids=["gpt", "stateful lstm"])
def test_a_compiled_run_compiles_once_and_changes_no_loss(config, corpus, tmp_path, monkeypatch):
    make_trainer(config, tmp_path / "eager", corpus).train()
    with_backend(monkeypatch)
    compiled = make_trainer(dataclasses.replace(config, compile="on"), tmp_path / "on", corpus)
    assert compiled.compilation.enabled
    assert (compiled.step, compiled.tokens_seen, compiled.state) == (0, 0, None)
    # Validations, samples and checkpoints come between the steps.
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled.train()
    eager, compiled = read_log(tmp_path / "eager"), read_log(tmp_path / "on")
    for name in ("loss", "validation_loss"):
        losses = [[line[name] for line in log if name in line] for log in (eager, compiled)]
        assert len(losses[0]) in (3, 6)
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_resumed_compiled_run_equals_an_uninterrupted_one(corpus, tmp_path, monkeypatch):
    with_backend(monkeypatch)
    config = dataclasses.replace(CONFIG, compile="on")
    make_trainer(config, tmp_path / "run", corpus).train()
    expected = load_tensors(tmp_path / "run" / "checkpoints" / "step-6" / "model.safetensors")
    resumed = make_trainer(config, tmp_path / "resumed", corpus)
    resumed.load_checkpoint(tmp_path / "run" / "checkpoints" / "step-3")
    resumed.train()
    tensors = load_tensors(tmp_path / "resumed" / "checkpoints" / "step-6" / "model.safetensors")
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_auto_trains_eagerly_where_compiling_fails(corpus, tmp_path, monkeypatch, no_compiler):
    make_trainer(BIGRAM, tmp_path / "eager", corpus).train()
    monkeypatch.setattr(trainer, "should_compile", lambda *_: (True, "it pays"))
    run = make_trainer(BIGRAM, tmp_path / "auto", corpus)
    assert re.match(rf"off \(auto: {NO_COMPILER}", str(run.compilation))
    run.train()
    assert read_log(tmp_path / "auto") == read_log(tmp_path / "eager")


def test_on_without_a_compiler_is_one_line_and_leaves_no_run(tmp_path, monkeypatch, no_compiler):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text\n" for i in range(200)))
    options = "--tokenizer bytes --batch-size 2 --context-length 8"
    arguments = (
        f"train softmax {options} --data {text} --run {tmp_path / 'run'} --device cpu --compile on"
    )
    code, _, err = training(*arguments.split())
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(rf"--compile on: {NO_COMPILER}", err)
    assert "--compile off trains without" in err
    assert not (tmp_path / "run").exists()


def test_runs_from_before_auto_can_be_resumed(tmp_path):
    for value, expected in ((False, "off"), (True, "on")):
        save_training_config(dataclasses.replace(CONFIG, compile=value), tmp_path, {})
        assert json.loads((tmp_path / "run.json").read_text())["config"]["compile"] is value
        assert load_training_config(tmp_path).compile == expected


def test_only_train_steps_use_tf32(corpus, tmp_path, monkeypatch):
    """As on a GPU: there `tf32` sets the precision that is recorded here."""
    gpu_tf32 = functools.partial(trainer.tf32, torch.device("cuda"))
    monkeypatch.setattr(trainer, "tf32", lambda _: gpu_tf32())
    run = make_trainer(CONFIG, tmp_path / "run", corpus)
    seen = {"loss": set(), "step": set(), "validate": set()}

    def record(name, function):
        def recorded(*arguments, **options):
            seen[name].add(torch.get_float32_matmul_precision())
            return function(*arguments, **options)

        return recorded

    run.model.loss = record("loss", run.model.loss)
    run.optimizers.step = record("step", run.optimizers.step)
    run.task.validate = record("validate", run.task.validate)
    run.train()
    run.score()
    assert seen == {"loss": {"high"}, "step": {"high"}, "validate": {"highest"}}
