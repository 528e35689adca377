"""The only door of the server to the network: it lets sites at the calls that are made for sites, and at nothing else.

    python -m fedloom.deploy.flower.gate --sockets NUMBER... --to PORT [--keys FOLDER]

Flower's SuperLink serves three interfaces at one port: Fleet for the sites, Runtime for the server's own processes, Control for
its owner. Without account servers anyone who reaches that port may, through Control, register a key or submit an app, which the
server would then run. So the SuperLink listens on loopback, and this gate in front of it ends TLS and passes on Fleet's calls.
It inherits sockets at which `fedloom serve` listens already, so that the port is the deployment's for as long as that runs.
It reads the heads of requests strictly (with h11), so that none can hide in another's body; answers go back as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import h11

TARGET = re.compile(rb"/v1/fleet/[a-z-]{1,64}")
REFUSED_FIELDS = frozenset([b"transfer-encoding", b"upgrade", b"expect"])
HEAD, BODY, CHUNK = 2**15, 2**26, 2**16
"""Bytes at most: of a request's head; of its body (Flower sends pieces of 5 MB); passed on at once."""
IDLE, CONNECTIONS = 300.0, 1024


class RequestRefused(Exception):
    """A request that is not for sites; the text is HTTP's status line."""


def body_length(head: bytes) -> int:
    """Return the length of the body behind the head of a request, which ends before the empty line.

    The head is read by h11, which follows RFC 9112. Where h11 is lenient (bare line feeds, folded lines, a length that stands twice)
    it would write other lines than it has read: such a head is refused, since the SuperLink might read it otherwise.

    Raises:
        RequestRefused: it is no call of Fleet, or leaves any doubt about where it ends.
    """
    parser, writer = h11.Connection(h11.SERVER, HEAD), h11.Connection(h11.CLIENT)
    parser.receive_data(head + b"\r\n\r\n")
    try:
        request = parser.next_event()
        if not isinstance(request, h11.Request):
            raise RequestRefused("400 Bad Request")
        if (request.method, request.http_version) != (b"POST", b"1.1") or not TARGET.fullmatch(request.target):
            raise RequestRefused("403 Forbidden")
        written = writer.send(request) or b""
    except h11.ProtocolError as error:
        raise RequestRefused("400 Bad Request") from error
    lengths = [int(value) for name, value in request.headers if name == b"content-length"]
    odd = any(name in REFUSED_FIELDS for name, _ in request.headers)
    if odd or len(lengths) != 1 or sorted(written.split(b"\r\n")) != sorted([*head.split(b"\r\n"), b"", b""]):
        raise RequestRefused("400 Bad Request")
    if lengths[0] > BODY:
        raise RequestRefused("413 Content Too Large")
    return lengths[0]


class Gate:
    """Passes requests from connections on to a SuperLink at `port` of loopback, over TLS if it has `trusted` certificates."""

    def __init__(self, port: int, trusted: ssl.SSLContext | None) -> None:
        self._port, self._trusted, self._open = port, trusted, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side ends it."""
        self._open += 1
        try:
            if self._open <= CONNECTIONS:
                await self._pass_on(reader, writer)
        except RequestRefused as error:
            writer.write(f"HTTP/1.1 {error}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        except (OSError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            pass
        finally:
            self._open -= 1
            await _close(writer)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await _head(reader)  # the first request is read before the SuperLink hears of the connection
        body_length(head)
        answers, asking = await asyncio.open_connection("127.0.0.1", self._port, ssl=self._trusted, limit=CHUNK)
        back = asyncio.create_task(_copy(answers, writer))
        there = asyncio.create_task(_requests(head, reader, asking))
        try:
            done, _ = await asyncio.wait({back, there}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (back, there):
                task.cancel()
            await asyncio.gather(back, there, return_exceptions=True)
            await _close(asking)


async def _requests(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        left = body_length(head)
        writer.write(head + b"\r\n\r\n")
        while left:
            piece = await asyncio.wait_for(reader.read(min(left, CHUNK)), IDLE)
            if not piece:
                return
            left -= len(piece)
            writer.write(piece)
            await writer.drain()
        await writer.drain()
        head = await _head(reader)


async def _head(reader: asyncio.StreamReader) -> bytes:
    return (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), IDLE))[:-4]


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(CHUNK):
        writer.write(piece)
        await writer.drain()


async def _close(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, ssl.SSLError, TimeoutError):
        writer.close()
        await asyncio.wait_for(writer.wait_closed(), 5.0)


async def run_gate(sockets: Sequence[socket.socket], to: int, keys: Path | None) -> None:
    """Accept connections until the process ends; with TLS if there are `keys`."""
    ours, trusted = None, None
    if keys is not None:
        ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ours.minimum_version = ssl.TLSVersion.TLSv1_2
        ours.load_cert_chain(keys / "server.crt", keys / "server.key")
        trusted = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    gate = Gate(to, trusted)
    servers = [await asyncio.start_server(gate.serve, sock=one, ssl=ours, limit=HEAD) for one in sockets]
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main(words: Sequence[str] | None = None) -> None:
    """Listen until the process is stopped."""
    parser = argparse.ArgumentParser(prog="fedloom.deploy.flower.gate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sockets", type=int, nargs="+", required=True, help="inherited sockets that sites connect to")
    parser.add_argument("--to", type=int, required=True, help="the SuperLink's port on loopback")
    parser.add_argument("--keys", type=Path, help="folder with ca.crt, server.crt and server.key (without: no TLS)")
    arguments = parser.parse_args(words)
    sockets = [socket.socket(fileno=number) for number in arguments.sockets]
    asyncio.run(run_gate(sockets, arguments.to, arguments.keys))


if __name__ == "__main__":
    main()
