"""Parameter counts, and the commands `chapters` and `describe`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt import CHAPTERS, MODELS, summary
from gpt.checkpoint import build_model

ROOT = Path(__file__).parents[2]


def tinygpt(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tinygpt", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_chapter_14_gpt3_weights_by_kind():
    """175,181,291,520 weights in 27,938 matrices, none of them in memory."""
    model = summary.build_gpt3()
    assert all(parameter.is_meta for parameter in model.parameters())
    counts = summary.count_by_kind(model)
    width, head, hidden, vocabulary, depth = 12_288, 128, 49_152, 50_257, 96
    per_kind = depth * 96 * width * head
    assert counts == {
        "embedding": (1, vocabulary * width),
        "query": (depth * 96, per_kind),
        "key": (depth * 96, per_kind),
        "value": (depth * 96, per_kind),
        "output": (depth, per_kind),
        "up": (depth, depth * width * hidden),
        "down": (depth, depth * width * hidden),
        "unembedding": (1, vocabulary * width),
    }
    assert sum(weights for _, weights in counts.values()) == 175_181_291_520
    assert sum(matrices for matrices, _ in counts.values()) == 27_938
    output = tinygpt("describe", "gpt3").stdout
    assert "27,938" in output
    assert "175,181,291,520" in output


@pytest.mark.parametrize("name", MODELS)
def test_counts_on_meta_equal_those_of_a_built_model(name):
    built = build_model(name, summary.NANO)
    assert summary.count_parameters(
        summary.build_on_meta(MODELS[name])
    ) == summary.count_parameters(built)
    matrices = sum(p.numel() for p in built.parameters() if p.ndim > 1)
    counted = sum(weights for _, weights in summary.count_by_kind(built).values())
    # Learned positions are not counted, and a tied unembedding is counted twice.
    position = built.position.weight.numel() if name == "gpt2" else 0
    tied = built.unembedding.weight.numel() if name == "gpt2" else 0
    assert counted == matrices - position + tied


def test_chapters_lists_every_model_in_order():
    result = tinygpt("chapters")
    assert result.returncode == 0
    numbers = [model.chapter for model in CHAPTERS.values()]
    assert numbers == list(range(1, 16))
    for name, model in CHAPTERS.items():
        assert any(
            line.split()[:3] == [str(model.chapter), name, str(model.year)]
            for line in result.stdout.splitlines()
        )
        assert model.idea in result.stdout
        assert model.paper in result.stdout
    lines = {line.split()[1]: line for line in result.stdout.splitlines()[1:] if line[:2].strip()}
    translators = {name for name, line in lines.items() if "translation" in line}
    assert translators == {"seq2seq", "attention", "transformer", "gpt2", "gpt"}
    assert {name for name, line in lines.items() if line.split()[4].rstrip(",") == "text"} == set(
        MODELS
    )


def test_describe_reads_the_config_of_a_run(tmp_path):
    kwargs = {"vocab_size": 300, "context_length": 16, "width": 32, "depth": 1, "heads": 2}
    (tmp_path / "config.json").write_text(
        json.dumps({"format": 2, "model": "gpt", "model_args": kwargs})
    )
    with torch.device("meta"):
        expected = f"{summary.count_parameters(build_model('gpt', kwargs)):,}"
    assert expected in tinygpt("describe", tmp_path).stdout


def test_describe_uses_the_size_of_a_preset():
    size = {"vocab_size": 8192, "context_length": 512, "width": 384, "depth": 6, "heads": 6}
    with torch.device("meta"):
        expected = f"{summary.count_parameters(build_model('gpt', size)):,}"
    assert expected in tinygpt("describe", "gpt-micro").stdout
    assert "norms, positions: 129" in tinygpt("describe", "rice-mlp").stdout


def test_a_mistyped_name_is_a_one_line_error():
    result = tinygpt("describe", "gtp2")
    assert result.returncode == 2
    assert "'gtp2' is neither a model nor a preset (did you mean gpt2" in result.stderr
    assert "gru" in result.stderr
    assert "gpt-micro" in result.stderr
    assert result.stderr.count("\n") == 1
