"""A job: the parts of one run as data. `prepare` builds it, `execute` carries it out, and a manifest describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import version
from typing import Any

from fedloom.core.coordinator import Coordinator
from fedloom.core.errors import Refused
from fedloom.core.schema import jsonable
from fedloom.core.types import Budget, ClientId, Model, Profile
from fedloom.data.data_checks import overlap_sentences
from fedloom.data.examples import Split
from fedloom.data.partition import Shard, partition_notes, partition_statistics
from fedloom.privacy.private import Private
from fedloom.privacy.secret_noise import commitment
from fedloom.report.notebook_view import partition_html
from fedloom.report.numbers import plural
from fedloom.runs import manifest
from fedloom.runs.private_run import private_notes
from fedloom.runs.resume import UnfinishedRun
from fedloom.runs.run import Run
from fedloom.runs.run_result import data_frame
from fedloom.runs.start_adapter import StartAdapter
from fedloom.simulate.availability import Stays
from fedloom.simulate.devices import Devices
from fedloom.train import chat_template
from fedloom.train.base_model import Base
from fedloom.train.confusion import commonest_label
from fedloom.train.engine.frozen_layers import ActivationCache
from fedloom.train.evaluate import AnswerScores, KeptActivations, Scores, score
from fedloom.train.tokenised import EncodedTexts

SIMULATED_NOISE = "Simulated noise protects nobody: its secret is derived from the run's seed, which is in this folder."
SIMULATED_DRAWS = "batches, dropout and held-out rows from secrets that follow from the run's seed"
SITES_DRAWS = "batches, dropout and held-out rows from each site's own secret"


def privacy_section(privacy: Private, secret: bytes, simulated: bool) -> dict[str, object]:
    """Return what a manifest says of a private run beside its settings: who makes the noise, and what tells its secret from another.

    The secret itself, or anything that could be turned back into it, is never in it.
    """
    where = "the server" if privacy.unit == "client" else "the sites"
    noise = "simulated noise: no privacy" if simulated else f"by a secret of {where}, which is not in this folder"
    kept = {"commitment": commitment(secret), "answers": "sealed with the secret"} if secret else {}
    return {"unit": privacy.unit, "noise": noise, **kept}


@dataclass(frozen=True, slots=True)
class Job:
    """The parts of a run: data divided, model loaded, server at version 0. Nothing has been written yet.

    Fields:
        run: the settings that the rest follows from.
        split: all training and test examples.
        shards: which training examples each client has (empty: the data lie at sites that are not known yet).
        profiles: device and data size of each client.
        devices: how long a simulated task takes each client.
        base: the frozen model.
        train_texts, test_texts: the examples of `split` in tokens.
        tested: positions of the test examples that score a version.
        canaries: positions of those that decide whether it is published; none of them is in `tested` (empty: there is no canary).
        server: the server, with edges if the run has a hierarchy; the only part that changes while the run is carried out.
        cache: outputs of frozen layers on test examples, computed once, and the folder that keeps them for other runs.
        stays: when each client can be reached (None: always).
        resumed_from: the unfinished run that is continued (None: it is a new one).
        start: the adapter that the run begins from (None: it begins untrained).
        draws: names the run in what its simulated clients draw. "": they draw alike in all runs of one seed. So methods are
            compared on the same batches, and a run that is made longer equals one that was longer from the beginning. The sites of a
            deployment draw apart in each run; a simulation that is to repeat one is given the deployment's run hash here.
        secret: secret of the server's noise (empty: it adds none).
    """

    run: Run
    split: Split
    shards: tuple[Shard, ...]
    profiles: Mapping[ClientId, Profile]
    devices: Devices
    base: Base
    train_texts: EncodedTexts
    test_texts: EncodedTexts
    tested: tuple[int, ...]
    server: Coordinator
    cache: ActivationCache = field(default_factory=ActivationCache)
    canaries: tuple[int, ...] = ()
    stays: Stays | None = None
    resumed_from: UnfinishedRun | None = None
    start: StartAdapter | None = None
    draws: str = ""
    secret: bytes = field(default=b"", repr=False)

    def __repr__(self) -> str:
        sizes = f"{len(self.split.train)} training and {len(self.split.test)} test examples"
        return f"{type(self).__name__}({self.run.name!r}: {plural(len(self.profiles), 'client')}, {sizes})"

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{escape(note)}</li>" for note in self._notes())
        return f"<code>{escape(repr(self))}</code>{partition_html(self._partition())}<ul>{notes}</ul>"

    def _partition(self) -> dict[str, Any]:
        return partition_statistics(self.split.train, self.shards)

    @property
    def clients(self) -> Any:
        """A row for each client: its device, its examples, mean words, and how many examples of each label it has.

        A pandas data frame; a list of mappings where pandas is not installed.
        """
        statistics = self._partition()
        rows = [
            {"client": client, "tier": self.profiles[client].tier}
            | {name: value for name, value in found.items() if name != "labels"}
            | {f"label {name}": count for name, count in zip(statistics["label_names"], found["labels"], strict=True)}
            for client, found in statistics["clients"].items()
        ]
        return data_frame(rows)

    def score(self, model: Model) -> Scores | AnswerScores:
        """Predict the test examples with a model."""
        return self._score(model, self.tested)

    def check(self, model: Model) -> tuple[float, ...]:
        """Return how probable the model finds the right answer of each canary example."""
        return self._score(model, self.canaries).probabilities()

    def _score(self, model: Model, rows: tuple[int, ...]) -> Scores | AnswerScores:
        return score(self.base, model.adapter, self.test_texts, rows, model.fold, self.kept_activations(self.cache))

    def kept_activations(self, cache: ActivationCache) -> KeptActivations:
        """Return what scoring keeps in `cache`, of the layers that no client trains."""
        depth = self.run.plan.depth.bounds[1] if self.run.plan.depth else None
        return KeptActivations(self.run.engine.cache if self.run.engine else 0, depth, cache)

    def evaluate(self, model: Model) -> dict[str, float]:
        """Return the metrics of a model on the test examples."""
        return {**self.score(model).metrics(), "examples": len(self.tested)}

    def baselines(self) -> dict[str, float]:
        """Return the test accuracy of always answering the commonest label; empty where text is written."""
        tested = self._tested_labels()
        return {} if self.base.labels is None else {"majority": tested.count(self._majority()) / len(tested)}

    def _tested_labels(self) -> list[int]:
        return [self.split.test.labels[i] for i in self.tested]

    def _majority(self) -> int:
        """The commonest label of the training examples; of the test examples at a server whose training examples lie at sites."""
        return commonest_label(self.split.train.labels or self._tested_labels())

    def check_failures(self, reason: str) -> None:
        """Raise Refused if the run ended because so many tasks failed."""
        if self.server.state.failures >= self.run.limits.failures:
            remedy = f"the run was given up: {reason}. Mend that, or allow for more"
            raise Refused("limits.failures", self.run.limits.failures, remedy)

    def describe(self) -> dict[str, object]:
        """Return the manifest, without the status."""
        settings, shape = jsonable(self.run), self.server.shape
        sites_elsewhere = {"clients": {}, "label_names": list(self.split.train.names)}
        ranks = range(1, self.run.plan.rank.largest + 1)
        notes = self._notes()
        return {
            "fedloom": version("fedloom"),
            "name": self.run.name,
            "seed": self.run.seed,
            "run_hash": manifest.settings_hash(settings),
            "client_draws": SIMULATED_DRAWS if self.shards else SITES_DRAWS,
            "run": settings,
            "versions": manifest.library_versions(),
            "machine": manifest.machine_kind(),
            "computed": self.base.computation,
            "base_weights": self.base.fingerprint(),
            **({"start": self.start.facts} if self.start else {}),
            **({"extended": self.resumed_from.extended} if self.resumed_from and self.resumed_from.extended else {}),
            "model": {
                "name": self.run.model,
                "labels": self.base.labels,
                "parameters": shape.parameters + shape.embeddings,
                "adapted_modules": list(self.server.state.model.adapter.factors),
                "lora_parameters_by_rank": {str(rank): shape.adapter_parameters(rank) for rank in ranks},
                "dense_parameters": shape.dense,
            },
            "partition": self._partition() if self.shards else sites_elsewhere,
            "clients": {client: jsonable(profile) for client, profile in self.profiles.items()},
            **self.server.manifest_sections(),
            **manifest.protection(self.run.aggregator, self.run.hierarchy),
            **(
                {"privacy": privacy_section(self.run.privacy, self.secret, bool(self.shards))}
                if self.run.privacy
                else {}
            ),
            "baselines": self.baselines(),
            "metrics": self._metric_meanings(),
            "notes": self.resumed_from.notes(notes) if self.resumed_from else notes,
        }

    def _metric_meanings(self) -> dict[str, str]:
        if self.base.labels is None:
            return manifest.choice_meaning(len(self.train_texts.choices))
        of = "training examples" if self.split.train.labels else "test examples"
        return manifest.metric_meanings(self.split.train.names, self._majority(), of)

    def _notes(self) -> list[str]:
        """Notes for a reader of the figures: on data, checkpoint, labels, cut texts, method."""
        rules = self.run.aggregator.start(self.server.state.model, Budget(1, 1), 0).rules
        counts = {"training": self.train_texts.fit_counts, "test": self.test_texts.fit_counts}
        cut = chat_template.fit_notes(self.run.training.token_limit, counts)
        if self.base.labels is None:
            cut += chat_template.prompt_notes(self.base.tokenizer, self.run.date)
        absent = [] if self.base.labels is None else manifest.label_notes(self.split.train.names, self._tested_labels())
        started = self.start.notes if self.start else ()
        longer = self.resumed_from.extension_notes if self.resumed_from and not self.shards else []
        return [
            *started,
            *longer,
            *self.split.notes,
            *overlap_sentences(self.split.train, self.split.test),
            *partition_notes(self.split.train, self.shards, self.run.held_out),
            *self.base.notes,
            *absent,
            *manifest.canary_notes(len(self.canaries), len(self.split.test)),
            *private_notes(self.run),
            *([SIMULATED_NOISE] if self.run.privacy and self.shards else []),
            *cut,
            *manifest.method_notes(rules, head=self.server.shape.dense > 0),
            *manifest.secrecy_notes(self.run.aggregator, self.run.hierarchy, bool(self.shards)),
        ]
