"""Run files in Python are code, and every page that shows one says so."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "run = Run(" in path.read_text("utf-8")
]
WARNING = "A run file in Python is executed: [run only files that you trust]("
TARGET = "run-folder.md#files-of-others"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_with_a_run_file_says_that_it_is_code(page: Path) -> None:
    text = page.read_text("utf-8")
    assert f"{WARNING}{'docs/' if page.parent == ROOT else ''}{TARGET})" in text


def test_there_are_such_pages_and_the_section_that_they_name() -> None:
    assert {"README.md", "deployment.md"} <= {page.name for page in PAGES}
    assert "\n## Files of others\n" in (ROOT / "docs" / "run-folder.md").read_text("utf-8")
