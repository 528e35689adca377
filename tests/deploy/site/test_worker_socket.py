"""The socket to the worker: what is sent arrives, whatever else comes is refused, and nothing ends it."""

from __future__ import annotations

import ast
import logging
import random
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.deploy.site import worker_socket
from fedloom.deploy.site.worker_socket import (
    ANSWER,
    HEAD,
    MARK,
    STATUS,
    BrokenFrame,
    Listener,
    ask_worker,
    worker_status,
)

LIMIT = 3_000_000


class Echo:
    """A worker that gives back what it gets, turned round; `hold` makes it take its time."""

    def __init__(self, path: Path) -> None:
        self.listener, self.hold, self.busy = Listener(path, LIMIT), threading.Event(), threading.Event()
        self.hold.set()
        serving = (self.answer, lambda: b"{}", lambda size: f"{size} is too much".encode())
        self.thread = threading.Thread(target=self.listener.serve, args=serving)
        self.thread.start()

    def answer(self, body: bytes) -> bytes:
        self.busy.set()
        self.hold.wait()
        return body[::-1]


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Echo]:
    made = Echo(tmp_path / "worker.sock")
    yield made
    made.hold.set()
    made.listener.close()
    made.thread.join(5)
    assert not made.thread.is_alive()
    assert not made.listener.path.exists()


def sent(path: Path, data: bytes) -> bytes:
    """What comes back of these bytes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(5)
        line.connect(str(path))
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: line.recv(2**16), b""))


@pytest.mark.parametrize("size", [0, 1, 70_000, LIMIT])
def test_what_is_sent_arrives_and_so_does_the_answer(echo: Echo, size: int) -> None:
    body = random.Random(size).randbytes(size)
    assert ask_worker(echo.listener.path, body) == body[::-1]


def test_nobody_else_can_use_the_socket(echo: Echo) -> None:
    assert stat.S_IMODE(echo.listener.path.stat().st_mode) == 0o600


def test_what_a_dead_worker_left_is_replaced(tmp_path: Path) -> None:
    Listener(tmp_path / "s", LIMIT).door.close()
    listener = Listener(tmp_path / "s", LIMIT)
    listener.close()


def test_a_path_that_is_too_long_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="at most 107 bytes"):
        Listener(tmp_path / ("x" * 100), LIMIT)


def test_the_status_is_told_while_a_task_is_trained(echo: Echo) -> None:
    echo.hold.clear()
    asking = threading.Thread(target=ask_worker, args=(echo.listener.path, b"x"))
    asking.start()
    assert worker_status(echo.listener.path) == b"{}"
    echo.hold.set()
    asking.join(5)


def test_too_many_messages_at_once_are_refused_and_those_in_line_answered(echo: Echo) -> None:
    echo.hold.clear()
    path, answers = echo.listener.path, list[bytes]()
    asking = [
        threading.Thread(target=lambda: answers.append(ask_worker(path, b"ab")))
        for _ in range(1 + worker_socket.IN_LINE)
    ]
    for one in asking:
        one.start()
        echo.busy.wait(5)
    while echo.listener.waiting.qsize() < worker_socket.IN_LINE:
        time.sleep(0.001)
    with pytest.raises(BrokenFrame, match="wait already"):
        ask_worker(path, b"x")
    echo.hold.set()
    for one in asking:
        one.join(5)
    assert answers == [b"ba"] * (1 + worker_socket.IN_LINE)


def test_who_does_not_wait_leaves_the_worker_well(echo: Echo) -> None:
    echo.hold.clear()
    with pytest.raises(TimeoutError):
        ask_worker(echo.listener.path, b"x", timeout=0.05)
    echo.hold.set()
    assert ask_worker(echo.listener.path, b"xy") == b"yx"


def test_nobody_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ask_worker(tmp_path / "nowhere", b"x")


@pytest.mark.parametrize("size", [LIMIT + 1, 10 * LIMIT])
def test_a_message_above_the_limit_is_not_read_and_told_so(echo: Echo, size: int) -> None:
    assert ask_worker(echo.listener.path, bytes(size)) == f"{size} is too much".encode()


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "this is no frame"),
        (HEAD.pack(MARK, 7, 0), "no request 7"),
        (HEAD.pack(MARK, STATUS, 9) + bytes(9), "no request 2"),
        (HEAD.pack(MARK, ANSWER, 9) + bytes(8), "in the middle of a frame"),
        (MARK, "in the middle of a frame"),
        (b"", "in the middle of a frame"),
    ],
    ids=lambda told: str(told)[:20],
)
def test_junk_is_refused_with_the_reason(echo: Echo, frame: bytes, reason: str) -> None:
    reply = sent(echo.listener.path, frame)
    assert HEAD.unpack(reply[: HEAD.size])[:2] == (MARK, worker_socket.NONE)
    assert reason in reply[HEAD.size :].decode()
    assert ask_worker(echo.listener.path, b"ab") == b"ba"


def test_who_is_silent_in_the_middle_of_a_frame_is_let_go(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_socket, "PATIENCE", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.connect(str(echo.listener.path))
        line.sendall(HEAD.pack(MARK, ANSWER, 100) + b"half")
        line.settimeout(5)
        assert b"timed out" in b"".join(iter(lambda: line.recv(2**16), b""))


def junk(draw: random.Random) -> bytes:
    """A frame that is none, or not whole, or too long, or asks for what there is not."""
    kind = draw.choice([k for k in range(9) if k not in (ANSWER, STATUS)])
    size = draw.randrange(1, 500)
    return draw.choice(
        (
            draw.randbytes(draw.randrange(200)),
            HEAD.pack(MARK, ANSWER, size) + draw.randbytes(size - 1),
            HEAD.pack(MARK, ANSWER, draw.randrange(LIMIT + 1, 2**64)) + draw.randbytes(size),
            HEAD.pack(MARK, kind, size) + draw.randbytes(size),
            HEAD.pack(MARK, STATUS, size) + draw.randbytes(size),
        )
    )


def storm(path: Path, count: int, caplog: pytest.LogCaptureFixture) -> None:
    """So many junk frames, each refused; the worker is alive after each hundred, and memory does not grow."""
    caplog.set_level(logging.CRITICAL, "fedloom.worker")  # pytest would keep a line of each
    draw = random.Random(1)
    before = 0
    for number in range(count):
        reply = sent(path, junk(draw))
        assert HEAD.unpack(reply[: HEAD.size])[1] == worker_socket.NONE or reply.endswith(b"is too much")
        if number % 100 == 99:
            assert ask_worker(path, b"ab") == b"ba"
        if number == min(count // 2, 1000):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4_000, "kilobytes"


def test_a_storm_of_junk_frames_is_refused(echo: Echo, caplog: pytest.LogCaptureFixture) -> None:
    storm(echo.listener.path, 300, caplog)


@pytest.mark.slow
def test_ten_thousand_junk_frames_are_refused_and_memory_stays_flat(
    echo: Echo, caplog: pytest.LogCaptureFixture
) -> None:
    storm(echo.listener.path, 10_000, caplog)


def test_asking_imports_the_standard_library_only() -> None:
    code = "import sys; from fedloom.deploy.site.worker_socket import ask_worker; print({m.partition('.')[0] for m in sys.modules})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "pydantic", "flwr", "safetensors"} & ast.literal_eval(told)
