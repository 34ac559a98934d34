"""Tests on the fake accelerator, like CUDA or like MPS: test_accelerator.py runs them in a process of their own."""

import contextlib
import copy
import dataclasses
import inspect
import io
import json
import os

import pytest
import torch

from gpt import device as gpt_device
from gpt.checkpoint import model_class, save_tensors
from gpt.models import attention
from gpt.sampling import SamplingParams
from serving import cli as serving_cli
from serving.engine import cuda_graphs
from serving.engine.autotune import quantize_and_measure
from serving.engine.engine import Engine
from serving.engine.sequence import Request
from tests import fake_accelerator
from tests.fake_accelerator import state
from tests.serving.test_engine import RUNGS, VOCABULARY, make_model, reference_output, run_requests
from tests.training.helpers import read_log
from tests.training.test_trainer import TINY, assert_resumed_equals_uninterrupted, shrink
from tests.training.test_trainer import VARIANTS as CONFIGS
from tests.training.test_trainer import corpus as corpus
from tests.training.test_trainer import pair_corpus as pair_corpus
from training import cli as training_cli
from training.presets import PRESETS
from training.tasks import TASKS
from training.tasks.tables import TABULAR_TASKS
from training.tasks.text import Text
from training.trainer import Trainer

LIKE = os.environ["FAKE_ACCELERATOR"]
fake_accelerator.install(LIKE)
CPU, DEVICE = torch.device("cpu"), torch.device("fake")
DTYPE = torch.float64 if LIKE == "cuda" else torch.float32

SOME_FAMILIES = ["mlp", "lstm", "transformer", "gpt"]
FAMILIES = RUNGS if LIKE == "cuda" else SOME_FAMILIES
"""Language models; what they share has been tried on the other device."""

cuda_only = pytest.mark.skipif(LIKE != "cuda", reason="MPS does not have it")


@pytest.fixture(autouse=True)
def fresh_counts():
    state.reset()


def open_task(config, corpus, pair_corpus):
    if config.task in TABULAR_TASKS:
        return TABULAR_TASKS[config.task].open(config, None, True)
    return TASKS[config.task](config, pair_corpus if config.task == "translation" else corpus)


def without_dropout(config):
    model_args = dict(config.model_args)
    if "dropout" in inspect.signature(model_class(config.model)).parameters:
        model_args["dropout"] = 0.0
    return dataclasses.replace(config, model_args=model_args, precision="float32")


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in FAMILIES if name in PRESETS),
        "gpt-nano",
        "zaremba",
        "word2vec",
        "rice-linear",
        "grain-experts",
        "translate-attention",
        "translate-transformer",
        "translate-gpt",
    ],
)
def test_training_equals_that_of_the_cpu(name, corpus, pair_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "random_numbers", contextlib.nullcontext)  # those of the CPU
    config = dataclasses.replace(without_dropout(shrink(PRESETS[name])), eval_interval=4)
    logs, scores = [], []
    for device in (CPU, DEVICE):
        directory = tmp_path / device.type
        directory.mkdir()
        trainer = Trainer(config, directory, open_task(config, corpus, pair_corpus), device)
        trainer.train()
        scores.append(trainer.score().to_json()["loss"])
        logs.append(read_log(directory))
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    for line, expected in zip(*reversed(logs), strict=True):
        numbers = {k: v for k, v in expected.items() if isinstance(v, float)}
        assert {k: line[k] for k in numbers} == pytest.approx(numbers, rel=1e-4)
        assert line.get("sample") == expected.get("sample")


@pytest.mark.parametrize("name", ["muon", "float16", "stateful-sgd", "word2vec"])
def test_resumed_run_equals_uninterrupted_run(name, corpus, tmp_path):
    """With dropout, whose random numbers are the device's."""
    if LIKE == "mps" and name == "float16":
        pytest.skip("GradScaler knows MPS by its name")
    config = shrink(CONFIGS.get(name) or PRESETS[name])
    assert_resumed_equals_uninterrupted(
        config, TASKS[config.task](config, corpus), 2, tmp_path, DEVICE
    )


