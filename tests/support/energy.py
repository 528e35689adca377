"""Share of the energy in the first two directions of a model, after rounds in which nobody learns anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.aggregate.shared.product_space import energy_shares
from fedloom.core.limits import Limits
from fedloom.core.policies import Aggregator
from fedloom.core.server import Server
from fedloom.core.types import ClientState, Model, Profile, Result, Task
from fedloom.schedule.rounds import Rounds
from fedloom.simulate.devices import World
from fedloom.simulate.simulation import Simulation
from tests.support.scene import SHAPE, ranks_by_name, toy_adapter

ROUNDS = 10
FEDERATION = (2,) * 10 + (4,) * 6 + (8,) * 4
COHORT = 10


@dataclass(frozen=True, slots=True)
class Idle:
    """A trainer that gives back what it got."""

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """Nothing is learnt."""
        return [(Result(task.start.train, 10, 0, task.budget.steps), local) for task, local in work]


def energy2(how: Aggregator, seed: int) -> float:
    """Share of the first two directions after ten simulated rounds of zero learning, 10 of 20 clients a round."""
    names = [f"c{number:02d}" for number in range(len(FEDERATION))]
    server = Server(
        how.init(toy_adapter(max(FEDERATION), 1)),
        how,
        Rounds(cohort_size=COHORT),
        ranks_by_name(names, FEDERATION),
        shape=SHAPE,
        limits=Limits(versions=ROUNDS),
        seed=seed,
    )
    profiles = {name: Profile(name, 10) for name in names}
    simulation = Simulation(server, Idle(), World(), profiles, lambda adapter: {}, lambda *step: None, seed=seed)
    simulation.run()
    return sum(energy_shares(server.state.model)[:2])


def energies(seeds: Sequence[int]) -> dict[str, float]:
    """The start, and the worst seed of each method: lowest for HLoRA, farthest from the start for the default."""
    start = sum(energy_shares(Model(toy_adapter(max(FEDERATION), 1)))[:2])
    default = max((energy2(ProductDelta(), seed) for seed in seeds), key=lambda share: abs(share - start))
    return {
        "energy2_hlora": min(energy2(HLoRA(), seed) for seed in seeds),
        "energy2_default": default,
        "energy2_start": start,
    }
