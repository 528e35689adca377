"""The weighted sum of the last updates of one layer, one of which is replaced at a time.

Beside the stacked factors their Gram matrices are kept. A new update rewrites its own rows and columns of them, from the
factors, so that nothing drifts; weights are a scaling at the time of asking. The Gram matrices start the Krylov iteration
of `lowrank.svd` and give the sum's energy: their products need only float32, since neither is more than a start and a
figure for a log.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.lora import Factor, pad
from fedloom.lowrank import svd


class Window:
    """`slots` updates of at most `rank` directions each; an empty slot counts as zero."""

    def __init__(self, slots: int, rank: int, like: Factor) -> None:
        """Empty, for the shape and the device of `like`. Memory: slots * rank * (d_out + d_in + 2 slots * rank) floats."""
        stacked = slots * rank
        self._rank = rank
        self._up = like.up.new_zeros(like.up.shape[0], stacked, dtype=torch.float32)
        self._down = like.down.new_zeros(stacked, like.down.shape[1], dtype=torch.float32)
        self._of_up, self._of_down = (self._up.new_zeros(stacked, stacked, dtype=torch.float64) for _ in range(2))

    def put(self, slot: int, update: Factor) -> None:
        """Replace what is in `slot`: O((d_out + d_in) R r). A smaller rank is padded with zeros."""
        own = slice(slot * self._rank, (slot + 1) * self._rank)
        padded = pad(update, self._rank)
        self._up[:, own], self._down[own] = padded.up, padded.down
        _rewrite(self._of_up, own, self._up)
        _rewrite(self._of_down, own, self._down.T)

    def best(self, weights: Sequence[float], rank: int) -> tuple[Factor, float]:
        """The best approximation of at most `rank` to sum of weight * update, one weight a slot, and the sum's energy.

        What `lora.truncate_sum` gives for the same terms, up to float32 rounding.
        """
        by = torch.tensor(weights, dtype=torch.float64, device=self._up.device).repeat_interleave(self._rank)
        of_up = self._of_up * by * by[:, None]
        left, values, right = svd(self._up * by.float(), self._down, rank, (of_up, self._of_down))
        energy = float((of_up * self._of_down).sum())
        return Factor(right, left * values), energy


def _rewrite(gram: Tensor, own: slice, tall: Tensor) -> None:
    """Bring the rows and columns `own` of tall^T tall up to date; their scale is kept out of float32's narrow range."""
    size = float(tall[:, own].abs().max()) or 1.0
    columns = (tall.T @ (tall[:, own] / size)).double() * size
    gram[:, own], gram[own] = columns, columns.T
