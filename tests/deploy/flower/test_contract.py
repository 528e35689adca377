"""What our doors take from Flower beyond its public API, as it is in the pinned version. A new version fails here first.

`executor.py` runs in place of Flower's own client processes, `grid.py` reads announcements itself (decision record 0022), `roster.py`
asks Control itself.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import flwr
import pytest
from flwr.app import Array, Message, MessageType
from flwr.cli.supernode.register import try_load_public_key
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto import control_pb2, runtime_pb2
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.heartbeat import HEARTBEAT_DEFAULT_INTERVAL
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, constant
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid
from flwr.supernode import start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.runtime import run_clientapp

from fedloom.deploy.flower import executor, grid, supernode
from fedloom.deploy.flower.site_calls import KEYLESS_CALLS, SITE_CALLS

SIGNATURES: dict[Callable[..., object], str] = {
    Array.__init__: "self, *args, dtype, shape, stype, data, ndarray, torch_tensor",
    Message.__init__: "self, *args, dst_node_id, message_type, content, error, ttl, group_id, dst_task_id, reply_to, metadata",
    run_clientapp.push_message: "client, message, context",
    run_clientapp.push_task_output: "client, context, sub_status, details",
    context_from_proto: "context_proto",
    RuntimeHttpClient.from_server_address: "server_address, insecure, root_certificates, interceptors, retry_invoker",
    RuntimeHttpClient.AcquireTask: "self, request",
    RuntimeHttpClient.PullTaskInput: "self, request",
    RuntimeHttpClient.PullMessages: "self, request",
    RuntimeHttpClient.PullObject: "self, request",
    RuntimeHttpClient.ConfirmMessageReceived: "self, request",
    RuntimeHttpClient.SendTaskHeartbeat: "self, request",
    FleetHttpClient.from_server_address: "server_address, insecure, root_certificates, interceptors, retry_invoker",
    FleetHttpClient.DeactivateNode: "self, request",
    ControlHttpClient.from_server_address: "server_address, insecure, root_certificates, interceptors, retry_invoker",
    ControlHttpClient.ListNodes: "self, request",
    ControlHttpClient.RegisterNode: "self, request",
    ControlHttpClient.UnregisterNode: "self, request",
    try_load_public_key: "public_key_path",
    NodeAuthHttpInterceptor.__init__: "self, private_key, public_key",
    RuntimeTokenHttpInterceptor.__init__: "self, token",
    RuntimeVersionHttpInterceptor.__init__: "self, component_name",
    SuperExecAuthHttpInterceptor.__init__: "self, master_secret, protected_methods",
    RetryInvoker.__init__: "self, wait_gen_factory, recoverable_exceptions, max_tries, max_time, "
    "on_success, on_backoff, on_giveup, jitter, should_giveup, wait_function",
    constant: "interval",
    pull_and_inflate_object_from_tree: "object_tree, pull_object_fn, confirm_object_received_fn, return_type, "
    "max_concurrent_pulls, max_time, max_tries_per_object, initial_backoff, backoff_cap",
    make_pull_object_fn_protobuf: "pull_object_protobuf, node, run_id",
    make_confirm_message_received_fn_protobuf: "confirm_message_received_protobuf, node, run_id",
    HttpGrid.get_nodes: "self",
    HttpGrid.push_messages: "self, messages",
}


def test_a_message_has_its_number_before_it_is_pushed() -> None:
    """So the gate can be told of the reply before a site has the message; the number is the hash of all but itself."""
    assert 'msg.metadata.__dict__["_message_id"] = msg.object_id' in inspect.getsource(HttpGrid.push_messages)
    assert 'proto_metadata.message_id = ""' in inspect.getsource(Message.deflate)


def test_the_superlink_asks_for_what_the_gate_asks_for() -> None:
    """And reads the body as the gate does: protobuf, whatever the headers say."""
    from flwr.supercore.protobuf import translation
    from flwr.superlink.routers.fleet import node_auth

    source = inspect.getsource(node_auth.authenticate_node)
    assert (
        "-SYSTEM_TIME_TOLERANCE\n            < age\n            < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE" in source
    )
    assert "verify_signature" in source
    read = {path.removeprefix("/v1/fleet/"): kind for (_, path), kind in translation.PROTOBUF_REQUEST_TYPES.items()}
    for call, kind in {**SITE_CALLS, **KEYLESS_CALLS}.items():
        assert read[call] is kind


def test_flower_is_the_version_that_was_read() -> None:
    assert flwr.__version__ == "1.41.0"


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_a_function_is_called_as_it_was_read(function: Callable[..., object]) -> None:
    shown = [
        f"*{name}" if p.kind is p.VAR_POSITIONAL else name for name, p in inspect.signature(function).parameters.items()
    ]
    assert ", ".join(shown) == SIGNATURES[function]


def test_messages_of_the_runtime_api_have_the_fields_we_read() -> None:
    fields = {
        runtime_pb2.AcquireTaskRequest: {"supported_task_types"},
        runtime_pb2.AcquireTaskResponse: {"token"},
        runtime_pb2.PullTaskInputResponse: {"context"},
        runtime_pb2.PullAppMessagesRequest: {"message_ids"},
        runtime_pb2.PullAppMessagesResponse: {"messages_list", "message_object_trees"},
        NodeInfo: {"node_id", "name", "public_key", "status"},
        control_pb2.ListNodesResponse: {"nodes_info"},
        control_pb2.RegisterNodeRequest: {"public_key", "name"},
        control_pb2.RegisterNodeResponse: {"node_id"},
        control_pb2.UnregisterNodeRequest: {"node_id"},
        Node: {"node_id"},
    }
    for message, wanted in fields.items():
        assert wanted <= set(message.DESCRIPTOR.fields_by_name), message
    assert NodeStatus.UNREGISTERED == "unregistered"
    assert isinstance(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, int)
    assert (TaskType.CLIENT_APP, SubStatus.COMPLETED, MessageType.TRAIN) == ("flwr-clientapp", "completed", "train")
    assert isinstance(inspect.getattr_static(HttpGrid, "_runtime_client"), property)


def test_the_waits_are_those_that_our_figures_name() -> None:
    """Three seconds between an idle SuperNode's questions, half a second between its looks for a reply; lease twice 30 s."""
    source = inspect.getsource(start_client_internal)
    assert source.count("time.sleep(3)") == 1
    assert source.count("time.sleep(0.5)") == 2
    assert HEARTBEAT_DEFAULT_INTERVAL == 30
    assert executor.HEARTBEAT < 2 * HEARTBEAT_DEFAULT_INTERVAL


