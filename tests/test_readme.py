"""Every command in the README runs, in its order, in a fresh folder; with small figures where it would take minutes."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import hub

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
TEXT = README + (ROOT / "docs" / "training.md").read_text("utf-8")

SMALL = (
    "--steps 2 --batch-size 2 --context-length 64 --width 32 --depth 1 --heads 1 --eval-interval 2 "
    "--eval-tokens 256 --vocab-size 300 --gradient-accumulation-steps 1 --device cpu"
)


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [block for kind, block in found if kind == language]


COMMANDS = [
    line.partition("  #")[0].strip()
    for block in blocks("sh")
    for line in block.splitlines()
    if line.strip()
]


def quickened(command: str) -> str:
    """The command itself, with options at its end that make it take seconds."""
    if match := re.fullmatch(r'(make train.*?)(?: ARGS="(.*)")?', command):
        own = re.sub(r"--context-length \d+", "", match[2] or "")
        small = SMALL
        if "=lstm" in match[1] or "=translate-attention" in match[1]:
            small = SMALL.replace("--heads 1", "").replace("--depth 1", "")
        return f'{match[1]} ARGS="{own} {small}"'
    if command.startswith("tinygpt train --from"):
        return f"{command} --steps 2 --eval-interval 2 --eval-tokens 256"
    if command.startswith("tinygpt train gpt-nano"):
        small = re.sub(r"--(width|depth|heads|vocab-size) \d+", "", SMALL)
        return re.sub(r"--steps \d+", "", command) + " " + small
    return command


@pytest.fixture
def clone(tmp_path):
    """The project as in a fresh clone, with the environment of this test as its .venv."""
    for name in ("gpt", "tokenizer", "training", "serving", "benchmarks", "tests", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("README.md", "constraints.txt", "Makefile", "pyproject.toml", "tinygpt.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (binaries / "tinygpt").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tinygpt "$@"\n')
    for name in ("python", "tinygpt"):
        (binaries / name).chmod(0o755)
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
    for name in (".installed", ".developed"):
        (tmp_path / ".venv" / name).touch()
    text = "Once upon a time there was a text.\n" * 400
    (tmp_path / "my.txt").write_text(text)
    (tmp_path / "other.txt").write_text(text[:5000])
    row = {"translation": {"en": "A dog runs.", "fr": "Un chien court."}}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 200)
    stories = tmp_path / "hub" / "roneneldan" / "TinyStories"
    stories.mkdir(parents=True)
    (stories / "train.txt").write_text(text)
    return tmp_path


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
def test_every_command_runs(clone):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with hub.running(clone / "hub") as stand_in, contextlib.ExitStack() as servers:
        # What `make test ARGS=…` was given is not meant for the makes in here.
        given = {
            "ARGS",
            "DATA",
            "PRESET",
            "PROMPT",
            "RUN",
            "TEMPERATURE",
            "MFLAGS",
            "HF_HUB_OFFLINE",
        }
        own = {name: value for name, value in os.environ.items() if name not in given}
        environment = own | {
            "PYTHONPATH": str(clone),
            "HF_ENDPOINT": stand_in.address,
            "HF_HOME": str(clone / "hf"),
            "TINYGPT_CACHE": str(clone / "cache"),
            "PORT": port,
            # What is no terminal would be read as a prompt.
            "MAKEFLAGS": "--no-print-directory",
        }

        def shell(command):
            return subprocess.run(
                ["bash", "-c", f"source .venv/bin/activate; {command}"],
                cwd=clone,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
            )

        seen = []
        for command in COMMANDS:
            if command == "make serve":
                server = subprocess.Popen(
                    ["make", "serve"],
                    cwd=clone,
                    env=environment,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
                servers.callback(server.communicate)
                servers.callback(os.killpg, server.pid, signal.SIGTERM)
                assert any(f":{port}" in line for line in iter(server.stdout.readline, ""))
                continue
            done = shell(quickened(command).replace(":8000", f":{port}"))
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            seen.append(command)
            if command.startswith("curl"):
                assert done.stdout.strip().endswith("data: [DONE]")
                for code in blocks("python"):
                    done = shell(f"python - <<'END'\n{code.replace(':8000', f':{port}')}\nEND")
                    assert done.returncode == 0, done.stderr
            if command.startswith("make sample"):
                prompt = re.search(r'PROMPT="(.*?)"', command)[1]
                assert done.stdout.startswith(prompt)
        assert {"make train", "make eval", 'make sample PROMPT="def " TEMPERATURE=0.3'} <= set(seen)
        assert (clone / "loss.svg").exists()


def test_the_readme_is_short_and_its_tree_is_there():
    assert len(README.splitlines()) <= 150
    tree = next(block for block in blocks("") if block.startswith("gpt/"))
    folder = ROOT
    for line in tree.splitlines():
        names = re.match(r" *([\w.]+/?(?:  [\w.]+\.py)*)", line)[1].split()
        folder = folder if line.startswith(" ") else ROOT
        assert all((folder / name).exists() for name in names), line
        folder = folder if line.startswith(" ") else ROOT / names[0]
