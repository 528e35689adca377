"""Attacks over the network on the real process of the gate, before a stand-in for the SuperLink: plain functions with numbers."""

from __future__ import annotations

import asyncio
import base64
import json
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fedloom.core.files import write_json
from fedloom.deploy.flower import keys
from fedloom.deploy.flower.gate import GateLimits, run_gate
from fedloom.deploy.flower.roster import ROSTER, RosterEntry, write_roster
from fedloom.deploy.flower.site_calls import AWAITED
from fedloom.deploy.flower.supervisor import is_listening
from tests.attacks.attack import Attack

RUN, NODES = 7, {"one": 11, "two": 12}
AWAITS = {"one": "a" * 64, "two": "b" * 64}
"""The message to each site that waits for its reply."""
LARGEST = 2**20
"""Bytes of the reply that is awaited."""
MEGABYTE = 2**20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an attack came to.

    Fields:
        locked_out_seconds: until a request of an honest site was answered.
        memory_growth_mb: of the gate.
        passed_mb: what came to the SuperLink.
        statuses: of HTTP, of the requests of the attacker that were answered.
    """

    locked_out_seconds: float = 0.0
    memory_growth_mb: float = 0.0
    passed_mb: float = 0.0
    statuses: tuple[int, ...] = ()

    @property
    def succeeded(self) -> bool:
        """Whether a request of the attacker was passed on."""
        return 200 in self.statuses


@dataclass(slots=True)
class GateStage:
    """A gate process with two sites on its roster, and what came through it.

    Fields:
        folder: of the server.
        port: of the gate.
        process: the gate.
        keys: private keys of the sites, and of a stranger.
        bodies: bodies that came through.
        came: bytes that came through.
    """

    folder: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    keys: dict[str, ec.EllipticCurvePrivateKey] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    came: int = 0

    @property
    def trusted(self) -> ssl.SSLContext:
        """The authority, as a site trusts it."""
        return ssl.create_default_context(cafile=str(self.folder / "keys" / "ca.crt"))

    def write_roster(self, *names: str) -> None:
        """Accept these sites."""
        entries = [RosterEntry(pem(self.keys[name]).decode(), name, NODES[name]) for name in names]
        write_roster(self.folder / ROSTER, entries)

    def await_replies(self, largest: int) -> None:
        """Await one reply of each site."""
        write_json(
            self.folder / AWAITED,
            {"run": RUN, "nodes": {str(NODES[name]): {AWAITS[name]: largest} for name in NODES}},
        )

    def connect(
        self, context: ssl.SSLContext | None = None, source: str = "127.0.0.1", wait: float = 20
    ) -> ssl.SSLSocket:
        """Connect to the gate, from an address of this machine."""
        plain = socket.create_connection(("127.0.0.1", self.port), wait, (source, 0))
        return (context or self.trusted).wrap_socket(plain, server_hostname="localhost")

    def call(self, name: str | None, call: str, body: bytes, late: float = 0.0) -> int:
        """Call Fleet as a site, whose clock is late by so many seconds; returns the status (0: none)."""
        with closing(self.connect()) as line:
            return ask(line, call, body, self.headers(name, late))

    def headers(self, name: str | None, late: float = 0.0) -> Mapping[str, str]:
        """The headers that prove who a site is (None: none), as Flower's SuperNode sends them."""
        if name is None:
            return {}
        stamp = (datetime.now(UTC) - timedelta(seconds=late)).isoformat()
        signature = sign_message(self.keys[name], stamp.encode("ascii"))
        return {
            FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(pem(self.keys[name])).decode(),
            TIMESTAMP_HEADER: stamp,
            FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signature).decode(),
        }

    def memory(self) -> float:
        """Megabytes of memory of the gate."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public half of a key, as Flower sends it."""
    return bytes(public_key_to_bytes(key.public_key()))