def test_an_idle_supernode_can_be_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that its loop takes from the module `time` is `sleep`."""
    used = re.findall(r"\btime\.(\w+)", inspect.getsource(start_client_internal))
    assert used == ["sleep"] * 3
    monkeypatch.setattr(start_client_internal, "time", time)
    slept = list[float]()
    monkeypatch.setattr(supernode.time, "sleep", slept.append)
    for idle in (0.05, 20.0):
        supernode.shorten_idle_wait(idle)
        start_client_internal.time.sleep(3)
        start_client_internal.time.sleep(0.5)
    assert slept == [0.05, 0.05, 20.0, 0.5], (
        "work is asked for so often; a reply is looked for no more seldom than before"
    )


def test_a_supernode_says_which_node_it_is(tmp_path: Path) -> None:
    source = inspect.getsource(start_client_internal)
    assert 'log(INFO, "SuperNode ID: %s", node_id)' in source
    handler = supernode.NodeIdHandler(tmp_path / "node")
    logging.getLogger("flwr").addHandler(handler)
    try:
        start_client_internal.log(logging.INFO, "SuperNode ID: %s", 17)
    finally:
        logging.getLogger("flwr").removeHandler(handler)
    assert (tmp_path / "node").read_text() == "17"


@pytest.mark.parametrize(
    ("size", "parts"), [(0, 2), (1, 2), (grid.SHORT, 2), (grid.SHORT + 1, 4), (5 * 2**20, 4), (5 * 2**20 + 1, 5)]
)
def test_a_body_comes_back_as_it_was_in_as_few_parts_as_can_be(size: int, parts: int) -> None:
    body = os.urandom(size)
    content = grid.pack_body(body)
    assert grid.unpack_body(content) == body
    assert len(get_all_nested_objects(content)) == parts


def test_content_of_another_form_is_refused() -> None:
    for content in (flwr.app.RecordDict(), flwr.app.RecordDict({"body": flwr.app.ConfigRecord({"body": "x"})})):
        with pytest.raises(ValueError, match="not one array"):
            grid.unpack_body(content)
