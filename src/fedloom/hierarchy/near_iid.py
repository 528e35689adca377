"""The search behind `grouping.NearIID`: groups that resemble the whole and in which clients wait little.

Source: Liao, Xu, Xu et al., ParallelSFL, arXiv 2410.01256, 2024, Eqs. 11 and 14, Alg. 1, as reconstructed for HierFedLoRA (arXiv
2503.21213, 2025), which forms groups without a leading worker. Differs from Alg. 1: its k-means only shortens the list of
candidates, and here all of them are evaluated at once; an exchange with an empty place (a move) counts as a swap. Above `LARGE`
members the candidates are samples, and many pairs of groups exchange at once: cost then grows with the members, not their square.

The utility of a group is share * waiting + (1 - share) * divergence. Waiting is the mean of (slowest - own) seconds, divergence
is KL(labels of the group || labels of all) in nats, and each is divided by its mean over random groups of the same sizes, so that a
group at random has utility 1 and the share means the same for every fleet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from fedloom.core.seeds import derive

RANDOM_DEALS = 16  # random groupings of which the two units are means
SMOOTHING = 1e-6  # examples of each label that everybody has more: no logarithm of 0
LEAST_GAIN = 1e-9  # in utility; below it a swap is rounding
LARGE = 1_000  # most members whose swaps are all compared; also the most candidates for one place of a new group
SAMPLE = 32  # most places of a group that one exchange looks at
ROUNDS = 1_000  # of exchanges between pairs of groups, and two more for each member of a group
QUIET = 100  # rounds in a row without an exchange, after which the search ends

Tally: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Label counts, slowest seconds, summed seconds, and number of members: of a group, or of a single place."""


@dataclass(frozen=True, slots=True)
class FleetArrays:
    """Members as tensors, the weight of waiting, and the allowed sizes of groups.

    Fields:
        labels: label counts (n, c), float64.
        seconds: seconds of each member (n), float64.
        groups: number of groups.
        share: weight of waiting.
        smallest: the fewest members of a group.
        largest: largest number of members of a group.
        units: mean waiting (s) and mean divergence (nats) of random groups, by which both are divided.
    """

    labels: Tensor
    seconds: Tensor
    groups: int
    share: float
    smallest: int
    largest: int
    units: tuple[float, float] = (1.0, 1.0)

    @property
    def logs(self) -> Tensor:
        """Logarithms of the label shares of all members together (c)."""
        whole = self.labels.sum(0) + SMOOTHING
        return (whole / whole.sum()).log()

    def utility(self, waiting: Tensor, distance: Tensor) -> Tensor:
        """Return the utility of groups with this mean waiting (s) and this divergence from the whole (nats)."""
        return self.share / self.units[0] * waiting + (1.0 - self.share) / self.units[1] * distance

    def terms(self, group: Tensor) -> tuple[Tensor, Tensor]:
        """Return waiting and divergence of each group (groups); `group` (n) holds the number of each member's group."""
        labels, slowest, total, size = self.tally(group)
        return slowest - total / size, label_divergence(labels, self.logs)

    def group_utility(self, group: Tensor) -> Tensor:
        """Return the utility of each group (groups)."""
        return self.utility(*self.terms(group))

    def tally(self, group: Tensor) -> Tally:
        """Return label counts, slowest seconds, summed seconds and size of each group."""
        zeros = self.seconds.new_zeros(self.groups)
        labels = self.labels.new_zeros(self.groups, self.labels.shape[1]).index_add(0, group, self.labels)
        slowest = (zeros - torch.inf).scatter_reduce(0, group, self.seconds, "amax")
        total, size = zeros.index_add(0, group, self.seconds), zeros.index_add(0, group, torch.ones_like(self.seconds))
        return labels, slowest, total, size

    def with_units(self, seed: int) -> FleetArrays:
        """Return a copy with its units measured: mean waiting and mean divergence of random groups of even sizes."""
        deals = [self.terms(self.random_groups(seed, deal)) for deal in range(RANDOM_DEALS)]
        waiting, distance = (float(torch.cat(terms).mean()) for terms in zip(*deals, strict=True))
        return replace(self, units=(waiting if waiting > 0 else 1.0, distance if distance > 0 else 1.0))

    def random_groups(self, seed: int, deal: int) -> Tensor:
        """Return groups at random, of sizes that differ by at most 1."""
        generator = torch.Generator().manual_seed(derive(seed, "deal", deal))
        count = len(self.seconds)
        return (torch.arange(count) % self.groups)[torch.randperm(count, generator=generator)]


