"""The gate passes on what is for sites, whole and unchanged, and nothing else, however it is dressed up."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.deploy.flower import keys
from fedloom.deploy.flower.gate import BODY, Gate, RequestRefused, body_length

CALL = b"POST /v1/fleet/pull-messages HTTP/1.1"
LENGTH = b"content-length: 3"


def test_a_call_of_a_site_passes() -> None:
    assert body_length(b"\r\n".join([CALL, b"Host: x", b"accept: */*", b"Content-Length: 12"])) == 12


@pytest.mark.parametrize(
    "lines",
    [
        [b"POST /v1/control/start-run HTTP/1.1", LENGTH],
        [b"POST /v1/control/register-node HTTP/1.1", LENGTH],
        [b"POST /v1/runtime/acquire-task HTTP/1.1", LENGTH],
        [b"POST /v1/fleet/../control/start-run HTTP/1.1", LENGTH],
        [b"POST /v1/fleet/%2e%2e/control/start-run HTTP/1.1", LENGTH],
        [b"POST /v1/fleet/x?y HTTP/1.1", LENGTH],
        [b"POST http://h/v1/fleet/pull-messages HTTP/1.1", LENGTH],
        [b"GET /docs HTTP/1.1", LENGTH],
        [b"GET /v1/fleet/pull-messages HTTP/1.1", LENGTH],
        [b"POST /v1/fleet/pull-messages HTTP/1.0", LENGTH],
        [b"POST  /v1/fleet/pull-messages HTTP/1.1", LENGTH],
        [CALL],
        [CALL, LENGTH, LENGTH],
        [CALL, b"content-length: 3, 3"],
        [CALL, b"content-length: +3"],
        [CALL, b"content-length: -3"],
        [CALL, b"content-length:"],
        [CALL, LENGTH, b"Transfer-Encoding: chunked"],
        [CALL, b"content-length : 3"],
        [CALL, LENGTH, b" folded"],
        [CALL, LENGTH, b"a: b\nc: d"],
        [CALL, LENGTH, b"a: b\rc: d"],
        [CALL, LENGTH, b"a: \0"],
        [CALL, LENGTH, b"Upgrade: h2c"],
        [CALL, LENGTH, b"Expect: 100-continue"],
        [CALL, f"content-length: {BODY + 1}".encode()],
        [CALL, LENGTH, b"a: b", b" folded"],
        [CALL, LENGTH, b"host: y"],
    ],
    ids=repr,
)
def test_whatever_leaves_a_doubt_is_refused(lines: list[bytes]) -> None:
    """Each head is complete but for its one fault."""
    with pytest.raises(RequestRefused):
        body_length(b"\r\n".join([lines[0], b"Host: x", *lines[1:]]))


@given(st.binary(max_size=300) | st.binary(max_size=60).map(lambda some: CALL + b"\r\nhost: x\r\n" + some))
def test_no_bytes_upset_it(head: bytes) -> None:
    with suppress(RequestRefused):
        assert 0 <= body_length(head) <= BODY


def through(
    tmp_path: Path, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bytes]]
) -> tuple[bytes, bytes]:
    """What a client hears who talks through a gate, and what came to the SuperLink behind it; both over TLS."""
    keys.new(tmp_path, ["localhost"])
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(tmp_path / "keys/server.crt", tmp_path / "keys/server.key")
    trusted = ssl.create_default_context(cafile=str(tmp_path / "keys/ca.crt"))
    came = bytearray()

    async def superlink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(2**16):
            came.extend(piece)
            if came.endswith(b"end"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                await writer.drain()
        writer.close()

    async def scene() -> bytes:
        inner = await asyncio.start_server(superlink, "127.0.0.1", 0, ssl=ours)
        outer = await asyncio.start_server(
            Gate(inner.sockets[0].getsockname()[1], trusted).serve, "127.0.0.1", 0, ssl=ours
        )
        async with inner, outer:
            port = outer.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusted, server_hostname="localhost")
            heard = await asyncio.wait_for(talk(reader, writer), 10)
            writer.close()
            return heard

    return asyncio.run(scene()), bytes(came)


def request(body: bytes, line: bytes = CALL) -> bytes:
    return line + b"\r\nhost: x\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n" + body


def test_calls_and_answers_go_through_unchanged_one_after_the_other(tmp_path: Path) -> None:
    one, two = request(b"x" * 3_000_000 + b"end"), request(b"end")

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        heard = b""
        for each in (one, two):
            writer.write(each)
            heard += await reader.readuntil(b"ok")
        return heard

    heard, came = through(tmp_path, talk)
    assert came == one + two
    assert heard.count(b"200 OK") == 2


@pytest.mark.parametrize("before", [b"", request(b"end")], ids=["at once", "after a call"])
def test_of_what_is_refused_the_superlink_hears_nothing(tmp_path: Path, before: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        if before:
            writer.write(before)
            await reader.readuntil(b"ok")
        writer.write(request(b"end", b"POST /v1/control/start-run HTTP/1.1"))
        return await reader.read()

    heard, came = through(tmp_path, talk)
    assert came == before
    assert heard.startswith(b"HTTP/1.1 403")
