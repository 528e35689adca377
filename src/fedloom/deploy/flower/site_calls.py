"""The calls that sites make of the server, and which replies it awaits: of which node, to which message, of what size.

The ServerApp writes down what it awaits, and the gate judges the bodies of calls by it. A key acts for its own node, and pushes
replies to the server only: Flower's SuperLink takes what is no reply for a task, and would hand it to any site that it names.

A reply travels in parts: it is announced, with the tree of its objects, and then each object is pushed. Flower's SuperLink takes
what is announced, of any size, and as often as it is announced anew; here an announcement must belong to a message that waits for
its reply, and the objects of all announcements of that reply must keep within what the task can have as an answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.run_pb2 import GetRunRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedloom.core.files import write_json
from fedloom.deploy.flower.roster import RosterEntry, WatchedFile

AWAITED = "awaited.json"
"""File of the awaited replies, in Flower's part of the server's folder."""
PIECE = 5 * 2**20
"""Bytes of the pieces into which Flower cuts a large body."""
FRAME = 2**12
"""Bytes that an object takes beside the body, at most: its kind, its children, the fields of the message."""


SITE_CALLS: Mapping[str, Any] = {
    "activate-node": ActivateNodeRequest,
    "deactivate-node": DeactivateNodeRequest,
    "send-node-heartbeat": SendNodeHeartbeatRequest,
    "pull-messages": PullMessagesRequest,
    "pull-object": PullObjectRequest,
    "confirm-message-received": ConfirmMessageReceivedRequest,
    "push-messages": PushMessagesRequest,
    "push-object": PushObjectRequest,
    "get-run": GetRunRequest,
    "get-fab": GetFabRequest,
}
"""Calls of Fleet that a site makes, and the messages in their bodies. No other is passed on."""
KEYLESS_CALLS: Mapping[str, Any] = {
    "register-node": RegisterNodeFleetRequest,
    "unregister-node": UnregisterNodeFleetRequest,
}
"""Those that come to it in a deployment without keys."""
OF_A_KEY = (ActivateNodeRequest, RegisterNodeFleetRequest)
SERVER_NODE = 1
"""Flower's number of the server, to which replies go."""
DAY, LONGEST = 86400, 1e9
"""Seconds: of a day; that a site may say that it worked on a message."""


class RequestRefused(Exception):
    """A request that is not for sites, or not for this one.

    The text is HTTP's status and reason. `code` is Flower's number of the error, for the site to read.
    """

    def __init__(self, status: str, code: int = 0) -> None:
        super().__init__(status)
        self.code = code


class NotAwaited(Exception):
    """A reply that no message waits for, or more of one than the task can have; the text says which."""


class TooLarge(NotAwaited):
    """A reply that is larger than any answer to its message."""


def most_objects(size: int) -> int:
    """Return into how many objects a reply of so many bytes is cut at most."""
    return 6 + size // PIECE


def most_bytes(size: int) -> int:
    """Return the bytes of all objects of a reply whose body has `size` bytes, at most."""
    return size + FRAME * most_objects(size)


def tree_objects(tree: ObjectTree, most: int) -> set[str]:
    """Return the ids of the objects in a tree. Raises TooLarge where there are more than `most`."""
    found = set[str]()
    for name in _walk(tree):
        found.add(name)
        if len(found) > most:
            raise TooLarge(f"a reply of more than {most} objects")
    return found


def _walk(tree: ObjectTree) -> Iterator[str]:
    yield tree.object_id
    for child in tree.children:
        yield from _walk(child)


class AwaitedReplies:
    """The awaited replies of a run, written down for the gate at each change."""

    def __init__(self, path: Path, run: int) -> None:
        self._path, self._run = path, run
        self._sizes = dict[str, dict[str, int]]()
        self._lock = threading.Lock()

    def add(self, node: int, message: str, size: int) -> None:
        """Await the reply of a node to a message, of at most `size` bytes."""
        with self._lock:
            self._sizes.setdefault(str(node), {})[message] = size
            self._write()

    def remove(self, node: int, message: str) -> None:
        """Await this reply no longer."""
        with self._lock:
            sizes = self._sizes.get(str(node), {})
            if sizes.pop(message, None) is not None:
                if not sizes:
                    del self._sizes[str(node)]
                self._write()

    def _write(self) -> None:
        write_json(self._path, {"run": self._run, "nodes": self._sizes})


