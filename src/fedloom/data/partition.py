"""Partitions: training examples divided over clients, a part of each held out for its evaluation, and statistics of them.

Clients that differ along an axis such as the length of their texts are in `skew`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import Refused
from fedloom.core.seeds import SecretOf, derive, keyed_seed
from fedloom.core.text import without_surrogates
from fedloom.data.examples import Examples

Indices = npt.NDArray[np.int64]
REDRAWS = 20  # draws of an uneven split before the smallest clients are filled from the largest


class Partition(Protocol):
    """A way to divide training examples over clients.

    Every example is at exactly one client, unless the partition promises sizes (`ClientDirichlet.size`, `equal` of those along an
    axis): what does not fit into them stays unused.
    """

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Return the names of the clients and, for each, the indices of its training examples; the same for the same seed."""
        ...


@dataclass(frozen=True)
class IID:
    """Examples shuffled and divided evenly: every client resembles the whole, sizes differ by at most one.

    Fields:
        clients: number of clients.
    """

    clients: int = 20

    def __post_init__(self) -> None:
        check_partition(self.clients)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Divide the examples over clients."""
        check_enough_examples(examples, self.clients, 1)
        return name_clients(np.array_split(partition_generator(seed, "iid").permutation(len(examples)), self.clients))


@dataclass(frozen=True)
class LabelDirichlet:
    """Each label is divided over the clients in proportions from Dirichlet(alpha): a small alpha skews the labels.

    Hsu, Qi and Brown 2019, "Measuring the effects of non-identical data distribution for federated visual
    classification", in the per-label form of Yurochkin et al. 2019, "Bayesian nonparametric federated learning of
    neural networks". Drawn again until every client has `smallest` examples; after some draws the best one is repaired.

    Fields:
        clients: number of clients.
        alpha: concentration; the smaller, the more uneven.
        smallest: examples that every client has at least.
    """

    clients: int = 20
    alpha: float = 0.5
    smallest: int = 8

    def __post_init__(self) -> None:
        check_partition(self.clients, self.alpha, self.smallest)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Divide the examples over clients."""
        check_enough_examples(examples, self.clients, self.smallest)
        labels = np.array(examples.labels)

        def deal(attempt: int) -> list[Indices]:
            draw = partition_generator(seed, "label", str(attempt))
            piles = [
                _pour(draw, np.flatnonzero(labels == label), self.clients, self.alpha) for label in np.unique(labels)
            ]
            return [np.concatenate(pile) for pile in zip(*piles, strict=True)]

        return name_clients(deal_at_least(self.smallest, deal, partition_generator(seed, "label", "repair")))


@dataclass(frozen=True)
class Shards:
    """Examples sorted by label and cut into `clients * per_client` equal shards, `per_client` random shards to each client.

    McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data".

    Fields:
        clients: number of clients.
        per_client: shards of each client.
    """

    clients: int = 20
    per_client: int = 2

    def __post_init__(self) -> None:
        check_partition(self.clients)
        if self.per_client < 1:
            raise Refused("partition.per_client", self.per_client, "choose a whole number of at least 1")

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Divide the examples over clients."""
        check_enough_examples(examples, self.clients, self.per_client)
        draw, labels = partition_generator(seed, "shards"), np.array(examples.labels)
        shuffled = draw.permutation(len(examples))  # so that equal labels are in random order
        shards = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], self.clients * self.per_client)
        dealt = np.split(draw.permutation(len(shards)), self.clients)
        return name_clients([np.concatenate([shards[i] for i in hand]) for hand in dealt])


@dataclass(frozen=True)
class QuantityDirichlet:
    """Random examples, but client sizes in proportions drawn from Dirichlet(alpha): a small alpha skews the sizes.

    Li, Diao, Chen and He 2022, "Federated learning on non-IID data silos: an experimental study" (quantity skew).

    Fields:
        clients: number of clients.
        alpha: concentration; the smaller, the more uneven.
        smallest: examples that every client has at least.
    """

    clients: int = 20
    alpha: float = 0.5
    smallest: int = 8

    def __post_init__(self) -> None:
        check_partition(self.clients, self.alpha, self.smallest)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Divide the examples over clients."""
        check_enough_examples(examples, self.clients, self.smallest)

        def deal(attempt: int) -> list[Indices]:
            return _pour(
                partition_generator(seed, "quantity", str(attempt)), np.arange(len(examples)), self.clients, self.alpha
            )

        return name_clients(deal_at_least(self.smallest, deal, partition_generator(seed, "quantity", "repair")))


