"""The Unix socket between a site's worker and whoever brings it messages. Bytes in, bytes out; the standard library only.

A frame is a head of 16 bytes (a mark, what is asked, the length) and a body. The head is judged before a byte of the body is read,
a body is at most as long as the site allows, and whoever is silent in the middle of a frame is let go.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from logging import getLogger
from pathlib import Path
from queue import SimpleQueue

LOG = getLogger("fedloom.worker")
HEAD = struct.Struct(">4sIQ")
MARK = b"FDLM"
ANSWER, STATUS, NONE = 1, 2, 3
"""What is asked for: the answer to a message, how the worker does. `NONE` is a reply: the frame was none, the body says why."""
PATIENCE = 20.0
"""Seconds of silence in the middle of a frame."""
AT_ONCE = 4
"""Frames that are read at once."""
IN_LINE = 2
"""Messages that wait while one is answered; more are refused."""
LONGEST = 107
"""Bytes that the path of a socket can have."""
PIECE = 2**20


class BrokenFrame(OSError):
    """The other side sent no frame, or went away in the middle of one."""


def ask_worker(path: Path, body: bytes, timeout: float | None = None) -> bytes:
    """Return the worker's answer to a message. `timeout` are the seconds that it may take to train (None: as long as it takes).

    Raises OSError where no worker listens, TimeoutError where it takes longer, Broken where it takes the frame for none.
    """
    return _asked(path, ANSWER, body, timeout)


def worker_status(path: Path, timeout: float | None = 5.0) -> bytes:
    """Return what the worker does, as JSON, also while it trains. Raises OSError."""
    return _asked(path, STATUS, b"", timeout)


def _asked(path: Path, kind: int, body: bytes, timeout: float | None) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(PATIENCE)
        line.connect(str(path))
        with suppress(BrokenPipeError):  # it may have refused the head already, and says why
            _send(line, kind, body)
        line.settimeout(timeout)
        replied, length = _head(line)
        line.settimeout(PATIENCE)
        reply = _body(line, length)
        if replied != kind:
            raise BrokenFrame(f"the worker takes this for no frame: {reply.decode(errors='replace')}")
        return reply


class Listener:
    """A socket at `path` that only its owner can use. Frames are read by a few threads and answered by the one that calls `serve`."""

    def __init__(self, path: Path, limit: int) -> None:
        """What another process left there is replaced: that none uses it is the caller's to know. Raises OSError."""
        if len(os.fsencode(path)) > LONGEST:
            raise OSError(f"a socket's path has at most {LONGEST} bytes: {path}")
        self.path, self.limit = path, limit
        self.waiting: SimpleQueue[tuple[socket.socket, bytes] | None] = SimpleQueue()
        self.door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            self.door.bind(str(path))
        finally:
            os.umask(before)
        self.door.listen(128)

    def serve(
        self, answer: Callable[[bytes], bytes], status: Callable[[], bytes], excess: Callable[[int], bytes]
    ) -> None:
        """Answer until `close`: one message at a time, in this thread; at once what the status is, and what is said to a message
        of so many bytes, which are too many. None of the three may raise.
        """
        for _ in range(AT_ONCE):
            threading.Thread(target=self._read, args=(status, excess), daemon=True).start()
        while (come := self.waiting.get()) is not None:
            line, body = come
            reply = answer(body)
            del come, body
            with closing(line), suppress(OSError):  # who has gone asks again
                _send(line, ANSWER, reply)

    def close(self) -> None:
        """No more frames are read; `serve` ends after the message that it answers."""
        with suppress(OSError):
            self.door.shutdown(socket.SHUT_RDWR)
        self.door.close()
        self.path.unlink(missing_ok=True)
        self.waiting.put(None)

    def _read(self, status: Callable[[], bytes], excess: Callable[[int], bytes]) -> None:
        while True:
            try:
                line, _ = self.door.accept()
            except OSError:  # closed
                return
            try:
                reply = self._take(line, status, excess)
            except OSError as error:
                LOG.warning("a frame was refused: %s", error)
                reply = NONE, str(error).encode()
            if reply is not None:
                with closing(line), suppress(OSError):
                    _reply_and_drain(line, *reply)

    def _take(
        self, line: socket.socket, status: Callable[[], bytes], excess: Callable[[int], bytes]
    ) -> tuple[int, bytes] | None:
        """What is to be said at once; None: a message has come, and waits. Raises OSError."""
        line.settimeout(PATIENCE)
        kind, length = _head(line)
        if kind == STATUS and not length:
            return STATUS, status()
        if kind != ANSWER:
            raise BrokenFrame(f"there is no request {kind}")
        if length > self.limit:
            return ANSWER, excess(length)
        if self.waiting.qsize() >= IN_LINE:
            raise BrokenFrame(f"busy, and {IN_LINE} messages wait already")
        self.waiting.put((line, _body(line, length)))
        return None


def _send(line: socket.socket, kind: int, body: bytes) -> None:
    line.sendall(HEAD.pack(MARK, kind, len(body)))
    line.sendall(body)


def _head(line: socket.socket) -> tuple[int, int]:
    """What is asked for, and the length of the body. Raises Broken."""
    mark, kind, length = HEAD.unpack(_body(line, HEAD.size))
    if mark != MARK:
        raise BrokenFrame("this is no frame")
    return kind, length


def _body(line: socket.socket, length: int) -> bytes:
    """So many bytes, and no memory for those that do not come. Raises Broken."""
    parts = list[bytes]()
    while length:
        parts.append(line.recv(min(length, PIECE)))
        if not parts[-1]:
            raise BrokenFrame("the other side went away in the middle of a frame")
        length -= len(parts[-1])
    return b"".join(parts)


def _reply_and_drain(line: socket.socket, kind: int, body: bytes) -> None:
    """Send a reply, then read on for a while: who is still sending would not get it if the line were closed at once."""
    line.settimeout(1.0)
    _send(line, kind, body)
    line.shutdown(socket.SHUT_WR)
    for _ in range(1000):
        if not line.recv(PIECE):
            return
