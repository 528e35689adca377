"""A region whose sites are only summed, with Flower's real processes, TLS and keys: `fedloom serve`, `region`, three `join`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from fedloom.deploy.flower import keys
from fedloom.deploy.flower.supervisor import free_port
from fedloom.deploy.server.key_facts import KeyFacts
from fedloom.deploy.site.request_record import RecordChain
from fedloom.runs.replay import replay
from tests.support import federation

pytestmark = [pytest.mark.slow, pytest.mark.federation, pytest.mark.skipif(sys.platform != "linux", reason="/proc")]


SECURED = federation.RUNFILE.replace("IID, FedFa,", "FFA, IID, Hierarchy, Rounds, Secure,").replace(
    "schedule=FedFa(window=4, max_in_flight={clients})",
    "aggregator=FFA(), schedule=Rounds(1), hierarchy=Hierarchy(rounds=2, secure=Secure(least=3, bound=0.05))",
)


def test_a_region_of_three_hosts_opens_sums_and_sees_no_answer(tmp_path: Path) -> None:
    north = federation.make(tmp_path / "north", clients=3, versions=2, steps=8, text=SECURED)
    above = federation.Federation(tmp_path / "above", ["north"], free_port())
    above.folder.mkdir()
    text = (north.folder / "run.py").read_text()
    (above.folder / "run.py").write_text(text.replace("Path(__file__).parent", f"Path({str(north.folder)!r})"))
    keys.new(above.server, [above.host])
    private, public = keys.site("north", north.folder)
    keys.add(public, "north", above.server, KeyFacts(region=True))
    settings = {
        "name": "north",
        "server": f"{above.host}:{above.port}",
        "ca": str(above.server / "keys" / "ca.crt"),
        "key": private.name,
        "region": True,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    (north.folder / "north.toml").write_text("\n".join([*lines, "[model]", f'path = "{north.folder / "model"}"']))
    peers = north.folder / "peers"
    peers.mkdir()
    for name in north.names:
        shutil.copy(north.folder / "sites" / name / f"{name}.pub", peers)
        toml = north.folder / "sites" / name / "site.toml"
        toml.write_text(f'peers = "{peers}"\n' + toml.read_text())
    try:
        above.serve()
        north.region(north.folder / "north.toml")
        for name in north.names:
            north.join(name)
        federation.until(above.over, 500, "the run did not end", 0.5)
        assert above.processes["server"].returncode == 0, above.said("server")
    finally:
        for one in (above, north):
            one.close()
    run = above.server / "run"
    assert replay(run).difference == ""
    steps = [json.loads(line)["event"] for line in (north.server / "run" / "trace.jsonl").read_text().splitlines()]
    opened = [event for event in steps if event["type"] == "SumOpened"]
    assert len(opened) == 4, "two versions of two rounds"
    assert all(len(event["blocks"][0]["tasks"]) == 3 for event in opened)
    for name in north.names:
        record = [*RecordChain().lines(north.folder / "sites" / name / "state" / "record.jsonl")]
        assert [line["kind"] for line in record].count("sum asked") == 4
