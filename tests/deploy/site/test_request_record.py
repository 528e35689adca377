"""The record of a site: what was changed is told by its line, a power cut costs nothing, and limits count right."""

from __future__ import annotations

import json
import os
import random
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedloom.cli import main
from fedloom.cli.record_view import line_rows, print_record
from fedloom.core.errors import Refused
from fedloom.deploy.site import request_record
from fedloom.deploy.site.request_record import (
    BrokenRecord,
    RecordChain,
    RecordEntry,
    RequestRecord,
    SiteUsage,
)

KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC = KEY.public_key()
RUN, TERMS = "0123456789ab", "t" * 64
NOON = datetime(2026, 5, 3, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The disk is not waited for: the size of each file at each call is noted in its place."""
    sizes = list[int]()
    monkeypatch.setattr(os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    return sizes


def task(number: int, epochs: float = 0.5, **more: object) -> RecordEntry:
    given = {"run": "toy", "run_hash": RUN, "terms": TERMS, "request": f"r{number}", "epochs": epochs, "bytes_in": 10}
    return RecordEntry("task asked", task=number, **(given | more))  # type: ignore[arg-type]


def answer(number: int, size: int = 1000) -> RecordEntry:
    return RecordEntry("task answered", "toy", RUN, TERMS, number, f"r{number}", bytes_out=size, sent="5" * 64)


def written(path: Path, key: ec.EllipticCurvePrivateKey | None = KEY) -> list[bytes]:
    record = RequestRecord(path, key, lambda: NOON)
    for number in (1, 2, 3):
        record.append(task(number))
        record.append(answer(number))
    record.append(RecordEntry("refused", "a\x1b[2Jrun\u202e", RUN, reason="no: \u009b é"))
    return path.read_bytes().splitlines(keepends=True)


def verify(path: Path, key: ec.EllipticCurvePublicKey | None = PUBLIC) -> RecordChain:
    chain = RecordChain([key] if key else [])
    for _ in chain.lines(path):
        pass
    return chain


def broken_at(path: Path, lines: list[bytes], key: ec.EllipticCurvePublicKey | None = PUBLIC) -> int:
    path.write_bytes(b"".join(lines))
    with pytest.raises(BrokenRecord) as found:
        verify(path, key)
    return found.value.number


def test_each_line_is_on_the_disk_before_anything_else_happens(tmp_path: Path, synced: list[int]) -> None:
    record = RequestRecord(tmp_path / "record.jsonl", KEY)
    for number in (1, 2):
        record.append(task(number))
        assert synced[-1] == (tmp_path / "record.jsonl").stat().st_size > 0


def test_a_record_holds_is_its_owner_s_alone_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    os.umask(before := os.umask(0))
    lines = written(path)
    assert os.umask(before) == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    chain = verify(path)
    assert (chain.number, chain.unsigned, chain.loose) == (len(lines), 0, 0)
    record = RequestRecord(path, KEY)
    assert record.head == chain.head
    record.append(task(9))
    assert verify(path).number == len(lines) + 1
    assert all(line.isascii() for line in lines), "nothing in it does anything to a terminal"


@pytest.mark.parametrize("key", [KEY, None], ids=["signed", "chain alone"])
def test_every_way_to_alter_a_record_is_told_with_the_line(
    tmp_path: Path, key: ec.EllipticCurvePrivateKey | None
) -> None:
    path, public = tmp_path / "record.jsonl", key.public_key() if key else None
    lines, last = written(path, key), 6
    for at in range(last):  # any line but the last, which only a signature protects
        changed = [*lines]
        changed[at] = changed[at].replace(b'"run":"toy"', b'"run":"joy"')
        assert broken_at(path, changed, public) == at + 1
        assert broken_at(path, lines[:at] + lines[at + 1 :], public) == at + 1
        assert broken_at(path, [*lines[: at + 1], *lines[at:]], public) == at + 2
        assert broken_at(path, [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]], public) == at + 1
        assert broken_at(path, [*lines[:at], b"no line\n", *lines[at + 1 :]], public) in (at + 1, at + 2)
    if key:
        changed = [*lines[:last], lines[last].replace(b"no: ", b"oh: ")]
        assert broken_at(path, changed, public) == last + 1


def test_any_changed_byte_of_a_signed_record_is_found_or_counts_as_cut_off(tmp_path: Path) -> None:
    """All but the last line: there a byte can also look like a power cut, which is said."""
    path, draw = tmp_path / "record.jsonl", random.Random(5)
    whole = b"".join(written(path))
    last = whole[:-1].rindex(b"\n") + 1
    for _ in range(60):
        at = draw.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            chain = verify(path)
        except BrokenRecord:
            continue
        assert at >= last
        assert chain.loose == 7 or at == len(whole) - 1


def test_another_key_and_stripped_signatures_do_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.jsonl"
    lines = written(path)
    other = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(BrokenRecord, match="line 1 "):
        verify(path, other.public_key())
    path.unlink()
    forged = RequestRecord(path, None)  # who has the file and not the key writes it anew
    forged.append(task(1))
    with pytest.raises(Refused, match="the last 1 of 1 lines bear no signature"):
        print_record(path, [PUBLIC], "", False, 0)
    path.write_bytes(b"".join(lines))
    RequestRecord(path, None).append(task(8))
    assert verify(path).unsigned == 1
    print_record(path, [], "", False, 0)
    assert "no signature" in capsys.readouterr().out


def test_a_removed_end_is_found_by_the_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.jsonl"
    lines = written(path)
    head = verify(path).head
    print_record(path, [PUBLIC], head, False, 0)
    assert head in capsys.readouterr().out
    RequestRecord(path, KEY).append(task(4))
    print_record(path, [PUBLIC], head, False, 0)
    assert "line 7 of 8" in capsys.readouterr().out
    path.write_bytes(b"".join(lines[:-1]))
    print_record(path, [PUBLIC], "", False, 0)
    with pytest.raises(Refused, match="no line has this head"):
        print_record(path, [PUBLIC], head, False, 0)


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_a_record_that_was_cut_at_any_byte_goes_on_and_holds(tmp_path: Path, stride: int) -> None:
    path = tmp_path / "record.jsonl"
    whole = b"".join(written(path, None)[:2])
    for length in range(0, len(whole) + 1, stride):
        cut = whole[:length]
        path.write_bytes(cut)
        record = RequestRecord(path, None if length % 10 else KEY, lambda: NOON)
        record.append(task(7))
        after = path.read_bytes()
        assert after.startswith(cut), "what was there stays"
        lines = [json.loads(line) for line in after.splitlines() if line.endswith(b'"}')]
        torn = bool(cut) and not cut.endswith((b"\n", b'"}'))  # no line has such an end inside
        assert [line["kind"] == "cut off" for line in lines].count(True) == torn
        chain = verify(path)
        assert (chain.loose, chain.number) == (0, after.count(b"\n"))
        assert record.usage(task(0)).tasks_today == 1 + (b"}" in cut), "the first line asks, the second answers"


def test_a_second_cut_in_the_line_that_ends_the_first_goes_on_too(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    first = b"".join(written(path)[:2])[:-9]
    path.write_bytes(first)
    RequestRecord(path, KEY)
    ended = path.read_bytes()
    for length in range(len(first), len(ended), 41):
        path.write_bytes(ended[:length])
        RequestRecord(path, KEY).append(task(7))
        assert verify(path).loose == 0


def test_nobody_else_writes_into_it(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    lines = written(path)
    record = RequestRecord(path, KEY)
    RequestRecord(path, KEY).append(task(4))
    with pytest.raises(Refused, match="another process"):
        record.append(task(5))
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(Refused, match="line 3 "):
        RequestRecord(path, KEY)
    (tmp_path / "other").write_bytes(b"")
    for make in (lambda p: p.symlink_to(tmp_path / "other"), os.mkfifo, Path.mkdir):
        path.unlink()
        make(path)  # type: ignore[operator]
        with pytest.raises(Refused):
            RequestRecord(path, KEY)
        if path.is_dir():
            path.rmdir()
            path.touch()
    assert (tmp_path / "other").read_bytes() == b""


def test_a_line_for_which_there_is_no_room_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.jsonl"
    lines = written(path)
    record = RequestRecord(path, KEY, lambda: NOON)
    wrote = os.write

    def full(handle: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return wrote(handle, data[:100])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        record.append(task(4))
    monkeypatch.undo()
    assert path.read_bytes() == b"".join(lines)
    assert record.usage(task(4)).tasks_today == 3
    record.append(task(4))
    assert verify(path).number == 8


# Limits ---------------------------------------------------------------------------------------------------------------


def clock(*times: datetime) -> Callable[[], datetime]:
    left = [*times]
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_usage_counts_each_request_once_and_is_the_same_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = RequestRecord(path, None, lambda: NOON)
    for number in (1, 2):
        record.append(task(number, epochs=0.125))
        record.append(answer(number))
    record.append(RecordEntry("task answered", "toy", RUN, TERMS, 2, "r2", again=True, bytes_out=1000))
    record.append(task(4, epochs=0.25))
    record.append(task(4, epochs=0.25, again=record.was_asked("r4")))
    for request in ("e1", "e1", "e2"):
        record.append(RecordEntry("evaluation asked", "toy", RUN, TERMS, request=request))
    record.append(RecordEntry("evaluation answered", "toy", RUN, TERMS, request="e2", rows=60, bytes_out=100))
    scored = frozenset({60})
    wanted = SiteUsage(3, 3100, 0.5, 2, scored)
    for one in (record, RequestRecord(path, None, lambda: NOON)):
        assert one.usage(task(3)) == wanted
        assert one.usage(task(2)) == wanted, "its answer is in the journal; to train it anew is another task"
        assert one.usage(task(4)) == replace(wanted, tasks_today=2, run_epochs=0.25), "apart from what is asked"
        assert one.usage(RecordEntry("evaluation asked", "", RUN, request="e1")).run_evaluations == 1
        assert one.usage(RecordEntry("task asked", "", "f" * 12, "u" * 64)) == SiteUsage(3, 3100, 0.0, 0, scored), (
            "another run"
        )
        assert one.usage(RecordEntry("task asked", "", "f" * 12, TERMS)).run_evaluations == 2, (
            "another hash, the same terms"
        )
        assert (one.evaluation_number(RUN, "e2"), one.evaluation_number(RUN, "e9")) == (2, None)
        assert (one.was_evaluated(RUN, "e1"), one.was_evaluated(RUN, "e2")) == (False, True)


def test_a_task_that_failed_counts_and_another_attempt_counts_again(tmp_path: Path) -> None:
    record = RequestRecord(tmp_path / "record.jsonl", None, lambda: NOON)
    record.append(task(1, epochs=0.5))
    record.append(RecordEntry("refused", "toy", RUN, TERMS, 1, "r1", reason="RuntimeError"))
    assert not record.was_asked("r1")
    assert record.usage(task(1)) == SiteUsage(1, 0, 0.5, 0)


def test_a_clock_that_is_set_back_opens_no_second_quota(tmp_path: Path) -> None:
    path, yesterday, tomorrow = tmp_path / "record.jsonl", NOON - timedelta(days=1), NOON + timedelta(days=1)
    RequestRecord(path, None, lambda: NOON).append(task(1))
    record = RequestRecord(path, None, lambda: yesterday)
    assert record.usage(task(2)).tasks_today == 1
    record.append(task(2))
    assert record.usage(task(3)).tasks_today == 2
    assert RequestRecord(path, None, lambda: NOON).usage(task(3)).tasks_today == 2
    assert RequestRecord(path, None, lambda: tomorrow).usage(task(3)).tasks_today == 0


def test_a_flood_of_refusals_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_record, "MOST_LINES", 20)
    monkeypatch.setattr(request_record, "FLOOD", 10)
    path = tmp_path / "record.jsonl"
    record = RequestRecord(path, None, lambda: NOON)
    for _ in range(60):
        record.append(RecordEntry("refused", reason="not a valid message"))
    assert record.is_full()
    assert len(path.read_bytes().splitlines()) == 24
    monkeypatch.setattr(record, "_clock", lambda: NOON + timedelta(days=1))
    assert not record.is_full()


# In the terminal ------------------------------------------------------------------------------------------------------


def test_what_is_shown_fits_and_does_nothing_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.jsonl"
    written(path)
    record = RequestRecord(path, KEY, lambda: NOON)
    record.append(RecordEntry("noise spent", "toy", RUN, TERMS, 10**6, clip=1.0, multiplier=0.8))
    record.append(
        RecordEntry("evaluation answered", "x" * 200, RUN, rows=10**6, bytes_out=10**9, reason="a reason " * 60)
    )
    print_record(path, [PUBLIC], "", False, 0)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert all(char.isprintable() for char in shown.replace("\n", ""))
    totals = next(line for line in shown.splitlines() if line.startswith("toy "))
    assert totals.split() == ["toy", "3", "1.50", "0", "0", "1", "3.0", "kB"]
    print_record(path, [PUBLIC], "", True, 0)
    assert capsys.readouterr().out.encode() == path.read_bytes()


def test_the_command_leaves_with_code_2_where_a_record_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, public = tmp_path / "record.jsonl", tmp_path / "ward.pub"
    lines = written(path)
    public.write_bytes(PUBLIC.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b" ward\n")

    def code(*words: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["fedloom", "site", "log", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return stop.value.code, capsys.readouterr().err

    assert code("--record", path, "--key", public) == (0, "")
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    status, words = code("--record", path, "--key", public)
    assert status == 2
    assert "line 3 is numbered 4" in words.replace("\n", " ")
    for wrong in ((), ("--record", tmp_path / "none"), ("--record", path, "--key", path), ("--record", tmp_path)):
        assert code(*wrong)[0] == 2


def test_a_line_shows_only_what_stands_in_it() -> None:
    (row,) = line_rows({"time": "2026-05-03T12:00:00Z", "kind": "started"})
    assert row == "2026-05-03 12:00                started"
