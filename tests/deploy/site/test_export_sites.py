"""Shards as sites: what a real site reads is what the simulated client had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.aggregate.fedsa import FedSA
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.aggregate.scaffold import Scaffold
from fedloom.core.codec import DeltaInt8
from fedloom.core.errors import Refused
from fedloom.core.events import Command, Dispatch, Event, UpdateArrived
from fedloom.core.fingerprint import fingerprint
from fedloom.core.seeds import simulated_secret
from fedloom.core.text import without_surrogates
from fedloom.core.types import Task
from fedloom.data.examples import Examples
from fedloom.data.instructions import Instructions
from fedloom.data.partition import IID, ByClient
from fedloom.data.table import Rows
from fedloom.deploy.messages.messages import TaskRequest, decode_reply, encode_request
from fedloom.deploy.site.export_sites import export_sites
from fedloom.deploy.site.settings import read_site
from fedloom.deploy.site.worker import SiteWorker
from fedloom.deploy.start import run_terms
from fedloom.runs.prepare import prepare
from fedloom.runs.run import Run
from fedloom.train.settings import Engine, Training
from tests.support.deployment_runs import as_deployed
from tests.support.sites import accepting
from tests.support.storms import one_in
from tests.support.tiny_models import tiny_run, toy_answers, toy_rows

PAIRS = [{"text": row["text"], "other": f"or {k}: \\ \" é\u2028", "label": k % 3, "who": f"{'ab'[k % 2]}/.."}
         for k, row in enumerate(toy_rows(60))]  # fmt: skip
TALKS = [
    {"talk": [{"role": "system", "content": "be kind"}, {"role": "user", "content": row["instruction"]},
              {"role": "assistant", "content": row["answer"]}]}
    for row in toy_answers(60)
]  # fmt: skip
SOURCES = {
    "labels": Rows(toy_rows(60)),
    "pairs": Rows(PAIRS, pair="other", labels={"0": "no", "1": "yes", "2": "perhaps"}, client="who"),
    "answers": Instructions(lambda: toy_answers(60)),
    "context": Instructions(lambda: [{**row, "about": "x" * (k % 2)} for k, row in enumerate(toy_answers(60))], context="about"),
    "conversations": Instructions(lambda: TALKS, messages="talk"),
}  # fmt: skip


def shards_of(run: Run) -> dict[str, Examples]:
    split = run.data.load(run.seed)
    parts = run.partition.split(split.train, run.seed)
    return {client: split.train.take(part) for client, part in parts.items()}


@pytest.mark.parametrize("data", SOURCES.values(), ids=SOURCES)
def test_a_site_reads_what_its_client_had(encoder: Path, tmp_path: Path, data: Any) -> None:
    partition = ByClient() if isinstance(data, Rows) and data.client else IID(3)
    run = tiny_run(encoder, data=data, partition=partition, seed=4)
    wanted = shards_of(run)
    sites = [read_site(file) for file in export_sites(run, tmp_path / "sites")]
    assert [site.name for site in sites] == list(wanted)
    for site in sites:
        own = wanted[site.name]
        has = site.examples(None if own.answers else own.names)
        for name in ("texts", "pairs", "answers", "before"):
            assert getattr(has, name) == getattr(own, name), name
        if own.answers is None:
            assert (has.labels, has.names) == (own.labels, own.names)
        assert site.model.is_of(run.model)
        assert site.model.path == str(encoder)


def test_half_characters_are_written_as_a_model_reads_them(encoder: Path, tmp_path: Path) -> None:
    rows = [{**row, "text": f"{row['text']} \ud83d"} for row in toy_rows(60)]
    run = tiny_run(encoder, data=Rows(rows), partition=IID(3))
    wanted = shards_of(run)
    for site in map(read_site, export_sites(run, tmp_path / "sites")):
        own = wanted[site.name]
        assert site.examples(own.names).texts == tuple(map(without_surrogates, own.texts))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", one_in(3, [ProductDelta(), Scaffold(clients=6), FedSA()]), ids=lambda method: type(method).__name__
)
def test_workers_repeat_a_run_to_the_bit(encoder: Path, tmp_path: Path, method: Any) -> None:
    """Every task of a simulation, sent to the site of its client: the answers are those that the server merged."""
    training = Training(learning_rate=1e-2, max_length=16)
    more = {"aggregator": method, "transfer": DeltaInt8(), "engine": Engine("torch", together=1), "training": training}
    run = tiny_run(encoder, **more, seed=4)
    sites = [read_site(file) for file in export_sites(run, tmp_path / "sites")]
    workers = {site.name: accepting(SiteWorker(site, secret=simulated_secret(run.seed, site.name))) for site in sites}
    settled = dict.fromkeys(workers, 0)
    job, tasks, seen = as_deployed(prepare(run)), dict[int, Task](), list[int]()

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        if isinstance(event, UpdateArrived) and event.task in tasks:
            task = tasks[event.task]
            reply = workers[event.client].answer(
                encode_request(TaskRequest(run_terms(job), 1, task, settled[event.client]))
            )
            _, number, result = decode_reply(reply, 10**8, tasks)  # type: ignore[misc]
            assert fingerprint(result.adapter) == fingerprint(event.result.adapter)
            assert (
                result.metrics.items() - {("seconds_train", result.metrics["seconds_train"])}
                <= event.result.metrics.items()
            )
            settled[event.client] = number
            seen.append(number)
        tasks.update({command.task.id: command.task for command in commands if isinstance(command, Dispatch)})

    job.execute(tmp_path / "run", [observe], report=False)
    assert len(seen) >= 12
    assert any(len([task for task in tasks.values() if task.client == client]) > 1 for client in settled)


def test_nothing_is_written_over(encoder: Path, tmp_path: Path) -> None:
    run = tiny_run(encoder)
    export_sites(run, tmp_path / "sites")
    with pytest.raises(Refused, match="it exists already"):
        export_sites(replace(run, seed=9), tmp_path / "sites")
