"""The only door of the server to the network: it lets sites at the calls that are made for sites, and at nothing else.

    python -m fedloom.deploy.flower.gate --sockets NUMBER... --to PORT --home FOLDER [--keys FOLDER] [--quota MB]

Flower's SuperLink serves three interfaces at one port: Fleet for the sites, Runtime for the server's own processes, Control for
its owner. Without account servers anyone who reaches that port may, through Control, register a key or submit an app, which the
server would then run. So the SuperLink listens on loopback, and this gate in front of it ends TLS and passes on Fleet's calls.
It inherits sockets at which `fedloom serve` listens already, so that the port is the deployment's for as long as that runs.

It reads the heads of requests strictly (with h11), so that none can hide in another's body. The head must prove that its caller
holds a key of the roster before a byte of the body is read. A key acts for its own node: it pushes replies only, to messages that
wait for one, of the size that their answer can have. Who has proved nothing has ten seconds, and a place among few.

What it passes on it has whole: at most a piece of Flower's of 5 MB, of few pushes at a time and key.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import re
import resource
import socket
import ssl
import sys
import time
from asyncio.sslproto import SSLProtocol
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from email.utils import formatdate
from functools import partial
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, NoReturn

import h11
from flwr.supercore.error import ApiErrorCode

from fedloom.deploy.flower.roster import ROSTER, NotAuthenticated, Roster, RosterEntry, WrongTime
from fedloom.deploy.flower.site_calls import KEYLESS_CALLS, SITE_CALLS, CallRules, RequestRefused

TARGET = re.compile(rb"/v1/fleet/([a-z-]{1,64})")
REFUSED_FIELDS = frozenset([b"transfer-encoding", b"upgrade", b"expect"])
HEAD, CHUNK, RECORD = 2**13, 2**16, 2**14
"""Bytes at most: of a request's head; passed on at once; of a record of TLS."""
CLOCK_CODE = 2900
"""Code of our own, beside those of Flower, by which a site knows that its clock is wrong."""
DAY = 86400


@dataclass(frozen=True, slots=True)
class GateLimits:
    """Limits of the gate, in seconds and bytes.

    Fields:
        handshake: time for the handshake of TLS.
        head: time for a request's head, while no key is known.
        idle: time for the next head of a known key, for a part of its body, for the SuperLink's answer, and for reading a part of it.
        linger: time to end a connection in order.
        rate: bytes a second of a body, at least, after `head` seconds.
        strangers: connections without a known key.
        peer: those of one address among them (IPv6: of one network of 64 bits).
        oldest_out: whether the oldest of too many goes out (False: the newest, for tests of what that stops).
        connections: connections of a key.
        pushes: objects that a key pushes at a time; others wait. Other calls do not: a heartbeat must be in time.
        authenticate: whether a key is asked for before a body is read (False: for tests of what that stops).
        small: bytes of the body of a call that brings no object.
        large: bytes of the body of a call that brings one.
        replies_only: whether what is pushed is judged (False: for tests of what that stops).
        quota: bytes that a site may push a day, between restarts of the gate.
    """

    handshake: float = 10.0
    head: float = 10.0
    idle: float = 60.0
    linger: float = 2.0
    rate: float = 2.0**13
    strangers: int = 128
    peer: int = 32
    oldest_out: bool = True
    connections: int = 16
    pushes: int = 4
    authenticate: bool = True
    small: int = 2**20
    large: int = 2**23
    replies_only: bool = True
    quota: int = 2**35


@dataclass(frozen=True, slots=True)
class FleetRequest:
    """The head of a request: the call of Fleet, its headers, and the bytes of the body that follows."""

    call: str
    length: int
    event: h11.Request


