"""On a CPU, training computes RMSNorm and, in bfloat16, attention otherwise than torch; nothing else does."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from gpt.kernels.rms_norm import rms_norm
from gpt.models.attention import RMSNorm
from tests.training.helpers import make_trainer, write_corpus
from training.config import TrainingConfig


@pytest.mark.parametrize(
    ("precision", "context_length", "is_fused"),
    [("bfloat16", 512, False), ("bfloat16", 513, True), ("float32", 512, True)],
)
def test_steps_in_bfloat16_compute_attention_in_chunks(
    precision, context_length, is_fused, tmp_path, monkeypatch
):
    config = dataclasses.replace(
        TrainingConfig(model_args={"width": 16, "depth": 1, "heads": 2}, batch_size=1, steps=2),
        precision=precision,
        context_length=context_length,
        sample_tokens=0,
    )
    trainer = make_trainer(config, tmp_path / "run", write_corpus(tmp_path))
    calls = []

    def fused(*tensors, **options):
        calls.append(torch.is_grad_enabled())
        return attention(*tensors, **options)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    assert trainer.train_step(trainer.objective).isfinite()
    assert bool(calls) == is_fused
    trainer.task.validate(trainer.model)
    assert calls[-1:] == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_rms_norm_and_its_gradients_are_those_of_torch(dtype, is_autocast):
    generator = torch.Generator().manual_seed(0)
    x_BHTD = torch.randn(2, 3, 5, 64, generator=generator).to(dtype)
    gradient_BHTD = torch.randn(x_BHTD.shape, generator=generator)
    # From rows of zeros to rows where eps counts for nothing.
    x_BHTD *= torch.tensor([0.0, 1e-3, 1e-2, 1.0, 1e3]).unsqueeze(1)
    weight_D = torch.rand(64, generator=generator)
    results = {}
    for name in ("torch", "ours"):
        x, weight = (tensor.clone().requires_grad_() for tensor in (x_BHTD, weight_D))
        if name == "torch":
            y = F.rms_norm(x.float(), (64,), weight, 1e-6)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                y = rms_norm(x, weight, 1e-6)
            assert y.dtype == (torch.bfloat16 if is_autocast else dtype)
        # The gradient has the output's precision.
        y.backward(gradient_BHTD.bfloat16().to(y.dtype))
        results[name] = y.detach(), x.grad, weight.grad
    rounding = 1e-6 if dtype == torch.float32 and not is_autocast else 2**-8
    for theirs, ours in zip(results["torch"], results["ours"], strict=True):
        scale = theirs.abs().amax(-1, keepdim=True)
        assert ((ours.float() - theirs).abs() <= rounding * scale).all()


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_steps_compute_rms_norm_by_the_kernel_and_evaluation_by_torch(
    precision, tmp_path, monkeypatch
):
    config = TrainingConfig(
        model_args={"width": 16, "depth": 1, "heads": 2},
        batch_size=1,
        steps=2,
        context_length=32,
        precision=precision,
        sample_tokens=0,
    )
    trainer = make_trainer(config, tmp_path / "run", write_corpus(tmp_path))
    calls = []

    def record(*arguments):
        calls.append(arguments)
        return theirs(*arguments)

    theirs = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", record)
    trainer.train_step(trainer.objective)
    assert not calls
    trainer.task.validate(trainer.model)
    norms = [module for module in trainer.model.modules() if isinstance(module, RMSNorm)]
    assert len(calls) % len(norms) == 0 < len(calls)
