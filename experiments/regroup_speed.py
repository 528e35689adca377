"""What groups that are made again save when clients' times drift: `Hierarchy.regroup`, on the virtual clock.

    PYTHONPATH=. python experiments/regroup_speed.py [--quick]

80 devices (classes 30/40/10 at speeds 1 : 2.5 : 6, 0.5 s a step for the slowest), 4 labels by Dirichlet(0.1), eight near-IID groups
whose edges are near their members (links U(1, 30) Mb/s, ten times as fast to the edge, drawn anew for each task), 100 Mb/s between
edge and server, an adapter of 9.6 Mb (links and adapter are a tenth of that here, which takes the same seconds); a task of an edge
is 20 local steps and four averages; FedFa across the groups, or rounds of all of them. At half of the versions a random tenth of the
devices begins to train four times slower.

Virtual seconds of eight reports, one of each group on average: before, and after that moment without and with groups made again at a
drift of 10 %; `settled` is the last quarter of the run. Waiting is the share of their time that members' places were empty after it.
Nothing is learnt. Mean over three seeds (minimum - maximum); the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from edge_speed import INNER, RANK, STEPS, TOKENS, Moved, server

from fedloom.core.events import Command, Event
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Schedule
from fedloom.core.seeds import rng
from fedloom.core.types import Profile, Result, Task
from fedloom.hierarchy.grouping import Member, NearIID
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.regrouping import Compared
from fedloom.hierarchy.tree import Tree
from fedloom.hierarchy.tree_state import Link
from fedloom.runs.metrics import Metrics
from fedloom.runs.observation import RunObservation
from fedloom.runs.prepare import comparison_seconds
from fedloom.runs.slot_usage import SlotUsage
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.weights import by_work
from fedloom.simulate.devices import Capabilities, Devices, FasterLinks, Seconds
from fedloom.simulate.simulation import Simulation
from tests.support.skewed_fleet import fleet

GROUPS, NEAR, SLOWER, SHARE, THRESHOLD = 8, 10.0, 4.0, 0.1, 0.1
PLATFORM, LINK = Capabilities(low_bps=1e5, high_bps=3e6, modes=(1.0,)), Link(1e7, 1e7)
LAYERS = {"layer": (1875, 1875)}
ACROSS: Mapping[str, tuple[Schedule, int]] = {
    "FedFa": (FedFa(window=GROUPS, max_in_flight=GROUPS, weigh=by_work), GROUPS),
    "rounds": (Rounds(cohort_size=GROUPS, weigh=by_work), 1),
}
"""The schedule across groups, and its versions in eight reports."""


@dataclass(frozen=True, slots=True)
class Slowed:
    """The devices of `inner`; what these are asked for from this moment on they train `times` as long."""

    inner: Devices
    clients: frozenset[str]
    since: float
    times: float = SLOWER

    def profiles(self, examples: Mapping[str, int], seed: int) -> tuple[Profile, ...]:
        """The same devices: nobody is told."""
        return self.inner.profiles(examples, seed)

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Longer training."""
        took = self.inner.seconds(task, result, profile, shape, seed, turn)
        slow = task.client in self.clients and task.sent >= self.since
        return replace(took, train=self.times * took.train) if slow else took


@dataclass(frozen=True, slots=True)
class Course:
    """A run: when each version was made, the waiting and working seconds of all places so far, who moved, times asked again."""

    made: tuple[float, ...]
    waited: tuple[float, ...]
    worked: tuple[float, ...]
    moves: int
    asked: int

    def pace(self, since: int, until: int, reports: int) -> float:
        """Virtual seconds of eight reports between these versions."""
        return (self.made[until - 1] - self.made[since - 1]) / (until - since) * reports

    def waiting(self, since: int) -> float:
        """The share of the places' time that was lost after this version."""
        lost, used = (own[-1] - own[since - 1] for own in (self.waited, self.worked))
        return lost / (lost + used)


def course(schedule: Schedule, versions: int, seed: int, since: float, regroup: float) -> Course:
    """One run; `since` is when the slow ones become slow."""
    known = {one.client: one for one in fleet(80, 4, seed)}
    profiles = FasterLinks(PLATFORM, NEAR).profiles({one.client: one.examples for one in known.values()}, seed)
    flat = server(LAYERS, schedule, versions, STEPS)
    flat.seed = seed
    tokens = STEPS * TOKENS
    members = tuple(
        Member(one.client, one.examples, comparison_seconds(flat.shape, one, RANK, tokens), known[one.client].labels)
        for one in profiles
    )
    hierarchy = Hierarchy(NearIID(GROUPS), INNER, link=LINK, inner_speedup=NEAR, regroup=regroup)
    given = {one.client: one for one in profiles}
    groups = {edge: [given[one] for one in own] for edge, own in hierarchy.grouped(members, seed).items()}
    tree = hierarchy.over(flat, groups, Compared(members, RANK, STEPS, tokens))
    slow = frozenset(rng(seed, "slow").sample(sorted(known), round(SHARE * len(known))))
    return followed(tree, given, Slowed(FasterLinks(PLATFORM, NEAR), slow, since), seed)


def followed(tree: Tree, profiles: Mapping[str, Profile], world: Devices, seed: int) -> Course:
    """Carried out to the end."""
    file = io.StringIO()
    metrics = Metrics(file, SlotUsage(tree.max_in_flight), RunObservation(tree.edges))

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        metrics(now, event, commands)

    Simulation(tree, Moved(), world, profiles, lambda model: {"loss": 0.0}, observe, seed=seed).run()
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    made = [line for line in lines if line["kind"] == "version"]
    moves, asked = (sum(line["kind"] == kind for line in lines) for kind in ("move", "regroup"))
    times, waited, worked = (
        tuple(line[name] for line in made) for name in ("time", "waiting_seconds", "working_seconds")
    )
    return Course(times, waited, worked, moves, asked)


def measured(across: str, rounds: int, seed: int) -> dict[str, float]:
    """The figures of one seed."""
    schedule, each = ACROSS[across]
    versions = rounds * each
    half, late = versions // 2, versions - versions // 4
    since = course(schedule, half, seed, float("inf"), 0.0).made[-1]
    kept, again = (course(schedule, versions, seed, since, threshold) for threshold in (0.0, THRESHOLD))
    return {
        "before": kept.pace(each, half, each),
        "after": kept.pace(half, versions, each),
        "regrouped": again.pace(half, versions, each),
        "settled": kept.pace(late, versions, each),
        "settled_regrouped": again.pace(late, versions, each),
        "waiting": kept.waiting(half),
        "waiting_regrouped": again.waiting(half),
        "moves": again.moves,
        "asked": again.asked,
    }


def spread_text(rows: Sequence[Mapping[str, float]], name: str) -> str:
    """Mean (minimum - maximum) over the seeds."""
    values = [row[name] for row in rows]
    return f"{fmean(values):.3g} ({min(values):.3g} - {max(values):.3g})"


def main() -> None:
    """Print a table for each schedule and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, one seed")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    found = {}
    for across in ACROSS:
        rows = [measured(across, 8 if quick else 32, seed) for seed in range(1 if quick else 3)]
        found[across] = {name: fmean(row[name] for row in rows) for name in rows[0]}
        for name in rows[0]:
            print(f"{across:8s} {name:20s} {spread_text(rows, name)}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
