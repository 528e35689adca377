"""What the members of a masked sum, and whoever asks them for one, must agree on: what is summed, and how finely."""

from __future__ import annotations

import hashlib

from fedloom.aggregate.shared.parts import start_digest
from fedloom.core.codec import Summed
from fedloom.core.rate_by_rank import rate_bounds
from fedloom.core.types import TaskStart
from fedloom.deploy.messages.messages import JoinRequest, RunTerms, encode_request


def summed_digest(terms: RunTerms, start: TaskStart, first: int, last: int) -> str:
    """Return the sha256 of what a member sums in a round: directions `first` to `last` - 1 of what a start becomes by these terms.

    Members compare it (`RoundTerms.starts`), for a server could ask others for directions in which nothing is learnt.
    """
    facts = encode_request(JoinRequest(terms, 0)) + f"{start_digest(start)} {first} {last}".encode()
    return hashlib.sha256(facts).hexdigest()


def why_coarse(terms: RunTerms, start: TaskStart, codec: Summed) -> str | None:
    """Return why whole numbers are so coarse that a step of the optimiser may be rounded to nothing; None if they are not.

    Members of one start may make different numbers of steps, so those who make few would all send zeros, and the sum be another's.
    """
    scaling = terms.lora.scaling if start.scaling is None else start.scaling
    step = terms.training.learning_rate * min(1.0, scaling * start.rules.up_rate)
    step *= rate_bounds(terms.rates, terms.rank)[0]
    if codec.step <= step:
        return None
    return f"numbers would be rounded to {codec.step:.3g}, and a step of the optimiser moves one by {step:.3g}: give more bits"
