"""Optimizers and the learning-rate schedule, compared with torch's and nanoGPT's."""

import copy
import dataclasses
import math

import pytest
import torch

from training.config import TrainingConfig, new_model
from training.optimizer import Muon, Optimizers, lr_schedule, orthogonalize, parameter_groups
from training.presets import PRESETS, TABLE_PRESETS

TINY = TrainingConfig(model_args={"width": 16, "depth": 2, "heads": 2}, device="cpu")


@pytest.fixture
def model():
    return new_model(TINY, {"vocab_size": 257, "context_length": 16})


def param_groups(model, config):
    optimizers = Optimizers(model, config, torch.device("cpu")).optimizers
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def test_schedule_warms_up_stays_and_cools_down():
    config = dataclasses.replace(
        TINY, steps=100, warmup_steps=10, cooldown_fraction=0.5, final_lr_fraction=0.1
    )
    fractions = [lr_schedule(config, step) for step in range(100)]
    assert fractions[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert fractions[9:51] == pytest.approx([1.0] * 42)
    assert fractions[75] == pytest.approx(0.1 + 0.9 * 0.5)
    assert fractions[99] == pytest.approx(0.1 + 0.9 * 0.02)
    constant = dataclasses.replace(config, warmup_steps=0, cooldown_fraction=0.0)
    assert all(lr_schedule(constant, step) == 1 for step in (0, 99))


@pytest.mark.parametrize(("warmup_steps", "cooldown_fraction"), [(10, 0.9), (0, 1.0), (5, 0.5)])
def test_cosine_decay_equals_torch(warmup_steps, cooldown_fraction):
    config = TrainingConfig(
        steps=100,
        warmup_steps=warmup_steps,
        cooldown_fraction=cooldown_fraction,
        cosine_decay=True,
        final_lr_fraction=0.1,
    )
    cooldown_steps = round(100 * cooldown_fraction)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cooldown_steps, eta_min=0.1)
    for step in range(100):
        warmup = min(1.0, (step + 1) / max(1, warmup_steps))
        assert lr_schedule(config, step) == pytest.approx(min(warmup, scheduler.get_last_lr()[0]))
        if step >= 100 - cooldown_steps:
            optimizer.step()
            scheduler.step()
    with pytest.raises(ValueError, match="--step-decays and --cosine-decay exclude each other"):
        dataclasses.replace(config, final_lr_fraction=0.0, step_decays=3)


def test_cosine_decay_equals_nanogpt():
    config = PRESETS["nanogpt-cpu"]
    for step in range(100, config.steps):
        progress = (step - 100) / (config.steps - 100)
        expected = 1e-4 + 0.5 * (1 + math.cos(math.pi * progress)) * (1e-3 - 1e-4)
        assert config.learning_rate * lr_schedule(config, step) == pytest.approx(expected)


def test_step_decay_halves_the_rate_as_in_zaremba_2014():
    epochs = 13
    config = TrainingConfig(
        steps=epochs * 10, warmup_steps=0, cooldown_fraction=9 / 13, step_decays=9
    )
    by_epoch = [
        {lr_schedule(config, epoch * 10 + step) for step in range(10)} for epoch in range(epochs)
    ]
    assert by_epoch == [{1.0}] * 4 + [{0.5**n} for n in range(1, 10)]
    with_warmup = dataclasses.replace(config, warmup_steps=5)
    assert [lr_schedule(with_warmup, step) for step in (0, 4, 20, 129)] == [0.2, 1.0, 1.0, 0.5**9]


def test_weight_decay_applies_to_its_groups_and_to_no_vector(model):
    config = dataclasses.replace(
        TINY, optimizer="adamw", weight_decay=0.1, embedding_weight_decay=0.2
    )
    decay_of = {
        id(parameter): group["weight_decay"]
        for group in param_groups(model, config)
        for parameter in group["params"]
    }
    expected = {"matrices": 0.1, "embeddings": 0.2, "unembedding": 0.2, "vectors": 0.0}
    for name, decay in expected.items():
        parameters = parameter_groups(model)[name]
        assert {decay_of[id(parameter)] for parameter in parameters} == {decay}


