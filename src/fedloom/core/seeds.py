"""Counter-based randomness: every draw names its run seed and what it is for, so no draw depends on another.

Two runs of one seed agree for any number of workers and any `PYTHONHASHSEED`, because nothing is drawn from a shared stream.
"""

from __future__ import annotations

import hashlib
import random


def derive(seed: int, *names: int | str) -> int:
    """Return a 63-bit seed for the stream that `names` spell, e.g. `derive(7, "cohort", 12)`.

    >>> derive(7, "cohort", 12) == derive(7, "cohort", 12) != derive(7, "cohort", 13)
    True
    """
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(seed: int, *names: int | str) -> random.Random:
    """Return a random generator for the stream that `names` spell."""
    return random.Random(derive(seed, *names))
