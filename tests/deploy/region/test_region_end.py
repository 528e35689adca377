"""A region that is told that the run above has ended: before it has begun, and what it says to its own sites."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Thread

from fedloom.core.types import Profile
from fedloom.deploy import start
from fedloom.deploy.messages.messages import RunEnded, encode_request
from fedloom.deploy.region.region import Region
from fedloom.deploy.site.settings import read_site
from fedloom.deploy.site.worker_socket import ask_worker
from fedloom.hierarchy.hierarchy import Hierarchy
from tests.support.deployed_processes import TERMS
from tests.support.deployment_runs import folder_of
from tests.support.federation import until
from tests.support.simulated_link import Net, Site
from tests.support.tiny_models import tiny_run

ENDED = encode_request(RunEnded(TERMS, 1, "5 versions made"))


def settings(folder: Path) -> Path:
    text = 'name = "north"\nserver = "127.0.0.1:8000"\nregion = true\n\n[model]\npath = "tiny"\n'
    (folder / "site.toml").write_text(text)
    return folder / "site.toml"


def test_it_is_taken_note_of_whatever_the_run_is(tmp_path: Path) -> None:
    region = Region(read_site(settings(tmp_path)), tmp_path, 1)
    assert b"Acknowledged" in region.answer(ENDED)
    assert region.ended == "5 versions made"


def test_a_region_that_nobody_asked_for_anything_ends_too(encoder: Path, tmp_path: Path) -> None:
    """As `fedloom region`, before the terms have come; it has no model and knows no site."""
    config, reasons = settings(tmp_path), list[str]()
    net = Net({1: Site(Profile("c1", 10))})
    run = tiny_run(encoder, hierarchy=Hierarchy())
    folder = folder_of(tmp_path, run, "region", clients=1, above=str(config))

    def lead() -> None:
        reasons.append(start.run_deployment(net, folder, lambda seconds: time.sleep(0.01), net.clock))

    thread = Thread(target=lead)
    thread.start()
    until((tmp_path / "state" / "worker.sock").exists, 30, "it does not listen")
    ask_worker(tmp_path / "state" / "worker.sock", ENDED, 5.0)
    thread.join(30)
    assert reasons == ["5 versions made"]
