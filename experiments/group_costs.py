"""What a fixed number of inner averages costs against one that is aligned: a cost simulation without events and without learning.

    PYTHONPATH=. python experiments/group_costs.py

80 devices, 30 : 40 : 10 of them at 1 : 2.5 : 6 in speed, 0.5 s a step the slowest; links U(1, 30) Mbit/s, the same both ways, drawn
anew for every device and global round; 9.6 Mbit of adapter at rank 8, which go down whole and up in proportion to depth; twelve
layers, a step at depth d costs (12 + d) / 24 of one at full depth; 8 groups of 10, labels as in `bench.group` (10 classes, Dirichlet
0.1). A round lasts as long as its slowest group, a group's as long as its slowest member takes for its steps and transfers.
Planners are told the links of the round (a device has just received, and knows); where they are guessed, they are moving averages
of the rounds before, x <- 0.8 x + 0.2 x_obs of seconds a bit. 60 rounds after 10 of warming up, three seeds: mean (min - max).
`edges`: links inside a group are ten times faster, and the edge has a link of U(1, 30) Mbit/s to the server. The mass of gradients
falls by a fifth a layer, delta_g is 1: these two are made up, so depths and ranks here show what the rules do, not what is best.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from joint_rules import JointMemory, TimeAligned

from fedloom.core.seeds import rng
from fedloom.hierarchy.grouping import BySpeed, Grouping, Groups, Member, NearIID, RandomGroups
from fedloom.hierarchy.joint_plan.gradient_score import GradientScore
from fedloom.hierarchy.joint_plan.group_cost import Choice, Device, GroupState, Sizes
from fedloom.hierarchy.joint_plan.shared import JointRule
from tests.support.skewed_fleet import fleet

LAYERS, BITS, RANK = 12, 9.6e6, 8
LOW_BPS, HIGH_BPS = 1e6, 3e7
WARM, ROUNDS, SEEDS = 10, 60, range(3)
MASS = tuple(0.8**layer for layer in range(LAYERS))  # of gradients, from the output down; for the rules that look
DISPERSION = 1.0
SIZES = Sizes(
    up=lambda depth, rank: BITS / 8 * depth / LAYERS * rank / RANK,
    down=lambda depth, rank: BITS / 8 * rank / RANK,
    memory=lambda depth, rank: 0.0,
)


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same for every group: what alignment is compared with."""

    rounds: int = 4
    steps: int = 20

    def __call__(self, groups: Sequence[GroupState]) -> tuple[Choice, ...]:
        """Full depth."""
        return tuple(Choice(self.rounds, LAYERS, RANK, self.steps) for _ in groups)


@dataclass(frozen=True, slots=True)
class Spent:
    """One global round: its seconds, the devices' idle share of them, all devices' steps, the share of layers they trained, bits."""

    seconds: float
    idle: float
    steps: float
    layers: float
    bits: float


@dataclass(frozen=True, slots=True)
class Scene:
    """`edge`: how much faster links inside a group are (0: the edge is the server); `told`: the planner knows the round's links.

    A link lasts for so many rounds before it is drawn anew.
    """

    edge: float = 0.0
    told: bool = True
    lasts: int = 1


def simulate(members: Sequence[Member], how: Grouping, rule: JointRule, scene: Scene, seed: int) -> list[Spent]:
    """Round after round, links drawn anew."""
    step, spent = {one.client: one.seconds for one in members}, list[Spent]()
    groups = how(members, seed)
    usual = math.log(HIGH_BPS / LOW_BPS) / (HIGH_BPS - LOW_BPS)  # mean seconds a bit
    known, outer = dict.fromkeys(step, usual), [usual] * len(groups)
    for number in range(WARM + ROUNDS):
        turn = number // scene.lasts
        links = {client: 1.0 / rng(seed, "link", client, turn).uniform(LOW_BPS, HIGH_BPS) for client in step}
        far = [1.0 / rng(seed, "edge", group, turn).uniform(LOW_BPS, HIGH_BPS) for group in range(len(groups))]
        real, guessed = states(groups, step, links, far, scene.edge), states(groups, step, known, outer, scene.edge)
        spent.append(round_of(real, rule(real if scene.told else guessed)))
        known = {client: 0.8 * known[client] + 0.2 * links[client] for client in step}
        outer = [0.8 * old + 0.2 * new for old, new in zip(outer, far, strict=True)]
    return spent[WARM:]


