"""The Makefile's commands, with names that a shell or make would take apart."""

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
NAME = 'it\'s "my" $(RUN) $HOME `x`; # * \\n'

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")


@pytest.fixture
def make(tmp_path):
    """Run make in a folder whose programs print their arguments, one a line."""
    (tmp_path / "Makefile").symlink_to(MAKEFILE)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", ".venv/.installed", ".venv/.developed"):
        (tmp_path / name).touch()
    for name in ("python", "tinygpt"):
        (binaries / name).write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        (binaries / name).chmod(0o755)

    def make(*arguments, **environment):
        command = ["make", "--silent", *arguments]
        given = {"PATH": "/usr/bin:/bin", **environment}
        done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n")[:-1]

    return make


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], ["train"]),
        (
            ["train", "PRESET=lstm", f"DATA={NAME}", f"RUN={NAME}", "ARGS=--steps 3"],
            ["train", "lstm", "--data", NAME, "--run", NAME, "--steps", "3"],
        ),
        (["eval", f"RUN={NAME}", f"DATA={NAME}"], ["eval", NAME, "--data", NAME]),
        (
            ["sample", f"RUN={NAME}", f"PROMPT={NAME}", "TEMPERATURE=0.3"],
            ["sample", NAME, "--prompt", NAME, "--temperature", "0.3"],
        ),
        (["serve", f"RUN={NAME}", "ARGS=two", "PORT=80"], ["serve", NAME, "two", "--port", "80"]),
        (["ladder", f"DATA={NAME}"], ["ladder", "--data", NAME]),
        (["bench", f"DATA={NAME}"], ["-m", "benchmarks.train", "--data", NAME]),
        (["bench"], ["-m", "benchmarks.serve"]),
    ],
)
def test_names_stay_one_word(arguments, expected, make):
    assert make(*arguments) == expected


def test_names_from_the_environment(make):
    assert make("eval", RUN=NAME) == ["eval", NAME]
