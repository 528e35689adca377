"""Noise of versions that cancels in part with that of earlier ones, where a client is merged at most once in `band` versions.

A run releases running sums A x of its merges x_0, x_1, ... (A: lower triangular ones). Independent noise adds up in them. With a
factorisation A = B C the server releases B (C x + z), z standard normal: the sums are the same, their noise is B z, and what is
protected is C x. C is here the square root of A, a Toeplitz matrix with the coefficients 1, 1/2, 3/8, ..., cut to a band. Noise of a
version is then w = C^-1 z, and what a version tells, beside what earlier ones told, is its row of C x + z, by which it is accounted:
a Gaussian release whose size is what a client has in that row. Rows compose as any Gaussian releases do, in whatever order answers
come; their squares add up to the sensitivity of the whole matrix for the client's own pattern of merges.

A version's noise is drawn from the secret and depends on that of all earlier ones, which is drawn again each time: nothing of it is
kept. Cost: as many draws of the model's size as there are versions.

Source: Denisov et al., arXiv 2202.08312, 2022 (matrix factorisation, adaptive streams); Choquette-Choo et al., arXiv 2306.08153,
2023 (banded, participations at least `band` apart); Kalinin and Lampert, arXiv 2405.13763, 2024 (square root; its sensitivity).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import accumulate

from torch import Tensor


@cache
def band_coefficients(band: int) -> tuple[float, ...]:
    """Return the first column of C: (-1)^j binom(-1/2, j) for j below `band`; positive, and each at most the one before.

    >>> band_coefficients(4)
    (1.0, 0.5, 0.375, 0.3125)
    """
    return tuple(accumulate(range(1, band), lambda before, j: before * (2 * j - 1) / (2 * j), initial=1.0))


@cache
def noise_coefficients(band: int, versions: int) -> tuple[float, ...]:
    """Return the first column of C^-1: the weight of the draws of this version, of the one before, and so on back to the first.

    >>> noise_coefficients(2, 4)
    (1.0, -0.5, 0.25, -0.125)
    """
    column, found = band_coefficients(band), [1.0]
    for version in range(1, versions):
        found.append(-math.fsum(column[j] * found[version - j] for j in range(1, min(band, version + 1))))
    return tuple(found)


def row_sensitivity(band: int, version: int, shares: Mapping[int, float]) -> float:
    """Return how much of a client is in the row of a version, relative to the largest change that one merge takes from it.

    Args:
        band: width of the band.
        version: number of the version, from 0.
        shares: by version, the client's share of that merge over the largest share that a client had there; later versions, and
            those before the band, do not count.
    """
    column = band_coefficients(band)
    return math.fsum(column[version - at] * share for at, share in shares.items() if 0 <= version - at < band)


def pattern_sensitivity(band: int, versions: int, shares: Mapping[int, float]) -> float:
    """Return the sensitivity of the first `versions` rows of C to a client with these shares: exact, whatever its merges are.

    All entries of C are positive, so changes that point the same way are the worst case. Divided by the noise multiplier it is the
    mu of a Gaussian mechanism.
    """
    return math.hypot(*(row_sensitivity(band, version, shares) for version in range(versions)))


def largest_sensitivity(band: int, versions: int, answers: int, apart: int) -> float:
    """Return the largest `pattern_sensitivity` of at most `answers` merges that are at least `apart` versions from each other.

    Merges as early and as close as allowed are the worst case, since the columns of C do not grow (arXiv 2405.13763).
    """
    earliest = range(0, versions, apart)[:answers]
    return pattern_sensitivity(band, versions, dict.fromkeys(earliest, 1.0))


def noise_in_sums(band: int, versions: int) -> float:
    """Return the deviation of the noise in the running sums, root of the mean square over versions, for a multiplier of 1."""
    in_sums = accumulate(noise_coefficients(band, versions))
    squares = accumulate(part * part for part in in_sums)
    return math.sqrt(math.fsum(squares) / versions)


def noise_saved(versions: int, answers: int, apart: int) -> float:
    """Return the noise in the running sums over that of independent noise at equal privacy, for a band as wide as merges are apart.

    >>> round(noise_saved(30, 3, 10), 2)
    0.52
    """
    banded, independent = (
        noise_in_sums(band, versions) * largest_sensitivity(band, versions, answers, apart) for band in (apart, 1)
    )
    return banded / independent


def correlated_normals(draws: Callable[[int], Iterable[Tensor]], band: int, version: int) -> list[Tensor]:
    """Return the noise of a version for a multiplier of 1, tensor by tensor: its row of C^-1 z.

    Args:
        draws: gives the standard normal numbers of a version, the same ones whenever it is asked; of the same shapes for all.
        band: width of the band; with 1 the draws of the version itself are its noise.
        version: number of the version, from 0.
    """
    weights, found = noise_coefficients(band, version + 1), list(draws(version))
    for at in range(version):
        if weight := weights[version - at]:
            found = [tensor.add(draw, alpha=weight) for tensor, draw in zip(found, draws(at), strict=True)]
    return found
