"""What an edge that is elsewhere tells beside its report, as JSON: read back by fields and kinds, or refused.

What the numbers may be is checked where they are used (`check.untellable`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from fedloom import kinds, trace
from fedloom.types import Profile, Told
from fedloom.values import Malformed, Reader, reachable

LONGEST = 2**22
"""Characters: some 10,000 members."""


@dataclass(frozen=True, slots=True)
class Telling:
    """What the root's plan is to learn, and who the edge leads now."""

    told: Told
    members: tuple[Profile, ...]


def written(telling: Telling) -> str:
    """As JSON."""
    return trace.written(telling)


def read(text: str) -> Telling:
    """What such a text tells. Raises Malformed, whatever the text is."""
    if len(text) > LONGEST:
        raise Malformed(f"what the edge tells has {len(text)} characters, above the limit of {LONGEST}")
    try:
        telling: Telling = Reader(reachable(Telling)).read(Telling, json.loads(text))
        kinds.check(telling)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Malformed(f"what the edge tells: {str(error)[:200] or type(error).__name__}") from error
    return telling
