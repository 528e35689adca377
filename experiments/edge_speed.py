"""What edges cost the server, and what they save of virtual time.

    PYTHONPATH=. python experiments/edge_speed.py [--quick]

Virtual seconds in which 80 devices (classes 30/40/10 at speeds 1 : 2.5 : 6, 0.5 s a step for the slowest, links U(1, 30) Mb/s drawn
anew for each task, an adapter of 9.6 Mb) all do 20 local steps: with one average, with four, in eight groups that average four times
on the distant server, in eight groups whose edges are near (members' links ten times as fast, 100 Mb/s between edge and server), and
the last with FedFa across the groups (time of eight reports). Nothing is learnt; groups are dealt at random. Then CPU seconds per
upload through the real core and the virtual-clock driver, rounds of 1,000 clients under one server and in 30 edges, median (minimum -
maximum). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from fedloom.aggregate.fedit import FedIT
from fedloom.core.events import Command, Event, UpdateArrived
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Schedule
from fedloom.core.seeds import rng
from fedloom.core.server import Server
from fedloom.core.types import ClientState, Profile, Result, Task
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.tree import Tree
from fedloom.hierarchy.tree_state import Link
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.weights import by_work
from fedloom.simulate.devices import Capabilities, Devices, FasterLinks, World
from fedloom.simulate.simulation import Simulation

RANK, STEPS, INNER, TOKENS = 8, 20, 4, 1000
WIDE = {f"layer{k}": (1875, 1875) for k in range(10)}
SMALL = {"layer": (64, 64)}
PLATFORM = Capabilities(modes=(1.0,))


@dataclass(frozen=True, slots=True)
class Moved:
    """Every entry that was sent, a little larger."""

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """One answer a task; tokens as from full batches."""
        return [(self._one(task), local) for task, local in work]

    def _one(self, task: Task) -> Result:
        grown = {
            name: Factor(1.001 * f.down + 1e-3, 1.001 * f.up + 1e-3) for name, f in task.start.train.factors.items()
        }
        return Result(Adapter(grown), 10, TOKENS * task.budget.steps, task.budget.steps)


def server(layers: dict[str, tuple[int, int]], schedule: Schedule, versions: int, steps: int) -> Server:
    """FedIT at rank 8; a step of the slowest class takes half a second."""
    shape = Shape(parameters=12_500_000, embeddings=0, layers=1, hidden=1, modules=tuple(layers.values()), dense=0)
    start = Adapter({n: Factor(torch.ones(RANK, d_in), torch.ones(d_out, RANK)) for n, (d_out, d_in) in layers.items()})
    method, plan, limits = FedIT(), Plan(FixedRank(RANK), steps), Limits(versions, evaluate_every=0)
    return Server(method.init(start), method, schedule, plan, shape=shape, limits=limits)


def grouped(flat: Server, profiles: Sequence[Profile], count: int, hierarchy: Hierarchy) -> Tree:
    """So many groups, dealt at random."""
    order = list(profiles)
    rng(0, "groups").shuffle(order)
    return hierarchy.over(flat, {f"edge{k:02d}": tuple(order[k::count]) for k in range(count)})


def simulated(core: Server | Tree, profiles: Sequence[Profile], world: Devices) -> tuple[float, int, float]:
    """Virtual seconds, uploads and CPU seconds of the run."""
    uploads = 0

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        nonlocal uploads
        uploads += isinstance(event, UpdateArrived)

    began = time.process_time()
    given = {profile.client: profile for profile in profiles}
    Simulation(core, Moved(), world, given, lambda model: {"loss": 0.0}, observe).run()
    return core.state.now, uploads, time.process_time() - began


def virtual(rounds: int) -> dict[str, float]:
    """Seconds of one global round, mean over so many."""
    profiles = PLATFORM.profiles({f"c{k:02d}": 10 for k in range(80)}, 0)
    everybody, groups = Rounds(cohort_size=80), Rounds(cohort_size=8, weigh=by_work)
    far, near = Hierarchy(rounds=INNER), Hierarchy(rounds=INNER, link=Link(1e8, 1e8), inner_speedup=10.0)
    close = FasterLinks(PLATFORM, near.inner_speedup)
    fast = [replace(one, up_bps=10 * one.up_bps, down_bps=10 * one.down_bps) for one in profiles]
    fedfa = FedFa(window=8, max_in_flight=8, weigh=by_work)

    def seconds(core: Server | Tree, who: Sequence[Profile], world: Devices) -> float:
        return simulated(core, who, world)[0] / rounds

    return {
        "one average": seconds(server(WIDE, everybody, rounds, STEPS), profiles, PLATFORM),
        "four averages": seconds(server(WIDE, everybody, INNER * rounds, STEPS // INNER), profiles, PLATFORM),
        "eight groups, distant": seconds(
            grouped(server(WIDE, groups, rounds, STEPS), profiles, 8, far), profiles, PLATFORM
        ),
        "eight groups, edges near": seconds(grouped(server(WIDE, groups, rounds, STEPS), fast, 8, near), fast, close),
        "the same, FedFa across": seconds(grouped(server(WIDE, fedfa, 8 * rounds, STEPS), fast, 8, near), fast, close),
    }


def cost(uploads: int) -> dict[str, float]:
    """CPU microseconds an upload, without and with edges."""
    world, profiles = World(), World().profiles({f"c{k:04d}": 10 for k in range(1000)}, 0)
    flat = server(SMALL, Rounds(cohort_size=1000), uploads // 1000, STEPS)
    below = server(SMALL, Rounds(cohort_size=30), uploads // (1000 * INNER), STEPS)
    tree = grouped(below, profiles, 30, Hierarchy(rounds=INNER, link=Link()))
    found = {}
    for name, core in (("flat", flat), ("tree", tree)):
        _, answered, took = simulated(core, profiles, world)
        found[name] = 1e6 * took / answered
    return found


def main() -> None:
    """Print two tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, one run")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    took = virtual(2 if quick else 10)
    for name, seconds in took.items():
        print(f"{name:28s} {seconds:7.1f} virtual s a round   {took['one average'] / seconds:5.2f} x")
    runs = [cost(4_000 if quick else 20_000) for _ in range(1 if quick else 5)]
    for name in ("flat", "tree"):
        spent = [run[name] for run in runs]
        print(f"{name:28s} {median(spent):7.0f} ({min(spent):.0f} - {max(spent):.0f}) CPU us an upload")
    print(
        json.dumps({"virtual_seconds": took, "cpu_us": {n: median(run[n] for run in runs) for n in ("flat", "tree")}})
    )


if __name__ == "__main__":
    main()
