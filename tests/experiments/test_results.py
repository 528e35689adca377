"""The tables in the pages are those that the committed results give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_tables_in_the_pages_are_made_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "experiments" / "tables.py"), "--check"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    pages = [*ROOT.glob("experiments/*.md"), *ROOT.glob("docs/results/*.md")]
    assert any("<!-- table" in page.read_text(encoding="utf-8") for page in pages)
