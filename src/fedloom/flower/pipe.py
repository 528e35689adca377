"""One request over the worker's Unix socket: eight bytes of length, the body; the answer likewise."""

from __future__ import annotations

import socket

LENGTH = 8


def ask(path: str, body: bytes, timeout: float | None) -> bytes:
    """The answer to `body`; OSError where nobody listens, or where the other side went away in the middle."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(timeout)
        line.connect(path)
        line.sendall(len(body).to_bytes(LENGTH, "big"))
        line.sendall(body)
        return received(line, int.from_bytes(received(line, LENGTH), "big"))


def received(line: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes."""
    data = bytearray(size)
    view, have = memoryview(data), 0
    while have < size:
        count = line.recv_into(view[have:])
        if not count:
            raise ConnectionResetError("the other side went away in the middle of an answer")
        have += count
    return bytes(data)