def test_validation_of_word_vectors_leaves_the_random_numbers_alone(corpus):
    config = shrink(PRESETS["word2vec"])
    task = TASKS[config.task](config, corpus)
    model = Trainer(config, None, task, DEVICE).model
    before = state.generator.get_state()
    losses = [task.validate(model) for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(state.generator.get_state(), before)


SAMPLING = [
    SamplingParams(temperature=0),
    SamplingParams(seed=1),
    SamplingParams(0.8, 5, 0.9, 0.02, 1.2, 0.5, 0.5, seed=2),
    SamplingParams(top_k=3, seed=3),
    SamplingParams(top_p=0.7, seed=4),
    SamplingParams(min_p=0.1, seed=5),
    SamplingParams(temperature=0, repetition_penalty=1.3, logit_bias=((3, 2.0), (5, -100.0))),
]
"""Every sampler."""


@pytest.mark.parametrize(
    ("name", "captured"),
    [
        *(pytest.param(name, True, marks=cuda_only) for name in [*RUNGS, "gpt-ngrams"]),
        *((name, False) for name in [*SOME_FAMILIES, "gpt-ngrams"]),
    ],
)
def test_engine_generates_the_texts_of_the_cpu(name, captured):
    cpu_model = make_model(name, DTYPE)
    engine = Engine(
        copy.deepcopy(cpu_model).to(DEVICE),
        4,
        max_num_batched_tokens=30,
        num_scheduler_steps=3 if captured else 1,
        cuda_graphs=captured,
    )
    requests = [
        Request(
            [(7 * i + j) % VOCABULARY for j in range(3 + 5 * i % 11)],
            7,
            params,
            {2 * i},
            n=2 if i == 1 else 1,
            allowed_first_tokens=(1, 4, 9) if i == 2 else (),
            logprobs=2 if i == 3 else None,
        )
        for i, params in enumerate(SAMPLING)
    ]
    collector = run_requests(engine, *requests)
    for request in requests:
        for choice in range(request.n):
            expected = reference_output(cpu_model, request, choice)
            assert collector.output(request, choice) == expected
    assert (state.operations["graph replay"] > 0) == captured


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ["seq2seq", "attention", "transformer", "gpt"])
def test_engine_translates_as_the_cpu(name, num_beams):
    cpu_model = make_model(name, DTYPE)
    params = SamplingParams(temperature=0)

    def translations(model, graphs):
        requests = [
            Request([i, i + 3, i + 1], 8, params, {0}, decoder_start_token=0, num_beams=num_beams)
            for i in range(4)
        ]
        collector = run_requests(Engine(model, 3, cuda_graphs=graphs), *requests)
        return [collector.output(request) for request in requests]

    expected = translations(cpu_model, False)
    assert translations(cpu_model.to(DEVICE), LIKE == "cuda") == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_activation_maps_equal_those_of_the_cpu(name):
    model = make_model(name, torch.float32)
    tokens_BT = torch.arange(12).view(1, -1)
    expected = model.xray(tokens_BT)
    for actual, each in zip(model.to(DEVICE).xray(tokens_BT.to(DEVICE)), expected, strict=True):
        torch.testing.assert_close(actual.weights.cpu(), each.weights)


