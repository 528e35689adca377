"""A run that ends while a SuperNode receives a message of it: Flower's own SuperNode state and HTTP API, our executor."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import Status
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import main as supernode_api
from flwr.supernode.nodestate import NodeState, NodeStateFactory
from flwr.supernode.start_client_internal import _pull_and_store_message

from fedloom.deploy.flower.grid import pack_body
from fedloom.deploy.flower.supervisor import free_port
from tests.deploy.flower.test_executor import Serve, serve  # noqa: F401 (a fixture)
from tests.support.federation import until

NODE = 7


@pytest.fixture
def node() -> Iterator[tuple[NodeState, str]]:
    """A SuperNode's state, and the address of its API."""
    factory, port = NodeStateFactory(ObjectStoreFactory()), free_port()
    server = uvicorn.Server(uvicorn.Config(supernode_api.create_app(factory), port=port, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    state = factory.state()
    state.set_node_id(NODE)
    yield state, f"127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def receive(state: NodeState, run: int, body: bytes, pull: Callable[[dict[str, bytes], str], bytes]) -> str:
    """Let the SuperNode receive a message of a run, its pieces by `pull`; return the message's id."""
    message = make_message(
        metadata=Metadata(run, "", 1, NODE, "", "", time.time(), 600.0, "train"), content=pack_body(body)
    )
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        tree = get_object_tree(message)
        pieces = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
    known = Run.create_empty(run)
    known.series_id, known.fab_hash = run, hashlib.sha256(b"app").hexdigest()
    state.store_run(known)
    state.store_fab(Fab(known.fab_hash, b"app", {}))
    state.set_run_series_context(run, Context(run, NODE, {}, RecordDict(), {}, series_id=run))
    empty = make_message(metadata=message.metadata, content=RecordDict())
    unused: Any = None
    _pull_and_store_message(
        state=state,
        object_store=state.object_store,
        node_config={},
        receive=lambda: (empty, tree),
        get_run=unused,
        get_fab=unused,
        pull_object=lambda _, name: pull(pieces, name),
        confirm_message_received=lambda *_: None,
        trusted_entities=None,
    )
    return str(message.metadata.message_id)


def run_has_ended(pieces: dict[str, bytes], name: str) -> bytes:
    raise RunNotRunningException


def replies(state: NodeState) -> list[Message]:
    return list(state.get_messages_legacy(is_reply=True))


@contextmanager
def executor(address: str, socket: Path) -> Iterator[None]:
    """The executor, as a process: a thread of it would go on, and draw from `random`, in the tests after this one."""
    module = "fedloom.deploy.flower.executor"
    process = subprocess.Popen([sys.executable, "-m", module, "--runtime", address, "--socket", str(socket)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def claimed(state: NodeState) -> bool:
    """Whether the executor has taken the first task."""
    return any(task.status.status != Status.PENDING for task in state.get_tasks())


@pytest.mark.slow
def test_the_site_goes_on_with_the_next_run(node: tuple[NodeState, str], serve: Serve) -> None:  # noqa: F811
    state, address = node
    receive(state, 5, b"never whole", run_has_ended)
    with executor(address, serve(lambda body: body + b"!")):
        until(lambda: claimed(state), 60, "that the executor takes the task")
        assert not replies(state)
        wanted = receive(state, 6, b"hello", lambda pieces, name: pieces[name])
        found: list[Message] = []
        until(lambda: bool(found.extend(replies(state)) or found), 60, "a reply")
    assert [one.metadata.reply_to_message_id for one in found] == [wanted]  # and none to the other, in its place
