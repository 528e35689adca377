"""The linear combination of tensors, which all averages in factor space come down to."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 2**16
"""Numbers up to which a mean is one product of a stack (0.8 MB), for calls cost more there than arithmetic."""


def mean(pairs: list[tuple[float, Tensor]]) -> Tensor:
    """The linear combination of tensors of one shape, added up in float64 and returned in the dtype of the first."""
    first = pairs[0][1]
    if len(pairs) * first.numel() <= SMALL:
        weights = torch.tensor([coefficient for coefficient, _ in pairs], dtype=torch.float64, device=first.device)
        rows = torch.stack([tensor for _, tensor in pairs]).double().view(len(pairs), first.numel())
        return (weights @ rows).view(first.shape).to(first.dtype)
    total = torch.zeros_like(first, dtype=torch.float64)
    for coefficient, tensor in pairs:
        total.add_(tensor, alpha=coefficient)
    return total.to(first.dtype)
