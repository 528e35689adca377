"""The end of a run, announced to all who are connected, so that no site waits for a server that is gone."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedloom.deploy.messages.messages import RunEnded, encode_request
from fedloom.deploy.server.driver import Deployment
from fedloom.deploy.server.reply_events import SITE_REPLY


def announce_end(running: Deployment, reason: str, pause: Callable[[float], None] = time.sleep) -> None:
    """Send `RunEnded` to each node that can be reached; returns when each has replied or is gone, or after `Timeouts.end`.

    A site that still trains replies when it is done. No reply to anything else is awaited any more.
    """
    body = encode_request(RunEnded(running.terms, running.incarnation, reason))
    awaited = {running.transport.send(node, body, SITE_REPLY) for node in running.transport.nodes()}
    running.traffic.sent += len(awaited)
    running.traffic.bytes_down += len(awaited) * len(body)
    until = running.clock() + running.timeouts.end
    while awaited and running.clock() < until:
        awaited -= {reply.message for reply in running.transport.collect()}
        pause(running.timeouts.poll)
