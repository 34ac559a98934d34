"""benchmarks.serve, with a tiny model and without a compiler."""

import json
import math

import pytest
import torch

from benchmarks import backends, comparison, load, serve
from benchmarks.http_client import RequestTiming
from gpt.generation import generate
from gpt.sampling import SamplingParams
from serving.engine.engine import Engine

TINY = backends.ModelSize(300, 32, 2, 2, context_length=512)
PROMPTS = backends.random_prompts(3, 5, TINY.vocab_size)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)


def expected_outputs():
    model = TINY.build()
    return [list(generate(model, prompt, 9, SamplingParams(0.0))) for prompt in PROMPTS]


def test_backends_generate_the_same_outputs():
    assert backends.TinyGPT(TINY.build(), 2, "float32").generate(PROMPTS, 9) == expected_outputs()
    assert backends.Transformers(TINY.build()).generate(PROMPTS, 9) == expected_outputs()


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_llama_cpp_generates_the_same_outputs(dtype):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    outputs = backends.LlamaCpp(TINY.build(), dtype, 1, 3).generate(PROMPTS, 9)
    matches = [
        a == b
        for output, expected in zip(outputs, expected_outputs(), strict=True)
        for a, b in zip(output, expected, strict=True)
    ]
    assert sum(matches) == 27 if dtype == "float32" else sum(matches) > 13


def test_summary_counts_tokens_over_time_and_rejected_requests_separately():
    timings = [
        RequestTiming(sent=0.0, first_token=0.5, last_token=2.5, num_tokens=5),
        RequestTiming(sent=1.0, first_token=1.1, last_token=3.0, num_tokens=1),
        RequestTiming(sent=1.0, status=429, end=1.2),
        RequestTiming(sent=1.0, status=0),
    ]
    summary = load.summarize(timings)
    assert summary["tokens_per_second"] == 2.0
    assert (summary["completed"], summary["rejected"], summary["failed"]) == (2, 1, 1)
    assert summary["ttft"]["p50"] == pytest.approx(0.3)
    assert summary["tpot"]["p50"] == 0.5
    assert load.percentiles([]) == {}
    assert load.percentiles([*range(1, 101)]) == {"p50": 50.5, "p99": 99}


def test_closed_loop_of_the_engine_completes_every_request():
    engine = Engine(TINY.build(), 2)
    summary = load.engine_closed_loop(engine, clients=4, num_prompts=7, output_length=6)
    assert summary["completed"] == 7
    assert summary["rejected"] == summary["failed"] == 0
    assert summary["tokens_per_second"] > 0
    assert engine.is_idle
    assert serve.decode_latency(engine, 50, 4) > 0


@pytest.mark.long
def test_whole_benchmark_writes_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve, "SIZES", {"tiny": TINY})
    monkeypatch.setattr(serve, "ROUNDS", 1)
    monkeypatch.setattr(load, "CLIENTS", (1, 4))
    monkeypatch.setattr(serve, "CONTEXT_LENGTHS", (35, 60))
    monkeypatch.setattr(load, "OVERLOAD_CLIENTS", 60)
    monkeypatch.setattr(load, "OVERLOAD_OUTPUT_LENGTH", 5)
    names = ["tinygpt float32", "tinygpt int8"]
    monkeypatch.setattr(comparison, "available_backends", lambda: names)
    threads = torch.get_num_threads()
    output = tmp_path / "serve.json"
    options = ["--threads", "1", "--num-prompts", "6", "--output-length", "5"]
    try:
        serve.main(["--output", str(output), *options])
    finally:
        torch.set_num_threads(threads)
    printed, result = capsys.readouterr().out, json.loads(output.read_text())
    for title in (
        "Compared with other engines",
        "tiny: concurrent clients",
        "tiny: overload, 60 clients at once, capacity 20",
        "Decode latency by context length",
    ):
        assert title in printed
        assert title in output.with_suffix(".md").read_text()
    (tiny,) = result["load"]
    closed_loop = [summary for clients in tiny["closed_loop"] for summary in clients["http"]]
    assert [summary["completed"] for summary in closed_loop] == [6, 8]
    assert all(summary["failed"] == 0 for summary in [*closed_loop, *tiny["open_loop"]])
    (tiny,) = result["overload"]
    (overload,) = tiny["overload"]
    assert overload["completed"] + overload["rejected"] == 60
    assert overload["completed"] >= 20
    assert not math.isnan(overload["rejection"]["p99"])


def test_errors_are_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        serve.main(["--max-num-seqs", "0"])
    assert exit_.value.code == 2
    assert "--max-num-seqs must be at least 1, not 0" in capsys.readouterr().err
