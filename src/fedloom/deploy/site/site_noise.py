"""Clipping and noise at the site, `[privacy]` in `site.toml`: what an answer tells at most, whatever a server asks for.

Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", arXiv 1710.06963, 2018 (clipping of a client's
whole change, Gaussian noise); here both are applied by the site itself. What is sent is start + min(1, S / |change|) change + noise,
the norm over all tensors that may change, in float64; the noise has the standard deviation z S in each entry, and the sum is rounded
to a grid of 2^-20 S, since the last digits of floating point numbers tell what noise was added to (Mironov, CCS 2012).

The noise is a keyed function (HMAC-SHA256, expanded by ChaCha20) of the site's secret and of all that the exact answer depends on,
the exact answer too: a task that is asked for again gets the same bytes, so that noise cannot be averaged away, and no two different
answers share their noise, so that it cannot be subtracted. torch's generators will not do here: they take 32 bits of a seed.

Each release is a line of `spent.jsonl`, on the disk before the answer is: what an accountant needs to add up a privacy loss. A crash
can only make it count too much.
"""

from __future__ import annotations

import hmac
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedloom.aggregate.shared.wrapper import euclidean_norm
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter, cut_factor, from_tensors, map_tensors, named_tensors, take_sides
from fedloom.core.types import Result, Side, Task, TaskStart

GRID = 2.0**-20
"""Distance of the values that a change can take, relative to the clipping norm."""
SIDES: tuple[Side, ...] = ("down", "up", "dense")


class SitePrivacy(BaseModel):
    """Clipping and noise that a site applies to each answer.

    Fields:
        clip: largest Euclidean norm of a change, over all tensors together (S).
        multiplier: standard deviation of the noise relative to `clip` (z; default 0: clipping alone).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    clip: float = Field(gt=0, le=1e6)
    multiplier: float = Field(default=0.0, ge=0, le=1e6)


@dataclass(frozen=True, slots=True)
class NoiseSource:
    """Noise of one answer, which nobody can foretell without the secret of the site.

    Fields:
        secret: secret of the site.
        run_hash: hash of the run.
        request: digest of the request.
    """

    secret: bytes
    run_hash: str
    request: str

    def normals(self, task: int, exact: Adapter) -> Iterator[Tensor]:
        """Yield, for each tensor of `exact` in order of name, standard normal numbers of its shape, in float64."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        names = json.dumps(["site noise", self.run_hash, task, self.request, fingerprint(exact)])
        key = hmac.digest(self.secret, names.encode(), "sha256")
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        for _, tensor in sorted(named_tensors(exact).items()):
            pairs = (tensor.numel() + 1) // 2
            drawn = torch.frombuffer(bytearray(stream.update(bytes(16 * pairs))), dtype=torch.int64)
            yield normals_of(drawn)[: tensor.numel()].reshape(tensor.shape)


def normals_of(words: Tensor) -> Tensor:
    """Return as many standard normal numbers as there are random 64-bit words, an even number (Box and Muller 1958)."""
    uniform = ((words & (2**53 - 1)).double() + 0.5) * 2.0**-53
    first, second = uniform.reshape(2, -1)
    radius, angle = (-2.0 * first.log()).sqrt(), 2.0 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()])


def why_unprotected(privacy: SitePrivacy | None, start: TaskStart) -> str | None:
    """Return why answers to such a task cannot be protected; None if they can, or need not."""
    if privacy is None:
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
    exact, start = result.adapter, task.start
    ranks = {name: factor.rank for name, factor in exact.factors.items()}  # lower where a client pruned itself
    sent = Adapter(
        {name: cut_factor(start.train.factors[name], rank) for name, rank in ranks.items()}, start.train.dense
    )
    free = frozenset(SIDES) - start.rules.unchanged
    zero = map_tensors(lambda one: torch.zeros_like(one, dtype=torch.float64), sent)
    change = take_sides(free, map_tensors(lambda new, old: new.double() - old.double(), exact, sent), zero)
    norm = euclidean_norm(change)
    if not math.isfinite(norm):
        change, norm = zero, 0.0
    share = min(1.0, privacy.clip / norm) if norm else 1.0
    moved = map_tensors(lambda one: one * share, change)
    if privacy.multiplier:
        moved = _with_noise(moved, privacy, source.normals(task.id, exact))
    protected = map_tensors(lambda old, more: (old.double() + more).to(old.dtype), sent, moved)
    return replace(result, adapter=take_sides(free, protected, sent), tokens=0, metrics={})


def _with_noise(change: Adapter, privacy: SitePrivacy, normals: Iterator[Tensor]) -> Adapter:
    deviation, grid = privacy.multiplier * privacy.clip, GRID * privacy.clip
    noisy = {
        name: ((tensor + deviation * normal.to(tensor.device)) / grid).round() * grid
        for (name, tensor), normal in zip(sorted(named_tensors(change).items()), normals, strict=True)
    }
    return from_tensors(change, noisy)
