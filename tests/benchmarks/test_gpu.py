"""benchmarks.gpu on a CPU: every part with tiny models, failures, limits, and its documentation."""

import functools
import json
import multiprocessing
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from benchmarks import comparison, gpu, load, report, serve, train
from benchmarks.worker import Worker
from tests.benchmarks.test_train import LocalWorker

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"Line {i}: once upon a time there were {i % 7} cats.\n" for i in range(400))
PRESETS = ("gpt-nano", "zaremba", "translate-attention", "word2vec", "grain-mlp")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch


class ThreadWorker(Worker):
    """A worker in a thread of this process."""

    def __init__(self, name, target, *arguments):
        self.name = name
        self.connection, child = multiprocessing.Pipe()

        def run():
            with child:  # closed, as at a process's end: nothing waits for it for ever
                target(child, *arguments)

        self.process = threading.Thread(target=run, daemon=True)
        self.process.start()


def run_part_here(name, settings, max_seconds):
    output = settings.folder / f"{name}.json"
    gpu.measure_part(name, settings, output)
    return {"status": "done", "seconds": 1.0, "results": json.loads(output.read_text())}


@pytest.fixture
def here(monkeypatch, tmp_path):
    """All parts in this process, with tiny figures and no compiler; yields the command's options."""
    (tmp_path / "input.txt").write_text(TEXT)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(gpu, "run_part", run_part_here)
    monkeypatch.setattr(gpu, "SMOKE_PRESETS", PRESETS)
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    monkeypatch.setattr(gpu, "DECODE_STEPS", 2)
    monkeypatch.setattr(gpu, "PROMPT_LENGTH", 60)
    monkeypatch.setattr(serve, "CONTEXT_LENGTHS", (35, 60))
    monkeypatch.setattr(load, "CLIENTS", (1, 2))
    monkeypatch.setattr(comparison, "MIN_SECONDS", 1e-9)
    monkeypatch.setattr(comparison, "Worker", ThreadWorker)
    monkeypatch.setattr(train, "Worker", LocalWorker)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    installed = report.is_installed
    monkeypatch.setattr(report, "is_installed", lambda name: name != "fastapi" and installed(name))
    threads = torch.get_num_threads()
    output = tmp_path / "bench" / "gpu.json"
    yield f"--device cpu --small --threads 1 --data {tmp_path / 'input.txt'} --output {output}"
    torch.set_num_threads(threads)


def test_every_part_measures_and_is_reported(here, tmp_path, capsys):
    gpu.main(shlex.split(here))
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "bench" / "gpu.json").read_text())
    markdown = (tmp_path / "bench" / "gpu.md").read_text()
    assert markdown in printed
    assert "gpu.md into an issue" in printed
    assert list(result["parts"]) == list(gpu.PARTS)
    smoke = result["parts"]["smoke"]["results"]
    assert [check["name"] for check in smoke] == [*PRESETS, "gpt-nano, compiled"]
    for check in smoke:
        assert check["resumed"] == 0
        assert check.get("cpu_difference", 0) == 0
        assert check.get("equal", 1) == 1
    assert smoke[-1]["compile"] == "on (--compile on)"
    for title in (
        "Figures",
        "Smoke test, float32 losses",
        "Throughput on random tokens",
        "Decoding and prefill",
        "GPU: time to loss",
        "Compared with other engines",
        "124M: concurrent clients",
        "Decode latency by context length, single sequence",
    ):
        assert f"### {title}\n" in markdown
    for name in gpu.TARGETS:
        # A CPU has no known peak, and tiny trials do not decode 256 sequences.
        is_measured = "MFU" not in name and "256" not in name
        assert re.search(rf"\| {re.escape(name)} \| [\d,.]+ \|", markdown) or not is_measured
    assert "| transformers bfloat16 |" in markdown
    assert "Without a server" in markdown
    assert f"input.txt, {len(TEXT):,} characters" in markdown
    assert f"torch {torch.__version__}" in markdown


