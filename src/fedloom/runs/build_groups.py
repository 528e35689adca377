"""What a run's grouping is told of its clients, and the server with edges over the groups that it found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedloom.core.model_shape import Shape
from fedloom.core.server import Server
from fedloom.core.types import ClientId, Profile
from fedloom.data.partition import Shard
from fedloom.data.private_histogram import noised
from fedloom.data.private_histogram import topics as found
from fedloom.hierarchy.grouping import Member
from fedloom.hierarchy.regrouping import Compared
from fedloom.hierarchy.tree import Tree
from fedloom.simulate.devices import Devices, Near
from fedloom.train.base_model import Base
from fedloom.train.embeddings import embeddings
from fedloom.train.tokenised import Encoded

if TYPE_CHECKING:
    from fedloom.hierarchy.hierarchy import Hierarchy
    from fedloom.runs.run import Run


def devices(run: Run) -> Devices:
    """The run's, with links to the edges where these are nearer."""
    times = run.hierarchy.inner_speedup if run.hierarchy else 1.0
    return run.world if times == 1.0 else Near(run.world, times)


def led(
    run: Run,
    flat: Server,
    base: Base,
    texts: Encoded,
    shards: Sequence[Shard],
    names: int,
    profiles: Mapping[ClientId, Profile],
) -> Server | Tree:
    """The server of the run: with edges, if it has a hierarchy, and clients, whose examples are among `texts`, of `names` labels.

    Raises Refused where the groups are none.
    """
    if run.hierarchy is None or not shards:
        return flat
    steps, top = run.plan.local_steps, run.plan.rank.largest
    tokens = steps * run.training.batch_size * run.training.max_length
    members, counts = [], label_counts(run.hierarchy, base, texts, shards, names, run.seed)
    for shard in shards:
        took = seconds(flat.shape, profiles[shard.client], top, tokens)
        members.append(Member(shard.client, len(shard.train), took, counts[shard.client]))
    groups = run.hierarchy.grouped(members, run.seed)
    profiled = {edge: tuple(profiles[one] for one in own) for edge, own in groups.items()}
    return run.hierarchy.over(flat, profiled, Compared(tuple(members), top, steps, tokens))


def label_counts(
    how: Hierarchy, base: Base, texts: Encoded, shards: Sequence[Shard], names: int, seed: int
) -> dict[ClientId, tuple[float, ...]]:
    """How many training examples of each label a client says that it has, or of each topic, for which embeddings are pooled."""
    if how.topics:
        counts = found({shard.client: embeddings(base, texts, shard.train) for shard in shards}, how.topics, seed)
    else:
        by = {shard.client: Counter(texts.labels[i] for i in shard.train) for shard in shards}
        counts = {client: tuple(float(own[k]) for k in range(names)) for client, own in by.items()}
    if not how.epsilon:
        return counts
    return {client: noised(own, how.epsilon, seed, client) for client, own in counts.items()}


def seconds(shape: Shape, profile: Profile, rank: int, tokens: int) -> float:
    """Of one task at this rank with full batches of the longest texts, both ways in float32: how clients compare."""
    links = 8.0 * shape.payload(rank) * (1.0 / profile.down_bps + 1.0 / profile.up_bps)
    return shape.train_flops(tokens, rank) / profile.flops + links
