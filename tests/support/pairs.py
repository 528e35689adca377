"""Pairs of an aggregator and a schedule that the server accepts."""

from __future__ import annotations

from fedloom.core.errors import Refused
from fedloom.core.policies import Aggregator, Schedule, require_enough_answers, require_fresh_answers


def goes_together(method: Aggregator, schedule: Schedule) -> bool:
    """Whether this pair makes sense, or is refused."""
    try:
        require_fresh_answers(method, schedule)
        require_enough_answers(method, schedule)
    except Refused:
        return False
    return True
