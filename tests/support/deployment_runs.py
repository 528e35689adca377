"""Deployments with real site workers in this process, over a simulated link: run, folder and net of a simulation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedloom import Plan, Rounds, Training
from fedloom.core.seeds import simulated_secret
from fedloom.core.types import Profile
from fedloom.deploy.site.worker import SiteWorker
from fedloom.deploy.start import run_terms
from fedloom.plan.rank import RandomRank
from fedloom.runs.job import Job
from fedloom.runs.prepare import PreparedRun, prepare
from fedloom.runs.run import Run
from tests.support.simulated_link import VALUES, Net
from tests.support.sites import accepting, site_at
from tests.support.tiny_models import tiny_run

MIXED = Plan(RandomRank(2, 8), local_steps=3)


@dataclass
class Real:
    """A site of the net with a real worker."""

    worker: SiteWorker
    profile: Profile = field(init=False)
    seconds: float = 1.0

    def __post_init__(self) -> None:
        self.profile = Profile(self.worker.site.name, 1)

    def answer(self, body: bytes) -> bytes:
        return self.worker.answer(body)


def run_of(encoder: Path, **more: Any) -> Run:
    training = Training(
        learning_rate=1e-2, max_length=16
    )  # left open, a server that has no rows would find a larger one
    given: dict[str, Any] = {"name": "parity", "plan": MIXED, "schedule": Rounds(4), "threads": 1, "training": training}
    run: Run = tiny_run(encoder, **(given | more))
    return run


def as_deployed(job: PreparedRun, run: Run | None = None) -> PreparedRun:
    """A simulation whose clients draw as sites with their secrets do in a deployment, of this run if it was made longer since."""
    return replace(job, draws=run_terms(prepare(run) if run else job).run_hash)


def folder_of(tmp_path: Path, run: Run, name: str = "deployment", **more: Any) -> Path:
    """The folder of a deployment, as `fedloom serve` makes it; the run file has the value from here."""
    folder = tmp_path / name
    folder.mkdir()
    VALUES[str(folder)] = run
    (folder / "run.py").write_text(
        f"from tests.support.simulated_link import VALUES\n\nrun = VALUES[{str(folder)!r}]\n"
    )
    told = {"runfile": str(folder / "run.py"), "clients": 6, **more}
    (folder / "deployment.json").write_text(json.dumps(told))
    return folder


def net_of(tmp_path: Path, job: Job, encoder: Path) -> Net:
    """A worker for each client of the simulation, with its examples as a file and its secret."""
    train, found = job.split.train, {}
    for number, shard in enumerate(job.shards):
        rows = [
            {"text": train.texts[i], "label": train.names[train.labels[i]]}
            for i in sorted(shard.train + shard.held_out)
        ]
        site = site_at(tmp_path / shard.client, encoder, rows)
        copy = site.model.model_copy(update={"name": job.run.model})
        site = site.model_copy(update={"name": shard.client, "model": copy})
        secret = simulated_secret(job.run.seed, shard.client)
        found[number] = Real(accepting(SiteWorker(site, secret=secret)), seconds=1.0 + number)
    return Net(found)  # type: ignore[arg-type]
