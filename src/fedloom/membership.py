"""What a run's grouping is told of its clients, and the server with edges over the groups that it found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedloom.cost import Shape
from fedloom.data.examples import Split
from fedloom.data.partition import Shard
from fedloom.group import Member
from fedloom.server import Server
from fedloom.tree import Tree
from fedloom.types import ClientId, Profile
from fedloom.world import Devices, Near

if TYPE_CHECKING:
    from fedloom.run import Run


def devices(run: Run) -> Devices:
    """The run's, with links to the edges where these are nearer."""
    near = run.hierarchy is not None and run.hierarchy.inner_speedup != 1.0
    return Near(run.world, run.hierarchy.inner_speedup) if near and run.hierarchy else run.world


def led(flat: Server, run: Run, shards: Sequence[Shard], split: Split, profiles: Mapping[ClientId, Profile]) -> Server | Tree:
    """The server of the run: with edges, if it has a hierarchy. Raises Refused where the groups are none."""
    if run.hierarchy is None:
        return flat
    rank, steps, size = run.plan.rank.largest, run.plan.local_steps, run.training.batch_size * run.training.max_length

    def member(shard: Shard) -> Member:
        counts = Counter(split.train.labels[i] for i in shard.train)
        labels = tuple(float(counts[label]) for label in range(len(split.train.names)))
        return Member(
            shard.client, len(shard.train), seconds(flat.shape, profiles[shard.client], rank, steps * size), labels
        )

    groups = run.hierarchy.grouped([member(shard) for shard in shards], run.seed)
    return run.hierarchy.over(flat, {edge: tuple(profiles[one] for one in own) for edge, own in groups.items()})


def seconds(shape: Shape, profile: Profile, rank: int, tokens: int) -> float:
    """Of one task at this rank with full batches of the longest texts, both ways in float32: how clients compare."""
    links = 8.0 * shape.payload(rank) * (1.0 / profile.down_bps + 1.0 / profile.up_bps)
    return shape.train_flops(tokens, rank) / profile.flops + links
