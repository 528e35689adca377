"""The parts of a run as data: what `prepare` builds and `execute` carries out, and how its manifest describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

from fedloom.core.errors import Refused
from fedloom.core.schema import plain
from fedloom.core.server import Server
from fedloom.core.types import Budget, ClientId, Model, Profile
from fedloom.data.examples import Split
from fedloom.data.partition import Shard, statistics
from fedloom.hierarchy.tree import Tree
from fedloom.runs import manifest
from fedloom.runs.resume import Begun
from fedloom.runs.run import Run
from fedloom.simulate.availability import Stays
from fedloom.train import chat_template
from fedloom.train.base_model import Base
from fedloom.train.engine.frozen_layers import Cache
from fedloom.train.evaluate import score
from fedloom.train.tokenised import Encoded

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Job:
    """The parts of a run: data divided, model loaded, server at version 0. Nothing has been written yet."""

    run: Run
    split: Split
    shards: tuple[Shard, ...]
    profiles: Mapping[ClientId, Profile]
    base: Base
    train_texts: Encoded
    test_texts: Encoded
    tested: tuple[int, ...]
    server: Server | Tree
    kept: Cache = field(default_factory=Cache)
    stays: Stays | None = None
    begun: Begun | None = None

    def evaluate(self, model: Model) -> dict[str, float]:
        """Figures on the test examples."""
        room = self.run.engine.cache if self.run.engine else 0
        scores = score(self.base, model.adapter, self.test_texts, self.tested, model.fold, self.kept, room)
        return {**scores.figures(), "examples": len(self.tested)}

    def about(self) -> dict[str, object]:
        """The manifest, without the status."""
        return told(self)

    def check_failures(self, reason: str) -> None:
        """Raise Refused if the run ended because so many tasks failed."""
        if self.server.state.failures >= self.run.limits.failures:
            remedy = f"the run was given up: {reason}. Mend that, or allow for more"
            raise Refused("limits.failures", self.run.limits.failures, remedy)


def groups(server: Server | Tree) -> dict[str, object]:
    """Who is in which group at the beginning, as far as it is known (the regions of a deployment say it when they join), and by what
    clients are compared where groups are made again.
    """
    if isinstance(server, Tree):
        again = server.regrouping
        return {"groups": server.groups.names, **({"compared": plain(again.compared)} if again else {})}
    known = server.state.groups
    return {"groups": {edge: [one.client for one in known[edge].members] for edge in sorted(known)}} if known else {}


def told(job: Job) -> dict[str, object]:
    """The manifest, without the status."""
    settings, shape = plain(job.run), job.server.shape
    rules = job.run.aggregator.start(job.server.state.model, Budget(1, 1), 0).rules
    fitted = {"training": job.train_texts.fitted, "test": job.test_texts.fitted}
    notes = [*job.split.notes, *chat_template.notes(job.base.tokenizer, job.run.training.max_length, fitted)]
    notes += manifest.notes(rules, head=shape.dense > 0)
    elsewhere = {"clients": {}, "label_names": list(job.split.train.names)}
    ranks = range(1, job.run.plan.rank.largest + 1)
    return {
        "fedloom": version("fedloom"),
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
        "clients": {client: plain(profile) for client, profile in job.profiles.items()},
        **groups(job.server),
        "baselines": {} if job.base.labels is None else {"majority": manifest.majority(job.split.test.labels)},
        "notes": job.begun.notes(notes, version("fedloom")) if job.begun else notes,
    }
