"""Clipping and noise of whole answers, `[privacy]` of unit "answer": what an answer tells at most, whatever a server asks for.

Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", arXiv 1710.06963, 2018 (clipping of a client's
whole change, Gaussian noise); here both are applied by the site itself. What is sent is start + min(1, S / |change|) change + noise,
the norm over all tensors that may change, in float64; the noise has the standard deviation z S in each entry, and the sum is rounded
to a grid of 2^-20 S, since the last digits of floating point numbers tell what noise was added to (Mironov, CCS 2012).

The noise is a keyed function (HMAC-SHA256, expanded by ChaCha20) of the site's secret and of all that the exact answer depends on,
the exact answer too: a task that is asked for again gets the same bytes, so that noise cannot be averaged away, and no two different
answers share their noise, so that it cannot be subtracted. torch's generators will not do here: they take 32 bits of a seed.

What each answer costs stands in the site's ledger before it leaves (`site_privacy`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedloom.core.answer_change import euclidean_norm, factor_change, with_change
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter, from_tensors, map_tensors, named_tensors
from fedloom.core.types import Result, Task, TaskStart
from fedloom.deploy.site.site_privacy import SitePrivacy
from fedloom.privacy.secret_noise import GRID, SecretNoise, add_noise


@dataclass(frozen=True, slots=True)
class NoiseSource:
    """Noise of one answer, which nobody can foretell without the secret of the site.

    Fields:
        secret: secret of the site.
        run_hash: hash of the run.
        request: digest of the request.
    """

    secret: bytes = field(repr=False)
    run_hash: str
    request: str

    def normals(self, task: int, exact: Adapter, clip: float, multiplier: float) -> Iterator[Tensor]:
        """Yield, for each tensor of `exact` in order of name, standard normal numbers of its shape, in float64.

        Another clip or multiplier gets other numbers: from the same ones at two scales the exact answer could be computed.
        """
        noise = SecretNoise(self.secret, ("site noise", self.run_hash))
        names = (task, self.request, fingerprint(exact), clip.hex(), multiplier.hex())
        yield from noise.normals(named_tensors(exact), *names)


def why_unprotected(privacy: SitePrivacy | None, start: TaskStart) -> str | None:
    """Return why answers to such a task cannot be protected; None if they can, or need not."""
    if privacy is None or privacy.unit == "record":  # whose noise comes before all of these
        return None
    if start.control is not None:
        return "this site clips what it sends ([privacy]), and a control variate (SCAFFOLD) would leave beside it"
    if privacy.multiplier and start.rules.pruning is not None:
        return "this site adds noise to what it sends ([privacy]), and the rank after pruning would tell of the data"
    if privacy.multiplier and start.rules.select is not None:
        return "this site adds noise to what it sends ([privacy]), and the choice of directions would tell of the data"
    return None


def protect_answer(privacy: SitePrivacy, source: NoiseSource, task: Task, result: Result) -> Result:
    """Return the answer with its change clipped and noise added, and without losses and tokens.

    Sides that may not change are those that were sent. A change that is not finite counts as none.
    """
    assert privacy.clip is not None  # of unit "answer"
    exact, start = result.adapter, task.start
    change = factor_change(start, exact)
    norm = euclidean_norm(change)
    if not math.isfinite(norm):
        change, norm = map_tensors(torch.zeros_like, change), 0.0
    share = min(1.0, privacy.clip / norm) if norm else 1.0
    moved = map_tensors(lambda one: one * share, change)
    if privacy.multiplier:
        normals = source.normals(task.id, exact, privacy.clip, privacy.multiplier)
        deviation, grid = privacy.multiplier * privacy.clip, GRID * privacy.clip
        moved = from_tensors(moved, add_noise(named_tensors(moved), normals, deviation, grid))
    return replace(result, adapter=with_change(start, exact, moved), tokens=0, metrics={})
