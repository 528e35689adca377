"""A ServerApp for the tests: sends each node random bytes again and again, and writes down what came back."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import ServerApp
from flwr.superlink.grid import HttpGrid

from fedloom.deploy.flower.server_app import run_server_app
from fedloom.deploy.link import Transport

app = ServerApp()


def run(link: Transport, folder: Path) -> str:
    """One message at a time to every node, until a file `enough` is there; every reply is a line of `replies.jsonl`."""
    told = json.loads((folder / "deployment.json").read_text())
    if told.get("fail"):
        raise RuntimeError("as told")
    flying: dict[str, tuple[int, bytes, float]] = {}
    nodes: dict[int, str | None] = {}
    looked = 0.0
    with (folder / "replies.jsonl").open("a", buffering=1) as out:
        while not (folder / "enough").exists():
            if time.monotonic() - looked > 1:
                nodes, looked = dict(link.nodes()), time.monotonic()
            for node in nodes.keys() - {node for node, _, _ in flying.values()}:
                body = os.urandom(int(told.get("size", 100)))
                flying[link.send(node, body, len(body))] = node, body, time.monotonic()
            for reply in link.collect():
                node, body, sent = flying.pop(reply.message)
                line = {"node": node, "name": nodes.get(node), "same": reply.body == body, "error": reply.error}
                out.write(json.dumps({**line, "seconds": time.monotonic() - sent, "pid": os.getpid()}) + "\n")
            time.sleep(0.1)
    return "enough"


@app.main()
def main(grid: HttpGrid, context: Context) -> None:
    run_server_app(grid, context, run)
