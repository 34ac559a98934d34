"""The house: gpt and tokenizer are leaves that never meet, training and serving never each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "gpt": {"gpt"},
    "tokenizer": {"tokenizer"},
    "training": {"training", "gpt", "tokenizer"},
    "serving": {"serving", "gpt", "tokenizer"},
}
HEAVY = {
    "datasets": "training/data/sources.py",
    "sacrebleu": "training/tasks/translation.py",
    "tokenizers": "tokenizer/__init__.py",
    "fastapi": "serving/http/app.py",
    "uvicorn": "serving/http/server.py",
    "prometheus_client": "serving/metrics.py",
    "safetensors": "gpt/checkpoint.py",
    "matplotlib": "training/plots/plot.py",
}


def imports_of(file: Path) -> set[str]:
    """The packages that a file imports."""
    found = set()
    tree = ast.parse(file.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports hide where a name comes from"
            found.add((node.module or "").split(".")[0])
    return found


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_the_floors_below_it(package):
    for file in sources(package):
        assert imports_of(file) & PACKAGES.keys() <= PACKAGES[package], file


@pytest.mark.parametrize("library", HEAVY)
def test_each_heavy_library_has_one_importing_file(library):
    importers = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in sources(package)
        if library in imports_of(file)
    }
    assert importers == {HEAVY[library]}


def test_what_trains_from_prepared_tokens_needs_no_data_or_web_library():
    code = (
        "import sys, training.cli, serving.engine.engine;"
        "print({'datasets', 'fastapi', 'uvicorn', 'pyarrow'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_the_tokenizer_needs_no_torch():
    code = "import sys, tokenizer.__main__; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_every_source_file_says_what_it_is():
    for package in PACKAGES:
        for file in sources(package):
            assert ast.get_docstring(ast.parse(file.read_text("utf-8"))), file
