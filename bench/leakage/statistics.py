"""A logistic rule, fitted on shadow clients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RIDGE, NEWTON_STEPS = 1e-2, 12


def fit_logistic(features: Tensor, right: Tensor) -> Callable[[Tensor], Tensor]:
    """Fit a logistic rule (Newton's method, a small ridge) on features (rows, columns); return its log odds as a function."""
    centre, spread = features.mean(0), features.std(0) + 1e-9

    def design(of: Tensor) -> Tensor:
        return torch.cat([(of - centre) / spread, torch.ones(len(of), 1, dtype=of.dtype)], 1)

    inputs, target = design(features), right.to(features.dtype)
    weights = torch.zeros(inputs.shape[1], dtype=features.dtype)
    for _ in range(NEWTON_STEPS):
        chance = (inputs @ weights).sigmoid()
        curvature = (inputs.T * (chance * (1 - chance))) @ inputs + RIDGE * torch.eye(len(weights), dtype=inputs.dtype)
        weights += torch.linalg.solve(curvature, inputs.T @ (target - chance) - RIDGE * weights)
    return lambda of: design(of) @ weights
