"""Clients that each have a label mixture of their own, all of one size: the skew of HLoRA's prototype, without its overlaps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedloom.core.errors import Refused
from fedloom.core.seeds import derive
from fedloom.data.examples import Examples
from fedloom.data.partition import Indices, named


@dataclass(frozen=True)
class ClientDirichlet:
    """Each client draws its label mixture from a symmetric Dirichlet(alpha) and takes `size` examples in these shares.

    So does the sampler that HLoRA's public prototype uses (its clients may share examples; here every example has one
    owner). The labels of all clients together are even in expectation, whatever the data's own shares are:
    `LabelDirichlet` keeps those, and then the commonest label drowns the others when most clients have one label. Where a
    label runs out, others fill the place; what nobody took stays unused.
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
        """Client ids c00, c01, ... and their examples."""
        if len(examples) < self.clients * self.size:
            most = len(examples) // self.clients
            raise Refused("partition.size", self.size, f"{len(examples)} training examples give at most {most} to each")
        draw, labels = np.random.default_rng(derive(seed, "partition", "mixture")), np.array(examples.labels)
        left = [draw.permutation(np.flatnonzero(labels == label)).tolist() for label in np.unique(labels)]
        return named([self._take(left, draw) for _ in range(self.clients)])

    def _take(self, left: list[list[int]], draw: np.random.Generator) -> Indices:
        """One client's examples, taken out of the piles `left` of each label."""
        wanted = draw.multinomial(self.size, draw.dirichlet([self.alpha] * len(left)))
        own = [pile.pop() for pile, count in zip(left, wanted, strict=True) for _ in range(min(count, len(pile)))]
        while len(own) < self.size:
            own.append(max(left, key=len).pop())
        return np.array(own)
