"""`Private`: what a run promises to its clients, or to the records at its sites, as one value.

Whom it protects. With unit "client" the server bounds what one client can change of a version, adds noise, and counts how often each
client is merged: that protects a client from all who see released models or the run folder, and from the other members, and trusts
the server. With unit "record" the sites train with noise (DP-SGD): that protects a record from the server too.

Two runs are neighbours, for unit "client", if one client's answers are replaced by answers that change nothing, at the same places
and with the same weights (zero-out; Ponomareva et al., "How to DP-fy ML", arXiv 2303.00654, section 2.1.1). So it is hidden what a
client's data made of its answers, and not that it took part or when it answered; how many examples it holds it does not say.

k answers of one client, each merged with a noise of z times the most that it can change, are one Gaussian mechanism of mu =
sqrt(k) / z, in whatever order answers come: no amplification by sampling is claimed, because who answers is a matter of speed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fedloom.core.errors import Refused
from fedloom.core.participation import Participation
from fedloom.core.types import Result


@dataclass(frozen=True, slots=True)
class Private:
    """Bounds and noise of a run, and how often one client may take part.

    Fields:
        clip: largest norm of a client's change, over all layers and the head together; with unit "record" of an example's
            gradient (S).
        multiplier: standard deviation of the noise over the largest change by one client in a merge; with unit "record" over `clip`
            in a step of training (z).
        most_answers: answers of one client that may be merged in the whole run; with unit "record" tasks that it may be given.
        unit: who is protected (default "client"). "client" is protected from readers and members, by noise of the server. "record" is
            protected from all parties, by noise at the sites.
        budget: (epsilon, delta) that a client's answers together, or with unit "record" those of a site, may not exceed (default
            None: not limited, but counted).
        noise: "independent" in each version, or "banded": correlated over versions, which is less for clients that are merged seldom
            (default "independent").
        apart: versions from one merge of a client to its next, at least (at least 1; default 1: it may be in every version).
    """

    clip: float
    multiplier: float
    most_answers: int
    unit: Literal["client", "record"] = "client"
    budget: tuple[float, float] | None = None
    noise: Literal["independent", "banded"] = "independent"
    apart: int = 1

    def __post_init__(self) -> None:
        if self.unit not in ("client", "record"):
            raise Refused("privacy.unit", self.unit, '"client" or "record"')
        for name in ("clip", "multiplier"):
            if not 0 < getattr(self, name) < math.inf:
                remedy = "a positive number: noise is `multiplier` times what `clip` lets one client or record change"
                raise Refused(f"privacy.{name}", getattr(self, name), remedy)
        for name in ("most_answers", "apart"):
            if getattr(self, name) < 1:
                raise Refused(f"privacy.{name}", getattr(self, name), "at least 1")
        if self.budget is not None and not (0 < self.budget[0] < math.inf and 0 < self.budget[1] < 1):
            remedy = (
                "(epsilon, delta): a positive epsilon, and a delta below one over the number of clients, as (8.0, 1e-5)"
            )
            raise Refused("privacy.budget", self.budget, remedy)
        if self.noise not in ("independent", "banded"):
            raise Refused("privacy.noise", self.noise, '"independent" or "banded"')
        if self.unit == "record" and (self.noise, self.apart) != ("independent", 1):
            remedy = 'sites add noise to each step: leave out `noise` and `apart`, which are of unit "client"'
            raise Refused("privacy.noise", self.noise, remedy)

    @property
    def participation(self) -> Participation:
        """How often a client may take part: where sites add noise, each task that is handed out counts."""
        return Participation(self.most_answers, self.apart, tasks=self.unit == "record")


def client_level(privacy: Private | None) -> bool:
    """Return whether the server adds the noise, and so holds exact answers of clients."""
    return privacy is not None and privacy.unit == "client"


def without_measures(result: Result) -> Result:
    """Return an answer without what its client measured on its data: losses, tokens, how many examples it holds.

    How long it took stays: that is not hidden.
    """
    seconds = {name: value for name, value in result.metrics.items() if name.partition("_")[0] == "seconds"}
    return replace(result, metrics=seconds, tokens=0, examples=1)
