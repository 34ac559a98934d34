"""Planned memory equals that of real steps on this CPU.

Run as a program, this prints the measurements of docs/scale.md.
"""

import dataclasses
import gc
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gpt import cli
from gpt.device import GPUSpec, find_gpu_spec
from tests.training.test_cli import training
from training.config import new_model
from training.cpu import tune_for_cpu
from training.optimizer import Optimizers
from training.plan import (
    Hardware,
    _FusedRMSNorm,
    all_gather_bytes,
    make_plan,
    measure_memory,
)
from training.presets import PRESETS
from training.tasks import TASKS
from training.trainer import Objective

CPU = torch.device("cpu")
SCALE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text("utf-8")
COMMANDS = re.findall(
    r"(?:tinygpt|-m -- training) (train|plan) ([^`\n]*)", SCALE.replace("\\\n", "")
)
ROWS = 4


def tiny(name, **changes):
    """A preset with tiny shapes."""
    preset = PRESETS[name]
    sizes = {"vocab_size": 300, "context_length": 32, "batch_size": ROWS}
    if preset.model in ("gpt", "gpt2", "transformer"):
        sizes["model_args"] = preset.model_args | {"width": 32, "depth": 2, "heads": 2}
    if preset.model == "lstm":
        sizes["model_args"] = preset.model_args | {"width": 16}
    return dataclasses.replace(preset, **(sizes | changes))


CONFIGS = {
    "gpt": tiny("gpt-nano"),
    "gpt-adamw": tiny("gpt-nano", optimizer="adamw"),
    "gpt2": tiny("gpt2"),
    "lstm": tiny("lstm"),
    "zaremba": tiny("zaremba"),
    "transformer": tiny("transformer"),
    "translate-gpt": tiny("translate-gpt"),
    "softmax": tiny("softmax"),
    "word2vec": tiny("word2vec"),
    "rice-mlp": PRESETS["rice-mlp"],
}


