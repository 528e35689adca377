"""A Transport over Flower's Grid. A message is one flat array of bytes, so that it travels in few pieces, and only data."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, pull_and_inflate_object_from_tree
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from fedloom.core.policies import do_nothing
from fedloom.deploy.flower.site_calls import AwaitedReplies, TooLarge, most_bytes, most_objects, tree_objects
from fedloom.deploy.link import RawReply

NAME = "body"
LIFETIME = 14 * 24 * 3600.0
"""Seconds until Flower forgets a message. Deadlines are the driver's: this one only lies beyond them all."""
DOWNLOADS = 32
"""Replies that are fetched at once."""
POLL = 0.2
"""Seconds between two polls for replies."""
MOST_POLL = 2.0
"""Seconds at most: a busy SuperLink is asked in no more than a fifth of the time."""

REASON = 1000
"""Characters of a site's reason that are read."""
SHORT = 2**20
"""Bytes of a body that travels in one piece."""
SOON, LATER = 0.05, 1.0
"""Seconds between two looks at whether a piece has been uploaded, at first and at most."""
UPLOAD, RATE = 180.0, 2.0**13
"""An announced reply is waited for so many seconds, and a second more for so many bytes that it may have."""


@dataclass(frozen=True, slots=True)
class SentTo:
    """A message that waits for its reply: the node that it was sent to, and the bytes of the largest reply."""

    node: int
    largest_reply: int


def pack_body(body: bytes) -> RecordDict:
    """Wrap a body as Flower's content; Flower cuts a large one into pieces of 5 MB, each sent once.

    Each part of a content is requested by itself, so a short one has as few as there can be.
    """
    if len(body) <= SHORT:
        return RecordDict({NAME: ConfigRecord({NAME: body})})
    return RecordDict({NAME: ArrayRecord({NAME: Array("uint8", (len(body),), NAME, body)})})


def unpack_body(content: RecordDict) -> bytes:
    """Return the body in Flower's content.

    Raises:
        ValueError: there is none, or something beside it.
    """
    match list(content.values()):
        case [ArrayRecord() as record] if list(record) == [NAME]:
            return bytes(record[NAME].data)
        case [ConfigRecord() as record] if list(record) == [NAME] and isinstance(body := record[NAME], bytes):
            return body
    raise ValueError("the content of the message is not one array of bytes")


def fetch_message(
    client: RuntimeHttpClient,
    tree: ObjectTree,
    node: Node,
    run: int,
    largest: int | None = None,
    check: Callable[[], None] = do_nothing,
) -> Message:
    """Fetch the message that `tree` announces, as soon as all its pieces are there.

    Args:
        client: whom to ask.
        tree: the objects of the message.
        node: who asks.
        run: Flower's number of the run.
        largest: bytes of its body at most (None: any, and for as long as it takes: the sender is trusted).
        check: is called before each attempt to get a piece, and may raise to give the message up.

    Raises:
        TooLarge: it is larger. Of one in too many pieces nothing is fetched.
        ObjectPullError: it did not come in time.
    """
    pull = _checked(check, make_pull_object_fn_protobuf(client.PullObject, node, run))
    if largest is not None:
        tree_objects(tree, most_objects(largest))
        pull = _at_most(most_bytes(largest), pull)
    return pull_and_inflate_object_from_tree(
        tree,
        pull,
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run),
        return_type=Message,
        max_time=None if largest is None else UPLOAD + largest / RATE,
        max_tries_per_object=None,
        initial_backoff=SOON,
        backoff_cap=LATER,
    )


def _checked(check: Callable[[], None], pull: Callable[[str], bytes]) -> Callable[[str], bytes]:
    def pull_object(name: str) -> bytes:
        check()
        return pull(name)

    return pull_object


