"""The benchmark of serving, at a tiny shape and without a compiler."""

import json
import math

import pytest
import torch

from benchmarks import rivals, serve
from benchmarks.serve import Timing, quantiles, summary
from gpt.generation import generate
from gpt.sampling import SamplingParams
from serving.engine.engine import Engine

TINY = rivals.Size(300, 32, 2, 2, context=512)
PROMPTS = serve.prompts(3, 5, TINY.vocabulary)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)


def wanted():
    model = TINY.build()
    return [list(generate(model, prompt, 9, SamplingParams(0.0))) for prompt in PROMPTS]


def test_every_rival_makes_the_same_texts_of_the_same_weights():
    assert rivals.Ours(TINY.build(), 2, "float32").many(PROMPTS, 9) == wanted()
    assert rivals.Transformers(TINY.build()).many(PROMPTS, 9) == wanted()


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_llama_cpp_makes_the_same_texts_of_the_same_weights(kind):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    texts = rivals.LlamaCpp(TINY.build(), kind, 1, 3).many(PROMPTS, 9)
    alike = [
        a == b for x, y in zip(texts, wanted(), strict=True) for a, b in zip(x, y, strict=True)
    ]
    assert sum(alike) == 27 if kind == "F32" else sum(alike) > 13


def test_a_summary_counts_tokens_by_time_and_the_refused_apart():
    timings = [
        Timing(asked=0.0, first=0.5, last=2.5, tokens=5),
        Timing(asked=1.0, first=1.1, last=3.0, tokens=1),
        Timing(asked=1.0, status=429, ended=1.2),
        Timing(asked=1.0, status=0),
    ]
    row = summary(timings, 4)
    assert row["tokens_per_second"] == 2.0
    assert (row["texts"], row["refused"], row["failed"]) == (2, 1, 1)
    assert row["first_token"]["p50"] == pytest.approx(0.3)
    assert row["between_tokens"]["p50"] == 0.5
    assert quantiles([]) == {}
    assert quantiles([*range(1, 101)]) == {"p50": 50.5, "p99": 99}


def test_a_closed_loop_of_the_engine_makes_every_text():
    engine = Engine(TINY.build(), 2)
    row = serve.engine_loop(engine, clients=4, texts=7, tokens=6)
    assert row["texts"] == 7
    assert row["refused"] == row["failed"] == 0
    assert row["tokens_per_second"] > 0
    assert engine.is_idle
    assert serve.per_token(engine, 50, 4) > 0


@pytest.mark.long
def test_the_whole_benchmark_writes_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve, "SIZES", {"tiny": TINY})
    monkeypatch.setattr(serve, "ROUNDS", 1)
    monkeypatch.setattr(
        serve, "TASKS", {"one": (1, 4, 8), "eight": (8, 4, 8), "prompt": (1, 32, 1)}
    )
    monkeypatch.setattr(serve, "CLIENTS", (1, 4))
    monkeypatch.setattr(serve, "REACHES", (35, 60))
    monkeypatch.setattr(serve, "CROWD", 60)
    monkeypatch.setattr(serve, "CROWD_TOKENS", 5)
    monkeypatch.setattr(serve, "names_of_rivals", lambda: ["ours float32", "ours int8"])
    threads = torch.get_num_threads()
    output = tmp_path / "serve.json"
    try:
        serve.main(["--output", str(output), "--threads", "1", "--texts", "6", "--tokens", "5"])
    finally:
        torch.set_num_threads(threads)
    printed, result = capsys.readouterr().out, json.loads(output.read_text())
    for title in ("Beside others", "tiny: many clients", "60 clients at once", "A token after"):
        assert title in printed
        assert title in output.with_suffix(".md").read_text()
    (loops,) = result["loops"]
    closed = [row for found in loops["closed"] for row in found["http"]]
    assert [row["texts"] for row in closed] == [6, 8]
    assert all(row["failed"] == 0 for row in [*closed, *loops["open"]])
    (crowds,) = result["crowds"]
    (crowd,) = crowds["crowd"]
    assert crowd["texts"] + crowd["refused"] == 60
    assert crowd["texts"] >= 20
    assert not math.isnan(crowd["refusal"]["p99"])


def test_a_mistake_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        serve.main(["--max-num-seqs", "0"])
    assert ended.value.code == 2
    assert "--max-num-seqs must be at least 1, not 0" in capsys.readouterr().err
