"""`tinygpt` has every verb of the four packages, and `python -m PACKAGE` runs the same ones."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import tinygpt
from gpt import cli
from tinygpt import VERBS
from tokenizer.__main__ import TINYGPT_VERBS

TYRO_PACKAGES = ["gpt", "serving", "training"]


def verbs_of(package):
    return [name for name, verb in VERBS.items() if verb.module.partition(".")[0] == package]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `tinygpt ARGUMENTS`; without tinygpt, `python -m ARGUMENTS`: code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", list(arguments))
        code = 0
        try:
            if arguments[0] == "tinygpt":
                tinygpt.main()
            else:
                runpy.run_module(arguments[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def command_table(monkeypatch, run):
    """Return the commands among which a command line chooses, by name."""

    def command_table(*arguments):
        tables = []
        with monkeypatch.context() as patch:
            patch.setattr(cli, "main", lambda *args: tables.append(args[2]))
            run(*arguments)
        (table,) = tables
        return {name: command.__qualname__ for name, command in table.items()}

    return command_table


def test_every_command_of_every_package_is_a_verb(command_table):
    for package in TYRO_PACKAGES:
        assert sorted(command_table(package)) == sorted(verbs_of(package))
    assert sorted(TINYGPT_VERBS.values()) == sorted(verbs_of("tokenizer"))


@pytest.mark.parametrize("package", TYRO_PACKAGES)
def test_python_m_runs_the_same_commands(package, command_table):
    expected = command_table(package)
    for verb in verbs_of(package):
        assert command_table("tinygpt", verb) == expected


def test_python_m_tokenizer_runs_the_same_commands(run, tmp_path):
    (tmp_path / "a.txt").write_text("a text " * 99)
    for name, arguments in (
        ("encode", ("bytes", "hi")),
        ("decode", ("bytes", "104", "105")),
        ("train", (str(tmp_path / "a.txt"), "--output", str(tmp_path / "tokenizer.json"))),
    ):
        expected = run("tokenizer", name, *arguments)
        assert expected[0] == 0
        assert run("tinygpt", TINYGPT_VERBS[name], *arguments) == expected


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_text(verb, run):
    code, out, err = run("tinygpt", verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: tinygpt {verb} ")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize(
    "command",
    [
        *([verb, "--help"] for verb in VERBS),
        ["--help"],
        ["presets"],
        ["chapters"],
        ["describe", "gpt"],
    ],
    ids=" ".join,
)
def test_output_in_any_encoding(command, encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["tinygpt", *command])
    with contextlib.suppress(SystemExit):
        tinygpt.main()
    stream.flush()
    assert len(stream.buffer.getvalue()) > 100


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 9 GiB"), torch.OutOfMemoryError("x")]
)
def test_too_little_memory_is_one_line(error, monkeypatch, run):
    def fail(model):
        raise error

    monkeypatch.setattr("gpt.summary.count_parameters", fail)
    code, _, err = run("tinygpt", "chapters")
    assert code == 2
    assert err == f"tinygpt: not enough memory: choose smaller sizes ({error})\n"


def test_too_large_a_tensor_is_one_line(monkeypatch, run):
    monkeypatch.setattr("gpt.summary.count_parameters", lambda model: torch.empty(2**55))
    code, _, err = run("tinygpt", "chapters")
    assert code == 2
    assert err.startswith("tinygpt: not enough memory: choose smaller sizes (")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", TINYGPT_VERBS)
def test_the_tokenizer_uses_the_names_that_were_typed(name, run):
    assert run("tokenizer", name, "--help")[1].startswith(f"usage: python -m tokenizer {name} ")
    for command, prog in (
        (("tinygpt", TINYGPT_VERBS[name]), f"tinygpt {TINYGPT_VERBS[name]}"),
        (("tokenizer", name), f"python -m tokenizer {name}"),
    ):
        for arguments, message in (
            ((), "the following arguments are required: "),
            (("absent.json", "1"), ""),
        ):
            code, out, err = run(*command, *arguments)
            assert (code, out) == (2, "")
            assert err.startswith(f"{prog}: {message}")
            assert err.count("\n") == 1


def test_help_lists_every_verb(run):
    for arguments in ((), ("-h",), ("--help",)):
        code, out, _ = run("tinygpt", *arguments)
        assert code == 0
        for name, verb in VERBS.items():
            assert f"  {name} " in out
            assert verb.help in out


def test_version(run):
    assert run("tinygpt", "--version") == (0, f"tinygpt {version('tinygpt')}\n", "")


def test_an_unknown_verb_is_one_line_and_exit_code_2(run):
    code, out, err = run("tinygpt", "evl")
    assert (code, out) == (2, "")
    assert err == (
        "tinygpt: no verb is named 'evl' (did you mean eval or lm-eval?); --help lists them\n"
    )
    code, _, err = run("tinygpt", "quux")
    assert (code, err) == (2, "tinygpt: no verb is named 'quux'; --help lists them\n")


@pytest.mark.parametrize("package", ["training.trainer", "serving.engine.engine"])
def test_openmp_workers_stop_spinning_before_torch_is_imported(package):
    """Otherwise two trainings on two cores run at an eighth of the speed each, instead of half."""
    code = (
        "import sys, os\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"import {package}"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.split()[0] == "1000"
