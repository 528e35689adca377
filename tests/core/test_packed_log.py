"""A packed log holds the lines of a plain one, wherever it was flushed, cut, gone on with, torn or looked into."""

from __future__ import annotations

import gzip
from io import TextIOWrapper
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core import files
from fedloom.core.errors import Refused
from fedloom.core.files import open_regular, read_lines
from fedloom.core.packed_log import PackedFile, log_size
from tests.support.storms import tries

STEPS = st.lists(
    st.tuples(st.text(max_size=40).map(lambda text: text.replace("\n", " ") + "\n"), st.booleans()), max_size=6
)


def opened(path: Path, size: int = 0) -> TextIOWrapper:
    file = open_regular(path, "ab")
    file.truncate(size)
    return TextIOWrapper(PackedFile(file), encoding="utf-8", newline="\n")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "trace.jsonl"


@given(steps=STEPS, again=STEPS, cut=st.integers(0, 12), torn=st.integers(0, 60))
@tries(200)
def test_lines_are_those_that_were_written(
    path: Path,
    steps: list[tuple[str, bool]],
    again: list[tuple[str, bool]],
    cut: int,
    torn: int,
) -> None:
    """A run that is killed and goes on: it is cut where its last checkpoint stood, and the rest is written anew."""
    places, written = [(0, 0)], b""
    with opened(path) as log:
        for line, checkpoint in steps:
            log.write(line)
            log.flush()
            written += line.encode()
            assert b"".join(read_lines(path)) == written, "a flush is enough to read it, in an unfinished member"
            if checkpoint:
                places.append((log_size(log), len(written)))
    size, length = places[cut % len(places)]
    assert b"".join(read_lines(path, size)) == written[length:]
    assert b"".join(read_lines(path, 0, size)) == written[:length]
    with path.open("r+b") as file:
        file.truncate(max(size, path.stat().st_size - torn))
    assert written.startswith(b"".join(read_lines(path))), "what is left of a torn log is its beginning"
    assert b"".join(read_lines(path, 0, size)) == written[:length]
    with opened(path, size) as log:
        log.writelines(line for line, _ in again)
    whole = written[:length] + "".join(line for line, _ in again).encode()
    assert b"".join(read_lines(path)) == whole
    assert not whole or gzip.decompress(path.read_bytes()) == whole, "any tool reads it"


def test_much_in_few_bytes_is_unpacked_in_pieces_and_its_lines_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 2**17)
    (tmp_path / "log").write_bytes(gzip.compress(b"x" * 2**24))
    with pytest.raises(Refused, match="a line of more than"):
        list(read_lines(tmp_path / "log"))


def test_a_damaged_log_is_refused_and_a_plain_one_is_read_as_before(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(bytes(range(10)) * 400 + b"\n"))
    packed[12:20] = b"\xff" * 8
    (tmp_path / "log").write_bytes(packed)
    with pytest.raises(Refused, match="damaged"):
        list(read_lines(tmp_path / "log"))
    (tmp_path / "plain").write_bytes(b"one\ntwo\nthree")
    assert list(read_lines(tmp_path / "plain", 4)) == [b"two\n", b"three"]
    assert list(read_lines(tmp_path / "plain", 0, 8)) == [b"one\n", b"two\n"]
    assert list(read_lines(tmp_path / "plain", 4, 7)) == []
