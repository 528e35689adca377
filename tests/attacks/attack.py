"""What an attack is: something that must fail against the defaults, and must succeed where what stops it is lifted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedloom.core.errors import Refused
from fedloom.core.schema import Malformed


@dataclass(frozen=True, slots=True)
class Attack:
    """An attempt on a site, a server, the wire or somebody's files.

    Fields:
        name: what is tried, in words.
        run: tries it in an empty folder, with the protection lifted (True) or as it is. Returns what came of it: how many texts or
            labels of the site were read, otherwise 1 where it succeeded; 0 where it failed.
        processes: whether it starts processes of its own, or takes long.
        reads: what `run` counts ("": nothing).
        in_gate: whether `make test` tries it too, as one that stands for its kind; `make redteam` tries all.
    """

    name: str
    run: Callable[[Path, bool], int]
    processes: bool = False
    reads: Literal["", "texts", "labels"] = ""
    in_gate: bool = False


def succeeds(attempt: Callable[[], object], words: str, *errors: type[Exception]) -> bool:
    """Whether an attempt is not refused. Where it is (`errors`, by default Refused and Malformed), then with these words."""
    expected = errors or (Refused, Malformed)
    try:
        attempt()
    except expected as error:
        reason = str(error)
    else:
        return True
    assert words in reason, reason
    return False
