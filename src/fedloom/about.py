"""What a run is, for its manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom import __version__, manifest
from fedloom.data.partition import statistics
from fedloom.server import Server
from fedloom.train import dialogue
from fedloom.tree import Tree
from fedloom.types import Budget

if TYPE_CHECKING:
    from fedloom.job import Job


def groups(server: Server | Tree) -> dict[str, object]:
    """Who is in which group at the beginning, as far as it is known (the regions of a deployment say it when they join), and by what
    clients are compared where groups are made again.
    """
    if isinstance(server, Tree):
        again = server.regrouping
        return {"groups": server.groups.names, **({"compared": manifest.plain(again.compared)} if again else {})}
    known = server.state.groups
    return {"groups": {edge: [one.client for one in known[edge].members] for edge in sorted(known)}} if known else {}


def told(job: Job) -> dict[str, object]:
    """The manifest, without the status."""
    settings, shape = manifest.plain(job.run), job.server.shape
    rules = job.run.aggregator.start(job.server.state.model, Budget(1, 1), 0).rules
    fitted = {"training": job.train_texts.fitted, "test": job.test_texts.fitted}
    notes = [*job.split.notes, *dialogue.notes(job.base.tokenizer, job.run.training.max_length, fitted)]
    notes += manifest.notes(rules, head=shape.dense > 0)
    elsewhere = {"clients": {}, "label_names": list(job.split.train.names)}
    ranks = range(1, job.run.plan.rank.largest + 1)
    return {
        "fedloom": __version__,
        "name": job.run.name,
        "seed": job.run.seed,
        "run_hash": manifest.digest(settings),
        "run": settings,
        "versions": manifest.versions(),
        "machine": manifest.machine(),
        "computed": job.base.computed,
        "model": {
            "name": job.run.model,
            "labels": job.base.labels,
            "parameters": shape.parameters + shape.embeddings,
            "adapted_modules": list(job.server.state.model.adapter.factors),
            "lora_parameters_by_rank": {str(rank): shape.adapter_parameters(rank) for rank in ranks},
            "dense_parameters": shape.dense,
        },
        "partition": statistics(job.split.train, job.shards) if job.shards else elsewhere,
        "clients": {client: manifest.plain(profile) for client, profile in job.profiles.items()},
        **groups(job.server),
        "baselines": {} if job.base.labels is None else {"majority": manifest.majority(job.split.test.labels)},
        "notes": job.begun.notes(notes, __version__) if job.begun else notes,
    }