class RealStep:
    """A real training step: what autograd saves, and what the allocator hands out."""

    def __init__(self, config, bfloat16):
        torch.manual_seed(0)
        task = TASKS[config.task]
        self.config, self.bfloat16 = config, bfloat16
        self.model = new_model(config, task.expected_model_args(config)).train()
        precision = "bfloat16" if bfloat16 else "float32"
        tune_for_cpu(self.model, precision, config.context_length)
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.optimizers = Optimizers(self.model, config, CPU, dtype)
        self.batch = [torch.from_numpy(array) for array in task.largest_batch(config, ROWS)]

    def loss(self):
        self.state = None  # kept alive as the trainer keeps it
        if self.config.stateful:
            self.state = self.model.init_state(ROWS, self.config.context_length)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            return Objective(self.model)(*self.batch, state=self.state)

    def step(self, index=0):
        self.loss().backward()
        self.gradients = [parameter.grad for parameter in self.model.parameters()]
        self.optimizers.step(index)

    def saved_bytes(self):
        """Bytes that the graph holds when the logits are about to be computed, with their inputs."""
        permanent = [*self.model.parameters(), *self.model.buffers(), *self.batch]
        not_counted = {tensor.untyped_storage()._cdata for tensor in permanent}
        storages, sizes = {}, []

        def save(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in not_counted:
                storages[storage._cdata] = storage
            return tensor

        if hasattr(self.model, "mean_nll"):
            mean_nll = self.model.mean_nll

            def recording_mean_nll(features, targets, *options):
                save(features)
                sizes.append(sum(storage.nbytes() for storage in storages.values()))
                return mean_nll(features, targets, *options)

            self.model.mean_nll = recording_mean_nll
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = self.loss()
        save(loss)
        sizes.append(sum(storage.nbytes() for storage in storages.values()))
        return sizes[0]

    def peak_bytes(self):
        """Most bytes allocated at once in a step whose gradients exist already."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gc.collect()  # garbage freed during the step would distort the count
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.loss().backward()
        events = profiler.profiler.kineto_results.events()
        memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        current = peak = 0
        for _, size in memory:
            current += size
            peak = max(peak, current)
        return peak


def measure(config, *, bfloat16, is_gpu=False):
    precision = "bfloat16" if bfloat16 else "float32"
    hardware = Hardware(1, "H100" if is_gpu else "cpu", GPUSpec(None, None), is_gpu, precision)
    return measure_memory(config, ROWS, hardware)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_planned_memory_is_that_of_a_real_step(name, bfloat16):
    config = CONFIGS[name]
    planned, real = measure(config, bfloat16=bfloat16), RealStep(config, bfloat16)
    # A Python number that scales a tensor, here in chunked attention, takes eight bytes of its own.
    numbers = sum(getattr(module, "query_chunk", 0) > 0 for module in real.model.modules())
    assert planned.activations + planned.loss + 8 * numbers == real.peak_bytes()
    saved = RealStep(config, bfloat16).saved_bytes()
    # Beyond what autograd saves, tensors that local variables keep alive.
    assert saved <= planned.activations <= 1.15 * saved
    tensors = [*real.model.parameters(), *real.model.buffers()]
    assert planned.weights == sum(tensor.nbytes for tensor in tensors)
    real.step()
    assert planned.gradients == sum(gradient.nbytes for gradient in real.gradients)
    assert planned.optimizer == sum(
        tensor.nbytes
        for optimizer in real.optimizers.optimizers
        for state in optimizer.state.values()
        for tensor in state.values()
    )


def test_chunked_logits_take_less_memory(monkeypatch):
    config = CONFIGS["gpt"]
    unchunked = measure(config, bfloat16=True)
    monkeypatch.setattr("gpt.models.base.MAX_LOGITS", 300 * 16)
    chunked = measure(config, bfloat16=True)
    assert chunked.activations == unchunked.activations
    assert chunked.loss < unchunked.loss / 3
    # A CPU's bfloat16 products make internal copies that are not tensors.
    real = RealStep(config, True)
    internal = real.peak_bytes() - chunked.activations - chunked.loss
    assert 0 <= internal <= real.model.unembedding.weight.nbytes


def test_every_model_can_be_planned():
    for name, preset in {preset.model: preset for preset in reversed(PRESETS.values())}.items():
        sizes = {"context_length": 4} if TASKS[preset.task].unit == "tokens" else {}
        config = dataclasses.replace(preset, **sizes, batch_size=2, gradient_accumulation_steps=1)
        plan = make_plan(config, 1, "H100", 0.4)
        assert plan.memory.peak > 0, name
        assert plan.hardware.fits(plan.memory), name
        assert json.dumps(plan.to_json())
        assert plan.table()


@pytest.mark.parametrize(("is_gpu", "itemsize"), [(True, 1), (False, 4)])
def test_dropout_mask_takes_one_byte_on_a_gpu_and_four_on_a_cpu(is_gpu, itemsize):
    config = CONFIGS["gpt"]
    with_dropout = dataclasses.replace(config, model_args=config.model_args | {"dropout": 0.1})
    before, after = (
        measure(each, bfloat16=False, is_gpu=is_gpu).activations for each in (config, with_dropout)
    )
    rows, width, layers = ROWS * 32, 32, 2
    # Two branches of each layer, and the embedding.
    assert after - before == itemsize * rows * width * (2 * layers + 1)


def test_norms_are_in_float32_on_a_gpu_under_autocast(monkeypatch):
    dtypes, apply = set(), _FusedRMSNorm.apply

    def record(x, weight):
        dtypes.update((x.dtype, weight.dtype))
        return apply(x, weight)

    monkeypatch.setattr(_FusedRMSNorm, "apply", record)
    measure(CONFIGS["gpt"], bfloat16=True, is_gpu=True)
    assert dtypes == {torch.float32}


def test_fsdp_divides_memory_and_gathers_the_largest_layer():
    config = dataclasses.replace(CONFIGS["gpt"], batch_size=2 * ROWS)
    ddp, fsdp = (
        make_plan(dataclasses.replace(config, fsdp=fsdp), 2, "H100", 0.4) for fsdp in (False, True)
    )
    model = ddp.model
    layer = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    outside = sum(parameter.numel() for parameter in model.parameters()) - 2 * layer
    assert all_gather_bytes(model) == 3 * 4 * layer + 2 * 4 * outside
    assert fsdp.memory.all_gather == 8 * layer + 6 * outside  # gathered in bfloat16
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert fsdp.memory.weights == fsdp.memory.gradients + buffers
    for kind in ("gradients", "optimizer"):
        share = getattr(fsdp.memory, kind) / getattr(ddp.memory, kind)
        assert share == pytest.approx(0.5, abs=0.001)
    assert ddp.memory.all_gather == ddp.memory.eval_model == 0
    assert fsdp.memory.activations < ddp.memory.activations


def test_time_is_flops_over_utilized_peak():
    config = dataclasses.replace(CONFIGS["gpt"], steps=100, batch_size=16)
    plan = make_plan(config, 4, "H100", 0.5)
    flops_per_token = plan.model.flops_per_token(32)
    assert plan.tokens == 100 * 16 * 32
    assert plan.tokens_per_second == pytest.approx(4 * 0.5 * 989e12 / flops_per_token)
    report = plan.to_json()
    seconds = plan.tokens * flops_per_token / (4 * 0.5 * 989e12)
    assert report["seconds"] == pytest.approx(seconds)
    assert report["tokens_per_parameter"] == pytest.approx(plan.tokens / report["parameters"])
    assert report["micro_batch_size"] == 4


def test_unknown_quantities_are_reported_as_unknown():
    for gpu in ("H1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "H100 MIG 1g.10gb"):
        plan = make_plan(CONFIGS["gpt"], 1, gpu, 0.4)
        assert plan.to_json()["fits"] is plan.tokens_per_second is plan.suggestion is None
        assert plan.table().count("unknown") == 3
    # Peaks are those of bfloat16, and sentences differ in length.
    in_float32 = dataclasses.replace(CONFIGS["gpt"], precision="float32")
    assert make_plan(in_float32, 1, "H100", 0.4).tokens_per_second is None
    translation = make_plan(CONFIGS["translate-gpt"], 1, "H100", 0.4)
    assert translation.tokens is translation.to_json()["seconds"] is None
    assert translation.hardware.fits(translation.memory)


def test_a_gpu_without_bfloat16_is_planned_in_float16():
    plan = make_plan(CONFIGS["gpt"], 1, "T4", 0.4)
    assert plan.to_json()["precision"] == "float16"
    assert plan.memory == make_plan(CONFIGS["gpt"], 1, "H100", 0.4).memory
    assert plan.tokens_per_second


def test_gpu_specs_are_found_by_driver_names():
    assert (
        find_gpu_spec("NVIDIA A100-SXM4-80GB")
        == find_gpu_spec("a100 80gb")
        == GPUSpec(80 * 10**9, 312e12)
    )
    assert find_gpu_spec("A100").memory is None
    assert find_gpu_spec("A100").flops == 312e12
    assert find_gpu_spec("NVIDIA H100 80GB HBM3") == find_gpu_spec("H100")
    assert find_gpu_spec("NVIDIA H100 PCIe").flops == 756e12
    assert find_gpu_spec("NVIDIA GeForce RTX 4090") == find_gpu_spec("RTX 4090")
    assert not find_gpu_spec("Tesla T4").has_bfloat16
    assert find_gpu_spec("Tesla V100-SXM2-16GB").memory == 16 * 10**9
    for other in ("NVIDIA L40", "NVIDIA GB200", "NVIDIA GeForce RTX 3090 Ti", "H100 64GB", ""):
        assert find_gpu_spec(other) == GPUSpec(None, None)


def test_options_are_suggested_for_a_run_that_does_not_fit(monkeypatch):
    one_layer = {"width": 32, "depth": 1, "heads": 2}
    config = tiny("gpt-nano", optimizer="adamw", batch_size=8, model_args=one_layer)

    def suggestion(capacity, num_gpus=1, **changes):
        monkeypatch.setattr("training.plan.find_gpu_spec", lambda _: GPUSpec(capacity, None))
        return make_plan(dataclasses.replace(config, **changes), num_gpus, "small", 0.4).suggestion

    def required(micro_batch_size, fsdp=False):
        hardware = Hardware(2, "", GPUSpec(None, None), True, "bfloat16")
        sharded_config = dataclasses.replace(config, fsdp=fsdp)
        memory = measure_memory(sharded_config, micro_batch_size, hardware)
        return int(memory.peak / 0.9) + 1

    assert suggestion(required(8)) is None
    assert suggestion(required(4)) == "--gradient-accumulation-steps 2"
    accumulated = suggestion(required(2), gradient_accumulation_steps=2)
    assert accumulated == "--gradient-accumulation-steps 4"
    assert suggestion(required(1) // 2) == "more GPUs with --fsdp, or a smaller model"
    # In so small a model the all-gather would be most of the memory.
    monkeypatch.setattr("training.plan.all_gather_bytes", lambda _: 0)
    sharded = suggestion(required(1, fsdp=True), num_gpus=2)
    assert sharded == "--gradient-accumulation-steps 4 --fsdp"


def test_plan_prints_a_table_or_json():
    shape = "--width 64 --depth 1 --heads 1 --context-length 32"
    options = f"--num-gpus 8 --gpu H100 --mfu 0.5 {shape}".split()
    code, table, _ = training("plan", "gpt-micro", *options)
    assert code == 0
    assert "8 x H100 at 50% of 989 TFLOP/s" in table
    code, out, _ = training("plan", "gpt-micro", *options, "--json")
    assert code == 0
    assert json.loads(out)["num_devices"] == 8
    assert "fits" in table


def test_vocab_size_is_that_of_the_tokenizer(tmp_path):
    code, out, _ = training(
        "plan", "--tokenizer", "bytes", "--heads", "4", "--width", "64", "--json"
    )
    assert code == 0
    assert json.loads(out)["parameters_by_kind"]["embedding"] == 257 * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("gpt-nanoo", "no preset is named 'gpt-nanoo' (did you mean gpt-nano"),
        ("--num-gpus 0", "--num-gpus must be at least 1, not 0"),
        ("--num-gpus 3", "--batch-size 32 cannot be divided among --num-gpus 3"),
        ("--mfu 40", "--mfu must be above 0 and at most 1, not 40.0"),
        ("--gpu H100 --device cpu", "--gpu and --device both choose the device"),
        ("--task rice", "the model gpt cannot learn the task rice"),
        ("--heads 5", "width must be a multiple of"),
        ("--tokenizer none.json", "none.json: no such tokenizer"),
        ("--num-gpus many", "--num-gpus"),
    ],
)
def test_invalid_arguments_print_one_line(options, message):
    code, out, err = training("plan", *options.split())
    assert code == 2
    assert not out
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_of_the_docs_are_valid(command, monkeypatch):
    name, options = command
    monkeypatch.setattr(sys, "argv", ["training", name, *shlex.split(options)])

    def parse(prog, description, commands, arguments=None, *_):
        assert cli._parse(prog, description, commands, arguments)

    monkeypatch.setattr(cli, "main", parse)
    runpy.run_module("training", run_name="__main__")


def test_docs_show_the_output_of_plan():
    example = re.search(r"^```sh\ntinygpt (plan .*)\n```\n\n```\n(.*?)^```", SCALE, re.M | re.S)
    code, out, _ = training(*example[1].split())
    assert code == 0
    assert out == example[2]


if __name__ == "__main__":
    print("| model | precision | planned | measured |\n|---|---|---:|---:|")
    for model in ("gpt-nano", "gpt2", "transformer", "lstm", "softmax"):
        for bfloat16 in (False, True):
            preset = dataclasses.replace(PRESETS[model], batch_size=ROWS)
            memory = measure(preset, bfloat16=bfloat16)
            precision = "bfloat16" if bfloat16 else "float32"
            planned, measured = (
                memory.activations + memory.loss,
                RealStep(preset, bfloat16).peak_bytes(),
            )
            print(f"| {model} | {precision} | {planned:,} | {measured:,} |", flush=True)
