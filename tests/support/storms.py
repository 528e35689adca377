"""How hard tests try: a random test with a tenth of its examples or all (STORMS), a long table with some cases or all (slow)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings

STORMS = int(os.environ.get("STORMS", "1"))
"""Tenths of the examples: 1 in `make check` and `make test`, 10 in `make storms`."""


def tries(count: int, **more: Any) -> settings:
    """Hypothesis' settings of a random test that tries so many examples in `make storms`, a tenth before, and at least one."""
    return settings(max_examples=max(1, count * STORMS // 10), deadline=None, **more)


def one_in(count: int, cases: Iterable[Any]) -> list[Any]:
    """Parameters of which the first of each `count` is tried in `make check`, and the others in `make test` only."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, marks=[pytest.mark.slow] * (k % count > 0)) for k, row in enumerate(rows)]
