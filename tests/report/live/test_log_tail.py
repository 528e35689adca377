"""A log is read as it grows: every line once, whole, whatever the pieces are."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.core.packed_log import MAGIC
from fedloom.report.live import log_tail
from fedloom.report.live.log_tail import LogReplaced, LogTail

LINES = [f'{{"number":{k},"text":"{"x" * (k * 7 % 50)}"}}'.encode() for k in range(60)]
TEXT = b"".join(line + b"\n" for line in LINES)


def read_all(tail: LogTail, length: int) -> list[bytes]:
    lines = tail.read(length)
    while tail.behind:
        lines += tail.read(length)
    return lines


@settings(deadline=None, max_examples=25)
@given(
    cuts=st.lists(st.integers(0, len(TEXT)), max_size=8),
    length=st.integers(1, 400),
    packed=st.booleans(),
)
def test_every_line_comes_once_in_order_whatever_the_pieces_are(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], length: int, packed: bool
) -> None:
    path = tmp_path_factory.mktemp("log") / "trace.jsonl"
    tail, found = LogTail(path), list[bytes]()
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(TEXT)], strict=True):
        piece = TEXT[begin:end]
        with path.open("ab") as file:
            file.write(gzip.compress(piece) if packed and piece else piece)
        found += read_all(tail, length)
    found += [line for _ in range(len(TEXT) // length + 1 if packed else 1) for line in tail.read(length)]
    assert found == LINES


def test_an_unfinished_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"a":1}\n{"b"')
    tail = LogTail(path)
    assert tail.read(1000) == [b'{"a":1}']
    with path.open("ab") as file:
        file.write(b":2}\n")
    assert tail.read(1000) == [b'{"b":2}']
    assert tail.read(1000) == []


def test_the_last_bytes_of_a_long_log_begin_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(TEXT)
    found = LogTail(path, most=500).read(10**6)
    assert 0 < sum(len(line) + 1 for line in found) <= 500
    assert found == LINES[-len(found) :]


@pytest.mark.parametrize("after", [b"", TEXT[:300], TEXT[:900].replace(b"x", b"y"), TEXT.replace(b"x", b"y") * 2])
def test_a_log_that_was_cut_or_written_again_is_noticed(tmp_path: Path, after: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(TEXT[:1000])
    tail = LogTail(path)
    tail.read(10**6)
    path.write_bytes(after)
    with pytest.raises(LogReplaced):
        tail.read(10**6)


def test_a_log_that_is_gone_is_noticed_and_one_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = LogTail(path)
    assert tail.read(100) == []
    path.write_bytes(TEXT)
    assert tail.read(10**6) == LINES
    path.unlink()
    with pytest.raises(LogReplaced):
        tail.read(100)


def test_a_line_that_is_too_long_is_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_tail, "LONGEST_SHOWN", 1000)
    path = tmp_path / "log"
    path.write_bytes(b"first\n" + b"x" * 5000 + b"\nlast\n")
    tail = LogTail(path)
    assert read_all(tail, 300) == [b"first", b"last"]
    assert tail.omitted == 1


def test_no_link_is_followed_and_no_damaged_log_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(TEXT)
    (tmp_path / "log").symlink_to(tmp_path / "secret")
    with pytest.raises(Refused, match="a link"):
        LogTail(tmp_path / "log").read(100)
    (tmp_path / "packed").write_bytes(MAGIC + b"\xff" * 500)
    with pytest.raises(Refused, match="damaged"):
        LogTail(tmp_path / "packed").read(10**6)


def test_a_small_packed_log_cannot_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(gzip.compress(b"x" * 10**7))
    tail = LogTail(tmp_path / "log")
    tail.read(1000)
    assert len(tail._rest) <= 1000
    assert tail.behind