@dataclass(frozen=True)
class ClientDirichlet:
    """Each client draws its label mixture from a symmetric Dirichlet(alpha) and takes `size` examples in these shares.

    So does the sampler that HLoRA's public prototype uses (its clients may share examples; here every example has one
    owner). The labels of all clients together are even in expectation, whatever the data's own shares are:
    `LabelDirichlet` keeps those, and then the commonest label drowns the others when most clients have one label. Where a
    label runs out, others fill the place; what no client took stays unused.

    Fields:
        clients: number of clients.
        alpha: concentration; the smaller, the more uneven.
        size: examples of each client.
    """

    clients: int = 20
    alpha: float = 0.5
    size: int = 100

    def __post_init__(self) -> None:
        for field in ("clients", "size"):
            if getattr(self, field) < 1:
                raise Refused(f"partition.{field}", getattr(self, field), "choose a whole number of at least 1")
        if not 0 < self.alpha < float("inf"):
            raise Refused("partition.alpha", self.alpha, "choose a number above 0; the smaller, the more uneven")

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Divide the examples over clients c00, c01, ..."""
        if len(examples) < self.clients * self.size:
            most = len(examples) // self.clients
            raise Refused("partition.size", self.size, f"{len(examples)} training examples give at most {most} to each")
        draw, labels = np.random.default_rng(derive(seed, "partition", "mixture")), np.array(examples.labels)
        left = [draw.permutation(np.flatnonzero(labels == label)).tolist() for label in np.unique(labels)]
        return name_clients([self._take(left, draw) for _ in range(self.clients)])

    def _take(self, left: list[list[int]], draw: np.random.Generator) -> Indices:
        """Take one client's examples out of the piles `left` of each label."""
        wanted = draw.multinomial(self.size, draw.dirichlet([self.alpha] * len(left)))
        taken = [pile.pop() for pile, count in zip(left, wanted, strict=True) for _ in range(min(count, len(pile)))]
        while len(taken) < self.size:
            taken.append(max(left, key=len).pop())
        return np.array(taken)


