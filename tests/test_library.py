"""docs/library.md: its examples run, type-check, and import what the packages export."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpt
import serving
import training

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "library.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PACKAGES = ("gpt", "tokenizer", "training", "serving")


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    Path("my.txt").write_text("Once upon a time there was a text.\n" * 200)
    namespace = {"__name__": "library"}
    assert len(EXAMPLES) == 4
    for example in EXAMPLES:
        exec(example, namespace)  # in order: later ones use the variables of earlier ones
        assert capsys.readouterr().out.strip()
    assert Path("runs/tiny/model.safetensors").exists()


@pytest.mark.long
def test_the_examples_have_types(tmp_path):
    """With the options and the cache of `make check`."""
    example, wrong = tmp_path / "example.py", tmp_path / "wrong.py"
    example.write_text("".join(EXAMPLES))
    wrong.write_text("from gpt import GPT\nfrom serving import nothing\nGPT(vocab_size='many')\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", example, wrong],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert re.findall(r"(\w+)\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE) == [
        ("wrong", "2", "attr-defined"),
        ("wrong", "3", "call-arg"),
        ("wrong", "3", "arg-type"),
    ]


def test_what_packages_export_is_there_and_what_the_page_imports_is_exported():
    for package in (gpt, training, serving):
        for name in package.__all__:
            assert getattr(package, name)
    for example in EXAMPLES:
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom) and node.module in ("gpt", "training", "serving"):
                exported = importlib.import_module(node.module).__all__
                assert {alias.name for alias in node.names} <= set(exported)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_marked_as_typed(package):
    assert (ROOT / package / "py.typed").is_file()


def test_serving_imports_no_web_framework_before_it_is_used():
    code = "import sys, serving; print('fastapi' in sys.modules); serving.create_app; print('fastapi' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="module 'serving' has no attribute 'create_ap'"):
        _ = serving.create_ap