def test_a_failure_costs_no_other_measurement_and_the_exit_code_is_1(
    here, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise RuntimeError("a kernel is missing")

    monkeypatch.setattr(gpu, "SMOKE_PRESETS", ("gpt-nano", "grain-mlp"))
    monkeypatch.setattr(gpu, "COMPILED_PRESETS", ())
    monkeypatch.setattr(gpu, "equal_tokens", fail)
    with pytest.raises(SystemExit) as exit_:
        gpu.main(shlex.split(f"{here} --only smoke context"))
    assert exit_.value.code == 1
    markdown = (tmp_path / "bench" / "gpu.md").read_text()
    assert "**smoke, gpt-nano: failed**" in markdown
    assert "RuntimeError: a kernel is missing" in markdown
    assert "| grain-mlp | " in markdown
    assert "### Decode latency" in markdown
    assert "smoke: done after 1 s, 1 of 2 measurements failed" in capsys.readouterr().out


def test_a_resumed_run_that_differs_fails(here, tmp_path, monkeypatch):
    resume = gpu.resume_run

    def resume_elsewhere(*arguments):
        trainer = resume(*arguments)
        for parameter in trainer.model.parameters():
            parameter.data.add_(1.0)
        return trainer

    monkeypatch.setattr(gpu, "resume_run", resume_elsewhere)
    settings = gpu.Settings("cpu", True, 1, tmp_path)
    with pytest.raises(AssertionError, match="the weights of a resumed run differ by"):
        gpu.check_preset("grain-mlp", "off", settings)


def test_parts_that_do_not_fit_into_the_time_are_skipped(here, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        gpu.main(shlex.split(f"{here} --seconds 10 --only context"))
    assert exit_.value.code == 1
    assert "context skipped: no time was left" in (tmp_path / "bench" / "gpu.md").read_text()


def test_a_part_is_killed_at_its_limit(tmp_path):
    part = gpu.run_part("context", gpu.Settings("cpu", True, 1, tmp_path), 0.01)
    assert part["status"] == "stopped after its limit of 0 s"
    assert part["results"] == []
    tables = gpu.part_tables("context", part)
    assert "**context: stopped after its limit of 0 s**" in tables[-1]
    assert gpu.has_failed(part)


def test_a_dead_process_leaves_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", "/bin/false")
    part = gpu.run_part("context", gpu.Settings("cpu", True, 1, tmp_path), 60)
    assert (part["status"], part["results"], part["log"]) == ("ended with exit code 1", [], "")


@pytest.mark.long
def test_a_part_in_a_process_of_its_own(tmp_path):
    settings = gpu.Settings("cpu", True, 1, tmp_path)
    part = gpu.run_part("context", settings, 120)
    assert part["status"] == "done"
    assert "### Decode latency" in part["results"][0]["table"]


def test_text_is_the_standard_library_without_data(tmp_path):
    text, description = gpu.read_text(None)
    assert text.isascii()
    assert len(text) == gpu.TEXT_CHARACTERS
    assert description == "sources of the standard library, 1,115,394 characters"


def test_corpora_are_split_as_in_nanogpt(tmp_path):
    gpu.write_corpora(TEXT, tmp_path)
    corpus = train.open_character_corpus(str(tmp_path / "characters"))
    texts = [corpus.tokenizer.decode(split.tokens) for split in corpus.splits.values()]
    assert "".join(texts) == TEXT
    assert len(texts[0]) == int(0.9 * len(TEXT))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device cpu", "--device cpu is no GPU: `--small` tries"),
        ("--device cpu --small --data absent.txt", "absent.txt: no such file"),
        ("--device cpu --small --data SHORT", "at least 1,000 characters"),
        ("--device cpu --small --data BINARY", "BINARY"),
        ("--device card", "--device must be"),
        ("--threads 0", "--threads must be at least 1"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("SHORT").write_text("short")
    Path("BINARY").write_bytes(b"\xff" * 2000)
    with pytest.raises(SystemExit) as exit_:
        gpu.main(arguments.split())
    err = capsys.readouterr().err
    assert (exit_.value.code, err.count("\n")) == (2, 1)
    assert message in err


def test_documented_commands_parse(monkeypatch):
    parsed = []
    monkeypatch.setattr(gpu, "benchmark", lambda *_, **options: parsed.append(options))
    text = (ROOT / "docs" / "experiments.md").read_text("utf-8")
    for command in re.findall(r"^.*-m benchmarks\.gpu (.*)$", text, re.MULTILINE):
        gpu.main(shlex.split(command, comments=True))
    assert parsed


def test_needs_no_data_or_web_library(tmp_path):
    code = (
        "import sys, pathlib; from benchmarks import gpu;"
        f"folder = pathlib.Path({str(tmp_path)!r}); gpu.write_corpora(gpu.read_text(None)[0][:30000], folder);"
        "gpu.check_preset('gpt-nano', 'off', gpu.Settings('cpu', True, 1, folder));"
        "print({'datasets', 'fastapi', 'uvicorn', 'uvloop', 'pyarrow', 'transformers'} & sys.modules.keys())"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert completed.stdout.splitlines()[-1] == "set()"