def head(call: str, length: int, headers: Mapping[str, str]) -> bytes:
    """The head of a call of Fleet."""
    lines = [f"POST /v1/fleet/{call} HTTP/1.1", "host: localhost", f"content-length: {length}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode()


def ask(line: socket.socket, call: str, body: bytes, headers: Mapping[str, str]) -> int:
    """Send a request and return the status of its answer; 0 if the connection ends without one."""
    with suppress(OSError):
        line.sendall(head(call, len(body), headers) + body)
    return status_of(line)


def status_of(line: socket.socket) -> int:
    """The status of the answer that comes; 0 if the connection ends without one."""
    with suppress(OSError, ValueError, IndexError):
        return int(line.recv(4096).split()[1])
    return 0


@contextmanager
def gate_stage(folder: Path, limits: GateLimits, process: bool = False) -> Iterator[GateStage]:
    """A running gate with these limits: a process of its own where memory is measured, else a thread, which begins at once."""
    keys.new(folder, ["localhost"])
    stage = GateStage(folder)
    stage.keys = {"stranger": ec.generate_private_key(ec.SECP384R1())}
    for name in NODES:
        private, _ = keys.site(name, folder / "sites")
        loaded = load_ssh_private_key(private.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        stage.keys[name] = loaded
    stage.write_roster(*NODES)
    stage.await_replies(LARGEST)
    with ExitStack() as opened:
        inner = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=256))
        outer = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
        opened.callback(inner.shutdown, socket.SHUT_RDWR)
        threading.Thread(target=_superlink, args=(stage, inner), daemon=True).start()
        stage.port = outer.getsockname()[1]
        begin = _gate_process if process else _gate_thread
        opened.enter_context(begin(stage, outer, inner.getsockname()[1], limits))
        assert is_listening("127.0.0.1", stage.port)
        if limits.authenticate:
            assert stage.call("one", "pull-messages", pull("one")) == 200
        stage.bodies, stage.came = [], 0
        yield stage


@contextmanager
def _gate_process(stage: GateStage, outer: socket.socket, inner: int, limits: GateLimits) -> Iterator[None]:
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192) if most > 0 else 8192, most))
    command = [sys.executable, "-m", "fedloom.deploy.flower.gate", "--sockets", str(outer.fileno())]
    command += ["--home", str(stage.folder), "--to", str(inner), "--keys", str(stage.folder / "keys")]
    command += ["--limits", json.dumps(asdict(limits))]
    with subprocess.Popen(command, pass_fds=(outer.fileno(),), stderr=subprocess.DEVNULL) as stage.process:
        yield
        stage.process.kill()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))


@contextmanager
def _gate_thread(stage: GateStage, outer: socket.socket, inner: int, limits: GateLimits) -> Iterator[None]:
    loop = asyncio.new_event_loop()

    def serve() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner, suppress(asyncio.CancelledError):
            runner.run(run_gate([outer], inner, stage.folder, stage.folder / "keys", limits))

    def stop() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield
    loop.call_soon_threadsafe(stop)
    thread.join(10)


def _superlink(stage: GateStage, door: socket.socket) -> None:
    """Answer each request with two bytes, and count what came: the stand-in for the SuperLink."""
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(stage.folder / "keys/server.crt", stage.folder / "keys/server.key")
    while True:
        try:
            line, _ = door.accept()
        except OSError:
            return
        threading.Thread(target=_answer, args=(stage, ours, line), daemon=True).start()


def _answer(stage: GateStage, ours: ssl.SSLContext, plain: socket.socket) -> None:
    with suppress(OSError), ours.wrap_socket(plain, server_side=True) as line, line.makefile("rb") as came:
        while start := came.readline():
            fields = {}
            while field_line := came.readline().strip():
                name, _, value = field_line.partition(b":")
                fields[name.lower()] = value
            left = int(fields[b"content-length"])
            keep = left < MEGABYTE
            body = b""
            while left:
                piece = came.read(min(left, 2**16))
                if not piece:
                    return
                left -= len(piece)
                stage.came += len(piece)
                body += piece if keep else b""
            stage.bodies.append(body)
            stage.came += len(start)
            line.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


