"""docs/chapters/: links, code, pictures, commands and printed output hold.

Run as a program, this updates the anchors and excerpts of code; with numbers of chapters after it,
also what `tinygpt chapter N` prints.
"""

import ast
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

import tinygpt
from gpt import CHAPTERS, cli
from training.chapters.commands import chapter_output
from training.presets import PRESETS

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "chapters.md"
PAGES = sorted((ROOT / "docs" / "chapters").glob("*.md"))
TEXTS = {page: page.read_text("utf-8") for page in [INDEX, *PAGES]}

CODE_LINK = re.compile(r"\[`([\w.]+)`\]\(((?:\.\./)+[\w/]+\.py)#([\w-]*)\)")
# A line with one link to code, then that code.
EXCERPT = re.compile(
    rf"^([^\n]*{CODE_LINK.pattern}[^\n]*\n\n```python\n)(.*?)^```$", re.MULTILINE | re.DOTALL
)
OUTPUT = re.compile(
    r"^(```sh\ntinygpt chapter (\d+)\n```\n\n```text\n)(.*?)^```$", re.MULTILINE | re.DOTALL
)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
COMMANDS = [
    line
    for text in TEXTS.values()
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
] + re.findall(r"`((?:tinygpt|python -m|make) [^`]+)`", "".join(TEXTS.values()))
EVERY_PRESET = [f"tinygpt train {name}" for name in PRESETS]


def find_definition(name: str, file: Path) -> ast.FunctionDef | ast.ClassDef:
    """A function, a class or a class's method."""
    place: ast.AST = ast.parse(file.read_text("utf-8"))
    for part in name.split("."):
        found = [
            node
            for node in ast.iter_child_nodes(place)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
        ]
        assert found, f"{file} has no {name}"
        place = found[0]
    assert isinstance(place, ast.FunctionDef | ast.ClassDef)
    return place


def anchor(name: str, file: Path) -> str:
    """The lines of a definition, as GitHub points at them."""
    node = find_definition(name, file)
    return f"L{node.lineno}-L{node.end_lineno}"


def excerpt(name: str, file: Path) -> str:
    """The source of a definition without its docstring."""
    node = find_definition(name, file)
    lines = file.read_text("utf-8").splitlines(keepends=True)
    source = lines[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        doc = node.body[0]
        del source[doc.lineno - node.lineno : (doc.end_lineno or doc.lineno) - node.lineno + 1]
    return textwrap.dedent("".join(source)).replace(":\n\n", ":\n", 1)


def mended(page: Path) -> str:
    """The page's text with every link into the code, and every excerpt of it, as the code is now."""

    def link(match: re.Match[str]) -> str:
        name, path, _ = match.groups()
        return f"[`{name}`]({path}#{anchor(name, page.parent / path)})"

    def block(match: re.Match[str]) -> str:
        head, name, path, _, _ = match.groups()
        return f"{head}{excerpt(name, page.parent / path)}```"

    return EXCERPT.sub(block, CODE_LINK.sub(link, TEXTS[page]))


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_links_into_the_code_and_excerpts_are_up_to_date(page):
    assert TEXTS[page] == mended(page), "code has moved: run `python -m tests.test_docs`"


# Those from 11 to 13 train models: tests/training/chapters/test_translators.py.
@pytest.mark.parametrize("number", [*range(1, 11), 14, 15])
def test_chapter_prints_what_its_page_shows(number):
    assert_prints_what_the_page_shows(number)


def assert_prints_what_the_page_shows(number: int) -> None:
    """Words are equal, and numbers to 2%: the last digit differs between processors."""
    [(_, _, expected)] = [m.groups() for m in OUTPUT.finditer(TEXTS[PAGES[number - 1]])]
    printed = "".join(f"{line}\n" for line in chapter_output(number))
    assert NUMBER.sub("N", printed) == NUMBER.sub("N", expected), (
        "run `python -m tests.test_docs N`"
    )
    values = ([float(n.replace(",", "")) for n in NUMBER.findall(t)] for t in (printed, expected))
    assert next(values) == pytest.approx(next(values), rel=0.02, abs=1e-9)


def test_every_chapter_has_its_parts():
    assert [int(page.stem[:2]) for page in PAGES] == [c.chapter for c in CHAPTERS.values()]
    for page in PAGES:
        for wanted in (
            "**You need:**",
            "](../../gpt/",
            "```python",
            "](../figures/",
            "\ntinygpt chapter ",
            "\ntinygpt train ",
            "**Predict, then try.**",
            "<details>",
            "**Leaves broken:**",
        ):
            assert wanted in TEXTS[page], f"no {wanted} in {page.name}"
        assert not re.search(r"```\w+\n```", TEXTS[page]), f"an empty block in {page.name}"
        assert re.search(r"\b(18|19|20)\d\d\b", TEXTS[page])


def test_every_link_and_picture_is_there():
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, place = target.partition("#")
            linked = page.parent / path if path else page
            assert "://" in target or linked.exists(), f"{page.name} has a dead link: {target}"
            if place and linked.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
                assert place in anchors, f"{page.name} has a dead link: {target}"


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS + EVERY_PRESET))
def test_every_command_is_understood(command, monkeypatch):
    if command.startswith("make"):
        target = command.split()[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    monkeypatch.setattr(sys, "argv", shlex.split(command))

    def parse(prog, description, commands, arguments=None, *_):
        assert cli._parse(prog, description, commands, arguments)

    monkeypatch.setattr(cli, "main", parse)
    tinygpt.main()


def printed_again(match: re.Match[str]) -> str:
    """A block of output, as the chapter prints it now."""
    head, number, old = match.groups()
    if number not in sys.argv[1:]:
        return f"{head}{old}```"
    return head + "".join(f"{line}\n" for line in chapter_output(int(number))) + "```"


if __name__ == "__main__":
    for page in TEXTS:
        page.write_text(OUTPUT.sub(printed_again, mended(page)), "utf-8")
