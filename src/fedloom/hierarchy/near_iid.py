"""The search behind `grouping.NearIID`: groups that resemble the whole and in which clients wait little.

Source: Liao, Xu, Xu et al., ParallelSFL, arXiv 2410.01256, 2024, Eqs. 11 and 14, Alg. 1, as reconstructed for HierFedLoRA (arXiv
2503.21213, 2025), which forms groups without a leading worker. Differs from Alg. 1: its k-means only shortens the list of
candidates, and here all of them are evaluated at once; an exchange with an empty place (a move) counts as a swap.

The utility of a group is share * waiting + (1 - share) * divergence. Waiting is the mean of (slowest - own) seconds, divergence
is KL(labels of the group || labels of all) in nats, and each is divided by its mean over random groups of the same sizes, so that a
group at random has utility 1 and the share means the same for every fleet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.core.seeds import derive

RANDOM_DEALS = 16  # random groupings of which the two units are means
SMOOTHING = 1e-6  # examples of each label that everybody has more: no logarithm of 0
LEAST_GAIN = 1e-9  # in utility; below it a swap is rounding


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

    def tally(self, group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    """Fill group after group: the slowest left, then the one that keeps the group's utility lowest, up to an even size."""
    count, group = len(fleet.seconds), torch.full((len(fleet.seconds),), -1)
    for number in range(fleet.groups):
        size = count // fleet.groups + (number < count % fleet.groups)
        left = (group < 0).nonzero().flatten()
        first = left[fleet.seconds[left].argmax()]
        group[first] = number
        labels, slowest, total = fleet.labels[first], fleet.seconds[first], fleet.seconds[first].clone()
        for held in range(1, size):
            left = (group < 0).nonzero().flatten()
            waiting = slowest - (total + fleet.seconds[left]) / (held + 1)
            costs = fleet.utility(waiting, label_divergence(labels + fleet.labels[left], fleet.logs))
            best = left[costs.argmin()]
            group[best] = number
            labels, total = labels + fleet.labels[best], total + fleet.seconds[best]
    return group


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
    held, spent, worth = (
        pad_places(values, fleet.groups) for values in (fleet.labels, fleet.seconds, torch.ones_like(fleet.seconds))
    )
    reach = torch.where(worth > 0, spent, -torch.inf)  # an empty place is nobody's slowest
    same = home == group[:, None]
    others = same & (torch.arange(len(home)) != rows[:, None])
    slowest = torch.where(others, reach, -torch.inf).amax(1)[:, None].maximum(reach)
    sizes = (size - worth[rows])[:, None] + worth
    waiting = slowest - ((total - spent[rows])[:, None] + spent) / sizes
    after = fleet.utility(waiting, pairwise_divergence(labels - held[rows], held, fleet.logs))
    refused = same | (sizes < fleet.smallest) | (sizes > fleet.largest)
    return torch.where(refused, torch.inf, after - fleet.group_utility(home[:count])[group][:, None])


def pad_places(values: Tensor, places: int) -> Tensor:
    """Return the members' values with zeros for so many empty places after them."""
    return torch.cat([values, values.new_zeros(places, *values.shape[1:])])


def pairwise_divergence(rest: Tensor, held: Tensor, logs: Tensor) -> Tensor:
    """`label_divergence(rest[:, None] + held, logs)`, label by label so that nothing is larger than the answer."""
    rest = rest + SMOOTHING
    surprise = rest.new_zeros(len(rest), len(held))
    for ours, theirs, log in zip(rest.T, held.T, logs, strict=True):
        counts = ours[:, None] + theirs
        surprise.addcmul_(counts, counts.log().sub_(log))
    total = rest.sum(1)[:, None] + held.sum(1)
    return surprise.div_(total).sub_(total.log()).clamp_(min=0.0)