@dataclass(frozen=True)
class ByClient:
    """Clients as the data name them in their client column.

    Fields:
        smallest: clients with fewer examples are left out, and a note counts them.
    """

    smallest: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.smallest, str):
            remedy = "the column of clients belongs to the data, such as Table(..., client=NAME); here leave it out"
            raise Refused("partition.smallest", self.smallest, remedy)
        check_partition(1, smallest=self.smallest)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Divide the examples over clients."""
        if examples.clients is None:
            raise Refused("partition", "by client", "the data name no clients; set data.client to the column that does")
        parts: dict[str, list[int]] = {name: [] for name in sorted(set(examples.clients))}
        for index, name in enumerate(examples.clients):
            if not name.strip():
                raise Refused("data.client", name, f"training example {index} has no client; fill the column")
            parts[name].append(index)
        large = {name: tuple(part) for name, part in parts.items() if len(part) >= self.smallest}
        if not large:
            most = max(map(len, parts.values()), default=0)
            raise Refused(
                "partition.smallest", self.smallest, f"no client has so many examples; the largest has {most}"
            )
        return large


@dataclass(frozen=True)
class Shard:
    """Examples of one client, as indices in the training data.

    Fields:
        client: its name.
        train: examples to train on.
        held_out: examples of its own evaluation; a client with few examples may have none.
    """

    client: str
    train: tuple[int, ...]
    held_out: tuple[int, ...]


def hold_out(
    parts: Mapping[str, tuple[int, ...]], examples: Examples, share: float, secret_of: SecretOf
) -> tuple[Shard, ...]:
    """Set about this `share` of each client's examples aside for its own evaluation, chosen by a secret of the client.

    An example is held out where a keyed hash of what it says (`_side`) falls below the share. So examples that are added move
    none that were there, equal ones are on one side, and a larger share holds out what a smaller one does, and more. How many they
    are is left to chance: a client with few examples may have none held out (`partition_notes` counts such clients). At least one
    example is left to train on: where all fall below the share, those of the largest hash stay.

    The run is no part of the key: what a client holds out in one run it trains on in none, as long as it keeps its secret and the
    share does not shrink.

    Raises:
        Refused: a client has no example, or an index that `examples` lack.
    """
    if not 0 <= share < 1:
        raise Refused("held_out", share, "choose a share of at least 0 (clients are not scored) and below 1")
    shards = []
    for number, (client, part) in enumerate(parts.items(), 1):
        if not part:
            raise Refused("partition.client", number, "this client has no example; use fewer clients, or leave it out")
        if not all(0 <= index < len(examples) for index in part):
            raise Refused("partition.client", number, f"has an index outside the {len(examples)} examples")
        part = tuple(sorted(part))
        secret = secret_of(client)
        sides = [_side(examples, index, secret) if share else 1.0 for index in part]
        limit = min(share, max(sides))
        held_out = tuple(index for index, side in zip(part, sides, strict=True) if side < limit)
        train = tuple(index for index, side in zip(part, sides, strict=True) if side >= limit)
        shards.append(Shard(client, train, held_out))
    return tuple(shards)


def _side(examples: Examples, index: int, secret: bytes) -> float:
    """Keyed hash, from 0 to 1, of an example: of its texts, its answer and the turns before. Uniform over secrets.

    The label is left out: an example whose label was mended, or which another run names otherwise, stays on its side. Half
    characters count as what a model reads in their place.
    """
    parts = [examples.texts[index]]
    for column in (examples.pairs, examples.answers):
        if column is not None:
            parts.append(column[index])
    for turn in examples.before[index] if examples.before is not None else ():
        parts += turn
    return keyed_seed(secret, "held out", *map(without_surrogates, parts)) / 2.0**63


def partition_notes(examples: Examples, shards: Sequence[Shard], share: float) -> list[str]:
    """Note clients that train without being scored, and training examples that no client has.

    `share` is what each client was to hold out.
    """
    notes = []
    if share and (unscored := sum(not shard.held_out for shard in shards)):
        whose = f"{unscored} of {len(shards)} clients have too few examples to hold any out"
        notes.append(f"{whose}: they train on all of them and are not evaluated.")
    unused = len(examples) - sum(len(shard.train) + len(shard.held_out) for shard in shards)
    if shards and unused:
        named = set(examples.clients or ())
        lost = len(named) - len(shards) if named.issuperset(shard.client for shard in shards) else 0
        whose = f", those of {lost} clients with too few examples (partition.smallest)" if lost else ""
        notes.append(f"{unused} of {len(examples)} training examples belong to no client and are not used{whose}.")
    return notes


def partition_statistics(examples: Examples, shards: tuple[Shard, ...]) -> dict[str, Any]:
    """Measure how uneven the clients are; the result is ready for JSON.

    For each client the number of `examples` to train on and of those `held_out`, and of both together the counts of
    each label and the mean words per text. `label_js` is the mean over clients of the Jensen-Shannon divergence, in
    bits (0 alike, at most 1), between a client's label shares and those of all clients; `size_cv` is the standard
    deviation of the sizes over their mean.
    """
    held = [shard.train + shard.held_out for shard in shards]
    counts = np.array([np.bincount([examples.labels[i] for i in part], minlength=len(examples.names)) for part in held])
    clients = {
        shard.client: {
            "examples": len(shard.train),
            "held_out": len(shard.held_out),
            "labels": row.tolist(),
            "mean_words": round(sum(len(examples.texts[i].split()) for i in part) / len(part), 2),
        }
        for shard, part, row in zip(shards, held, counts, strict=True)
    }
    return {
        "clients": clients,
        "label_names": list(examples.names),
        "label_js": round(mean_divergence(counts), 4),
        "size_cv": round(coefficient_of_variation(counts.sum(axis=1)), 4),
    }


def mean_divergence(counts: npt.NDArray[Any]) -> float:
    """Mean over rows (clients) of the Jensen-Shannon divergence, in bits, between a row's shares and those of all rows together."""
    sizes = counts.sum(axis=1)
    shares, whole = counts / sizes[:, None], counts.sum(axis=0) / sizes.sum()
    apart = _bits((shares + whole) / 2) - (_bits(shares) + _bits(whole)) / 2
    return max(float(apart.mean()), 0.0)


