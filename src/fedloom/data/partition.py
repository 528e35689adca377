"""Who holds what: training examples divided over clients, and each client's own part held out for its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rich import box
from rich.markup import escape
from rich.table import Table

from fedloom.core.errors import Refused
from fedloom.core.seeds import derive
from fedloom.data.examples import Examples

Indices = npt.NDArray[np.int64]
REDRAWS = 20  # draws of an uneven split before the smallest clients are filled from the largest


class Partition(Protocol):
    """A way to divide: client id -> indices of its training examples, every example at no more than one client.

    Every example is at exactly one, unless the partition promises sizes (`ClientDirichlet.size`, `equal` of those along an axis):
    what does not fit into them stays unused.
    """

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]: ...


@dataclass(frozen=True)
class IID:
    """Shuffled and dealt out evenly: every client resembles the whole, sizes differ by at most one."""

    clients: int = 20

    def __post_init__(self) -> None:
        check(self.clients)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        enough(examples, self.clients, 1)
        return named(np.array_split(generator(seed, "iid").permutation(len(examples)), self.clients))


@dataclass(frozen=True)
class LabelDirichlet:
    """Each label is divided over the clients in proportions from Dirichlet(alpha): a small alpha skews the labels.

    Hsu, Qi and Brown 2019, "Measuring the effects of non-identical data distribution for federated visual
    classification", in the per-label form of Yurochkin et al. 2019, "Bayesian nonparametric federated learning of
    neural networks". Drawn again until every client has `smallest` examples; after some draws the best one is repaired.
    """

    clients: int = 20
    alpha: float = 0.5
    smallest: int = 8

    def __post_init__(self) -> None:
        check(self.clients, self.alpha, self.smallest)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        enough(examples, self.clients, self.smallest)
        labels = np.array(examples.labels)

        def deal(attempt: int) -> list[Indices]:
            draw = generator(seed, "label", str(attempt))
            piles = [
                _pour(draw, np.flatnonzero(labels == label), self.clients, self.alpha) for label in np.unique(labels)
            ]
            return [np.concatenate(pile) for pile in zip(*piles, strict=True)]

        return named(at_least(self.smallest, deal, generator(seed, "label", "repair")))


@dataclass(frozen=True)
class Shards:
    """Sorted by label, cut into `clients * per_client` equal shards, `per_client` random shards to each client.

    McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data".
    """

    clients: int = 20
    per_client: int = 2

    def __post_init__(self) -> None:
        check(self.clients)
        if self.per_client < 1:
            raise Refused("partition.per_client", self.per_client, "choose a whole number of at least 1")

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        enough(examples, self.clients, self.per_client)
        draw, labels = generator(seed, "shards"), np.array(examples.labels)
        shuffled = draw.permutation(len(examples))  # so that equal labels are in random order
        shards = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], self.clients * self.per_client)
        dealt = np.split(draw.permutation(len(shards)), self.clients)
        return named([np.concatenate([shards[i] for i in hand]) for hand in dealt])


@dataclass(frozen=True)
class QuantityDirichlet:
    """Random examples, but client sizes in proportions drawn from Dirichlet(alpha): a small alpha skews the sizes.

    Li, Diao, Chen and He 2022, "Federated learning on non-IID data silos: an experimental study" (quantity skew).
    """

    clients: int = 20
    alpha: float = 0.5
    smallest: int = 8

    def __post_init__(self) -> None:
        check(self.clients, self.alpha, self.smallest)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        enough(examples, self.clients, self.smallest)

        def deal(attempt: int) -> list[Indices]:
            return _pour(generator(seed, "quantity", str(attempt)), np.arange(len(examples)), self.clients, self.alpha)

        return named(at_least(self.smallest, deal, generator(seed, "quantity", "repair")))


@dataclass(frozen=True)
class ByClient:
    """The clients that the data themselves name in their client column."""

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        if examples.clients is None:
            raise Refused("partition", "by client", "the data name no clients; set data.client to the column that does")
        parts: dict[str, list[int]] = {name: [] for name in sorted(set(examples.clients))}
        for index, name in enumerate(examples.clients):
            if not name.strip():
                raise Refused("data.client", name, f"training example {index} has no client; fill the column")
            parts[name].append(index)
        return {name: tuple(part) for name, part in parts.items()}


@dataclass(frozen=True)
class Shard:
    """One client's examples, as indices in the training data: to train on, and held out for its own evaluation."""

    client: str
    train: tuple[int, ...]
    held_out: tuple[int, ...]


def hold_out(
    parts: Mapping[str, tuple[int, ...]], examples: Examples, share: float = 0.2, seed: int = 0
) -> tuple[Shard, ...]:
    """Set a random `share` of each client's examples aside, at least one unless it is 0, and leave at least one to train on.

    Raises:
        Refused: a client has fewer than two examples (one, where none is set aside), or an index that `examples` lack.
    """
    if not 0 <= share < 1:
        raise Refused("held_out", share, "choose a share of at least 0 (clients are not scored) and below 1")
    least = 2 if share else 1
    shards = []
    for client, part in parts.items():
        if len(part) < least:
            raise Refused(
                "partition.client",
                client,
                f"has {len(part)} example(s), needs {least}; use fewer clients, or leave this one's rows out",
            )
        if not all(0 <= index < len(examples) for index in part):
            raise Refused("partition.client", client, f"has an index outside the {len(examples)} examples")
        shuffled = generator(seed, "held out", client).permutation(part).tolist()
        cut = min(max(1, round(share * len(part))), len(part) - 1) if share else 0
        shards.append(Shard(client, tuple(sorted(shuffled[cut:])), tuple(sorted(shuffled[:cut]))))
    return tuple(shards)