# What sites send ------------------------------------------------------------------------------------------------------


def pull(name: str) -> bytes:
    """A site asks for work."""
    return bytes(PullMessagesRequest(node=Node(node_id=NODES[name])).SerializeToString())


def reply(name: str, objects: Sequence[str] = ("c" * 64,), **other: object) -> bytes:
    """A site announces its reply; `other` replaces fields of the message."""
    node = NODES[name]
    fields = {"run_id": RUN, "message_id": objects[0], "src_node_id": node, "dst_node_id": 1}
    about = Metadata(**{**fields, "reply_to_message_id": AWAITS[name], **other})  # type: ignore[arg-type]
    tree = ObjectTree(object_id=objects[0], children=[ObjectTree(object_id=one) for one in objects[1:]])
    request = PushMessagesRequest(node=Node(node_id=node), messages_list=[Message(metadata=about)])
    request.message_object_trees.append(tree)
    return bytes(request.SerializeToString())


def piece(name: str, number: str, size: int) -> bytes:
    """A site pushes an object."""
    request = PushObjectRequest(node=Node(node_id=NODES[name]), run_id=RUN, object_id=number, session_id="s")
    request.object_content = bytes(size)
    return bytes(request.SerializeToString())


# Attacks --------------------------------------------------------------------------------------------------------------


def idle_connections(folder: Path, limits: GateLimits, count: int = 2000, patience: float = 15.0) -> Outcome:
    """So many idle TLS connections from one address; then a site asks for work, from that address too."""
    with gate_stage(folder, limits, process=True) as stage, ExitStack() as opened:
        context, before = stage.trusted, stage.memory()
        for _ in range(count):
            with suppress(OSError):
                opened.enter_context(stage.connect(context))
        begun = time.monotonic()
        while time.monotonic() < begun + patience:
            with suppress(OSError), closing(stage.connect(wait=patience)) as line:
                if ask(line, "pull-messages", pull("two"), stage.headers("two")) == 200:
                    break
            time.sleep(0.1)
        return Outcome(time.monotonic() - begun, stage.memory() - before)


def silent_connections(folder: Path, limits: GateLimits, count: int = 2000, addresses: int = 100) -> Outcome:
    """So many connections that do not even begin TLS, from many addresses; a site asks for work once they are there."""
    with gate_stage(folder, limits, process=True) as stage, ExitStack() as opened:
        before, status = stage.memory(), 0
        for number in range(count):
            source = f"127.0.1.{1 + number % addresses}"
            opened.enter_context(socket.create_connection(("127.0.0.1", stage.port), 20, (source, 0)))
        begun = time.monotonic()
        with suppress(OSError):
            status = stage.call("two", "pull-messages", pull("two"))
        return Outcome(time.monotonic() - begun if status == 200 else 60.0, stage.memory() - before)


