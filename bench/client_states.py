"""What clients keep between their tasks: bytes of a checkpoint, of files beside it, and of memory.

    python -m bench.client_states

A thousand clients with an adapter of MiniLM's size (12 layers of 384 x 384, rank 8: 73,728 numbers), each of which answers once, 20
at work at a time (FedFa). Their trainer is a store of answers, and leaves what AdamW leaves: two moments for each number. The
checkpoint is written when 980 have answered. "rotating": each version has a basis of its own, as with product methods, the default
among them. "lasting": the basis stays, as with FedIT. Bars: 20 MB. The last line is one JSON object.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from bench.memory import resident
from fedloom.aggregate.shared.factor_space import leading_start
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor, named_tensors
from fedloom.core.model_shape import Shape
from fedloom.core.participation import Participation
from fedloom.core.policies import Merge
from fedloom.core.server import Server
from fedloom.core.types import Budget, ClientState, Model, Result, Task, TaskStart
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.runs.resume import CheckpointWriter
from fedloom.runs.state_files import STATES, StateFiles
from fedloom.schedule.fedfa import FedFa
from fedloom.simulate.client_states import ClientStates
from fedloom.simulate.devices import World
from fedloom.simulate.simulation import Simulation

CLIENTS, PLACES, LAYERS, WIDTH, RANK, STORE = 1000, 20, 12, 384, 8, 8
MEGABYTES_BAR = 20.0


@dataclass(frozen=True, slots=True)
class NewestAnswer:
    """The model is the newest answer: an aggregator without arithmetic, in either space."""

    space: Literal["factor", "product"]
    exempt: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))

    def init(self, start: Adapter) -> Model:
        """The start itself."""
        return Model(start)

    def merge(self, model: Model, merge: Merge) -> Model:
        """The last in task order; in "product" space in a basis of its own."""
        newest = merge.weighted_updates[-1][1].result.adapter
        return replace(model, adapter=newest, basis=model.basis + (self.space == "product"))

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """The model as it is."""
        return leading_start(model, budget)


@dataclass(frozen=True, slots=True)
class AdamTrainer:
    """Answers from a store, in turn, and leaves moments of its own at each client."""

    answers: Sequence[Adapter]

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """At once."""
        return [(Result(self._answer(task), 10, 100, 1), self._left(task)) for task, _ in work]

    def _answer(self, task: Task) -> Adapter:
        return self.answers[task.id % len(self.answers)]

    def _left(self, task: Task) -> ClientState:
        moments = {
            name: {"step": torch.tensor(1.0), "exp_avg": 0.1 * tensor, "exp_avg_sq": 0.001 * tensor * tensor}
            for name, tensor in named_tensors(self._answer(task)).items()
        }
        return ClientState(task.start.basis, moments)


@dataclass(slots=True)
class Measured:
    """One checkpoint.

    Fields:
        megabytes: of it.
        files: megabytes of the files that it names.
        seconds: CPU seconds in which it was written.
        memory: megabytes by which the resident set had grown since before the first answer.
        run: CPU seconds of the run until then, without the checkpoint, an answer.
    """

    megabytes: float = 0.0
    files: float = 0.0
    seconds: float = 0.0
    memory: float = 0.0
    run: float = 0.0


def measure(space: Literal["factor", "product"]) -> Measured:
    """Run until all but the last clients have answered, and write a checkpoint then."""
    draws = torch.Generator().manual_seed(0)

    def adapter() -> Adapter:
        sides = ((RANK, WIDTH), (WIDTH, RANK))
        names = [f"layer.{k}" for k in range(LAYERS)]
        return Adapter({name: Factor(*(torch.randn(one, generator=draws) for one in sides)) for name in names})

    how, schedule = NewestAnswer(space), FedFa(max_in_flight=PLACES)
    shape = Shape(1000, 0, LAYERS, WIDTH, modules=((WIDTH, WIDTH),) * LAYERS, dense=0)
    limits, once = Limits(versions=CLIENTS, evaluate_every=CLIENTS), Participation(1)
    plan = Plan(FixedRank(RANK), 1)
    server = Server(how.init(adapter()), how, schedule, plan, shape=shape, limits=limits, participation=once)
    profiles = {one.client: one for one in World().profiles({f"c{k:04d}": 10 for k in range(CLIENTS)}, 0)}
    trainer, found = AdamTrainer([adapter() for _ in range(STORE)]), Measured()
    with tempfile.TemporaryDirectory() as place:
        store = StateFiles(Path(place) / STATES)
        states = ClientStates(store, rotates=space == "product")
        simulation = Simulation(
            server, trainer, World(), profiles, lambda model: {}, lambda *_: None, client_states=states
        )
        owners = (*server.parts_to_save(), simulation, states, simulation.presence)
        writer, begun, before = (
            CheckpointWriter(Path(place), 0.0, owners, states=store),
            time.process_time(),
            resident(),
        )
        store.needed = simulation.stored_states

        def write() -> None:
            if len(states.settled) < CLIENTS - PLACES or found.megabytes:
                return
            simulation.drain()
            found.run = (time.process_time() - begun) / len(states.settled)
            found.memory = (resident() - before) / 1e6
            now = time.process_time()
            found.megabytes = writer.write() / 1e6
            found.seconds = time.process_time() - now
            found.files = sum(path.stat().st_size for path in store.folder.glob("*")) / 1e6

        simulation.after_step = write
        simulation.run()
    return found


def checkpoint_megabytes() -> float:
    """Megabytes of the larger of both checkpoints; prints what they cost."""
    print(
        f"\n{CLIENTS:,} clients of which each has answered    checkpoint MB   CPU s   files MB   memory MB   ms an answer"
    )
    found = {name: measure(space) for name, space in (("rotating", "product"), ("lasting", "factor"))}  # type: ignore[arg-type]
    for name, one in found.items():
        print(
            f"{name:42s} {one.megabytes:12.1f} {one.seconds:10.2f} {one.files:10.1f} {one.memory:10.1f} {1e3 * one.run:12.2f}"
        )
    return max(one.megabytes for one in found.values())


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    print(json.dumps({"checkpoint_mb_1000_clients": checkpoint_megabytes()}))


if __name__ == "__main__":
    main()
