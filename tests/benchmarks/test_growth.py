"""benchmarks.growth, with texts of a few megabytes."""

import dataclasses
import json
import mmap
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from benchmarks import growth

TEXT = "One cat sat here.\nTwo dogs ran there.\n\nThe end of it.\n" * 40


def test_text_has_the_requested_size_and_is_deterministic(tmp_path):
    (tmp_path / "base.txt").write_text(TEXT)
    for data in (None, str(tmp_path / "base.txt")):
        base = growth.base_text(data, seed=1)
        assert base == growth.base_text(data, seed=1)
        texts = []
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            growth.write_text(tmp_path / name, 3 * len(base), base, seed)
            texts.append((tmp_path / name).read_text())
        assert texts[0] == texts[1] != texts[2]
        assert 3 * len(base) <= len(texts[0]) <= 3 * len(base) + 200
        # Other places, but no new words: a longer text is not richer.
        assert set(texts[0].split()) <= set(base.split())
        assert texts[0][: len(base)] != base


def use_memory(megabytes, path, ready, sampled):
    """Allocate memory and map a file, until both have been sampled."""
    allocated = bytearray(b"x") * (megabytes * 2**20)
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = sum(1 for offset in range(0, len(mapped), 4096) if mapped[offset] == 0)
        ready.set()
        sampled.wait()
    return {"pages": pages, "allocated": len(allocated)}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is only known on Linux")
def test_anonymous_memory_and_file_pages_are_measured_separately(tmp_path, monkeypatch):
    (tmp_path / "large").write_bytes(bytes(64 * 2**20))
    (tmp_path / "small").write_bytes(bytes(4096))
    memory_of = growth.memory_of

    def measure(megabytes, name):
        context = multiprocessing.get_context("spawn")
        ready, sampled = context.Event(), context.Event()

        def sample(pid):
            was_ready = ready.is_set()
            memory = memory_of(pid)
            if was_ready:
                sampled.set()
            return memory

        monkeypatch.setattr(growth, "memory_of", sample)
        return growth.measure_memory(use_memory, megabytes, str(tmp_path / name), ready, sampled)

    base, allocated, mapped = measure(1, "small"), measure(65, "small"), measure(1, "large")
    assert mapped["pages"] == 64 * 256
    key = "anonymous_bytes"
    assert allocated[key] - base[key] == pytest.approx(64 * 2**20, rel=0.05)
    assert mapped["file_bytes"] - base["file_bytes"] == pytest.approx(64 * 2**20, rel=0.05)
    assert abs(mapped[key] - base[key]) < 3 * 2**20


def die():
    os._exit(1)


def test_dead_worker_is_one_line():
    with pytest.raises(ValueError, match="die: the worker process died; its error is above"):
        growth.measure_memory(die)


@pytest.mark.long
def test_command_writes_both_files_and_memory_does_not_grow(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(growth, "CONFIG", dataclasses.replace(growth.CONFIG, vocab_size=300))
    output = tmp_path / "growth.json"
    growth.main(f"--small 1 --large 20 --steps 20 --threads 1 --output {output}".split())
    result = json.loads(output.read_text())
    small, large = result["sizes"]
    assert (small["megabytes"], large["megabytes"]) == (1, 20)
    assert large["prepare"]["tokens"] == pytest.approx(20 * small["prepare"]["tokens"], rel=0.1)
    for size in (small, large):
        assert size["train"]["first"] > 0 < size["train"]["last"]
    if sys.platform == "linux":
        # How much freed memory the allocator keeps varies by some 50 MB, with how threads interleave.
        growth_bytes = large["train"]["anonymous_bytes"] - small["train"]["anonymous_bytes"]
        assert growth_bytes < 80 * 2**20 < 8 * large["prepare"]["tokens"]
    assert result["tokenization"][0]["cores"] == 1
    assert all(speed["bytes"] == small["bytes"] for speed in result["tokenization"])
    printed = capfd.readouterr().out
    assert "| | 1 MB | 20 MB | ratio |" in printed
    assert output.with_suffix(".md").read_text() in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--small 0", "--small must be at least 1, not 0"),
        ("--small 5 --large 5", "--large must be more than --small, 5, not 5"),
        ("--data absent.txt", "absent.txt: no such file: --data takes a text file"),
        ("--large 1000000000", "choose smaller sizes, or another disk with TMPDIR"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        growth.main(arguments.split())
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in err
    assert err.count("\n") == 1