class ReplyBudget:
    """Judges announcements and objects by the file of the awaited replies. What was pushed is known since this process began."""

    def __init__(self, path: Path) -> None:
        self._file = WatchedFile(path)
        self._pushed = dict[
            int, dict[str, dict[str, int]]
        ]()  # by node, message and object: bytes, 0 while it was announced only

    def announce(self, node: int, run: int, message: str, tree: ObjectTree) -> None:
        """Take note that a node announces its reply to a message, with these objects.

        Raises:
            NotAwaited: nobody waits for it.
            TooLarge: it has more objects than the largest answer.
        """
        awaited = self._awaited(node, run)
        if message not in awaited:
            raise NotAwaited("no reply to this message is awaited")
        most, pushed = most_objects(awaited[message]), self._pushed[node].setdefault(message, {})
        named = tree_objects(tree, most)
        if len(named | pushed.keys()) > most:  # announced once more, with others
            raise TooLarge(f"a reply of more than {most} objects")
        for name in named:
            pushed.setdefault(name, 0)

    def push(self, node: int, run: int, name: str, size: int) -> None:
        """Take note that a node pushes an object of so many bytes; the same object again counts once.

        An object that nothing announced belongs to a reply that was announced to the process before this one.

        Raises:
            NotAwaited: it belongs to no reply that is awaited.
            TooLarge: with it the reply is larger than the largest answer.
        """
        awaited, replies = self._awaited(node, run), self._pushed[node]
        named = [message for message, pushed in replies.items() if name in pushed]
        if not awaited:
            raise NotAwaited("no reply is awaited")
        for message in named or awaited:
            pushed = replies.get(message, {})
            sizes = pushed | {name: max(size, pushed.get(name, 0))}
            if len(sizes) <= most_objects(awaited[message]) and sum(sizes.values()) <= most_bytes(awaited[message]):
                replies[message] = sizes
                return
        raise TooLarge(f"a reply of more than the {max(awaited.values())} bytes that its message can have as an answer")

    def _awaited(self, node: int, run: int) -> Mapping[str, int]:
        """Return the messages that await a reply of this node; what is known of others is forgotten."""
        self._file.changed()
        ours = self._file.value.get("run") == run
        awaited: Mapping[str, int] = self._file.value.get("nodes", {}).get(str(node), {}) if ours else {}
        replies = self._pushed.setdefault(node, {})
        for message in replies.keys() - awaited.keys():
            del replies[message]
        return awaited


class CallRules:
    """Judges the body of a call: a key acts for its own node, and pushes what is awaited of it."""

    def __init__(self, home: Path, replies_only: bool, quota: int) -> None:
        self._replies_only, self._quota = replies_only, quota
        self._replies = ReplyBudget(home / AWAITED)
        self._pushed = dict[int, tuple[int, int]]()

    def check(self, call: str, body: bytes, caller: RosterEntry | None) -> None:
        """Judge the body of a call; caller None: in a deployment without keys, where a node is what it says that it is.

        Raises:
            RequestRefused: the caller may not make this call.
        """
        try:
            request = {**SITE_CALLS, **KEYLESS_CALLS}[call].FromString(body)
        except DecodeError as error:
            raise RequestRefused("400 Bad Request") from error
        if isinstance(request, OF_A_KEY):
            if caller is not None and request.public_key != caller.key.encode():
                raise RequestRefused("401 Unauthorized: another key")
            return
        node = request.node.node_id if "node" in request.DESCRIPTOR.fields_by_name else request.node_id
        if caller is not None and node != caller.node:
            raise RequestRefused("401 Unauthorized: another node")
        if not self._replies_only or not isinstance(request, PushMessagesRequest | PushObjectRequest):
            return
        self._count(node, len(body))
        try:
            if isinstance(request, PushObjectRequest):
                self._replies.push(node, request.run_id, request.object_id, len(request.object_content))
            else:
                self._check_reply(node, request)
        except TooLarge as error:
            raise RequestRefused(f"413 {error}") from error
        except NotAwaited as error:
            raise RequestRefused(f"403 {error}") from error

    def _check_reply(self, node: int, request: PushMessagesRequest) -> None:
        """Judge an announcement. Raises RequestRefused or NotAwaited."""
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise RequestRefused("400 one reply a call")
        message, tree = request.messages_list[0], request.message_object_trees[0]
        about = message.metadata
        if not about.reply_to_message_id or (about.src_node_id, about.dst_node_id) != (node, SERVER_NODE):
            raise RequestRefused("403 a site sends replies of its own to the server, and nothing else")
        if message.content.ByteSize() or about.message_id != tree.object_id:
            raise RequestRefused("400 a reply is announced without its content, by the number of its first object")
        if not all(0 <= seconds < LONGEST for seconds in request.clientapp_runtime_list):
            raise RequestRefused("400 no such time")  # the SuperLink adds it to the run's, which no NaN may become
        self._replies.announce(node, about.run_id, about.reply_to_message_id, tree)

    def _count(self, node: int, size: int) -> None:
        """Count bytes that are pushed. Raises RequestRefused above the quota of the day."""
        today = int(time.time()) // DAY
        day, before = self._pushed.get(node, (today, 0))
        pushed = size + (before if day == today else 0)
        if pushed > self._quota:
            raise RequestRefused(f"429 more than {self._quota} bytes today")
        self._pushed[node] = today, pushed