def command(main, *arguments):
    """Return what a command prints on standard output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main("tinygpt", [str(argument) for argument in arguments])
    return out.getvalue()


def test_commands_print_what_they_print_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    # An RMSNorm of its own lets a CPU's training differ in the last digits.
    monkeypatch.setattr("training.trainer.tune_for_cpu", lambda *arguments: None)
    (tmp_path / "text.txt").write_text("the cat sat on the mat and saw the dog\n" * 200)
    options = [
        "gpt-nano",
        "--width",
        "16",
        "--depth",
        "1",
        "--heads",
        "2",
        "--steps",
        "6",
        "--batch-size",
        "4",
        "--context-length",
        "16",
        "--vocab-size",
        "300",
        "--eval-interval",
        "3",
        "--checkpoint-interval",
        "3",
        "--log-interval",
        "1",
        "--eval-tokens",
        "64",
        "--precision",
        "float32",
    ]
    printed = []
    for device in ("cpu", "auto"):
        run = tmp_path / device
        data = ("--data", tmp_path / "text.txt", "--run", run, "--device", device)
        assert "loss" in command(training_cli.main, "train", *options, *data)
        assert ("fake" in (run / "run.json").read_text()) == (device == "auto")
        (run / "checkpoints" / "step-6").rename(tmp_path / f"{device}-step-6")
        assert "continues at step 3" in command(
            training_cli.main, "train", "--resume", run, "--device", device
        )
        score = command(training_cli.main, "eval", run, "--device", device, "--accuracy", "--json")
        quality = command(
            training_cli.main, "sample-quality", run, "--device", device, "--samples", "4", "--json"
        )
        shares = [
            (row["distinct_2"], row["repetition"], round(row["loss"], 4))
            for row in json.loads(quality)["rows"]
        ]
        texts = [
            command(
                serving_cli.main, "sample", run, "--prompt", "the", "--device", device, *sampling
            )
            for sampling in (["--temperature", "0"], ["--seed", "1", "-n", "2"])
        ]
        printed.append([score.partition('"loss"')[2][:8], shares, *texts])
    assert printed[0] == printed[1]


# What waits for the device.


def train_steps(trainer, count):
    """Take training steps, and return what the last one waited for."""
    trainer.model.train()
    for _ in range(count):
        state.reset()
        trainer.train_step(trainer.objective)
        trainer.step += 1
    return dict(state.waits)


def make_trainer(name, corpus, tmp_path):
    config = CONFIGS[name]
    return Trainer(config, tmp_path, Text(config, corpus), DEVICE)


WAITS_IN_FLOAT16 = {"aten._local_scalar_dense.default": 1}


@cuda_only
@pytest.mark.parametrize("name", CONFIGS)
def test_train_step_does_not_wait_for_the_device(name, corpus, tmp_path):
    waits = train_steps(make_trainer(name, corpus, tmp_path), 3)
    assert waits == (WAITS_IN_FLOAT16 if name == "float16" else {})


@cuda_only
def test_train_step_of_word2vec_does_not_wait_for_the_device(corpus, tmp_path):
    config = shrink(PRESETS["word2vec"])
    trainer = Trainer(config, tmp_path, TASKS[config.task](config, corpus), DEVICE)
    assert train_steps(trainer, 2) == {}


@cuda_only
def test_a_loss_that_is_read_in_every_step_is_caught(corpus, tmp_path):
    trainer = make_trainer("muon", corpus, tmp_path)
    optimizer_step = trainer.optimizers.step

    def step_with_item(step):
        next(trainer.model.parameters()).grad.norm().item()
        optimizer_step(step)

    trainer.optimizers.step = step_with_item
    assert train_steps(trainer, 3) == {"aten._local_scalar_dense.default": 1}


@pytest.mark.parametrize("name", ["gpt", "gpt2", "transformer"])
def test_a_mask_on_the_cpu_is_caught(name, monkeypatch):
    model = make_model(name, torch.float32).to(DEVICE)
    init = attention.Positions.__init__

    def init_with_mask_on_cpu(self, tokens_BT, *arguments):
        init(self, tokens_BT, *arguments)
        self.mask_B1TS = torch.ones(tokens_BT.shape[1], tokens_BT.shape[1]).tril().bool()

    source_mask = "gpt.models.transformer.source_mask"
    monkeypatch.setattr(attention.Positions, "__init__", init_with_mask_on_cpu)
    monkeypatch.setattr(source_mask, lambda lengths_B, length: torch.ones(1, length).bool())
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        model(torch.arange(8, device=DEVICE).view(1, -1))


@cuda_only
@pytest.mark.parametrize("fault", ["a tensor made of a list", "a number that is read"])
def test_what_waits_in_a_capture_is_caught(fault, monkeypatch):
    def sample(logits_BV, *_):
        if fault == "a tensor made of a list":
            return logits_BV.argmax(-1) + torch.tensor([1] * len(logits_BV), device=DEVICE)
        return logits_BV.argmax(-1) + int(logits_BV[0, 0] > 1e9)

    monkeypatch.setattr(cuda_graphs, "sample", sample)
    engine = Engine(make_model("gpt", torch.float32).to(DEVICE), 2, cuda_graphs=True)
    engine.add_request(Request([1], 4, SamplingParams(temperature=0)))
    errors = [output.error for _ in range(3) for output in engine.step() if output.error]
    assert "not permitted in a capture" in errors[0]


# Which kernels are asked for.


@cuda_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_uses_fused_kernels_and_the_lower_precision(dtype, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(fake_accelerator.CUDAModule, "has_bfloat16", dtype == torch.bfloat16)
    config = dataclasses.replace(TINY, model_args={"width": 32, "depth": 2, "heads": 2})
    assert config.precision == "auto"
    trainer = Trainer(config, tmp_path, Text(config, corpus), DEVICE)
    assert trainer.optimizers.scaler.is_enabled() == (dtype == torch.float16)
    train_steps(trainer, 2)
    arrays, micro_batches, layers = 2, 2, 2
    assert state.operations["non-blocking copy from pinned memory"] == arrays
    assert state.operations["aten._fused_adamw_.default"] == 3  # embeddings, unembedding, vectors
    assert len(state.attention) == micro_batches * layers
    assert all(call.dtype == dtype and call.is_flash for call in state.attention)
    products = [
        (name, each)
        for name, each in state.dtypes
        if name.split(".")[1] in ("mm", "addmm", "baddbmm")
    ]
    assert products
    assert {each for _, each in products} <= {dtype}


@cuda_only
def test_prefill_and_decode_ask_for_the_fused_attention():
    model = make_model("gpt", torch.float32).to(DEVICE)
    run_requests(Engine(model, 2), Request([1, 2, 3], 4, SamplingParams(temperature=0)))
    assert len(state.attention) == 2 * 4  # layers and forward passes
    assert all(call.masked and not call.causal for call in state.attention)


def test_quantized_weights_are_measured_on_the_device(tmp_path):
    tokens = torch.arange(200, dtype=torch.int32) % VOCABULARY
    save_tensors(tmp_path / "validation.safetensors", {"tokens": tokens})
    model = make_model("gpt", torch.float32).to(DEVICE)
    if LIKE == "mps":
        with pytest.raises(TypeError, match=r"does not support torch\.bfloat16"):
            quantize_and_measure(model, "bfloat16", tmp_path)
        return
    _, message = quantize_and_measure(model, "bfloat16", tmp_path)
    assert "bfloat16: perplexity" in message


def test_precision_auto_is_what_the_device_computes_fast(monkeypatch):
    if LIKE == "mps":
        assert gpt_device.matmul_dtype(DEVICE, "auto") == torch.float32
        assert not gpt_device.is_gpu(DEVICE)
        assert not gpt_device.has_cuda_graphs(DEVICE)
        return
    assert gpt_device.matmul_dtype(DEVICE, "auto") == torch.bfloat16
    monkeypatch.setattr(fake_accelerator.CUDAModule, "has_bfloat16", False)
    assert gpt_device.matmul_dtype(DEVICE, "auto") == torch.float16
    assert gpt_device.matmul_dtype(DEVICE, "bfloat16") == torch.bfloat16
    assert gpt_device.device_name(DEVICE) == "fake (Fake H100)"
