"""What `python -m gpt` says of the models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt import CHAPTERS, MODELS, summary
from gpt.checkpoint import build_model

ROOT = Path(__file__).parents[2]


def gpt(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "gpt", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_chapter_14_gpt3_by_its_shapes():
    """175,181,291,520 weights in 27,938 matrices, none of them in memory."""
    model = summary.build_gpt3()
    assert all(parameter.is_meta for parameter in model.parameters())
    found = summary.count_by_kind(model)
    width, head, hidden, vocabulary, depth = 12_288, 128, 49_152, 50_257, 96
    each = depth * 96 * width * head
    assert found == {
        "embedding": (1, vocabulary * width),
        "query": (depth * 96, each),
        "key": (depth * 96, each),
        "value": (depth * 96, each),
        "output": (depth, each),
        "up": (depth, depth * width * hidden),
        "down": (depth, depth * width * hidden),
        "unembedding": (1, vocabulary * width),
    }
    assert sum(weights for _, weights in found.values()) == 175_181_291_520
    assert sum(matrices for matrices, _ in found.values()) == 27_938
    said = gpt("describe", "gpt3").stdout
    assert "27,938" in said
    assert "175,181,291,520" in said


@pytest.mark.parametrize("name", MODELS)
def test_shapes_count_what_a_built_model_has(name):
    built = build_model(name, summary.NANO)
    assert summary.count_parameters(
        summary.build_on_meta(MODELS[name])
    ) == summary.count_parameters(built)
    matrices = sum(p.numel() for p in built.parameters() if p.ndim > 1)
    counted = sum(weights for _, weights in summary.count_by_kind(built).values())
    # Learned positions do not count, and a tied unembedding counts twice.
    position = built.position.weight.numel() if name == "gpt2" else 0
    tied = built.unembedding.weight.numel() if name == "gpt2" else 0
    assert counted == matrices - position + tied


def test_the_table_lists_every_chapter_in_order():
    said = gpt("chapters")
    assert said.returncode == 0
    numbers = [model.chapter for model in CHAPTERS.values()]
    assert numbers == list(range(1, 16))
    for name, model in CHAPTERS.items():
        assert any(
            line.split()[:3] == [str(model.chapter), name, str(model.year)]
            for line in said.stdout.splitlines()
        )
        assert model.idea in said.stdout
        assert model.paper in said.stdout
    rows = {line.split()[1]: line for line in said.stdout.splitlines()[1:] if line[:2].strip()}
    can_translate = {name for name, line in rows.items() if "translate" in line}
    assert can_translate == {"seq2seq", "attention", "transformer", "gpt2", "gpt"}
    assert {name for name, line in rows.items() if "speak" in line} == set(MODELS)


def test_a_run_is_described_by_its_config(tmp_path):
    given = {"vocab_size": 300, "context_length": 16, "width": 32, "depth": 1, "heads": 2}
    (tmp_path / "config.json").write_text(
        json.dumps({"format": 1, "model": "gpt", "model_args": given})
    )
    said = gpt("describe", tmp_path).stdout
    with torch.device("meta"):
        assert f"{summary.count_parameters(build_model('gpt', given)):,}" in said


def test_a_preset_is_described_at_its_own_size():
    size = {"vocab_size": 8192, "context_length": 512, "width": 384, "depth": 6, "heads": 6}
    with torch.device("meta"):
        expected = f"{summary.count_parameters(build_model('gpt', size)):,}"
    assert expected in gpt("describe", "gpt-micro").stdout


def test_a_mistyped_name_is_one_line():
    said = gpt("describe", "gtp2")
    assert said.returncode == 2
    assert "'gtp2' is neither a model nor a preset (did you mean gpt2" in said.stderr
    assert "gru" in said.stderr
    assert "gpt-micro" in said.stderr
    assert said.stderr.count("\n") == 1
