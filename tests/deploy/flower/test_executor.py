"""What the executor does when the worker is away, dies over a message, or comes back; over a real socket."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message

from fedloom.deploy.flower.executor import BROKEN, NoAnswer, answer_message, ask_until_answered
from fedloom.deploy.flower.grid import pack_body, unpack_body
from fedloom.deploy.site import worker_socket

Serve = Callable[[Callable[[bytes], bytes | None]], Path]


def message_of(content: RecordDict) -> Message:
    """As it arrives at node 7 from the server, node 1."""
    facts = Metadata(5, "id", 1, 7, "", "", time.time(), 60.0, "train")
    return make_message(metadata=facts, content=content)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts a worker of ours: it answers as told, or goes away in the middle (None)."""
    opened: list[socket.socket] = []

    def start(reply: Callable[[bytes], bytes | None]) -> Path:
        door = socket.socket(socket.AF_UNIX)
        door.bind(str(tmp_path / "worker.sock"))
        door.listen()
        opened.append(door)

        def loop() -> None:
            while True:
                try:
                    line, _ = door.accept()
                except OSError:
                    return
                with line:
                    _, _, length = worker_socket.HEAD.unpack(line.recv(worker_socket.HEAD.size, socket.MSG_WAITALL))
                    body = reply(line.recv(length, socket.MSG_WAITALL) if length else b"")
                    if body is not None:
                        line.sendall(
                            worker_socket.HEAD.pack(worker_socket.MARK, worker_socket.ANSWER, len(body)) + body
                        )

        threading.Thread(target=loop, daemon=True).start()
        return tmp_path / "worker.sock"

    yield start
    for door in opened:
        door.shutdown(socket.SHUT_RDWR)
        door.close()


def test_bytes_go_through_whatever_they_are(serve: Serve) -> None:
    path = serve(lambda body: body[::-1])
    for size in (0, 1, 3_000_000):
        body = os.urandom(size)
        assert ask_until_answered(path, body, 1.0) == body[::-1]


def test_a_message_waits_for_a_worker_that_is_being_restarted(serve: Serve, tmp_path: Path) -> None:
    threading.Timer(0.3, lambda: serve(lambda body: body + b"!")).start()
    assert ask_until_answered(tmp_path / "worker.sock", b"hello", 10.0) == b"hello!"


def test_the_wait_for_a_worker_ends(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(NoAnswer, match="no worker at this site for 0 seconds"):
        ask_until_answered(tmp_path / "worker.sock", b"hello", 0.3)
    assert time.monotonic() - begun < 3


def test_a_worker_that_died_over_a_message_is_asked_again(serve: Serve) -> None:
    answers = [None] * (BROKEN - 1)
    path = serve(lambda body: answers.pop() if answers else body)
    assert ask_until_answered(path, b"hello", 1.0) == b"hello"


def test_a_message_that_kills_every_worker_is_given_up(serve: Serve) -> None:
    seen: list[bytes] = []
    path = serve(lambda body: seen.append(body))
    with pytest.raises(NoAnswer, match=f"died {BROKEN} times"):
        ask_until_answered(path, b"hello", 1.0)
    assert len(seen) == BROKEN


def test_what_is_no_message_of_ours_is_answered_with_an_error_and_reaches_no_worker(tmp_path: Path) -> None:
    strange = message_of(RecordDict({"c": ConfigRecord({"import": "os"})}))
    reply = answer_message(strange, tmp_path / "none.sock", 0.1)
    assert reply.has_error()
    assert "not one array of bytes" in reply.error.reason


def test_an_answer_goes_to_whom_the_message_came_from(serve: Serve) -> None:
    message = message_of(pack_body(b"hello"))
    reply = answer_message(message, serve(lambda body: body * 2), 1.0)
    assert unpack_body(reply.content) == b"hellohello"
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id, reply.metadata.run_id) == (7, 1, 5)
