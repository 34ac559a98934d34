"""The Dockerfiles: no linter finds a fault, and they hold what the package needs."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import tinygpt

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
    "hadolint"
)


def instructions(file, name):
    """The arguments of an instruction wherever it stands, its lines joined."""
    text = re.sub(r"^#.*\n", "", file.read_text("utf-8"), flags=re.MULTILINE)
    return re.findall(rf"^{name} (.*)$", re.sub(r"\\\n\s*", "", text), re.MULTILINE)


def copied(file):
    """What is copied from the repository."""
    return {
        name
        for arguments in instructions(file, "COPY")
        if not arguments.startswith("--from")
        for name in arguments.split()[:-1]
    }


def test_there_is_one_to_serve_and_one_to_train():
    assert [file.stem for file in DOCKERFILES] == ["serve", "train"]


@pytest.mark.skipif(not HADOLINT, reason="hadolint is not installed: no wheel for this machine")
@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_hadolint_finds_nothing(file):
    done = subprocess.run([HADOLINT, "--no-color", file], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_base_is_pinned_and_the_user_is_not_root(file):
    for image in instructions(file, "FROM"):
        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+( AS build)?", image)
    (user,) = instructions(file, "USER")
    assert int(user.split(":")[0]) > 0  # Kubernetes' runAsNonRoot wants a number
    assert instructions(file, "HEALTHCHECK")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_everything_that_is_installed_is_copied(file):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = {verb.module.partition(".")[0] for verb in tinygpt.VERBS.values()}
    packages |= {
        pattern.rstrip("*")
        for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]
    }
    files = {"pyproject.toml", "constraints.txt", "tinygpt.py"}
    files |= {project["project"]["readme"], *project["project"]["license-files"]}
    assert copied(file) == packages | files
    assert "--constraint constraints.txt" in " ".join(instructions(file, "RUN"))


def test_dockerignore_leaves_what_is_copied_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for file in DOCKERFILES:
        assert {line[1:] for line in lines if line.startswith("!")} == copied(file)
    assert "*" in lines


@pytest.mark.parametrize("status", [200, 503, None])
def test_health_check_follows_health(status):
    """The command of the Dockerfile, against a server that answers so, or against none."""
    (check,) = instructions(DOCKERFILES[0], "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[0] == "python"
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with socket.socket() as unused, HTTPServer(("127.0.0.1", 0), Handler) as server:
        unused.bind(("127.0.0.1", 0))
        if status:
            threading.Thread(target=server.handle_request, daemon=True).start()
        port = server.server_port if status else unused.getsockname()[1]
        environment = os.environ | {"TINYGPT_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
        done = subprocess.run(
            [sys.executable, "-I", *command[1:]], env=environment, capture_output=True, timeout=30
        )
    assert done.returncode == (0 if status == 200 else 1)
    assert asked == (["/health"] if status else [])


def test_commands_of_the_docs_name_what_is_there():
    text = (ROOT / "docs" / "deployment.md").read_text("utf-8")
    (block,) = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    tags = set()
    for command in map(shlex.split, block.splitlines()):
        if command[:2] == ["docker", "build"]:
            assert ROOT / command[command.index("--file") + 1] in DOCKERFILES
            tags.add(command[command.index("--tag") + 1])
        else:
            assert command[:2] == ["docker", "run"]
            assert tags & set(command)
    for folder in ("/app", "/cache"):
        for file in DOCKERFILES:
            assert f" {folder}" in " ".join(instructions(file, "RUN"))
