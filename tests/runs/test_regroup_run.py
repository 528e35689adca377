"""Runs of a tiny model whose groups are made again: the folder, the report, replay, resumption, what a deployment says to it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedloom import Capabilities, Hierarchy, Limits, Link, NearIID, Refused, prepare
from fedloom.deploy.start import prepare_server
from fedloom.hierarchy.tree import Tree
from fedloom.report.page import write_report
from fedloom.report.run_log import read_run_log
from fedloom.report.tables import regrouping_table
from fedloom.runs.replay import Replayed, replay, server_from_manifest
from tests.support.folder_runs import grouped_run, interrupt_run
from tests.support.same_bytes import COMPARED


def regrouping(encoder: Path, **more: Any) -> Any:
    """FedFa over two near-IID groups of devices whose speeds change all the time."""
    how: dict[str, Any] = {"rounds": 2, "link": Link(1e6, 1e6), "inner_speedup": 4.0, "regroup": 0.1} | more
    world = Capabilities(mode_tasks=3)
    return grouped_run(
        encoder, hierarchy=Hierarchy(NearIID(2, waiting=1.0), **how), world=world, limits=Limits(versions=10)
    )


@pytest.fixture(scope="module")
def recorded(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its answers kept; tests must not write into it."""
    out = tmp_path_factory.mktemp("regrouped") / "out"
    prepare(regrouping(encoder)).execute(out, keep_updates=True)
    return out


def test_the_folder_and_the_report_tell_each_regrouping(recorded: Path, tmp_path: Path) -> None:
    log = read_run_log(recorded)
    assert log.moves, "else this is no test"
    home = {client: edge for edge, own in log.manifest["groups"].items() for client in own}
    lines = [(line["sent"], 1, line["client"], line["edge"]) for line in log.tasks]
    lines += [(line["time"], 0, line["client"], line["to"]) for line in log.moves]
    for _, is_task, client, edge in sorted(lines):
        assert home.get(client) == edge or not is_task, "a task has the edge in which it was done"
        home[client] = edge
    rows = regrouping_table(log).rows
    assert len(rows) == len(log.regroups)
    assert all("more than 10.0" in row[2] for row in rows)
    assert sum(int(row[1].split()[0]) for row in rows) == len(log.moves)
    page = write_report([recorded], tmp_path / "page.html").read_text(encoding="utf-8")
    assert rows[0][2] in page
    assert "Regroupings: the times of clients had drifted apart" in page
    assert log.manifest["compared"]["members"][0]["client"] == "c00"


@pytest.mark.slow
def test_it_replays_and_goes_on_to_the_same_files(encoder: Path, recorded: Path, tmp_path: Path) -> None:
    """Interrupted after the first regrouping, before the last."""
    assert isinstance(server_from_manifest(recorded), Tree)
    assert replay(recorded) == Replayed((recorded / "trace.jsonl").read_bytes().count(b"\n"))
    first = read_run_log(recorded).regroups[0]["version"]
    assert first < 8
    out = interrupt_run(regrouping(encoder), tmp_path / "out", version=first + 2, checkpoint_seconds=0.0)
    prepare(regrouping(encoder), resume=out).execute(report=False)
    for name in (*COMPARED, "manifest.json"):
        assert (out / name).read_bytes() == (recorded / name).read_bytes(), name


def test_a_manifest_without_what_clients_are_compared_with_is_refused(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "updates").mkdir(parents=True)
    for name in ("trace.jsonl", "updates/start.safetensors"):
        (out / name).write_bytes((recorded / name).read_bytes())
    text = (recorded / "manifest.json").read_text(encoding="utf-8")
    (out / "manifest.json").write_text(text.replace('"compared"', '"other"'), encoding="utf-8")
    with pytest.raises(Refused, match="compared"):
        replay(out)


def test_the_hash_of_a_run_that_keeps_its_groups_is_what_it_was(encoder: Path) -> None:
    from fedloom.core.schema import jsonable
    from fedloom.runs.manifest import settings_hash

    before: Any = jsonable(regrouping(encoder, regroup=0.0))
    assert before["hierarchy"].pop("regroup") == 0.0
    assert (
        settings_hash(before)
        == settings_hash(jsonable(regrouping(encoder, regroup=0.0)))
        != settings_hash(jsonable(regrouping(encoder)))
    )


@pytest.mark.slow
def test_regions_keep_their_sites(encoder: Path, tmp_path: Path) -> None:
    """`fedloom serve` says so before anything starts, and so does what it starts."""
    said = r"hierarchy\.regroup.*sites stay with the region"
    with pytest.raises(Refused, match=said):
        prepare_server(regrouping(encoder), tmp_path / "none", 2)
    file = tmp_path / "mine.py"
    text = "from fedloom import Hierarchy, Rows, Run\nrun = Run('m', Rows([{'text': 'a', 'label': 'b'}]), hierarchy=Hierarchy())\n"
    file.write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        "from fedloom.cli.main import main; main()",
        "serve",
        str(file),
        "--folder",
        str(tmp_path / "server"),
    ]
    command += ["--set", "hierarchy.regroup=0.1", "--insecure"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 2
    assert re.search(said, ran.stderr), ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "server").exists()
