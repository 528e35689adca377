"""A federation on one machine: its folder, and, by real processes, that it runs, stops without a trace and continues."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom.core.errors import Refused
from fedloom.deploy.flower import keys
from fedloom.deploy.flower.local_federation import README, host_guide, make_federation, read_federation
from fedloom.deploy.flower.supervisor import program
from fedloom.deploy.server.status import read_status
from fedloom.deploy.site.settings import read_site
from tests.deploy.test_deployment import running
from tests.support.federation import RUNFILE, environment, until
from tests.support.tiny_models import tiny_encoder, toy_rows


def run_file(folder: Path, versions: int = 2, steps: int = 1, more: str = "") -> Path:
    """A run of four clients on toy sentences, each of which says whose it is."""
    for name, rows in (("train", toy_rows(400, 1)), ("test", toy_rows(100, 2))):
        lines = [json.dumps({**row, "who": f"ward {k % 3}"}) + "\n" for k, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    text = RUNFILE.format(clients=4, versions=versions, steps=steps, seed=0)
    (folder / "run.py").write_text(text + more)
    return folder / "run.py"


def test_the_folder_has_all_that_a_server_and_its_sites_need(tmp_path: Path) -> None:
    made = make_federation(run_file(tmp_path), ["training.batch_size=4", "patience.poll=0.1"], 2, tmp_path / "up")
    assert made == read_federation(tmp_path / "up")
    assert made.settings == ("training.batch_size=4", "patience.poll=0.1", "partition.clients=2"), (
        "the run is one of as many clients"
    )
    assert [entry.name for entry in keys.listed(tmp_path / "up" / "server")] == [*made.sites] == ["c00", "c01"]
    sites = [read_site(tmp_path / "up" / "sites" / name / "site.toml") for name in made.sites]
    for site in sites:
        assert site.server == f"127.0.0.1:{made.port}"
        assert site.key is not None
        assert site.key.stat().st_mode & 0o777 == 0o600
        assert site.ca is not None
        assert site.ca.read_bytes() == (tmp_path / "up" / "server" / "keys" / "ca.crt").read_bytes()
        assert site.limits.learning_rate == 1e-2, "as the run needs, and more than the default"
    assert sum(len(site.examples(("colour", "pet"))) for site in sites) == 400, "the whole data, divided anew"
    words = made.serve_command(tmp_path / "up")
    assert "--resume" not in words
    assert words[-4:] == ["--set", "patience.poll=0.1", "--set", "partition.clients=2"]
    guide = (tmp_path / "up" / README).read_text()
    assert "fedloom join --config site.toml" in guide
    assert "--set training.batch_size=4" in guide
    assert "partition" not in guide
    quoted = host_guide(replace(made, settings=("date='2026-01-31'; rm -r x",)), tmp_path)
    (line,) = [line for line in quoted.splitlines() if "fedloom serve" in line]
    assert shlex.split(line)[-2:] == ["--set", "date='2026-01-31'; rm -r x"]


def test_clients_that_the_data_name_become_sites_whose_names_a_key_can_have(tmp_path: Path) -> None:
    by_client = """
from dataclasses import replace
from fedloom import ByClient
run = replace(run, data=replace(run.data, client="who"), partition=ByClient())
"""
    made = make_federation(run_file(tmp_path, more=by_client), [], 2, tmp_path / "up")
    assert (made.sites, made.settings) == (("site-01", "site-02"), ())
    with pytest.raises(Refused, match=r"sites = 4.*3 clients"):
        make_federation(tmp_path / "run.py", [], 4, tmp_path / "other")
    assert not (tmp_path / "other").exists(), "nothing is half written"


def test_what_cannot_be_tried_so_is_refused(tmp_path: Path) -> None:
    file = run_file(
        tmp_path,
        more="\nfrom dataclasses import replace\nfrom fedloom import Hierarchy\nrun = replace(run, hierarchy=Hierarchy())\n",
    )
    with pytest.raises(Refused, match="regions need servers of their own"):
        make_federation(file, [], 2, tmp_path / "up")
    with pytest.raises(Refused, match="fedloom up"):
        read_federation(tmp_path)


@pytest.mark.slow
@pytest.mark.federation
@pytest.mark.skipif(sys.platform != "linux", reason="as the processes of a deployment")
def test_it_is_stopped_without_a_trace_continues_and_ends_by_itself(tmp_path: Path) -> None:
    """SIGTERM in the middle of the run, then --resume: server and sites have the exit code 0, and nobody is left."""
    tiny_encoder(tmp_path / "model")
    file, folder = run_file(tmp_path, versions=8, steps=10), tmp_path / "up"

    def begin(*words: str) -> subprocess.Popen[str]:
        command = [program("fedloom"), "up", *words]
        return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def version() -> int:
        return int(read_status(folder / "server")["version"]) if (folder / "server" / "status.json").exists() else 0

    first = begin(str(file), "--out", str(folder))
    until(lambda: version() >= 2 or first.poll() is not None, 300, "no version was made")
    os.kill(first.pid, signal.SIGTERM)
    said, _ = first.communicate(timeout=90)
    assert f" up --resume {folder}\n" in said
    assert folder.stat().st_mode & 0o77 == 0, "the rows of the sites are its owner's alone"
    assert running(str(folder)) == {}
    before = version()
    assert before < 8, "it was stopped too late to say anything"

    second = begin("--resume", str(folder))
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 0, said
    assert running(str(folder)) == {}
    for name in ("c00", "c01"):
        assert f"{name}    | " in said
        assert "answered: loss" in said
        assert (folder / "logs" / f"{name}.log").read_text().count("has ended: 8 versions made") == 1
    assert read_status(folder / "server")["state"] == "finished"
    assert "server | Finished 8 versions made" in said
