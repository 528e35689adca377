"""The table of model families in the documentation is what was measured last, of every family, and nothing in it is wrong."""

from __future__ import annotations

from bench.models import PAGE, kept_rows, summary, with_table
from tests.support.families import FAMILIES


def test_the_page_shows_what_was_measured() -> None:
    text, rows = PAGE.read_text(encoding="utf-8"), kept_rows()
    assert with_table(text, rows) == text, "run python -m bench.models --table"
    assert {row.family for row in rows} == FAMILIES.keys(), "run python -m bench.models"


def test_what_was_measured_is_within_the_bars() -> None:
    figures = summary(kept_rows())
    assert figures["families"] >= 40
    assert figures["refused_with_reason"] <= 4
    assert figures["silent_or_traceback"] == figures["largest_depth_gap"] == 0
    assert max(figures["largest_merge_gap"], figures["largest_export_gap"]) <= 1e-5
