"""docs/chapters.md: its links, anchors, pictures and commands hold. Run as a program, this mends the anchors."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest

import tinygpt
from gpt import CHAPTERS, cli
from training.presets import PRESETS

ROOT = Path(__file__).parents[1]
CHAPTERS_MD = ROOT / "docs" / "chapters.md"
TEXT = CHAPTERS_MD.read_text("utf-8")

CODE_LINK = re.compile(r"\[`([\w.]+)`\]\((\.\./[\w/]+\.py)#([\w-]*)\)")
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
] + re.findall(r"`((?:tinygpt|python -m|make) [^`]+)`", TEXT)
EVERY_PRESET = [f"tinygpt train {name}" for name in PRESETS]


def anchor(name: str, file: Path) -> str:
    """The lines of a function, a class or a class's method, as GitHub points at them."""
    place: ast.AST = ast.parse(file.read_text("utf-8"))
    for part in name.split("."):
        found = [
            node
            for node in ast.iter_child_nodes(place)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
        ]
        assert found, f"{file} has no {name}"
        place = found[0]
    return f"L{place.lineno}-L{place.end_lineno}"


def mended(text: str) -> str:
    """With every link into the code where its name is."""

    def link(match: re.Match[str]) -> str:
        name, path, _ = match.groups()
        return f"[`{name}`]({path}#{anchor(name, CHAPTERS_MD.parent / path)})"

    return CODE_LINK.sub(link, text)


def test_every_link_into_the_code_points_at_what_it_names():
    for old, new in zip(CODE_LINK.finditer(TEXT), CODE_LINK.finditer(mended(TEXT)), strict=True):
        assert old[0] == new[0], "code has moved: `python -m tests.test_docs` updates the links"


def test_every_chapter_has_its_code_its_picture_and_what_it_leaves_broken():
    parts = re.split(r"^## (?=\d)", TEXT, flags=re.MULTILINE)[1:]
    assert [int(part.split()[0]) for part in parts] == [
        model.chapter for model in CHAPTERS.values()
    ]
    for part in parts:
        for wanted in ("](../gpt/", "](figures/", "```sh", "**Leaves broken:**"):
            assert wanted in part, f"no {wanted} in {part.splitlines()[0]}"
        assert re.search(r"\b(18|19|20)\d\d\b", part)


def test_every_link_and_picture_is_there():
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings}
    links = [target.partition("#") for target in re.findall(r"\]\(([^)\s]+)\)", TEXT)]
    assert {place for path, _, place in links if not path} <= anchors
    missing = {path for path, _, _ in links if not (CHAPTERS_MD.parent / path).exists()}
    assert not missing


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS + EVERY_PRESET))
def test_every_command_is_understood(command, monkeypatch):
    if command.startswith("make"):
        target = command.split()[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    monkeypatch.setattr(sys, "argv", shlex.split(command))

    def parse(prog, description, commands, arguments=None):
        assert cli._parse(prog, description, commands, arguments)

    monkeypatch.setattr(cli, "main", parse)
    tinygpt.main()


if __name__ == "__main__":
    CHAPTERS_MD.write_text(mended(TEXT), "utf-8")
