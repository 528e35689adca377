"""Report pages with few pictures or none: what a page says is tested without drawing."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from fedloom.report.page import render_page, runs_page
from fedloom.report.run_log import RunLog

EMPTY = "<svg></svg>"
ALL = "all sections"


def page_text(*logs: RunLog, draw: Collection[str] = ()) -> str:
    """The page of these runs; pictures are drawn in the sections whose titles are in `draw`, and empty elsewhere."""
    page = runs_page(logs)
    sections = [
        section
        if draw == ALL or section.title in draw
        else replace(section, blocks=tuple(replace(b, picture=b.picture and (lambda: EMPTY)) for b in section.blocks))
        for section in page.sections
    ]
    return render_page(replace(page, sections=sections))


def section_text(text: str, title: str) -> str:
    """The HTML of one section; empty if the page has none of this title. Spaces that do not break become plain ones."""
    match = re.search(rf"<h2>{title}</h2>(.*?)</section>", text.replace("\u00a0", " "), re.DOTALL)
    return match[1] if match else ""


def visible_words(text: str) -> str:
    """Everything that a reader reads, the names of pictures too."""
    labels = re.findall(r'aria-label="([^"]*)"', text)
    return " ".join([*re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL).split(), *labels])
