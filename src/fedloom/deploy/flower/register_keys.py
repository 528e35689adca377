"""Register the keys that a SuperLink accepts, through Flower's Control API, by a process of its own, all at once.

    python -m fedloom.deploy.flower.register_keys PORT [CERTIFICATE]    (who may come as JSON on stdin, what came of it on stdout)

Flower's own command takes one key a process, seconds each, and cannot list which are taken. All may be registered again, and again:
a key that is taken already keeps its node, also where the answer was lost, and nobody else's stays.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedloom.deploy.flower.superlink import Admission, SiteKey


def admit_keys(client: ControlHttpClient, listed: Mapping[str, SiteKey]) -> Admission:
    """Let in those who are listed, by the fingerprints of their keys, and nobody else. Raises httpx.HTTPError without a SuperLink.

    Where a key cannot be read nobody is put out: it might be that one's.
    """
    done, keys, listing = Admission(), dict[str, bytes](), client.ListNodes(ListNodesRequest()).nodes_info
    registered = {node.public_key: node.node_id for node in listing if node.status != NodeStatus.UNREGISTERED}
    for fingerprint, one in listed.items():
        try:
            keys[fingerprint] = read_public_key(Path(one.key))
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            done.refused[fingerprint] = f"{one.name} cannot be registered: {error}"
    for node in [] if done.refused else [node for key, node in registered.items() if key not in keys.values()]:
        client.UnregisterNode(UnregisterNodeRequest(node_id=node))
    for fingerprint, key in keys.items():
        try:
            request = RegisterNodeRequest(public_key=key, name=listed[fingerprint].name)
            done.nodes[fingerprint] = registered.get(key) or client.RegisterNode(request).node_id
        except httpx.HTTPStatusError as error:
            done.refused[fingerprint] = f"{listed[fingerprint].name} cannot be registered: {_reason(error)}"
    return done


def read_public_key(path: Path) -> bytes:
    """Return a public key as Flower knows it. Raises OSError, ValueError, UnsupportedAlgorithm."""
    key = load_ssh_public_key(path.read_bytes())
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("it is no key of an elliptic curve")
    return bytes(public_key_to_bytes(key))


def _reason(error: httpx.HTTPStatusError) -> str:
    """Return what Flower says about a call that it refused."""
    try:
        detail = json.loads(error.response.text)
        return str(detail.get("message") or detail.get("detail") or detail)
    except (ValueError, AttributeError):
        return error.response.text[-300:] or str(error)


def main() -> None:
    """Read the listed keys from stdin, register them, print the result."""
    port, authority = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    listed = {fingerprint: SiteKey(**one) for fingerprint, one in json.load(sys.stdin).items()}
    interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
    try:
        with ControlHttpClient.from_server_address(
            f"127.0.0.1:{port}", authority is None, authority, interceptors
        ) as client:
            sys.stdout.write(json.dumps(asdict(admit_keys(client, listed))))
    except httpx.HTTPError as error:
        sys.exit(f"the SuperLink does not answer: {error or type(error).__name__}")


if __name__ == "__main__":
    main()