def label_divergence(labels: Tensor, logs: Tensor) -> Tensor:
    """Return KL(shares of `labels` (..., c) || exp(logs) (c)), in nats; (...)."""
    counts = labels + SMOOTHING
    total = counts.sum(-1)
    return ((counts * (counts.log() - logs)).sum(-1) / total - total.log()).clamp(min=0.0)


def build_groups(fleet: FleetArrays) -> Tensor:
    """Fill group after group: the slowest left, then the one that keeps the group's utility lowest, up to an even size.

    Of more than `LARGE` that are left, the slowest half as many and an even sample of the others are candidates.
    """
    count, group = len(fleet.seconds), torch.full((len(fleet.seconds),), -1)
    left = torch.arange(count) if count <= LARGE else fleet.seconds.argsort(descending=True, stable=True)
    for number in range(fleet.groups):
        size = count // fleet.groups + (number < count % fleet.groups)
        first = left[fleet.seconds[left].argmax()]
        group[first], left = number, left[left != first]
        labels, slowest, total = fleet.labels[first], fleet.seconds[first], fleet.seconds[first].clone()
        for held in range(1, size):
            tried = thin_out(left)
            waiting = slowest - (total + fleet.seconds[tried]) / (held + 1)
            costs = fleet.utility(waiting, label_divergence(labels + fleet.labels[tried], fleet.logs))
            best = tried[costs.argmin()]
            group[best], left = number, left[left != best]
            labels, total = labels + fleet.labels[best], total + fleet.seconds[best]
    return group


