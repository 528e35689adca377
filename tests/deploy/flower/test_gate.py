"""The gate passes on what is for sites, whole and unchanged, and nothing else, however it is dressed up."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.deploy.flower.gate import Connections, Gate, GateLimits, peer_network, read_head
from fedloom.deploy.flower.site_calls import RequestRefused

CALL = b"POST /v1/fleet/pull-messages HTTP/1.1"
LENGTH = b"content-length: 3"
BODY = PullMessagesRequest(message_ids=["end"]).SerializeToString()


def test_a_call_of_a_site_passes() -> None:
    request = read_head(b"\r\n".join([CALL, b"Host: x", b"accept: */*", b"Content-Length: 12"]))
    assert (request.call, request.length) == ("pull-messages", 12)


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
        [CALL, LENGTH, b"a: b", b" folded"],
        [CALL, LENGTH, b"host: y"],
    ],
    ids=repr,
)
def test_whatever_leaves_a_doubt_is_refused(lines: list[bytes]) -> None:
    """Each head is complete but for its one fault."""
    with pytest.raises(RequestRefused):
        read_head(b"\r\n".join([lines[0], b"Host: x", *lines[1:]]))


@given(st.binary(max_size=300) | st.binary(max_size=60).map(lambda some: CALL + b"\r\nhost: x\r\n" + some))
def test_no_bytes_upset_it(head: bytes) -> None:
    with suppress(RequestRefused):
        assert read_head(head).length >= 0


def through(
    folder: Path, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bytes]]
) -> tuple[bytes, bytes]:
    """What a client hears who talks through a gate without keys, and what came to the SuperLink behind it."""
    came = bytearray()

    async def superlink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(2**16):
            came.extend(piece)
            if came.endswith(BODY):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                await writer.drain()
        writer.close()

    async def scene() -> bytes:
        inner = await asyncio.start_server(superlink, "127.0.0.1", 0)
        outer = socket.create_server(("127.0.0.1", 0))
        gate = asyncio.create_task(Gate(inner.sockets[0].getsockname()[1], folder).listen(outer))
        async with inner:
            reader, writer = await asyncio.open_connection(*outer.getsockname())
            heard = await asyncio.wait_for(talk(reader, writer), 10)
            writer.close()
            gate.cancel()
            await all_tasks_ended()
            outer.close()
            return heard

    return asyncio.run(scene()), bytes(came)


async def all_tasks_ended() -> None:
    """Wait for the connections to end."""
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0.01)


def request(body: bytes, line: bytes = CALL) -> bytes:
    return line + b"\r\nhost: x\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n" + body


def test_calls_and_answers_go_through_unchanged_one_after_the_other(tmp_path: Path) -> None:
    one, two = request(PullMessagesRequest(message_ids=["x" * 900_000]).SerializeToString() + BODY), request(BODY)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(one + two)  # the second before the answer to the first
        return await reader.readuntil(b"ok") + await reader.readuntil(b"ok")

    heard, came = through(tmp_path, talk)
    assert came == one + two
    assert heard.count(b"200 OK") == 2


@pytest.mark.parametrize("before", [b"", request(BODY)], ids=["at once", "after a call"])
@pytest.mark.parametrize(
    ("refused", "status"),
    [
        (request(BODY, b"POST /v1/control/start-run HTTP/1.1"), 403),
        (request(BODY, b"POST /v1/fleet/list-nodes HTTP/1.1"), 403),
        (request(b"no protobuf"), 400),
        (request(bytes(GateLimits().small + 1)), 413),
    ],
    ids=["not for sites", "no call of sites", "garbage", "too large"],
)
def test_of_what_is_refused_the_superlink_hears_nothing(
    tmp_path: Path, before: bytes, refused: bytes, status: int
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        if before:
            writer.write(before)
            await reader.readuntil(b"ok")
        with suppress(OSError):
            writer.write(refused)
        return await reader.read(2**10)

    heard, came = through(tmp_path, talk)
    assert came == before
    assert heard.startswith(f"HTTP/1.1 {status}".encode())
    assert b"\r\nDate: " in heard


def test_an_answer_of_any_form_ends_where_it_ends(tmp_path: Path) -> None:
    """Chunked, or closed: a second request gets its own answer, or the connection ends."""
    parts = [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nok"]

    async def scene() -> list[bytes]:
        async def superlink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for part in parts:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(BODY))
                writer.write(part)
            writer.close()

        inner = await asyncio.start_server(superlink, "127.0.0.1", 0)
        outer = socket.create_server(("127.0.0.1", 0))
        gate = asyncio.create_task(Gate(inner.sockets[0].getsockname()[1], tmp_path).listen(outer))
        reader, writer = await asyncio.open_connection(*outer.getsockname())
        heard = []
        for part in parts:
            writer.write(request(BODY))
            heard.append(await reader.readexactly(len(part)))
        assert not await reader.read()
        writer.close()
        gate.cancel()
        inner.close()
        await all_tasks_ended()
        outer.close()
        return heard

    assert asyncio.run(scene()) == parts


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2", True),
    ],
)
def test_a_peer_is_an_address_or_a_network_that_one_user_has(one: str, other: str, same: bool) -> None:
    assert (peer_network(one) == peer_network(other)) is same


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["arrive", "know", "rest", "leave"])), max_size=60))
def test_strangers_never_end_a_known_connection_and_never_become_too_many(steps: list[tuple[int, str]]) -> None:
    """Whatever comes in whatever order: who has proved a key is ended by others of that key alone."""
    limits = GateLimits(strangers=5, peer=3, connections=2)
    table, strangers, known = Connections(limits), list[Task](), list[Task]()
    for who, what in steps:
        strangers = [task for task in strangers if not task.ended]
        if what == "arrive":
            before = [task for task in known if not task.ended]
            strangers.append(Task(who))
            table.arrive(strangers[-1], f"peer {who}")  # type: ignore[arg-type]
            assert not any(task.ended for task in before)
        elif what == "know" and (ours := [task for task in strangers if task.who == who]):
            with suppress(RequestRefused):
                table.know(ours[0], f"key {who}")  # type: ignore[arg-type]
                known.append(ours[0])
            strangers.remove(ours[0])
        elif ours := [task for task in known if task.who == who and not task.ended]:
            (table.rest(ours[0], f"key {who}") if what == "rest" else table.leave(ours[0]))  # type: ignore[arg-type]
            known = known if what == "rest" else [task for task in known if task is not ours[0]]
        here = [task for task in strangers if not task.ended]
        assert len(here) <= limits.strangers
        assert all(sum(task.who == one for task in here) <= limits.peer for one in range(4))


class Task:
    """Stands for the task of a connection."""

    def __init__(self, who: int) -> None:
        self.who, self.ended = who, False

    def cancel(self) -> None:
        self.ended = True


def test_what_is_refused_is_said_once_a_minute_with_how_often(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = Gate(1, tmp_path)
    for reason in ("413 large", "413 large", "413 large", "429 much"):
        error = RequestRefused(reason)
        assert gate._reported_refusal(None, error) is error
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["site"], line["reason"], line["times"]) for line in said] == [
        ("a site", "413 large", 1),
        ("a site", "429 much", 3),
    ]
