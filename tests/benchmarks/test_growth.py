"""The benchmark of growth, with texts of a few megabytes."""

import dataclasses
import json
import mmap
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from benchmarks import growth

SOME = "One cat sat here.\nTwo dogs ran there.\n\nThe end of it.\n" * 40


def test_a_text_is_as_long_as_it_is_to_be_and_always_the_same(tmp_path):
    (tmp_path / "some.txt").write_text(SOME)
    for data in (None, str(tmp_path / "some.txt")):
        base = growth.base_text(data, seed=1)
        assert base == growth.base_text(data, seed=1)
        texts = []
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            growth.write_text(tmp_path / name, 3 * len(base), base, seed)
            texts.append((tmp_path / name).read_text())
        assert texts[0] == texts[1] != texts[2]
        assert 3 * len(base) <= len(texts[0]) <= 3 * len(base) + 200
        # Words in other places, but no others: nothing to learn is added by length.
        assert set(texts[0].split()) <= set(base.split())
        assert texts[0][: len(base)] != base


def filled(megabytes, path, full, seen):
    """So much memory of its own, and a file mapped beside it, until both were seen."""
    own = bytearray(b"x") * (megabytes * 2**20)
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        size = sum(1 for place in range(0, len(mapped), 4096) if mapped[place] == 0)
        full.set()
        seen.wait()
    return {"pages": size, "own": len(own)}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_memory_is_a_processs_own_and_pages_of_files_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "zeros").write_bytes(bytes(64 * 2**20))
    (tmp_path / "few").write_bytes(bytes(4096))
    memory_of = growth.memory_of

    def alone(megabytes, name):
        context = multiprocessing.get_context("spawn")
        full, seen = context.Event(), context.Event()

        def look(process):
            last = full.is_set()
            found = memory_of(process)
            if last:
                seen.set()
            return found

        monkeypatch.setattr(growth, "memory_of", look)
        return growth.alone(filled, megabytes, str(tmp_path / name), full, seen)

    little, much, mapped = alone(1, "few"), alone(65, "few"), alone(1, "zeros")
    assert mapped["pages"] == 64 * 256
    assert much["own_bytes"] - little["own_bytes"] == pytest.approx(64 * 2**20, rel=0.05)
    assert mapped["file_bytes"] - little["file_bytes"] == pytest.approx(64 * 2**20, rel=0.05)
    assert abs(mapped["own_bytes"] - little["own_bytes"]) < 3 * 2**20


def gone():
    os._exit(1)


def test_a_process_that_ends_is_said_in_a_line():
    with pytest.raises(ValueError, match="gone: its process has ended, see above"):
        growth.alone(gone)


@pytest.mark.long
def test_the_command_writes_both_files_and_memory_does_not_grow(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(growth, "RUN", dataclasses.replace(growth.RUN, vocab_size=300))
    output = tmp_path / "growth.json"
    growth.main(f"--small 1 --large 5 --steps 20 --threads 1 --output {output}".split())
    found = json.loads(output.read_text())
    small, large = found["sizes"]
    assert (small["megabytes"], large["megabytes"]) == (1, 5)
    assert large["prepare"]["tokens"] == pytest.approx(5 * small["prepare"]["tokens"], rel=0.1)
    for row in (small, large):
        assert row["train"]["first"] > 0 < row["train"]["last"]
    if sys.platform == "linux":
        own = [row["train"]["own_bytes"] for row in (small, large)]
        assert own[1] == pytest.approx(own[0], rel=0.1)
    assert found["tokenising"][0]["cores"] == 1
    assert all(row["bytes"] == small["bytes"] for row in found["tokenising"])
    printed = capfd.readouterr().out
    assert "| | 1 MB | 5 MB | times |" in printed
    assert output.with_suffix(".md").read_text() in printed


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--small 0", "--small must be at least 1, not 0"),
        ("--small 5 --large 5", "--large must be more than --small, 5, not 5"),
        ("--data absent.txt", "absent.txt: no such file: --data takes a text file"),
        ("--large 1000000000", "choose smaller sizes, or another disk with TMPDIR"),
    ],
)
def test_mistakes_are_one_line(arguments, why, capsys):
    with pytest.raises(SystemExit) as left:
        growth.main(arguments.split())
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert why in err
    assert err.count("\n") == 1
