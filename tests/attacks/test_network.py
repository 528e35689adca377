"""One running gate against many attempts over the network; `test_attacks.py` has each by itself, with its control."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedloom.deploy.flower.join import clock_ahead
from tests.attacks import network
from tests.attacks.network import AWAITS, LIMITS, NODES, gate_stage, pull, reply

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="many addresses of loopback, /proc")]


def test_one_running_gate_against_all_that_needs_no_other_limits(tmp_path: Path) -> None:
    """Which keys, which nodes, which calls; and who is refused disturbs nobody else."""
    with gate_stage(tmp_path / "gate", LIMITS) as stage:
        found = {
            "no key": stage.call(None, "pull-messages", pull("one")),
            "a stranger's key": stage.call("stranger", "pull-messages", pull("one")),
            "a stranger activates": stage.call("stranger", "activate-node", b""),
            "another node": stage.call("one", "pull-messages", pull("two")),
            "another's reply": stage.call("one", "push-messages", reply("two")),
            "to another's message": stage.call("one", "push-messages", reply("one", reply_to_message_id=AWAITS["two"])),
            "to another site": stage.call("one", "push-messages", reply("one", dst_node_id=NODES["two"])),
            "registers itself": stage.call("one", "register-node", b""),
            "another interface": stage.call("one", "list-nodes", b""),
            "a clock 400 s late": stage.call("one", "pull-messages", pull("one"), late=400),
            "a clock 30 s early": stage.call("one", "pull-messages", pull("one"), late=-30),
        }
        refused = {
            "no key": 401,
            "a stranger's key": 401,
            "a stranger activates": 400,
            "another node": 401,
            "another's reply": 401,
            "to another's message": 403,
            "to another site": 403,
            "registers itself": 400,
            "another interface": 403,
            "a clock 400 s late": 401,
            "a clock 30 s early": 401,
        }
        assert found == refused
        assert stage.came == 0
        for late in (200, -1):
            assert stage.call("one", "pull-messages", pull("one"), late=late) == 200
        ahead = clock_ahead(f"localhost:{stage.port}", stage.folder / "keys" / "ca.crt")
        assert ahead is not None
        assert abs(ahead) < 1.5, "the refusal of a request without a key tells the time"
        with stage.connect() as line:
            assert network.ask(line, "pull-messages", pull("one"), stage.headers("one")) == 200
            assert network.ask(line, "pull-messages", pull("two"), stage.headers("two")) == 401, "one key a connection"
        with ExitStack() as opened:  # a heartbeat does not wait for uploads that hang, nor does another site
            for _ in range(2 * LIMITS.connections):
                line = opened.enter_context(stage.connect())
                line.sendall(network.head("push-object", 1000, stage.headers("one")) + b"begun")
                time.sleep(0.01)
            assert stage.call("one", "pull-messages", pull("one")) == 503, "all that a key may have are in use"
            assert stage.call("two", "pull-messages", pull("two")) == 200
        with ExitStack() as opened:
            for _ in range(LIMITS.connections - 1):
                line = opened.enter_context(stage.connect())
                line.sendall(network.head("push-object", 1000, stage.headers("one")) + b"begun")
            assert stage.call("one", "pull-messages", pull("one")) == 200
        assert stage.call("one", "push-messages", reply("one")) == 200
        assert stage.call("one", "push-object", network.piece("one", "c" * 64, 1000)) == 200
        assert stage.call("two", "pull-messages", pull("two")) == 200