def bodies_without_key(folder: Path, limits: GateLimits, count: int = 10, megabytes: int = 57) -> Outcome:
    """Bodies of so many megabytes by nobody, sent as far as they are taken, and held open."""
    with gate_stage(folder, limits, process=True) as stage, ExitStack() as opened:
        before, block, statuses = stage.memory(), bytes(MEGABYTE), list[int]()

        def send(number: int) -> None:
            with suppress(OSError):
                line = opened.enter_context(stage.connect(source=f"127.0.2.{1 + number % 200}"))
                line.settimeout(5)
                line.sendall(head("push-object", (megabytes + 1) * MEGABYTE, {}))
                with suppress(OSError):
                    for _ in range(megabytes):
                        line.sendall(block)
                line.settimeout(1)
                statuses.append(status_of(line))

        threads = [threading.Thread(target=send, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        most = before
        while any(thread.is_alive() for thread in threads):
            most = max(most, stage.memory())
            time.sleep(0.02)
        most = max(most, stage.memory())
        return Outcome(0.0, most - before, stage.came / MEGABYTE, tuple(statuses))


def call_as(
    folder: Path, limits: GateLimits, call: str, body: bytes, name: str | None = "one", late: float = 0
) -> Outcome:
    """One call of a site whose clock is late, or of nobody."""
    with gate_stage(folder, limits) as stage:
        status = stage.call(name, call, body, late)
        return Outcome(passed_mb=stage.came / MEGABYTE, statuses=(status,))


def another_key_on_a_connection(folder: Path, limits: GateLimits) -> Outcome:
    """A request with another site's key on a connection that one has opened."""
    with gate_stage(folder, limits) as stage, closing(stage.connect()) as line:
        assert ask(line, "pull-messages", pull("one"), stage.headers("one")) == 200
        return Outcome(statuses=(ask(line, "pull-messages", pull("two"), stage.headers("two")),))


def large_reply(folder: Path, limits: GateLimits, awaited: int = LARGEST, megabytes: int = 600) -> Outcome:
    """A reply of so many megabytes, in pieces of five, until it is refused."""
    with gate_stage(folder, limits) as stage:
        stage.await_replies(awaited)
        pieces = [f"{number:064x}" for number in range(megabytes // 5)]
        statuses = [stage.call("one", "push-messages", reply("one", ["c" * 64, *pieces]))]
        for number in pieces:  # whatever came of the announcement: the gate may have been another process then
            statuses.append(stage.call("one", "push-object", piece("one", number, 5 * MEGABYTE)))
            if statuses[-1] != 200:
                break
        return Outcome(passed_mb=stage.came / MEGABYTE, statuses=tuple(statuses))


def the_same_object_without_end(folder: Path, limits: GateLimits, count: int = 5) -> Outcome:
    """An object of half a megabyte, again and again: none too large, and the disk and the line of the server are busy all day."""
    with gate_stage(folder, limits) as stage:
        body = piece("one", "c" * 64, MEGABYTE // 2)
        statuses = [stage.call("one", "push-object", body) for _ in range(count)]
        return Outcome(passed_mb=stage.came / MEGABYTE, statuses=tuple(statuses[-1:]))


def slow_connection(folder: Path, limits: GateLimits, sent: bytes, name: str | None, wait: float) -> Outcome:
    """A connection that sends a part of a head, or of a body, and no more: seconds until it is ended, at most `wait`."""
    with gate_stage(folder, limits) as stage, closing(stage.connect(wait=wait)) as line:
        begun = time.monotonic()
        line.sendall(sent if name is None else head("push-object", 1000, stage.headers(name)) + sent)
        with suppress(OSError):
            while line.recv(4096):
                pass
        return Outcome(time.monotonic() - begun)


def removed_key(folder: Path, limits: GateLimits, removed: bool = True) -> Outcome:
    """A site whose key was removed while its connection was open."""
    with gate_stage(folder, limits) as stage, closing(stage.connect()) as line:
        assert ask(line, "pull-messages", pull("one"), stage.headers("one")) == 200
        stage.write_roster(*(["two"] if removed else NODES))
        return Outcome(statuses=(ask(line, "pull-messages", pull("one"), stage.headers("one")),))


# The list -------------------------------------------------------------------------------------------------------------

LIMITS, NOT_ASKED, NOT_JUDGED = GateLimits(), GateLimits(authenticate=False), GateLimits(replies_only=False)
SHORT = GateLimits(head=0.3)
CROWDED = GateLimits(oldest_out=False, strangers=100, peer=100, head=300, handshake=300)
"""As the gate was: whoever comes first stays for minutes."""


def _idle(folder: Path, lifted: bool) -> bool:
    outcome = idle_connections(folder, CROWDED if lifted else LIMITS, 110 if lifted else 150, patience=3)
    return outcome.locked_out_seconds > 2 or outcome.memory_growth_mb > 64


def _silent(folder: Path, lifted: bool) -> bool:
    outcome = silent_connections(folder, CROWDED if lifted else LIMITS)
    return outcome.locked_out_seconds > 10 or outcome.memory_growth_mb > 64


def _bodies(folder: Path, lifted: bool) -> bool:
    outcome = bodies_without_key(
        folder, GateLimits(authenticate=False, large=2**27) if lifted else LIMITS, 3 if lifted else 10
    )
    return outcome.memory_growth_mb > 64 or outcome.passed_mb > 0


def _begun(folder: Path, lifted: bool) -> bool:
    wide = GateLimits(authenticate=False, large=2**27, strangers=1000)
    return (
        bodies_without_key(folder, wide if lifted else LIMITS, 3 if lifted else 60, megabytes=63).memory_growth_mb > 64
    )


def _large(folder: Path, lifted: bool) -> bool:
    outcome = large_reply(folder, LIMITS, 2**30 if lifted else LARGEST, 20 if lifted else 600)
    return outcome.passed_mb > 1.1


def _same(folder: Path, lifted: bool) -> bool:
    return the_same_object_without_end(folder, LIMITS if lifted else GateLimits(quota=2 * MEGABYTE)).succeeded


def _slow(sent: bytes, name: str | None) -> Callable[[Path, bool], bool]:
    def run(folder: Path, lifted: bool) -> bool:
        return slow_connection(folder, LIMITS if lifted else SHORT, sent, name, 2).locked_out_seconds >= 2

    return run


def _call(
    lifting: GateLimits, call: str, body: bytes, name: str | None = "one", late: float = 0
) -> Callable[[Path, bool], bool]:
    def run(folder: Path, lifted: bool) -> bool:
        return call_as(folder, lifting if lifted else LIMITS, call, body, name, late).succeeded

    return run


def _attacks() -> Iterator[Attack]:
    yield Attack("idle connections lock the sites out", _idle, True)
    yield Attack("connections that begin no TLS lock the sites out", _silent, True)
    yield Attack("bodies of nobody fill the memory", _bodies, True)
    yield Attack("many bodies that are announced fill the memory", _begun, True)
    yield Attack("half a head holds a place", _slow(b"POST /v1/fl", None))
    yield Attack("half a body holds a place", _slow(b"begun", "one"))
    yield Attack(
        "somebody without a key asks for work", _call(NOT_ASKED, "pull-messages", pull("one"), None), in_gate=True
    )
    yield Attack("a key that nobody added asks for work", _call(NOT_ASKED, "pull-messages", pull("one"), "stranger"))
    yield Attack("old headers are used again", _call(NOT_ASKED, "pull-messages", pull("one"), late=400))
    yield Attack("headers are made for later", _call(NOT_ASKED, "pull-messages", pull("one"), late=-30))
    yield Attack(
        "a key that was removed goes on", lambda folder, lifted: removed_key(folder, LIMITS, not lifted).succeeded
    )
    yield Attack(
        "a connection changes its key",
        lambda folder, lifted: another_key_on_a_connection(folder, NOT_ASKED if lifted else LIMITS).succeeded,
    )
    yield Attack("a site takes another's work", _call(NOT_ASKED, "pull-messages", pull("two")))
    task = reply("one", src_node_id=1, dst_node_id=NODES["two"], reply_to_message_id="")
    yield Attack("a site sends a task to another site", _call(NOT_JUDGED, "push-messages", task), in_gate=True)
    other = reply("one", reply_to_message_id=AWAITS["two"])
    yield Attack("a site replies to another's task", _call(NOT_JUDGED, "push-messages", other))
    yield Attack(
        "a site replies in another's name", _call(NOT_JUDGED, "push-messages", reply("one", src_node_id=NODES["two"]))
    )
    yield Attack(
        "a reply nobody waits for", _call(NOT_JUDGED, "push-messages", reply("one", reply_to_message_id="d" * 64))
    )
    many = reply("one", [f"{number:064x}" for number in range(1000)])
    yield Attack("a reply of a thousand objects", _call(NOT_JUDGED, "push-messages", many))
    yield Attack("a reply of 600 MB", _large)
    yield Attack("the same object without end", _same)


ATTACKS = tuple(_attacks())
