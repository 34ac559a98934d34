"""docs/coverage.md and docs/errata.md: what they name exists, and every check of the errata holds."""

import doctest
import re
from pathlib import Path

import pytest

from tests.test_docs import find_definition

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text("utf-8") for name in ("coverage", "errata")}
ROWS = [row.split(" | ") for row in re.findall(r"^\| (\d+ \| .*) \|$", PAGES["coverage"], re.M)]
"""Number, item, page, code and test of every item."""
LINK = re.compile(r"\[`?([^\]`]+)`?\]\(([^)#]+)(?:#[^)]*)?\)")


def test_items_are_numbered_without_holes():
    assert [int(number) for number, *_ in ROWS] == list(range(1, len(ROWS) + 1))
    assert len(ROWS) > 120


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_what_it_names(page):
    for name, path in set(LINK.findall(PAGES[page])):
        target = DOCS / path
        assert target.is_file(), f"{page}.md has a dead link: {path}"
        if target.suffix == ".py":
            find_definition(name, target)


def test_every_item_is_on_a_page_and_has_a_test_or_a_reason():
    for number, _, page, _, tests in ROWS:
        assert "](chapters" in page, f"item {number} is on no page"
        names = [name for name, _ in LINK.findall(tests)]
        assert all(name.startswith("test_") for name in names), f"item {number}"
        assert names or len(tests.split()) > 4, f"item {number} has neither a test nor a reason"


def test_every_chapter_has_items():
    pages = {path for _, _, page, *_ in ROWS for _, path in LINK.findall(page)}
    assert {f"chapters/{path.name}" for path in (DOCS / "chapters").glob("*.md")} <= pages


def test_every_check_of_the_errata_holds():
    found = doctest.DocTestParser().get_doctest(PAGES["errata"], {}, "errata.md", None, 0)
    assert len(found.examples) > 30
    assert doctest.DocTestRunner().run(found).failed == 0


def test_errata_are_numbered_by_document_and_those_that_are_cited_exist():
    listed = re.findall(r"^\| ([A-E])(\d+) \|", PAGES["errata"], re.M)
    for document in "ABCDE":
        numbers = [int(number) for letter, number in listed if letter == document]
        assert numbers == list(range(1, len(numbers) + 1))
    cited = re.findall(r"\b([A-E])(\d+)\b", "".join(PAGES.values()))
    assert set(cited) == set(listed)
