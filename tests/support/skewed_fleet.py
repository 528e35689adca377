"""Fleets of clients with skewed labels and three classes of devices, for what is measured of groups."""

from __future__ import annotations

from functools import cache

from fedloom.core.seeds import rng
from fedloom.data.examples import Examples
from fedloom.data.partition import LabelDirichlet
from fedloom.hierarchy.grouping import Member
from fedloom.simulate.devices import Capabilities

EXAMPLES, ALPHA = 120_000, 0.1
STEP_SECONDS = 0.5  # of the slowest class


@cache
def fleet(clients: int, classes: int, seed: int) -> tuple[Member, ...]:
    """Members by name: labels by Dirichlet, seconds of one step by class (30 : 40 : 10 devices, 1 : 2.5 : 6 in speed)."""
    draw = rng(seed, "labels")
    labels = tuple(draw.randrange(classes) for _ in range(EXAMPLES))
    examples = Examples(("",) * EXAMPLES, None, labels, tuple(map(str, range(classes))), None)
    split = LabelDirichlet(clients, ALPHA).split(examples, seed)
    devices = Capabilities().profiles({client: len(own) for client, own in split.items()}, seed)
    slowest = min(device.flops for device in devices)

    def member(client: str, flops: float) -> Member:
        counts = [0.0] * classes
        for index in split[client]:
            counts[labels[index]] += 1.0
        return Member(client, len(split[client]), STEP_SECONDS * slowest / flops, tuple(counts))

    return tuple(member(device.client, device.flops) for device in devices)
