"""Counter-based randomness: every draw names its run seed and what it is for, so no draw depends on another.

Two runs of one seed agree for any number of workers and any `PYTHONHASHSEED`, because nothing is drawn from a shared stream.

What a server must not know (which rows share a batch, which are held out, what dropout drops) is drawn by a client from a secret of
its own: `keyed_seed`. A simulation gives each client a secret that follows from the run's seed, so its numbers repeat.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import random
from collections.abc import Callable
from typing import TypeAlias

SecretOf: TypeAlias = Callable[[str], bytes]
"""Gives the secret of a client by its name."""


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


def keyed_seed(secret: bytes, *names: int | str) -> int:
    """Return a 63-bit seed for the stream that `names` spell, which nobody can foretell without the secret (HMAC-SHA256).

    >>> keyed_seed(b"mine", "task", 12) == keyed_seed(b"mine", "task", 12) != keyed_seed(b"yours", "task", 12)
    True
    """
    spelt = json.dumps(names).encode()  # texts are quoted, so no two sequences of names are spelt alike
    return int.from_bytes(hmac.digest(secret, spelt, "sha256")[:8], "big") >> 1


def simulated_secret(seed: int, client: str) -> bytes:
    """Return the 32 bytes that stand for a client's secret in a simulation. Whoever knows the run's seed knows them."""
    return hmac.digest(b"fedloom simulation", json.dumps((seed, client)).encode(), "sha256")