def thin_out(queue: Tensor) -> Tensor:
    """Return at most `LARGE` of a queue: half as many from its head, and the others evenly from the rest."""
    head = LARGE // 2
    return queue if len(queue) <= LARGE else torch.cat([queue[:head], queue[head :: -(-(len(queue) - head) // head)]])


def add_members(fleet: FleetArrays, group: Tensor) -> Tensor:
    """Put members without a group (-1), the slowest first, where they add least to the utility; no group grows above `largest`."""
    group = group.clone()
    homeless = (group < 0).nonzero().flatten()
    for member in homeless[fleet.seconds[homeless].argsort(descending=True, stable=True)].tolist():
        settled = replace(fleet, labels=fleet.labels[group >= 0], seconds=fleet.seconds[group >= 0])
        labels, slowest, total, size = settled.tally(group[group >= 0])
        seconds = fleet.seconds[member]
        waiting = slowest.maximum(seconds) - (total + seconds) / (size + 1)
        gain = fleet.utility(waiting, label_divergence(labels + fleet.labels[member], fleet.logs))
        gain = gain - torch.where(
            size > 0, settled.utility(slowest - total / size, label_divergence(labels, fleet.logs)), 0.0
        )
        group[member] = torch.where(size < fleet.largest, gain, torch.inf).argmin()
    return group


def improve_groups(fleet: FleetArrays, group: Tensor, seed: int, price: float = 0.0) -> Tensor:
    """Return groups of a lower summed utility, by exchanges each of which lowers it by more than `price`."""
    if len(fleet.seconds) <= LARGE:
        return improve_by_swaps(fleet, group, price)
    return improve_in_pairs(fleet, group, seed, price)


def improve_by_swaps(fleet: FleetArrays, group: Tensor, price: float = 0.0) -> Tensor:
    """Carry out the best swap, again and again, until none lowers the summed utility by more than `price`.

    Rows and columns are members and, after them, one empty place per group: who changes places with it moves there. `alone`
    (i, j) is what the utility of i's group changes by if j takes i's place, so that after a swap only the rows of two groups are
    new. Cost: O((n + groups)^2) memory; a swap of groups of m members O(n m c), and a pass over the matrix.
    """
    count = len(fleet.seconds)
    home = torch.cat([group, torch.arange(fleet.groups)])
    alone, both = (fleet.seconds.new_zeros(len(home), len(home)) for _ in range(2))
    stale = torch.arange(len(home))
    while True:
        alone[stale] = replacement_gains(fleet, home, stale)
        both[stale] = alone[stale] + alone[:, stale].T
        both[:, stale] = both[stale].T
        i, j = divmod(int(both.argmin()), len(home))
        if not float(both[i, j]) < -max(price, LEAST_GAIN):
            return home[:count]
        places = home[i].clone(), home[j].clone()
        stale = ((home == places[0]) | (home == places[1])).nonzero().flatten()
        for mover, place in ((i, places[1]), (j, places[0])):
            if mover < count:
                home[mover] = place


def replacement_gains(fleet: FleetArrays, home: Tensor, rows: Tensor) -> Tensor:
    """Return how the utility of each row's group changes if each column takes the row's place; inf where that is not allowed."""
    count, group = len(fleet.seconds), home[rows]
    before = fleet.tally(home[:count])
    labels, _, total, size = (tally[group] for tally in before)
    places = tally_places(fleet, fleet.groups)
    held, reach, spent, worth = places
    same = home == group[:, None]
    others = same & (torch.arange(len(home)) != rows[:, None])
    slowest = torch.where(others, reach, -torch.inf).amax(1)
    rest = (labels - held[rows], slowest, total - spent[rows], size - worth[rows])
    after = utility_with(fleet, rest, places) - fleet.group_utility(home[:count])[group][:, None]
    return torch.where(same, torch.inf, after)


def improve_in_pairs(fleet: FleetArrays, group: Tensor, seed: int, price: float = 0.0) -> Tensor:
    """Put the groups into pairs and carry out the best swap of each, again and again, each pair's if it gains more than `price`.

    A group offers all its places, or the slowest member's and a sample of the others, and one empty place. Ends after a number of
    rounds, or where no pair has exchanged anything for some. Cost of a round: O(n c), with the smaller of a group and a sample.
    """
    generator = torch.Generator().manual_seed(derive(seed, "pairs"))
    slowest_first = fleet.seconds.argsort(descending=True, stable=True)
    rounds, quiet = ROUNDS + 2 * len(group) // fleet.groups, 0
    for _ in range(rounds):
        order = slowest_first[group[slowest_first].argsort(stable=True)]
        pairs = draw_pairs(fleet.tally(group)[1], generator)
        movers, places = find_exchanges(fleet, group, order, pairs, generator, price)
        quiet = 0 if len(movers) else quiet + 1
        if quiet == QUIET:
            break
        group = torch.cat([group, group.new_zeros(1)]).index_put((movers,), places)[:-1]
    return group


def draw_pairs(slowest: Tensor, generator: torch.Generator) -> Tensor:
    """Return pairs of groups (2, groups // 2), at random, and of all distances in the order of their slowest members.

    Groups of like speed gain most from each other, but then all have the labels of their neighbours: how far a round reaches is
    drawn, each order of magnitude as often.
    """
    count = len(slowest)
    draw = torch.rand(count + 1, generator=generator, dtype=torch.float64)
    place = torch.arange(count) + 2.0 * count ** float(draw[0]) * draw[1:]
    return slowest.argsort(stable=True)[place.argsort(stable=True)][: count // 2 * 2].view(-1, 2).T


def find_exchanges(
    fleet: FleetArrays, group: Tensor, order: Tensor, pairs: Tensor, generator: torch.Generator, price: float
) -> tuple[Tensor, Tensor]:
    """Return who moves, and to which group: two entries for each pair whose best swap gains more than `price`.

    An empty place is the member after the last.
    """
    nobody, tally, places = len(group), fleet.tally(group), tally_places(fleet, 1)
    labels, slowest, total, size = tally
    sizes = size.long()
    starts, order = sizes.cumsum(0) - sizes, torch.cat([order, torch.tensor([len(group)])])
    offered = sample_places(sizes, fleet.largest, generator)
    member = order[torch.where(offered < sizes[:, None], starts[:, None] + offered, nobody)][pairs]
    second = places[1][order[torch.where(sizes > 1, starts + 1, nobody)]]
    held, reach, spent, worth = (values[member] for values in places)
    others = torch.where(offered == 0, second[:, None], slowest[:, None])[pairs]
    rest = (labels[pairs][:, :, None] - held, others, total[pairs][..., None] - spent, size[pairs][..., None] - worth)
    swapped = (held.flip(0), reach.flip(0), spent.flip(0), worth.flip(0))
    after = utility_with(fleet, rest, swapped)
    gains = (after[0] + after[1].mT).flatten(1) - fleet.group_utility(group)[pairs].sum(0)[:, None]
    best, at = gains.min(1)
    paying = best < -max(price, LEAST_GAIN)
    width = member.shape[-1]
    chosen = torch.stack([at // width, at % width])[:, :, None]
    return member.gather(2, chosen)[:, paying, 0].flatten(), pairs.flip(0)[:, paying].flatten()


def sample_places(sizes: Tensor, largest: int, generator: torch.Generator) -> Tensor:
    """Return the places that each group offers (groups, places); from the size of a group on they are empty.

    All of them and an empty one, if groups may grow; of larger groups the first, an empty one, and some at random.
    """
    most = int(sizes.max())
    if most <= SAMPLE:
        return torch.arange(min(most + 1, largest)).expand(len(sizes), -1)
    offered = torch.rand(len(sizes), SAMPLE, generator=generator, dtype=torch.float64)
    offered = (offered * sizes[:, None]).long()
    offered[:, 0], offered[:, -1] = 0, sizes
    return offered


def tally_places(fleet: FleetArrays, empty: int) -> Tally:
    """Return the tally of each member's place, and of so many empty places after them, which are nobody's slowest."""

    def pad(values: Tensor, filling: float = 0.0) -> Tensor:
        return torch.cat([values, values.new_full((empty, *values.shape[1:]), filling)])

    return pad(fleet.labels), pad(fleet.seconds, -torch.inf), pad(fleet.seconds), pad(torch.ones_like(fleet.seconds))


def utility_with(fleet: FleetArrays, rest: Tally, come: Tally) -> Tensor:
    """Return the utility of each group without one place, `rest` (.., r), with each of `come` (.., h) in it (.., r, h).

    inf where the group would be too small or too large.
    """
    labels, slowest, total, size = rest
    held, reach, spent, worth = come
    sizes = size[..., None] + worth[..., None, :]
    waiting = slowest[..., None].maximum(reach[..., None, :]) - (total[..., None] + spent[..., None, :]) / sizes
    after = fleet.utility(waiting, pairwise_divergence(labels, held, fleet.logs))
    return torch.where((sizes < fleet.smallest) | (sizes > fleet.largest), torch.inf, after)


def pairwise_divergence(rest: Tensor, held: Tensor, logs: Tensor) -> Tensor:
    """`label_divergence` of each of `rest` (.., r, c) with each of `held` (.., h, c): (.., r, h), and nothing larger on the way."""
    rest = rest + SMOOTHING
    surprise = rest.new_zeros(*rest.shape[:-1], held.shape[-2])
    for ours, theirs, log in zip(rest.unbind(-1), held.unbind(-1), logs, strict=True):
        counts = ours[..., None] + theirs[..., None, :]
        surprise.addcmul_(counts, counts.log().sub_(log))
    total = rest.sum(-1)[..., None] + held.sum(-1)[..., None, :]
    return surprise.div_(total).sub_(total.log()).clamp_(min=0.0)
