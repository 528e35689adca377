"""The one executor of a site: takes a message from the SuperNode, hands its bytes to our worker, sends back what the worker says.

    python -m fedloom.deploy.flower.executor --runtime ADDRESS --socket PATH --secret FILE

On Flower's own path a site would install and import the app that the server sent, in a new process for every message. This
executor does neither: what runs at a site is what was installed there. It stands on modules of Flower that are not its public
API, so `tests/flower/test_contract.py` pins version and signatures (decision record 0022).
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, constant
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from fedloom.deploy.flower.grid import fetch_message, pack_body, unpack_body
from fedloom.deploy.site.worker_socket import ask_worker

POLL = 0.2
"""Seconds between two looks, over loopback."""
HEARTBEAT = 10.0
"""Seconds; the SuperNode gives a task up after 60 without one."""
PATIENCE = 600.0
"""Seconds that a message waits for a worker that is not there: it is being restarted, or loads a large model."""
STORED = 10.0
"""Seconds between a task and its message."""
BROKEN = 3
"""Times that the worker may die over one message before the message is answered with an error."""
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
WHOLE = 1.0
"""Seconds that a message may take to be whole before the executor looks whether a newer task waits."""


class NoAnswer(Exception):
    """A message that has no answer; the text says why."""


class Superseded(Exception):
    """A message that will never be whole: its run ended while the SuperNode received it, and a newer task waits.

    Fields:
        token: the newer task's.
    """

    def __init__(self, token: str) -> None:
        super().__init__("its run ended while it was received")
        self.token = token


def main(words: Sequence[str] | None = None) -> None:
    """Serve until the process is stopped; ends with an error when a message was taken and could not be answered."""
    parser = argparse.ArgumentParser(
        prog="fedloom.deploy.flower.executor", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--runtime", required=True, help="the SuperNode's Runtime API, host:port on this machine")
    parser.add_argument("--socket", type=Path, required=True, help="the worker's Unix socket")
    parser.add_argument("--secret", type=Path, help="file with the secret that the SuperNode was started with")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds that a message waits for the worker")
    parser.add_argument("--ask", type=float, default=POLL, help="seconds between two polls for a task")
    arguments = parser.parse_args(words)
    secret = arguments.secret.read_bytes() if arguments.secret else None
    execute_tasks(arguments.runtime, arguments.socket, secret, arguments.patience, arguments.ask)


def execute_tasks(
    runtime: str, socket: Path, secret: bytes | None, patience: float = PATIENCE, pause: float = POLL
) -> None:
    """Take one task after the other. The SuperNode hands out one at a time."""
    signed = [SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE})] if secret else []
    asking = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    with runtime_client(runtime, "SuperExec", signed) as supernode:

        def newest() -> str:
            try:
                return str(supernode.AcquireTask(asking).token)
            except httpx.TransportError:
                return ""

        _say("ready", runtime=runtime)
        token = ""
        while True:
            if token := token or newest():
                token = execute_task(runtime, token, socket, newest, patience)
            else:
                time.sleep(pause)


def execute_task(runtime: str, token: str, socket: Path, newest: Callable[[], str], patience: float) -> str:
    """Pull the message that `token` stands for, and push the worker's answer, or an error in its place.

    Returns the token of a newer task, where the message was given up for it; "" otherwise. `newest` asks for one ("": none waits).
    """
    with (
        runtime_client(runtime, "flwr-clientapp", [RuntimeTokenHttpInterceptor(token)]) as supernode,
        heartbeats(supernode),
    ):
        try:
            message, context = pull_message(supernode, newest)
        except Superseded as newer:
            # no reply: the SuperNode would send it in the place of the newer task's
            push_task_output(supernode, None, SubStatus.FAILED, str(newer))
            _say("given up", error=str(newer))
            return newer.token
        started, reply = time.monotonic(), answer_message(message, socket, patience)
        _say(
            "answered",
            seconds=round(time.monotonic() - started, 3),
            error=reply.error.reason if reply.has_error() else "",
        )
        push_message(supernode, reply, context)
        push_task_output(supernode, context, SubStatus.COMPLETED, "")
        return ""


def pull_message(supernode: RuntimeHttpClient, newest: Callable[[], str]) -> tuple[Message, Context]:
    """Pull the message of the task, with its context. The app that comes with it is not fetched.

    Raises:
        NoAnswer: there is no message.
        Superseded: it will never be whole. Where a run ends while the SuperNode receives a message of it, its task is announced and
            stays so; the SuperNode receives one message after the other, so a newer task says that no more of it will come.
    """
    context = context_from_proto(supernode.PullTaskInput(PullTaskInputRequest()).context)
    until = time.monotonic() + STORED
    while True:
        pulled = supernode.PullMessages(PullAppMessagesRequest())
        if pulled.messages_list:
            break
        if time.monotonic() > until:
            raise NoAnswer("the SuperNode announced a task and has no message for it")
        time.sleep(POLL)  # it announces the task before it stores the message
    [tree] = pulled.message_object_trees
    node = Node(node_id=context.node_id)
    message = fetch_message(supernode, tree, node, context.run_id, check=unless_superseded(newest))
    message.metadata.__dict__["_message_id"] = tree.object_id  # it has none of its own while it travels; as Flower does
    return message, context


def unless_superseded(newest: Callable[[], str]) -> Callable[[], None]:
    """Return a check that raises Superseded as soon as a newer task waits; it asks once in `WHOLE` seconds, from any thread."""
    lock, due = threading.Lock(), time.monotonic() + WHOLE

    def check() -> None:
        nonlocal due
        with lock:
            if time.monotonic() < due:
                return
            due = time.monotonic() + WHOLE
            if token := newest():
                raise Superseded(token)

    return check


def answer_message(message: Message, socket: Path, patience: float) -> Message:
    """Return the worker's answer to a message, as a message."""
    try:
        return Message(pack_body(ask_until_answered(socket, unpack_body(message.content), patience)), reply_to=message)
    except (ValueError, NoAnswer) as error:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)