def states(
    groups: Groups, step: dict[str, float], links: dict[str, float], far: Sequence[float], edge: float
) -> list[GroupState]:
    """The groups at these seconds a bit; `edge` is how much faster links inside a group are (0: the edge is the server)."""

    def device(client: str) -> Device:
        bps = (edge or 1.0) / links[client]
        steps = tuple(step[client] * (LAYERS + depth) / (2 * LAYERS) for depth in range(1, LAYERS + 1))
        return Device(client, steps, bps, bps)

    backbones = [1.0 / second if edge else math.inf for second in far]
    return [
        GroupState(tuple(map(device, group)), SIZES, bps, bps, DISPERSION, MASS)
        for group, bps in zip(groups, backbones, strict=True)
    ]


def round_of(groups: Sequence[GroupState], choices: Sequence[Choice]) -> Spent:
    """What the round took."""
    pairs = list(zip(groups, choices, strict=True))
    seconds = max(group.seconds(choice) for group, choice in pairs)
    busy, steps, layers, bits = 0.0, 0.0, 0.0, 0.0
    for group, choice in pairs:
        count, links = len(group.members), group.link_seconds(choice.depth, choice.rank)
        busy += choice.steps * sum(group.step_seconds(choice.depth)) + choice.rounds * sum(links)
        steps += choice.steps * count
        layers += choice.steps * count * choice.depth / LAYERS
        bits += (
            8 * (SIZES.up(choice.depth, choice.rank) + SIZES.down(choice.depth, choice.rank)) * choice.rounds * count
        )
    devices = sum(len(group.members) for group in groups)
    return Spent(seconds, 1.0 - busy / (devices * seconds), steps, layers / steps, bits)


TOLD, GUESSED, LASTING, NEAR = Scene(), Scene(told=False), Scene(told=False, lasts=20), Scene(edge=10.0)


def row(name: str, how: Grouping, rule: JointRule, scene: Scene = TOLD) -> dict[str, float | str]:
    """Print a line of the table, and return its figures."""
    runs = [simulate(fleet(80, 10, seed), how, rule, scene, seed) for seed in SEEDS]
    rates = [sum(one.steps for one in run) / sum(one.seconds for one in run) for run in runs]
    every = [one for run in runs for one in run]
    steps = sum(one.steps for one in every)
    figures = {
        "seconds": fmean(one.seconds for one in every),
        "steps_per_second": fmean(rates),
        "idle": fmean(one.idle for one in every),
        "depth": fmean(one.layers for one in every),
        "megabytes_per_1000_steps": sum(one.bits for one in every) / steps / 8e3,
    }
    spread = f"{fmean(rates):6.1f} ({min(rates):.1f} - {max(rates):.1f})"
    print(
        f"{name:44s} {figures['seconds']:6.1f} s   {spread:24s} idle {figures['idle']:4.0%}   depth {figures['depth']:4.0%}   "
        f"{figures['megabytes_per_1000_steps']:5.0f} MB",
        flush=True,
    )
    return {"name": name, **{key: round(value, 3) for key, value in figures.items()}}


def table() -> list[dict[str, float | str]]:
    """Everything, in the order of methods 4i."""
    near = NearIID(8, 0.3), NearIID(8, 0.7)
    grow = TimeAligned(steps=40, most=8)
    print(f"{'':44s} a round   steps a second           of devices   of layers   per 1,000 steps")
    memory = JointMemory(ranks=(2, 4, 8))
    return [
        row("flat, 20 steps", RandomGroups(1), Fixed(1)),
        row("near-IID 0.3, f = 4 for all", near[0], Fixed()),
        row("near-IID 0.3, f aligned, 20 steps divided", near[0], TimeAligned(work_grows=False)),
        row("random groups, f aligned, work grows", RandomGroups(8), grow),
        row("groups by speed, f aligned, work grows", BySpeed(8), grow),
        row("near-IID 0.3, f aligned, work grows", near[0], grow),
        row("near-IID 0.7, f aligned, work grows", near[1], grow),
        row("  the same, links guessed", near[1], grow, GUESSED),
        row("  the same, guessed, links last 20 rounds", near[1], grow, LASTING),
        row("  f = 4 for all, links last 20 rounds", near[1], Fixed(), LASTING),
        row("near-IID 0.3, scored", near[0], GradientScore()),
        row("near-IID 0.3, joint memory", near[0], memory),
        row("  the same, links guessed", near[0], memory, GUESSED),
        row("edges: near-IID 0.3, f = 4 for all", near[0], Fixed(), NEAR),
        row("edges: near-IID 0.3, f aligned, work grows", near[0], grow, NEAR),
        row("edges: near-IID 0.7, f aligned, work grows", near[1], grow, NEAR),
        row("edges: near-IID 0.3, scored", near[0], GradientScore(), NEAR),
        row("edges: near-IID 0.3, joint memory", near[0], memory, NEAR),
    ]


if __name__ == "__main__":
    print(json.dumps({"costs": table()}))
