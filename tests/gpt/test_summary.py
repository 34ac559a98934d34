"""Parameter counts, and the commands `chapters` and `describe`."""

import json
import sys

import pytest
import torch

import tinygpt
from gpt import CHAPTERS, MODELS, summary
from gpt.checkpoint import build_model


@pytest.fixture
def run_tinygpt(capsys, monkeypatch):
    """Run the command; return its exit code and what it printed on both streams."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tinygpt", *map(str, arguments)])
        code = 0
        try:
            tinygpt.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def test_chapter_14_gpt3_weights_by_kind(run_tinygpt):
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
    _, output, _ = run_tinygpt("describe", "gpt3")
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


def test_chapters_lists_every_model_in_order(run_tinygpt):
    code, output, _ = run_tinygpt("chapters")
    assert code == 0
    numbers = [model.chapter for model in CHAPTERS.values()]
    assert numbers == list(range(1, 16))
    for name, model in CHAPTERS.items():
        assert any(
            line.split()[:3] == [str(model.chapter), name, str(model.year)]
            for line in output.splitlines()
        )
        assert model.idea in output
        assert model.paper in output
    lines = {line.split()[1]: line for line in output.splitlines()[1:] if line[:2].strip()}
    translators = {name for name, line in lines.items() if "translation" in line}
    assert translators == {"seq2seq", "attention", "transformer", "gpt2", "gpt"}
    assert {name for name, line in lines.items() if line.split()[4].rstrip(",") == "text"} == set(
        MODELS
    )


def test_describe_reads_the_config_of_a_run(tmp_path, run_tinygpt):
    kwargs = {"vocab_size": 300, "context_length": 16, "width": 32, "depth": 1, "heads": 2}
    (tmp_path / "config.json").write_text(
        json.dumps({"format": 2, "model": "gpt", "model_args": kwargs})
    )
    with torch.device("meta"):
        expected = f"{summary.count_parameters(build_model('gpt', kwargs)):,}"
    assert expected in run_tinygpt("describe", tmp_path)[1]


def test_describe_uses_the_size_of_a_preset(run_tinygpt):
    size = {"vocab_size": 8192, "context_length": 512, "width": 384, "depth": 6, "heads": 6}
    with torch.device("meta"):
        expected = f"{summary.count_parameters(build_model('gpt', size)):,}"
    assert expected in run_tinygpt("describe", "gpt-micro")[1]
    assert "norms, positions: 129" in run_tinygpt("describe", "rice-mlp")[1]


def test_a_mistyped_name_is_a_one_line_error(run_tinygpt):
    code, _, errors = run_tinygpt("describe", "gtp2")
    assert code == 2
    assert "'gtp2' is neither a model nor a preset (did you mean gpt2" in errors
    assert "gru" in errors
    assert "gpt-micro" in errors
    assert errors.count("\n") == 1