def read_head(head: bytes) -> FleetRequest:
    """Read the head of a request, which ends before the empty line.

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
        call = TARGET.fullmatch(request.target)
        if (request.method, request.http_version) != (b"POST", b"1.1") or call is None:
            raise RequestRefused("403 Forbidden")
        written = writer.send(request) or b""
    except h11.ProtocolError as error:
        raise RequestRefused("400 Bad Request") from error
    lengths = [int(value) for name, value in request.headers if name == b"content-length"]
    odd = any(name in REFUSED_FIELDS for name, _ in request.headers)
    if odd or len(lengths) != 1 or sorted(written.split(b"\r\n")) != sorted([*head.split(b"\r\n"), b"", b""]):
        raise RequestRefused("400 Bad Request")
    return FleetRequest(call[1].decode("ascii"), lengths[0], request)


def peer_network(address: str) -> str:
    """Return whom an address stands for: itself, or its network of 64 bits, of which a single user has all addresses."""
    one = ip_address(address.partition("%")[0])
    if isinstance(one, IPv6Address):
        return str(one.ipv4_mapped or ip_network((one, 64), strict=False))
    return str(one)


class Connections:
    """The open connections. Where they become too many, the oldest that waits goes out: of strangers, of one peer, of one key.

    So strangers push out strangers only, and whoever proves a key at once is in before he is the oldest.
    """

    def __init__(self, limits: GateLimits) -> None:
        self._limits = limits
        self._strangers = dict[asyncio.Task[None], str]()
        self._known = dict[str, dict[asyncio.Task[None], bool]]()

    def arrive(self, task: asyncio.Task[None], peer: str) -> None:
        """Count a connection of which no key is known."""
        of_peer = [one for one, other in self._strangers.items() if other == peer]
        full = len(of_peer) >= self._limits.peer or len(self._strangers) >= self._limits.strangers
        self._strangers[task] = peer
        if full and self._limits.oldest_out:
            self._end(of_peer[0] if len(of_peer) >= self._limits.peer else next(iter(self._strangers)))
        elif full:
            self._end(task)

    def end_oldest(self) -> None:
        """End the oldest connection of which no key is known."""
        for oldest in list(self._strangers)[:1]:
            self._end(oldest)

    def know(self, task: asyncio.Task[None], key: str) -> None:
        """Count a connection as one of this key, which makes a call. Raises RequestRefused where all that it may have make calls."""
        self._strangers.pop(task, None)
        ours = self._known.setdefault(key, {})
        waiting = [one for one, calls in ours.items() if not calls and one is not task]
        if task not in ours and len(ours) >= self._limits.connections:
            if not waiting:
                raise RequestRefused("503 Service Unavailable")
            del ours[waiting[0]]
            waiting[0].cancel()
        ours[task] = True

    def rest(self, task: asyncio.Task[None], key: str) -> None:
        """Note that the connection makes no call now; it becomes the newest of those that wait."""
        ours = self._known.get(key, {})
        if ours.pop(task, None) is not None:
            ours[task] = False

    def leave(self, task: asyncio.Task[None]) -> None:
        """Forget a connection that has ended."""
        self._strangers.pop(task, None)
        for key in [key for key, ours in self._known.items() if ours.pop(task, None) is not None and not ours]:
            del self._known[key]

    def _end(self, task: asyncio.Task[None]) -> None:
        del self._strangers[task]
        task.cancel()


class Gate:
    """Passes requests from connections on to a SuperLink at `port` of loopback.

    Args:
        port: where the SuperLink listens.
        home: folder with the roster and the awaited replies.
        ours: certificate for the connections (None: without TLS and keys).
        trusted: certificates of the SuperLink (None: it has no TLS).
        limits: of connections and bodies.
    """

    def __init__(
        self,
        port: int,
        home: Path,
        ours: ssl.SSLContext | None = None,
        trusted: ssl.SSLContext | None = None,
        limits: GateLimits | None = None,
    ) -> None:
        self._port, self._ours, self._trusted = port, ours, trusted
        self._limits = limits or GateLimits()
        self._roster = Roster(home / ROSTER)
        self._rules = CallRules(home, self._limits.replies_only, self._limits.quota)
        self._connections = Connections(self._limits)
        self._pushes = dict[str, asyncio.Semaphore]()
        self._reported = dict[tuple[str, str], float]()
        self._refused = dict[str, int]()

    async def listen(self, door: socket.socket) -> NoReturn:
        """Accept connections at an open socket until the task is cancelled."""
        door.setblocking(False)
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(door)
            except OSError:  # too many files are open, or the peer has gone
                self._connections.end_oldest()
                await asyncio.sleep(0.05)
                continue
            task = asyncio.create_task(self._serve(accepted))
            self._connections.arrive(task, peer_network(address[0]))
            task.add_done_callback(self._connections.leave)
            task.add_done_callback(partial(_close_socket, accepted))

    async def _serve(self, accepted: socket.socket) -> None:
        """One connection, until either side ends it."""
        loop, limits = asyncio.get_running_loop(), self._limits
        reader = asyncio.StreamReader(limit=HEAD)
        protocol = asyncio.StreamReaderProtocol(reader)
        times = {"ssl_handshake_timeout": limits.handshake, "ssl_shutdown_timeout": limits.linger} if self._ours else {}
        with suppress(OSError):  # no handshake
            transport, _ = await loop.connect_accepted_socket(lambda: protocol, accepted, ssl=self._ours, **times)
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            try:
                await self._answer_requests(reader, writer)
            except RequestRefused as error:
                await self._refuse(reader, writer, error)
            except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, h11.ProtocolError, TimeoutError):
                pass
            finally:
                await _close(writer, limits.linger)

    async def _answer_requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on one request after the other, each with its answer."""
        task, bound, limits = _current_task(), "", self._limits
        superlink: SuperLinkConnection | None = None
        try:
            while True:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), limits.idle if bound else limits.head)
                request = read_head(head[:-4])
                caller = self._caller(request)
                key = caller.key if caller else f"connection {id(task)}"
                if bound not in ("", key):
                    raise RequestRefused("401 Unauthorized: one key a connection")
                bound = key
                if request.length > (limits.large if request.call == "push-object" else limits.small):
                    raise self._reported_refusal(caller, RequestRefused("413 Content Too Large"))
                self._connections.know(task, key)
                async with self._turn(request.call, key):
                    body = await self._read_body(reader, request.length)
                    try:
                        self._rules.check(request.call, body, caller)
                    except RequestRefused as error:
                        raise self._reported_refusal(caller, error) from error
                    superlink = superlink or await SuperLinkConnection.open(self._port, self._trusted)
                    goes_on = await superlink.ask(request.event, head, body, writer, limits.idle)
                del body
                self._connections.rest(task, key)
                if not goes_on:
                    return
        finally:
            if not self._roster.find(bound):
                self._pushes.pop(bound, None)
            if superlink is not None:
                await _close(superlink.writer, limits.linger)

    def _turn(self, call: str, key: str) -> AbstractAsyncContextManager[object]:
        """Return what a call waits for: its turn, if it pushes an object."""
        if call != "push-object":
            return nullcontext()
        return self._pushes.setdefault(key, asyncio.Semaphore(self._limits.pushes))

    async def _read_body(self, reader: asyncio.StreamReader, length: int) -> bytes:
        """Read a body. Raises TimeoutError where it comes too slowly, or nothing comes, and IncompleteReadError where it ends."""
        parts, left = list[bytes](), length
        async with asyncio.timeout(self._limits.head + length / self._limits.rate):
            while left:
                part = await asyncio.wait_for(reader.read(min(left, CHUNK)), self._limits.idle)
                if not part:
                    raise asyncio.IncompleteReadError(b"", left)
                parts.append(part)
                left -= len(part)
        return b"".join(parts)

    def _caller(self, request: FleetRequest) -> RosterEntry | None:
        """Return the caller of a request; None: there are no keys here. Raises RequestRefused."""
        if request.call not in SITE_CALLS and (self._ours or request.call not in KEYLESS_CALLS):
            code = ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED if request.call in KEYLESS_CALLS else 0
            raise RequestRefused("400 no node registers itself" if code else "403 Forbidden", code)
        if self._ours is None or not self._limits.authenticate:
            return None
        try:
            return self._roster.authenticate(list(request.event.headers))
        except NotAuthenticated as error:
            code = CLOCK_CODE if isinstance(error, WrongTime) else ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
            # a SuperNode that activates itself and is answered 401 ends without a word
            status = "400" if request.call == "activate-node" else "401"
            raise RequestRefused(f"{status} {error}", code) from error

    def _reported_refusal(self, caller: RosterEntry | None, error: RequestRefused) -> RequestRefused:
        """Say that something was refused to a known site, the same once a minute, with how often; returns the error."""
        name, now = caller.name if caller else "a site", time.monotonic()
        self._refused[name] = self._refused.get(name, 0) + 1
        if now > self._reported.get((name, str(error)), -DAY) + 60:
            self._reported[name, str(error)] = now
            line = {
                "time": round(time.time(), 3),
                "part": "gate",
                "event": "refused",
                "site": name,
                "reason": str(error),
                "times": self._refused.pop(name),
            }
            sys.stderr.write(json.dumps(line) + "\n")
        return error

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, error: RequestRefused) -> None:
        """Answer that a request is refused. What still comes is thrown away for a moment, so that the answer is read."""
        detail = json.dumps({"code": error.code, "detail": str(error)}) if error.code else ""
        fields = [f"HTTP/1.1 {error}", f"Date: {formatdate(usegmt=True)}", "Content-Type: application/json"]
        fields += [f"Content-Length: {len(detail)}", "Connection: close", "", detail]
        with suppress(OSError, TimeoutError):
            writer.write("\r\n".join(fields).encode())
            async with asyncio.timeout(self._limits.linger):
                await writer.drain()
                for _ in range(4):
                    if not await reader.read(CHUNK // 4):
                        break


@dataclass(frozen=True, slots=True)
class SuperLinkConnection:
    """A connection to the SuperLink, for the requests of one connection to the gate."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    parser: h11.Connection

    @classmethod
    async def open(cls, port: int, trusted: ssl.SSLContext | None) -> SuperLinkConnection:
        """Connect to the SuperLink."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusted, limit=CHUNK)
        return cls(reader, writer, h11.Connection(h11.CLIENT))

    async def ask(
        self, request: h11.Request, head: bytes, body: bytes, answer_to: asyncio.StreamWriter, idle: float
    ) -> bool:
        """Pass on a request and write its answer, as it is; returns whether another may follow."""
        for part in (request, h11.Data(data=body), h11.EndOfMessage()):
            self.parser.send(part)  # which writes it too; what is sent is what came
        self.writer.write(head)
        self.writer.write(body)
        await asyncio.wait_for(self.writer.drain(), idle)
        event: Any = None
        ended = False
        while not isinstance(event, h11.EndOfMessage):
            event = self.parser.next_event()
            if event is h11.NEED_DATA:
                piece = await asyncio.wait_for(self.reader.read(CHUNK), idle)
                self.parser.receive_data(piece)
                ended = not piece
                answer_to.write(piece)
                await asyncio.wait_for(answer_to.drain(), idle)
            elif isinstance(event, h11.ConnectionClosed):
                return False
        if ended or h11.MUST_CLOSE in (self.parser.our_state, self.parser.their_state):
            return False
        self.parser.start_next_cycle()
        return True


def _current_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def _close(writer: asyncio.StreamWriter, linger: float) -> None:
    """Close a connection; at once where its task was cancelled, or where the other side does not answer."""
    try:
        if not _current_task().cancelling():
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), linger)
    except (OSError, TimeoutError):
        pass
    finally:
        writer.transport.abort()


