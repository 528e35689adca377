"""The site of docs builds without a warning, and its reference is what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import docs


def test_a_docstring_is_read_into_a_text_and_a_line_a_field() -> None:
    text, found = docs.sections(
        "Meaning.\n\nFields:\n    rank: the rank,\n        of all layers.\n    side: one.\n\nMore."
    )
    assert text.split() == ["Meaning.", "More."]
    assert found == {"Fields": {"rank": "the rank, of all layers.", "side": "one."}}


def test_every_page_of_the_docs_is_in_the_menu() -> None:
    menu = set(re.findall(r'"([\w/.-]+\.md)"', docs.CONFIG.read_text(encoding="utf-8")))
    root = docs.ROOT / "docs"
    pages = {f"docs/{path.relative_to(root)}" for path in root.rglob("*.md")} - {"docs/LOG.md"}
    assert {page for page in pages - menu if not page.startswith("docs/decisions/")} == set()
    made = {f"notebooks/{path.stem}.md" for path in docs.ROOT.glob("notebooks/*.ipynb")}
    assert {page for page in menu - pages if not (docs.ROOT / page).is_file()} == made | {
        "index.md",
        "docs/decisions/all.md",
    }


def test_a_notebook_becomes_a_page_with_what_it_showed(tmp_path: Path) -> None:
    code: dict[str, Any] = {
        "cell_type": "code",
        "source": ["a\n", "b"],
        "outputs": [{"output_type": "stream", "text": ["one\n"]}],
    }
    code["outputs"] += [
        {"output_type": "execute_result", "data": {"text/html": ["<b>x</b>\n", "\n", "y"], "text/plain": ["z"]}}
    ]
    book = {"cells": [{"cell_type": "markdown", "source": ["# Title"]}, code]}
    path = tmp_path / "small.ipynb"
    path.write_text(json.dumps(book))
    first, link, *shown = docs.notebook_page(path).strip().split("\n\n")
    assert (first, link) == ("# Title", "[Download this notebook](small.ipynb)")
    assert shown == ["```python\na\nb\n```", "```text\none\n```", "<b>x</b>\ny"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere() -> None:
    made = docs.pages()
    assert docs.out_of_date(made) == [], "run: make docs"
    assert [name for name, text in made.items() if re.search(r"PosixPath\(|0x[0-9a-f]{6}", text)] == [], (
        "of this machine"
    )
    warnings, said = docs.build()
    assert warnings == 0, said
    loaded = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?https?://')
    assert [page.name for page in docs.SITE.rglob("*.html") if loaded.search(page.read_text(encoding="utf-8"))] == []