def statistics(examples: Examples, shards: tuple[Shard, ...]) -> dict[str, Any]:
    """How uneven the clients are, ready for JSON.

    For each client the number of `examples` to train on and of those `held_out`, and of both together the counts of
    each label and the mean words per text. `label_js` is the mean over clients of the Jensen-Shannon divergence, in
    bits (0 alike, at most 1), between a client's label shares and those of all clients; `size_cv` is the standard
    deviation of the sizes over their mean.
    """
    held = [shard.train + shard.held_out for shard in shards]
    counts = np.array([np.bincount([examples.labels[i] for i in own], minlength=len(examples.names)) for own in held])
    clients = {
        shard.client: {
            "examples": len(shard.train),
            "held_out": len(shard.held_out),
            "labels": row.tolist(),
            "mean_words": round(sum(len(examples.texts[i].split()) for i in own) / len(own), 2),
        }
        for shard, own, row in zip(shards, held, counts, strict=True)
    }
    return {
        "clients": clients,
        "label_names": list(examples.names),
        "label_js": round(divergence(counts), 4),
        "size_cv": round(variation(counts.sum(axis=1)), 4),
    }


def describe(stats: Mapping[str, Any], most: int = 16) -> Table:
    """The statistics as a table for the terminal, largest client first; beyond `most` clients the middle is left out.

    Up to eight labels have a column each, of more the three commonest at each client are named.
    """
    names, clients = stats["label_names"], stats["clients"]
    facts = "label divergence {label_js:.3f} bits, size variation {size_cv:.2f}".format(**stats)
    table = Table(
        title=f"{len(clients)} clients, {facts}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("client")
    wide = len(names) <= 8
    for heading in ("train", "held out", "words", *(map(escape, names) if wide else ["commonest labels"])):
        table.add_column(heading, justify="right")
    order = sorted(clients, key=lambda name: (-clients[name]["examples"], name))
    for position, name in enumerate(order):
        if most // 2 <= position < len(order) - most // 2 and len(order) > most:
            if position == most // 2:
                table.add_row("…", f"{len(order) - most // 2 * 2} more")
            continue
        own = clients[name]
        ranked = sorted(range(len(names)), key=lambda label: -own["labels"][label])[:3]
        labels = (
            map(str, own["labels"]) if wide else [", ".join(escape(f"{names[i]} {own['labels'][i]}") for i in ranked)]
        )
        table.add_row(escape(name), str(own["examples"]), str(own["held_out"]), f"{own['mean_words']:.0f}", *labels)
    return table


def divergence(counts: npt.NDArray[Any]) -> float:
    """Mean over rows (clients) of the Jensen-Shannon divergence, in bits, between a row's shares and those of all rows together."""
    sizes = counts.sum(axis=1)
    shares, whole = counts / sizes[:, None], counts.sum(axis=0) / sizes.sum()
    apart = _bits((shares + whole) / 2) - (_bits(shares) + _bits(whole)) / 2
    return max(float(apart.mean()), 0.0)


def variation(sizes: npt.NDArray[Any]) -> float:
    """Standard deviation over mean."""
    return float(sizes.std() / sizes.mean())


def _bits(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Entropy over the last axis, in bits."""
    logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    return np.asarray(-(shares * logs).sum(axis=-1))


def generator(seed: int, *names: str) -> np.random.Generator:
    return np.random.default_rng(derive(seed, "partition", *names))


def check(clients: int, alpha: float = 1.0, smallest: int = 1) -> None:
    for field, value in (("clients", clients), ("smallest", smallest)):
        if value < 1:
            raise Refused(f"partition.{field}", value, "choose a whole number of at least 1")
    if not 0 < alpha < float("inf"):
        raise Refused("partition.alpha", alpha, "choose a number above 0; the smaller, the more uneven")


def enough(examples: Examples, clients: int, each: int) -> None:
    if len(examples) < clients * each:
        remedy = f"{len(examples)} training examples cannot give {each} to each; choose at most {len(examples) // each}"
        raise Refused("partition.clients", clients, remedy)


def named(piles: Sequence[Indices]) -> dict[str, tuple[int, ...]]:
    """Client ids c00, c01, ... of equal width, so that they sort by number."""
    width = max(2, len(str(len(piles) - 1)))
    return {f"c{number:0{width}}": tuple(sorted(pile.tolist())) for number, pile in enumerate(piles)}


def _pour(draw: np.random.Generator, members: Indices, clients: int, alpha: float) -> list[Indices]:
    """The shuffled members, cut in proportions from a symmetric Dirichlet."""
    cuts = draw.dirichlet([alpha] * clients).cumsum()[:-1] * len(members)
    return np.split(draw.permutation(members), cuts.round().astype(int))


def at_least(smallest: int, deal: Callable[[int], list[Indices]], draw: np.random.Generator) -> list[Indices]:
    """The first of some deals that gives everyone `smallest`, or the best of them, filled up from the largest piles."""
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
