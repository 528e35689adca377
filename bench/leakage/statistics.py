"""Area under the ROC curve, a logistic rule, and the 95 % interval of a mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, 97.5 % quantile by degrees of freedom."""

RIDGE, NEWTON_STEPS = 1e-2, 12


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Chance that a positive scores higher than a negative; a tie counts half (0.5: the score tells nothing).

    >>> auc([2.0, 1.0], [1.0, 0.0])
    0.875
    """
    gaps = np.subtract.outer(np.asarray(positive, float), np.asarray(negative, float))
    return float((gaps > 0).mean() + 0.5 * (gaps == 0).mean())


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of some seeds (Student's t); infinite for one."""
    if len(values) < 2:
        return math.inf
    return T95[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def mean_of(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return mean(values) if values else math.nan


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
