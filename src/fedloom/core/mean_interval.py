"""How sure a mean over a few values is, such as one over seeds or over pairs of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, stdev

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, 97.5 % quantile by degrees of freedom."""
Z95 = NormalDist().inv_cdf(0.975)


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of some values (Student's t); infinite for one.

    >>> round(half_width([1.0, 2.0, 3.0]), 2), half_width([1.0])
    (2.48, inf)
    """
    if len(values) < 2:
        return math.inf
    freedom = len(values) - 1
    # Cornish and Fisher: right to 0.003 from 10 degrees of freedom on
    quantile = T95.get(freedom) or Z95 + (Z95**3 + Z95) / (4 * freedom) + (5 * Z95**5 + 16 * Z95**3 + 3 * Z95) / (
        96 * freedom**2
    )
    return quantile * stdev(values) / math.sqrt(len(values))