def ask_until_answered(socket: Path, body: bytes, patience: float) -> bytes:
    """Return the worker's answer. It may be away for `patience` seconds, and may die `BROKEN` times.

    Raises:
        NoAnswer: it was away for longer, or died more often.
    """
    until, broken = time.monotonic() + patience, 0
    while True:
        try:
            return ask_worker(socket, body)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > until:
                raise NoAnswer(f"no worker at this site for {patience:.0f} seconds") from None
        except OSError as error:
            broken += 1
            until = time.monotonic() + patience
            if broken == BROKEN:
                raise NoAnswer(f"the worker died {BROKEN} times over this message, at last with: {error}") from None
        time.sleep(POLL)


@contextmanager
def runtime_client(
    runtime: str, component: str, interceptors: Sequence[ProtobufClientInterceptor]
) -> Iterator[RuntimeHttpClient]:
    """Connect to the SuperNode's Runtime API; a call is tried for some seconds, then its error goes up."""
    client = RuntimeHttpClient.from_server_address(
        runtime,
        insecure=True,  # loopback of this machine; `--secret` keeps other users of it out
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=component), *interceptors],
        retry_invoker=RetryInvoker(lambda: constant(0.2), httpx.TransportError, max_tries=10, max_time=10.0),
    )
    try:
        yield client
    finally:
        client.close()


@contextmanager
def heartbeats(supernode: RuntimeHttpClient) -> Iterator[None]:
    """Send the SuperNode heartbeats until the end of the block: the task is worked on."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT):
            try:
                supernode.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            except httpx.HTTPError as error:
                _say("no heartbeat", error=str(error))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _say(event: str, **facts: object) -> None:
    line = {"time": round(time.time(), 3), "part": "executor", "event": event, **facts}
    sys.stderr.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