def _at_most(size: int, pull: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """Return `pull` for objects that have `size` bytes together."""
    lock, left = threading.Lock(), size

    def pull_object(name: str) -> bytes:
        nonlocal left
        content = pull(name)
        with lock:
            left -= len(content)
            if left < 0:
                raise TooLarge(f"the reply has more than {size} bytes")
        return content

    return pull_object


class GridTransport:
    """`Transport` over `grid`, which is connected to a SuperLink; a site's name is what its key was registered under.

    A thread asks for news all the time, whatever the driver does meanwhile. Flower tells of a lost message only while its node is
    away, which may be seconds, and drops a finished reply whose node has left before it was asked for.

    Flower announces a reply before its bytes are uploaded, and `Grid.pull_messages` then waits for them: minutes, over a slow
    line, in which no other client would be served. So the announcements are read here and each reply is fetched by a thread,
    through the client that the Grid holds; `tests/flower/test_contract.py` pins what that takes.
    """

    def __init__(self, grid: HttpGrid, awaited: Path) -> None:
        """Args: the grid, and the file that says which replies are awaited, for the gate."""
        self._grid = grid
        self._awaited = AwaitedReplies(awaited, grid.run.run_id)
        self._sent: dict[str, SentTo] = {}
        self._came: SimpleQueue[RawReply] = SimpleQueue()
        self._pool = ThreadPoolExecutor(DOWNLOADS, "fetch")
        self._asking = threading.Thread(target=self._ask, name="ask", daemon=True)
        self._trouble: BaseException | None = None
        self._refused = 0

    def nodes(self) -> Mapping[int, str | None]:
        """The nodes whose lease of about a minute is not over, with their names."""
        return {node.node_id: node.name or None for node in self._grid.get_nodes()}

    def send(self, node: int, body: bytes, largest_reply: int) -> str:
        """Hand `body` over to the SuperLink. While the SuperLink is away this waits for it.

        The gate hears first of the reply that may come: from Flower's number of the message, which is the hash of its content.
        """
        message, number = Message(pack_body(body), node, MessageType.TRAIN, ttl=LIFETIME), ""
        awaited, reason = message.object_id, "the SuperLink did not take the message"
        self._awaited.add(node, awaited, largest_reply)
        try:
            number = next(iter(self._grid.push_messages([message])), "")
        except ObjectPushError as error:  # a machine so busy that it took minutes
            reason = f"the SuperLink did not get all of the message: {error}"
        if number:
            self._sent[number] = SentTo(node, largest_reply)
            if self._asking.ident is None:
                self._asking.start()
        else:
            self._refused += 1
            self._awaited.remove(node, awaited)
            number = f"refused-{self._refused}"
            self._came.put(RawReply(number, node, None, reason))
        return number

    def collect(self) -> list[RawReply]:
        """The replies that are there, each once. What went wrong in asking for them is raised here."""
        if self._trouble:
            raise self._trouble
        return list(self._drained())

    def _drained(self) -> Iterator[RawReply]:
        while True:
            try:
                yield self._came.get_nowait()
            except Empty:
                return

    def _ask(self) -> None:
        try:
            while True:
                started = time.monotonic()
                if waiting := list(self._sent):
                    pulled = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=waiting))
                    for message, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                        number = message.metadata.reply_to_message_id
                        if (sent := self._sent.pop(number, None)) is not None:
                            self._pool.submit(self._fetch, number, sent, tree)
                time.sleep(min(max(POLL, 4 * (time.monotonic() - started)), MOST_POLL))
        except BaseException as error:
            self._trouble = error

    def _fetch(self, number: str, sent: SentTo, tree: ObjectTree) -> None:
        client, here, run, node = self._grid._runtime_client, self._grid.node, self._grid.run.run_id, sent.node
        try:
            message = fetch_message(client, tree, here, run, sent.largest_reply)
            if message.has_error():
                reply = RawReply(number, node, None, f"{message.error.reason[:REASON]} (code {message.error.code})")
            else:
                reply = RawReply(number, node, unpack_body(message.content))
        except Exception as error:  # whatever a site uploads, or fails to, is that site's affair
            reply = RawReply(number, node, None, f"{type(error).__name__}: {error}")
        with suppress(OSError):  # the disk is full, which others say; the gate knows of one reply too many
            self._awaited.remove(node, number)
        self._came.put(reply)
