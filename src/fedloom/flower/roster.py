"""Whose keys a SuperLink takes: told to it through Flower's Control API, by a process of its own, all changes at once.

    python -m fedloom.flower.roster PORT [CERTIFICATE]    (the change as JSON on stdin, what came of it on stdout)

Flower's own command takes one key a process, seconds each. A change may be told again: a key that is taken already keeps its node,
also where the answer was lost, or the server was killed before it wrote the answer down.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import httpx
from click import ClickException
from flwr.cli.supernode.register import try_load_public_key
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedloom.flower.control import Changed, Coming


def changed(client: ControlHttpClient, come: Mapping[str, Coming], go: Mapping[str, int]) -> Changed:
    """Let in who comes, and no longer who goes, each by the fingerprint of its key. Raises httpx.HTTPError without a SuperLink."""
    done, known = Changed(), _known(client)
    for fingerprint, one in come.items():
        try:
            key = try_load_public_key(Path(one.key))
            asked = RegisterNodeRequest(public_key=key, name=one.name)
            done.come[fingerprint] = known.get(key) or client.RegisterNode(asked).node_id
        except (httpx.HTTPStatusError, ClickException) as error:
            done.refused[fingerprint] = f"{one.name} cannot be let in: {_reason(error)}"
    for fingerprint, node in go.items():
        try:
            if node in known.values():
                client.UnregisterNode(UnregisterNodeRequest(node_id=node))
            done.gone.append(fingerprint)
        except httpx.HTTPStatusError as error:
            done.refused[fingerprint] = f"the holder of key {fingerprint} cannot be kept out: {_reason(error)}"
    return done


def _known(client: ControlHttpClient) -> dict[bytes, int]:
    """The node of each key that is taken now."""
    listed = client.ListNodes(ListNodesRequest()).nodes_info
    return {node.public_key: node.node_id for node in listed if node.status != NodeStatus.UNREGISTERED}


def _reason(error: httpx.HTTPStatusError | ClickException) -> str:
    """What Flower says."""
    if isinstance(error, ClickException):
        return error.format_message()
    try:
        told = json.loads(error.response.text)
        return str(told.get("message") or told.get("detail") or told)
    except (ValueError, AttributeError):
        return error.response.text[-300:] or str(error)


def main() -> None:
    """Read, tell, print."""
    port, authority = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    told, said = json.load(sys.stdin), [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
    come = {fingerprint: Coming(**one) for fingerprint, one in told["come"].items()}
    try:
        with ControlHttpClient.from_server_address(f"127.0.0.1:{port}", authority is None, authority, said) as client:
            sys.stdout.write(json.dumps(asdict(changed(client, come, told["go"]))))
    except httpx.HTTPError as error:
        sys.exit(f"the SuperLink does not answer: {error or type(error).__name__}")


if __name__ == "__main__":
    main()
