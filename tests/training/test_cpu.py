"""In bfloat16 on a CPU, training does without torch's fused attention; nothing else does."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

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
