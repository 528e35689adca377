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
    times = run.hierarchy.inner_speedup if run.hierarchy else 1.0
    return run.world if times == 1.0 else Near(run.world, times)


def led(
    run: Run, flat: Server, shards: Sequence[Shard], split: Split, profiles: Mapping[ClientId, Profile]
) -> Server | Tree:
    """The server of the run: with edges, if it has a hierarchy, and clients. Raises Refused where the groups are none."""
    if run.hierarchy is None or not shards:
        return flat
    tokens = run.plan.local_steps * run.training.batch_size * run.training.max_length
    members = []
    for shard in shards:
        counts = Counter(split.train.labels[i] for i in shard.train)
        labels = tuple(float(counts[label]) for label in range(len(split.train.names)))
        took = seconds(flat.shape, profiles[shard.client], run.plan.rank.largest, tokens)
        members.append(Member(shard.client, len(shard.train), took, labels))
    groups = run.hierarchy.grouped(members, run.seed)
    return run.hierarchy.over(flat, {edge: tuple(profiles[one] for one in own) for edge, own in groups.items()})


def seconds(shape: Shape, profile: Profile, rank: int, tokens: int) -> float:
    """Of one task at this rank with full batches of the longest texts, both ways in float32: how clients compare."""
    links = 8.0 * shape.payload(rank) * (1.0 / profile.down_bps + 1.0 / profile.up_bps)
    return shape.train_flops(tokens, rank) / profile.flops + links
