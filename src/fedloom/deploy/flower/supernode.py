"""Flower's SuperNode, as a process that ends when its work does.

    python -m fedloom.deploy.flower.supernode [--was FILE] [--idle SECONDS] -- ARGUMENTS OF flower-supernode

Where the SuperNode's loop fails, by a certificate that has just expired or an answer 500 of the server, its main thread ends but its
HTTP thread keeps the process: it would sit there for good and look alive. So it would where the thread of its heartbeats ends, by an
answer 500 of a server whose disk is full. Here it ends, and `fedloom join` starts it again.

A SuperNode that was killed holds its place at the server for a minute, in which no other process may take it, not even its successor.
`--was` names the file with the node id that this site had: it is given back first, with the site's own key, so that a restart takes
seconds, and the server hears of the lost message at once.

`--idle` is the one place where something inside Flower is changed, and only if it is asked for: between two polls for work an
idle SuperNode waits three seconds, which is most of a short round trip. `tests/flower/test_contract.py` pins that line.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedloom.core.files import atomic_write, read_regular

KEY = "--auth-supernode-private-key"


NODE_ID_PREFIX = "SuperNode ID: "
QUESTION = 3
"""Seconds between two questions for work, as Flower has it."""
GAP = 2.0
"""Seconds between giving a place back and taking it again, in which the server must notice that the message was lost."""


def release_node(number: int, server: str, authority: Path, key: Path) -> None:
    """Deactivate node `number`, whose key this is, at the server."""
    private = load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    signed = NodeAuthHttpInterceptor(private, private.public_key())
    interceptors = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), signed]
    with FleetHttpClient.from_server_address(server, False, str(authority), interceptors) as client:
        client.DeactivateNode(DeactivateNodeRequest(node_id=number))
    time.sleep(GAP)


class NodeIdHandler(logging.Handler):
    """Writes down the node id when the SuperNode tells it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Handle a line of Flower's log."""
        if (line := record.getMessage()).startswith(NODE_ID_PREFIX):
            with atomic_write(self._path) as draft:
                draft.write_text(line.removeprefix(NODE_ID_PREFIX), encoding="utf-8")


def shorten_idle_wait(idle: float) -> None:
    """Let the idle SuperNode wait so many seconds between two questions for work, and look for a reply no more seldom than that."""
    start_client_internal.time = SimpleNamespace(
        sleep=lambda seconds: time.sleep(idle if seconds == QUESTION else min(seconds, idle))
    )


def exit_process(failed: threading.ExceptHookArgs) -> NoReturn:
    """End the process by which a thread has just ended."""
    threading.__excepthook__(failed)
    logging.shutdown()
    os._exit(1)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Run the SuperNode; never returns, and leaves no thread."""
    parser = argparse.ArgumentParser(
        prog="fedloom.deploy.flower.supernode", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--idle", type=float, help="seconds between two questions for work")
    parser.add_argument("--was", type=Path, help="file with the node id that the site had")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(words)
    rest = arguments.rest[arguments.rest[:1] == ["--"] :]
    if arguments.idle is not None:
        shorten_idle_wait(arguments.idle)
    if arguments.was and arguments.was.exists() and KEY in rest:
        server, authority, key = (rest[rest.index(word) + 1] for word in ("--superlink", "--root-certificates", KEY))
        with suppress(httpx.HTTPError, OSError, ValueError):  # it had left in order, or the server is away
            release_node(int(read_regular(arguments.was, 64)), server, Path(authority), Path(key))
    threading.excepthook = exit_process
    if arguments.was:
        logging.getLogger("flwr").addHandler(NodeIdHandler(arguments.was))
    sys.argv = ["flower-supernode", *rest]
    code = 1
    try:
        flower_supernode()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        logging.shutdown()
        os._exit(code)


if __name__ == "__main__":
    main()
