"""A site that turns its change round and scales it, among honest ones: how much accuracy is lost, with a canary and without.

The liar is no worse at its data than others: its answer is an honest one whose change has the other sign. Scaled by the number of
the others it just undoes what they bring, which no fall of a score shows; scaled further it drives the model away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedloom.core.canary import Canary
from fedloom.core.events import Command, Event, SetAside
from fedloom.core.lora import Adapter, Factor
from fedloom.core.policies import Trainer
from fedloom.core.seeds import simulated_secret
from fedloom.core.types import ClientState, Model, Result, Task
from fedloom.runs.prepare import PreparedRun, prepare
from fedloom.simulate.simulation import Simulation
from fedloom.train.settings import PLAIN
from fedloom.train.trainer import PeftTrainer
from tests.attacks.attack import Attack
from tests.support.tiny_models import tiny_encoder, tiny_run

SITES = 6
CANARY = Canary(examples=100, margin=0.02)


def turned(task: Task, result: Result, times: float) -> Result:
    """The answer with its change turned round and scaled: factors and head."""
    sent = task.start.train

    def back(old: Tensor, new: Tensor) -> Tensor:
        return old - times * (new - old)

    factors = {
        name: Factor(back(sent.factors[name].down, factor.down), back(sent.factors[name].up, factor.up))
        for name, factor in result.adapter.factors.items()
    }
    dense = {name: back(sent.dense[name], new) for name, new in result.adapter.dense.items()}
    return replace(result, adapter=Adapter(factors, dense))


@dataclass(frozen=True)
class Liars:
    """A trainer whose liars turn their changes round."""

    inner: Trainer
    liars: Sequence[str]
    times: float

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """Train all honestly, then turn."""
        pairs = zip(work, self.inner.train(work), strict=True)
        return [
            (turned(task, result, self.times) if task.client in self.liars else result, local)
            for (task, _), (result, local) in pairs
        ]


@dataclass(frozen=True)
class Attacked:
    """What came of a run: accuracy on test examples, and whose answers were set aside or refused, by client."""

    accuracy: float
    set_aside: Mapping[str, int]
    refused: int


def attacked(
    model: Path, times: float | None, canary: Canary | None, versions: int = 6, *, limited: bool = True, **more: Any
) -> Attacked:
    """A run of six sites in rounds, the first of which lies by so many times (None: it is honest), with a limit on norms or none."""
    from fedloom import IID, FixedRank, Limits, Plan, Rounds, Rows
    from tests.support.tiny_models import toy_rows

    given: dict[str, Any] = {
        "data": Rows(toy_rows(900)),
        "partition": IID(SITES),
        "schedule": Rounds(cohort_size=SITES),
        "plan": Plan(FixedRank(4), local_steps=8),
        "limits": Limits(versions=versions, evaluate_every=0, norm_ratio=5.0 if limited else None),
        "canary": canary,
    }
    job = prepare(tiny_run(model, **(given | more)))
    scores, counts, refused = list[Mapping[str, float]](), dict[str, int](), list[Command]()

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, SetAside):
                counts[command.client] = counts.get(command.client, 0) + 1
            refused.extend([command] if type(command).__name__ == "Reject" else [])

    def evaluate(shown: Model) -> Mapping[str, float]:
        scores.append(job.evaluate(shown))
        return scores[-1]

    liars = [sorted(job.profiles)[0]] if times else []
    trainer = Liars(honest_trainer(job), liars, times or 1.0)
    Simulation(
        job.server, trainer, job.devices, job.profiles, evaluate, observe, check=job.check, seed=job.run.seed
    ).run()
    return Attacked(scores[-1]["accuracy"], counts, len(refused))


def honest_trainer(job: PreparedRun) -> PeftTrainer:
    """The trainer of a simulation of this job."""
    shards = {shard.client: shard.train for shard in job.shards}
    secret = partial(simulated_secret, job.run.seed)
    return PeftTrainer(
        job.base, job.train_texts, shards, job.run.training, secret, job.run.engine or PLAIN, run=job.draws
    )


def undoes(folder: Path, lifted: bool) -> bool:
    """A change turned round and scaled, of a model that is trained as usual. Lifted: there is no limit on norms, and no canary."""
    model, canary = tiny_encoder(folder / "model"), None if lifted else CANARY
    honest, lied = (attacked(model, times, canary, limited=not lifted) for times in (None, 8.0))
    assert lifted or lied.refused > 0
    return honest.accuracy - lied.accuracy > 0.05


ATTACKS = (Attack("a change undoes what others bring, of a trained encoder", undoes),)
