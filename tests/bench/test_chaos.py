"""`bench.chaos` in small: one kill of each kind, two sites, real processes. A minute or two; the long form is the bench's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.chaos import audit, stormed


@pytest.mark.slow
@pytest.mark.federation
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_answer_is_lost_or_counted_twice_whatever_is_killed(tmp_path: Path) -> None:
    counts = {"worker": 1, "supernode": 1, "serverapp": 1, "superlink": 1}
    told = stormed(tmp_path, 40, 0, counts, 0, 300.0, sites=2)
    assert told.pop("recovered") >= 3  # of what was killed last, the end of the run may come first
    assert told == {"accepted": told["accepted"], "kills": 4, "lost": 0, "double_counted": 0, "unfinished": 0}
    assert told["accepted"] >= 40


def line(event: dict[str, object], *commands: dict[str, object]) -> dict[str, object]:
    return {"event": event, "commands": [*commands]}


def test_the_audit_finds_what_is_lost_counted_twice_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace alone is looked at, so that the server's own bookkeeping cannot hide anything."""
    monkeypatch.setattr("bench.chaos.replay", lambda folder: type("Same", (), {"difference": ""}))
    sent = [{"type": "Dispatch", "task": {"id": task, "client": f"c{task % 2}"}} for task in range(1, 5)]
    came = [{"type": "UpdateArrived", "task": task, "client": f"c{task % 2}"} for task in range(1, 5)]
    first = line({"type": "TimerFired"}, *sent)
    lines = [first, line(came[0], {"type": "Publish", "updates": [1]}), line(came[1]), line(came[0])]
    found = audit(lines, tmp_path)
    assert (found.accepted, found.lost, found.double, found.unfinished) == ((1, 2, 1), (2,), 1, (3, 4))
    lines += [line(came[2], {"type": "Reject", "task": 3}), line({"type": "ClientLost", "client": "c0"})]
    assert audit(lines, tmp_path).unfinished == ()
    assert audit([first, first], tmp_path).double == 4