def _close_socket(accepted: socket.socket, task: asyncio.Task[None]) -> None:
    """Close the socket of a connection that has ended: its task may have been cancelled before its first step."""
    accepted.close()


def allow_many_files() -> int:
    """Let this process open as many files as the system allows it; returns how many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


async def run_gate(
    sockets: Sequence[socket.socket], to: int, home: Path, keys: Path | None, limits: GateLimits
) -> None:
    """Accept connections until the task is cancelled; with TLS and a roster if there are `keys`."""
    ours, trusted = None, None
    if keys is not None:
        ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ours.minimum_version = ssl.TLSVersion.TLSv1_2
        ours.options |= ssl.OP_NO_RENEGOTIATION
        ours.load_cert_chain(keys / "server.crt", keys / "server.key")
        trusted = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    gate = Gate(to, home, ours, trusted, limits)
    await asyncio.gather(*(gate.listen(one) for one in sockets))


def take_little_memory() -> None:
    """Let a connection take little memory, and give it back soon."""
    SSLProtocol.max_size = RECORD  # otherwise it keeps 2**18 bytes ready for each connection
    gc.collect()
    gc.freeze()  # what was imported is looked at no more, so that connections that have ended are soon collected


def main(words: Sequence[str] | None = None) -> None:
    """Listen until the process is stopped."""
    parser = argparse.ArgumentParser(prog="fedloom.deploy.flower.gate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sockets", type=int, nargs="+", required=True, help="inherited sockets that sites connect to")
    parser.add_argument("--to", type=int, required=True, help="the SuperLink's port on loopback")
    parser.add_argument("--home", type=Path, required=True, help="folder with the roster and the awaited replies")
    parser.add_argument("--keys", type=Path, help="folder with ca.crt, server.crt and server.key (without: no TLS)")
    parser.add_argument("--limits", type=json.loads, default={}, help="other limits, as JSON (for tests)")
    arguments = parser.parse_args(words)
    sockets = [socket.socket(fileno=number) for number in arguments.sockets]
    limits = GateLimits(**arguments.limits)
    limits = replace(limits, strangers=min(limits.strangers, allow_many_files() // 2))
    take_little_memory()
    asyncio.run(run_gate(sockets, arguments.to, arguments.home, arguments.keys, limits))


if __name__ == "__main__":
    main()