def coefficient_of_variation(sizes: npt.NDArray[Any]) -> float:
    """Standard deviation of the sizes over their mean."""
    return float(sizes.std() / sizes.mean())


def _bits(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Entropy over the last axis, in bits."""
    logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    return np.asarray(-(shares * logs).sum(axis=-1))


def partition_generator(seed: int, *names: str) -> np.random.Generator:
    """Generator of the random stream of a partition that `names` spell."""
    return np.random.default_rng(derive(seed, "partition", *names))


def check_partition(clients: int, alpha: float = 1.0, smallest: int = 1) -> None:
    """Raise Refused for settings of a partition that are out of range."""
    for field, value in (("clients", clients), ("smallest", smallest)):
        if value < 1:
            raise Refused(f"partition.{field}", value, "choose a whole number of at least 1")
    if not 0 < alpha < float("inf"):
        raise Refused("partition.alpha", alpha, "choose a number above 0; the smaller, the more uneven")


def check_enough_examples(examples: Examples, clients: int, each: int) -> None:
    """Raise Refused where there are too few examples to give `each` to every client."""
    if len(examples) < clients * each:
        remedy = f"{len(examples)} training examples cannot give {each} to each; choose at most {len(examples) // each}"
        raise Refused("partition.clients", clients, remedy)


def name_clients(piles: Sequence[Indices]) -> dict[str, tuple[int, ...]]:
    """Name the clients c00, c01, ... at equal width, so that they sort by number."""
    width = max(2, len(str(len(piles) - 1)))
    return {f"c{number:0{width}}": tuple(sorted(pile.tolist())) for number, pile in enumerate(piles)}


def _pour(draw: np.random.Generator, members: Indices, clients: int, alpha: float) -> list[Indices]:
    """Shuffle the members and cut them in proportions from a symmetric Dirichlet."""
    cuts = draw.dirichlet([alpha] * clients).cumsum()[:-1] * len(members)
    return np.split(draw.permutation(members), cuts.round().astype(int))


def deal_at_least(smallest: int, deal: Callable[[int], list[Indices]], draw: np.random.Generator) -> list[Indices]:
    """Return the first of some deals that gives everyone `smallest`, or the best of them, filled up from the largest piles."""
    deals: list[list[Indices]] = []
    for attempt in range(REDRAWS):
        deals.append(deal(attempt))
        if min(map(len, deals[-1])) >= smallest:
            return deals[-1]
    best = max(deals, key=lambda piles: min(map(len, piles)))
    piles = [draw.permutation(pile).tolist() for pile in best]
    while len(poor := min(piles, key=len)) < smallest:
        poor.append(max(piles, key=len).pop())
    return [np.array(pile) for pile in piles]
