"""What a client counts for: by what it registered when it first joined the run, never by what an answer says.

A number that is the client's own word (`Profile.claimed`) counts at most `MOST` times the median of all that are registered, so one
client in six has at most 3 / 8 of the weight, whatever it says. The simulator and the operator of a deployment know how many examples
there are: their numbers count as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from statistics import median_low

from fedloom.core.types import ClientId, Profile

MOST = 3
"""A number that a client claims counts at most so many times the median."""


def register(registered: MutableMapping[ClientId, int], profile: Profile) -> Profile:
    """Write down the examples of a client that joins; returns the profile that counts from now on.

    What a client claimed first stays: a later claim changes nothing for the rest of the run.
    """
    if profile.claimed and profile.client in registered:
        return replace(profile, examples=registered[profile.client])
    registered[profile.client] = profile.examples
    return profile


def counted_examples(registered: Mapping[ClientId, int], profile: Profile) -> int:
    """Return the examples that count for a client that has registered, at least 1. Cost: a sort of all that are claimed.

    The median is the lower one of two: beside one honest client a liar counts three times as much, and not without end.

    >>> counted_examples({"a": 100, "b": 10**12}, Profile("b", 10**12, claimed=True))
    300
    """
    examples = max(1, registered[profile.client])
    return min(examples, MOST * max(1, median_low(registered.values()))) if profile.claimed else examples
