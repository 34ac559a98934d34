"""Layers: gpt and tokenizer import no other package; training and serving not each other."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "gpt": {"gpt"},
    "tokenizer": {"tokenizer"},
    "training": {"training", "gpt", "tokenizer"},
    "serving": {"serving", "gpt", "tokenizer"},
}
"""Each package, and those that it may import."""
LIBRARIES = {
    "datasets": "training/data",
    "datasketch": "training/data/duplicates.py",
    "huggingface_hub": "training",
    "sacrebleu": "training/tasks/translation.py",
    "tokenizers": "tokenizer/__init__.py",
    "fastapi": "serving/http/app.py",
    "uvicorn": "serving/http/server.py",
    "prometheus_client": "serving/metrics.py",
    "safetensors": "gpt/checkpoint.py",
    "gguf": "gpt/gguf.py",
    "matplotlib": "training/plots",
    "sklearn": "training/tasks/tables.py",
    "ray": "serving/ray_serve.py",
    "lm_eval": "training/evaluation/harness.py",
}
"""Each heavy library, and the only file or package that may import it."""


def imported_packages(file: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports hide where a name comes from"
            packages.add((node.module or "").split(".")[0])
    return packages


def source_files(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def output_of(code: str) -> str:
    """Run a program in a new interpreter."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_lower_layers(package):
    for file in source_files(package):
        assert imported_packages(file) & PACKAGES.keys() <= PACKAGES[package], file


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_heavy_library_is_imported_in_one_place(library):
    importers = {
        file.relative_to(ROOT)
        for package in PACKAGES
        for file in source_files(package)
        if library in imported_packages(file)
    }
    assert importers
    assert all(file.is_relative_to(LIBRARIES[library]) for file in importers)


def test_every_library_is_installed_by_make_setup():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    # lm_eval is one of the clients, an extra that may not be installed.
    dependencies = [*project["dependencies"], *extras["gguf"], *extras["clients"]]
    declared = {re.split("[^\\w-]", d)[0].replace("-", "_") for d in dependencies}
    declared |= {"starlette", "pydantic", "h11"}  # of fastapi and uvicorn
    declared |= {"httpx2"}  # of huggingface_hub
    distributions = importlib.metadata.packages_distributions()
    imported = set().union(*(imported_packages(f) for name in PACKAGES for f in source_files(name)))
    assert "ray" in extras  # click is one of uvicorn's
    imported -= {"ray", "click"}
    for library in imported - PACKAGES.keys() - sys.stdlib_module_names:
        installed = distributions.get(library, [library])
        names = {name.lower().replace("-", "_") for name in installed}
        assert declared & names, f"{library} is no dependency"


def test_training_and_engine_need_no_data_or_web_library():
    code = (
        "import sys, training.cli, serving.engine.engine;"
        "print({'datasets', 'huggingface_hub', 'fastapi', 'uvicorn', 'pyarrow'} & sys.modules.keys())"
    )
    assert output_of(code) == "set()"


@pytest.mark.parametrize("module", ["tokenizer.__main__", "tinygpt"])
def test_tokenizer_and_tinygpt_need_no_torch(module):
    assert output_of(f"import sys, {module}; print('torch' in sys.modules)") == "False"


def test_every_source_file_has_a_docstring():
    for package in PACKAGES:
        for file in source_files(package):
            assert ast.get_docstring(ast.parse(file.read_text("utf-8"))), file