@pytest.mark.parametrize("name", TABLE_PRESETS)
def test_learning_rate_and_weight_decay_govern_every_weight_of_a_table_model(name):
    config = dataclasses.replace(
        TABLE_PRESETS[name], optimizer="sgd", learning_rate=0.5, weight_decay=0.1
    )
    model = new_model(config, {"inputs": 2, "classes": 3})
    groups = param_groups(model, config)
    assert {group["lr"] for group in groups} == {0.5}
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay_of[id(parameter)] == (0.0 if name.endswith("bias") else 0.1), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_vector_lr_is_that_of_a_line_s_bias_only(optimizer):
    config = dataclasses.replace(
        TABLE_PRESETS["linear"], optimizer=optimizer, learning_rate=0.5, vector_lr=0.25
    )
    model = new_model(config, {"inputs": 2})
    lr_of = {id(p): group["lr"] for group in param_groups(model, config) for p in group["params"]}
    assert {name: lr_of[id(p)] for name, p in model.named_parameters()} == {
        "weight": 0.5,
        "bias": 0.25,
    }


def test_every_parameter_is_updated_by_one_optimizer(model):
    groups = parameter_groups(model)
    num_parameters = len(list(model.parameters()))
    assert sum(map(len, groups.values())) == num_parameters
    assert groups["embeddings"][0] is model.embedding.weight
    assert groups["unembedding"][0] is model.unembedding.weight
    assert all(parameter.ndim == 2 for parameter in groups["matrices"])
    updated = [
        id(parameter) for group in param_groups(model, TINY) for parameter in group["params"]
    ]
    assert len(updated) == len(set(updated)) == num_parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_moves_singular_values_close_to_one(dtype):
    torch.manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16), (1, 8, 8)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), dtype).float())
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_muon_equals_torch():
    torch.manual_seed(0)
    shapes = [(16, 48), (48, 16), (16, 16), (16, 16)]
    our_matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    torch_matrices = [torch.nn.Parameter(p.detach().clone()) for p in our_matrices]
    settings = {"lr": 0.1, "weight_decay": 0.1}
    ours = Muon([{"params": our_matrices, **settings}])
    torchs = torch.optim.Muon(torch_matrices, momentum=0.95, **settings)
    for _ in range(4):
        for our_matrix, torch_matrix in zip(our_matrices, torch_matrices, strict=True):
            our_matrix.grad = torch.randn_like(our_matrix)
            torch_matrix.grad = our_matrix.grad.clone()
        ours.step()
        torchs.step()
    for our_matrix, torch_matrix, shape in zip(our_matrices, torch_matrices, shapes, strict=True):
        # torch computes in bfloat16: four updates of 0.1, each with an error of about one percent.
        torch.testing.assert_close(our_matrix, torch_matrix, atol=0.004, rtol=0.01, msg=str(shape))


def test_small_gradients_are_orthogonalized_in_float16():
    """Gradients of 1e-7 are zero in float16."""
    torch.manual_seed(0)
    update_NAB = torch.randn(2, 4, 6)
    expected = orthogonalize(update_NAB, torch.float32)
    actual = orthogonalize(update_NAB * 1e-6, torch.float16)
    torch.testing.assert_close(actual.float(), expected, atol=0.02, rtol=0.02)


def backward(model, optimizers):
    tokens_BT = torch.arange(32).view(2, 16)
    optimizers.scaler.scale(model.loss(tokens_BT, tokens_BT)).backward()


def test_a_step_whose_gradients_overflow_is_skipped_by_every_optimizer(model):
    optimizers = Optimizers(model, TINY, torch.device("cpu"), torch.float16)
    assert len(optimizers.optimizers) == 2
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backward(model, optimizers)
    model.get_parameter("unembedding.weight").grad[0, 0] = math.inf  # of AdamW's, none of Muon's
    optimizers.step(0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (optimizers.skipped_steps, optimizers.loss_scale) == (1, 2.0**15)
    assert not optimizers.state_dict()
    for step in (1, 2):
        backward(model, optimizers)
        optimizers.step(step)
    changed = [p for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    for group in ("matrices", "unembedding"):
        assert set(changed) & set(parameter_groups(model)[group])
    restored = Optimizers(model, TINY, torch.device("cpu"), torch.float16)
    restored.load_scaler_state(optimizers.scaler_state())
    assert (restored.skipped_steps, restored.loss_scale) == (1, 2.0**15)


def test_scaled_losses_train_as_unscaled_ones(model):
    """Gradients are clipped after they are unscaled."""
    other = copy.deepcopy(model)
    for each, dtype in ((model, torch.float16), (other, torch.float32)):
        optimizers = Optimizers(each, TINY, torch.device("cpu"), dtype)
        for step in range(2):
            backward(each, optimizers)
            optimizers.step(step)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], atol=1e-3, rtol=1e-2, msg=name)
