"""What a plan says of a run, held against real steps on this CPU. Run as a program, this prints the table of docs/scale.md."""

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
from training.optimizer import Optimizers
from training.plan import Hardware, gathered, measure, plan
from training.presets import PRESETS
from training.tasks import TASKS
from training.trainer import Objective

CPU = torch.device("cpu")
SCALE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text("utf-8")
COMMANDS = re.findall(r"-m (?:-- )?training (train|plan) ([^`\n]*)", SCALE.replace("\\\n", ""))
ROWS = 4


def tiny(name, **changes):
    """A preset at a tiny shape."""
    run = PRESETS[name]
    sizes = {"vocab_size": 300, "context_length": 32, "batch_size": ROWS}
    if run.model in ("gpt", "gpt2", "transformer"):
        sizes["model_args"] = run.model_args | {"width": 32, "depth": 2, "heads": 2}
    if run.model == "lstm":
        sizes["model_args"] = run.model_args | {"width": 16}
    return dataclasses.replace(run, **(sizes | changes))


RUNS = {
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


class Real:
    """A step of a run as it is: what autograd saves, and what the allocator gives out."""

    def __init__(self, run, bfloat16):
        torch.manual_seed(0)
        task = TASKS[run.task]
        self.model = new_model(run, task.expected_model_args(run)).train()
        self.optimizers = Optimizers(self.model, run, CPU, bfloat16)
        self.batch = [torch.from_numpy(array) for array in task.largest_batch(run, ROWS)]
        self.bfloat16, self.carry, self.window = bfloat16, run.carry, run.window

    def loss(self):
        self.carried = self.model.init_state(ROWS, self.window) if self.carry else None
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            return Objective(self.model)(*self.batch, state=self.carried)

    def step(self, index=0):
        self.loss().backward()
        self.gradients = [parameter.grad for parameter in self.model.parameters()]
        self.optimizers.step(index)

    def saved(self):
        """Bytes that the graph holds on to when the logits are to be made, with what they are made from."""
        own = [*self.model.parameters(), *self.model.buffers(), *self.batch]
        not_counted = {tensor.untyped_storage()._cdata for tensor in own}
        found, at_logits = {}, []

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in not_counted:
                found[storage._cdata] = storage
            return tensor

        if hasattr(self.model, "mean_nll"):
            mean_nll = self.model.mean_nll

            def noting(features, targets):
                keep(features)
                at_logits.append(sum(storage.nbytes() for storage in found.values()))
                return mean_nll(features, targets)

            self.model.mean_nll = noting
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        keep(loss)
        at_logits.append(sum(storage.nbytes() for storage in found.values()))
        return at_logits[0]

    def peak(self):
        """Most bytes given out at once in a step whose gradients are there already."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gc.collect()  # what others left to be given back would count here
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.loss().backward()
        events = profiler.profiler.kineto_results.events()
        memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        now = most = 0
        for _, size in memory:
            now += size
            most = max(most, now)
        return most


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_memory_is_what_a_real_step_takes(name, bfloat16):
    run = RUNS[name]
    planned, real = measure(run, ROWS, bfloat16, card=False), Real(run, bfloat16)
    assert planned.activations + planned.loss == real.peak()
    saved = Real(run, bfloat16).saved()
    # Beside what autograd saves, what the code still has a name for.
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


def test_logits_are_made_in_chunks(monkeypatch):
    run = RUNS["gpt"]
    at_once = measure(run, ROWS, True, card=False)
    monkeypatch.setattr("gpt.models.base.CHUNK_ELEMENTS", 300 * 16)
    few = measure(run, ROWS, True, card=False)
    assert few.activations == at_once.activations
    assert few.loss < at_once.loss / 3
    # The copies that a CPU's bfloat16 products make for themselves are no tensors.
    real = Real(run, True)
    unseen = real.peak() - few.activations - few.loss
    assert 0 <= unseen <= real.model.unembedding.weight.nbytes


def test_every_model_can_be_planned():
    for name, run in {run.model: run for run in reversed(PRESETS.values())}.items():
        sizes = {"context_length": 4} if TASKS[run.task].unit == "tokens" else {}
        found = plan(
            dataclasses.replace(run, **sizes, batch_size=2, gradient_accumulation_steps=1),
            1,
            "H100",
            0.4,
        )
        assert found.memory.together > 0, name
        assert found.place.holds(found.memory), name
        assert json.dumps(found.to_json())
        assert found.table()


@pytest.mark.parametrize(("card", "bytes_each"), [(True, 1), (False, 4)])
def test_the_mask_of_a_dropout_takes_a_byte_on_a_card_and_four_on_a_cpu(card, bytes_each):
    run = RUNS["gpt"]
    dropping = dataclasses.replace(run, model_args=run.model_args | {"dropout": 0.1})
    without, found = (measure(it, ROWS, False, card).activations for it in (run, dropping))
    rows, width, layers = ROWS * 32, 32, 2
    # Two branches a layer, and the embedding.
    assert found - without == bytes_each * rows * width * (2 * layers + 1)


def test_a_card_computes_norms_in_float32():
    """Under autocast, where a CPU keeps what it makes of queries and keys in bfloat16."""
    card, cpu = (measure(RUNS["gpt"], ROWS, True, card=it).activations for it in (True, False))
    assert card > cpu


def test_what_is_sharded_is_divided_and_its_largest_layer_put_together():
    run = dataclasses.replace(RUNS["gpt"], batch_size=2 * ROWS)
    whole, half = (
        plan(dataclasses.replace(run, fsdp=shard), 2, "H100", 0.4) for shard in (False, True)
    )
    model = whole.model
    layer = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    rest = sum(parameter.numel() for parameter in model.parameters()) - 2 * layer
    assert gathered(model) == 3 * 4 * layer + 2 * 4 * rest
    assert half.memory.gathered == 8 * layer + 6 * rest  # gathered in bfloat16
    tables = sum(buffer.nbytes for buffer in model.buffers())
    assert half.memory.weights == half.memory.gradients + tables
    for kind in ("gradients", "optimizer"):
        of = getattr(half.memory, kind) / getattr(whole.memory, kind)
        assert of == pytest.approx(0.5, abs=0.001)
    assert whole.memory.gathered == whole.memory.validation == 0
    assert half.memory.activations < whole.memory.activations


def test_time_is_operations_over_what_the_cards_reach():
    run = dataclasses.replace(RUNS["gpt"], steps=100, batch_size=16)
    found = plan(run, 4, "H100", 0.5)
    per_token = found.model.flops_per_token(32)
    assert found.tokens == 100 * 16 * 32
    assert found.tokens_per_second == pytest.approx(4 * 0.5 * 989e12 / per_token)
    said = found.to_json()
    assert said["seconds"] == pytest.approx(found.tokens * per_token / (4 * 0.5 * 989e12))
    assert said["tokens_per_parameter"] == pytest.approx(found.tokens / said["parameters"])
    assert said["rows"] == 4


def test_what_is_not_known_is_said_so():
    for card in ("H1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "H100 MIG 1g.10gb"):
        said = plan(RUNS["gpt"], 1, card, 0.4)
        assert said.to_json()["fits"] is said.tokens_per_second is said.remedy is None
        assert said.table().count("unknown") == 3
    # Peaks are of bfloat16, and a sentence has its own length.
    in_float32 = dataclasses.replace(RUNS["gpt"], precision="float32")
    assert plan(in_float32, 1, "H100", 0.4).tokens_per_second is None
    pairs = plan(RUNS["translate-gpt"], 1, "H100", 0.4)
    assert pairs.tokens is pairs.to_json()["seconds"] is None
    assert pairs.place.holds(pairs.memory)


def test_cards_by_their_drivers_names():
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
    for other in ("NVIDIA L40", "NVIDIA GB200", "NVIDIA GeForce RTX 3090 Ti", "H100 64GB", ""):
        assert find_gpu_spec(other) == GPUSpec(None, None)


def test_what_does_not_fit_is_told_what_helps(monkeypatch):
    one_layer = {"width": 32, "depth": 1, "heads": 2}
    run = tiny("gpt-nano", optimizer="adamw", batch=8, arguments=one_layer)

    def told(room, cards=1, **changes):
        monkeypatch.setattr("training.plan.find_card", lambda _: GPUSpec(room, None))
        return plan(dataclasses.replace(run, **changes), cards, "small", 0.4).remedy

    def needed(rows, shard=False):
        one = Hardware(2, "", GPUSpec(None, None), True, True)
        return int(one.measure(dataclasses.replace(run, fsdp=shard), rows).together / 0.9) + 1

    assert told(needed(8)) is None
    assert told(needed(4)) == "--gradient-accumulation-steps 2"
    assert told(needed(2), accumulation=2) == "--gradient-accumulation-steps 4"
    assert told(needed(1) // 2) == "more cards with --fsdp, or a smaller model"
    # What is gathered is most of so small a model.
    monkeypatch.setattr("training.plan.gathered", lambda _: 0)
    assert told(needed(1, shard=True), cards=2) == "--gradient-accumulation-steps 4 --fsdp"


def test_the_command_prints_a_table_or_json():
    options = [
        "--num-gpus",
        "8",
        "--gpu",
        "H100",
        "--mfu",
        "0.5",
        "--width",
        "64",
        "--depth",
        "1",
        "--heads",
        "1",
        "--context-length",
        "32",
    ]
    code, table, _ = training("plan", "gpt-micro", *options)
    assert code == 0
    assert "8 x H100 at 50% of 989 TFLOP/s" in table
    code, said, _ = training("plan", "gpt-micro", *options, "--json")
    assert code == 0
    assert json.loads(said)["cards"] == 8
    assert "fits" in table


def test_the_vocabulary_is_that_of_the_tokenizer(tmp_path):
    code, said, _ = training(
        "plan", "--tokenizer", "bytes", "--heads", "4", "--width", "64", "--json"
    )
    assert code == 0
    assert json.loads(said)["weights_by_kind"]["embedding"] == 257 * 64


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("gpt-nanoo", "no preset is named 'gpt-nanoo' (did you mean gpt-nano"),
        ("--num-gpus 0", "--num-gpus must be at least 1, not 0"),
        ("--num-gpus 3", "--batch-size 16 cannot be divided among --num-gpus 3"),
        ("--mfu 40", "--mfu must be above 0 and at most 1, not 40.0"),
        ("--gpu H100 --device cpu", "--gpu and --device both say where"),
        ("--task rice", "the model gpt cannot learn the task rice"),
        ("--heads 5", "width must be a multiple of"),
        ("--tokenizer none.json", "none.json: no such tokenizer"),
        ("--num-gpus many", "--num-gpus"),
    ],
)
def test_a_mistake_is_one_line(options, complaint):
    code, out, err = training("plan", *options.split())
    assert code == 2
    assert not out
    assert complaint in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_commands_of_the_docs_are_understood(command, monkeypatch):
    name, options = command
    monkeypatch.setattr(sys, "argv", ["training", name, *shlex.split(options)])

    def parse(prog, description, commands, arguments=None):
        assert cli._parse(prog, description, commands, arguments)

    monkeypatch.setattr(cli, "main", parse)
    runpy.run_module("training", run_name="__main__")


def test_the_docs_show_what_the_plan_says():
    first = re.search(
        r"^```sh\npython -m (training plan .*)\n```\n\n```\n(.*?)^```", SCALE, re.M | re.S
    )
    code, said, _ = training(*first[1].split()[1:])
    assert code == 0
    assert said == first[2]


if __name__ == "__main__":
    print("| model | precision | planned | measured |\n|---|---|---:|---:|")
    for model in ("gpt-nano", "gpt2", "transformer", "lstm", "softmax"):
        for half in (False, True):
            chosen = dataclasses.replace(PRESETS[model], batch_size=ROWS)
            said = measure(chosen, ROWS, half, card=False)
            precision = "bfloat16" if half else "float32"
            sizes = (said.activations + said.loss, Real(chosen, half).peak())
            print(f"| {model} | {precision} | {sizes[0]:,} | {sizes[1]:,} |", flush=True)
