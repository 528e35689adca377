"""Report pages with few pictures or none: what a page says is tested without drawing."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace

from fedloom.report.page import render_page, runs_page
from fedloom.report.run_log import RunLog

EMPTY = "<svg></svg>"
ALL = "all sections"


def page_text(*logs: RunLog, draw: Collection[str] = (), narrow: bool = False) -> str:
    """The page of these runs; pictures are drawn in the sections whose titles are in `draw`, for narrow pages too if asked for."""
    page = runs_page(logs)
    sections = [
        replace(
            section,
            blocks=tuple(
                replace(
                    block, picture=block.picture and _drawn(block.picture, draw == ALL or section.title in draw, narrow)
                )
                for block in section.blocks
            ),
        )
        for section in page.sections
    ]
    return render_page(replace(page, sections=sections))


def _drawn(picture: Callable[..., str], drawn: bool, both: bool) -> Callable[..., str]:
    return lambda narrow=False: picture(narrow=narrow) if drawn and both >= narrow else EMPTY


def section_text(text: str, title: str) -> str:
    """The HTML of one section; empty if the page has none of this title. Spaces that do not break become plain ones."""
    match = re.search(rf"<h2>{title}</h2>(.*?)</section>", text.replace("\u00a0", " "), re.DOTALL)
    return match[1] if match else ""


def visible_words(text: str) -> str:
    """Everything that a reader reads, the names of pictures too."""
    labels = re.findall(r'aria-label="([^"]*)"', text)
    return " ".join([*re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL).split(), *labels])
