"""Correlated noise: its sensitivity is that of the matrix and never below, and in running sums it is as small as promised."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fedloom.privacy.correlated_noise import (
    band_coefficients,
    correlated_normals,
    largest_sensitivity,
    noise_coefficients,
    noise_in_sums,
    noise_saved,
    pattern_sensitivity,
    row_sensitivity,
)


def matrix(column: tuple[float, ...], versions: int) -> Tensor:
    """The lower triangular Toeplitz matrix of a first column, entry by entry."""
    found = torch.zeros(versions, versions, dtype=torch.float64)
    for row, at in itertools.product(range(versions), repeat=2):
        if 0 <= row - at < len(column):
            found[row, at] = column[row - at]
    return found


def test_the_full_square_root_is_the_square_root_of_the_running_sum() -> None:
    root = matrix(band_coefficients(12), 12)
    torch.testing.assert_close(root @ root, torch.ones(12, 12, dtype=torch.float64).tril(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("band", [1, 2, 5, 20])
def test_the_noise_coefficients_are_the_inverse_of_the_band(band: int) -> None:
    column = band_coefficients(band)
    assert all(0 < after <= before for before, after in itertools.pairwise(column))
    product = matrix(column, 20) @ matrix(noise_coefficients(band, 20), 20)
    torch.testing.assert_close(product, torch.eye(20, dtype=torch.float64), atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("versions", "answers", "apart", "ratio"),
    [(30, 3, 10, 0.52), (100, 10, 10, 0.43), (300, 10, 30, 0.28), (1000, 10, 100, 0.17), (30, 15, 2, 0.77)],
)
def test_known_values_of_the_noise_saved(versions: int, answers: int, apart: int, ratio: float) -> None:
    """Measured once with dense matrices and their inverses, before this was written."""
    assert round(noise_saved(versions, answers, apart), 2) == ratio


def test_noise_in_sums_is_that_of_dense_matrices() -> None:
    ones = torch.ones(25, 25, dtype=torch.float64).tril()
    dense = (ones @ torch.linalg.inv(matrix(band_coefficients(6), 25))).square().sum().sqrt() / 5
    assert noise_in_sums(6, 25) == pytest.approx(float(dense), rel=1e-12)
    assert noise_in_sums(1, 25) == pytest.approx(math.sqrt(13), rel=1e-12)


def test_the_sensitivity_of_a_pattern_is_that_of_the_matrix_and_no_changes_of_these_sizes_exceed_it() -> None:
    """Non-contiguous patterns, columns that overlap, shares below one, columns that the end of the run cuts."""
    draw = torch.Generator().manual_seed(0)
    for band, shares in ((4, {0: 1.0, 1: 0.5, 7: 1.0, 11: 0.25}), (9, {2: 1.0, 11: 1.0}), (3, {5: 0.7}), (3, {})):
        root = matrix(band_coefficients(band), 12)
        exact = pattern_sensitivity(band, 12, shares)
        sizes = torch.zeros(12, dtype=torch.float64)
        for at, share in shares.items():
            sizes[at] = share
        assert exact == pytest.approx(float(torch.linalg.vector_norm(root @ sizes)), rel=1e-12, abs=1e-15)
        for _ in range(50):
            changes = (
                torch.nn.functional.normalize(torch.randn(12, 3, generator=draw, dtype=torch.float64)) * sizes[:, None]
            )
            assert float(torch.linalg.matrix_norm(root @ changes)) <= exact + 1e-12


def test_the_largest_sensitivity_is_that_of_the_worst_pattern() -> None:
    """Among all patterns of up to so many merges, at least so far apart; also bands that are wider or narrower than that."""
    versions = 9
    for band, answers, apart in itertools.product((1, 3, 5), (1, 2, 4), (1, 2, 3)):
        patterns = (
            pattern
            for count in range(answers + 1)
            for pattern in itertools.combinations(range(versions), count)
            if all(after - before >= apart for before, after in itertools.pairwise(pattern))
        )
        worst = max(pattern_sensitivity(band, versions, dict.fromkeys(pattern, 1.0)) for pattern in patterns)
        assert largest_sensitivity(band, versions, answers, apart) == pytest.approx(worst, rel=1e-12)


def test_rows_add_up_to_the_pattern_and_a_band_of_one_is_independent_noise() -> None:
    shares = {0: 1.0, 4: 1.0, 9: 0.5}
    rows = [row_sensitivity(4, version, shares) for version in range(10)]
    assert math.hypot(*rows) == pytest.approx(pattern_sensitivity(4, 10, shares), rel=1e-12)
    assert rows[4] == 1.0  # what is out of the band does not count any more
    assert largest_sensitivity(1, 100, 10, 10) == pytest.approx(math.sqrt(10), rel=1e-12)


def draws(version: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(version)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((300,), (20, 35))]


def test_the_noise_of_a_version_is_its_row_of_the_inverse_times_all_draws() -> None:
    inverse = torch.linalg.inv(matrix(band_coefficients(3), 8))
    for version in range(8):
        for place, found in enumerate(correlated_normals(draws, 3, version)):
            wanted = sum(inverse[version, at] * draws(at)[place] for at in range(version + 1))
            torch.testing.assert_close(found, wanted, atol=1e-13, rtol=0)
    assert all(one.equal(own) for one, own in zip(correlated_normals(draws, 1, 5), draws(5), strict=True))


def test_the_noise_in_running_sums_is_as_large_as_computed() -> None:
    """Of 1,000 numbers over 20 versions: the root mean square is known to 1 %."""
    noise = [torch.cat([part.flatten() for part in correlated_normals(draws, 5, version)]) for version in range(20)]
    measured = torch.stack(noise).cumsum(0).square().mean().sqrt()
    assert float(measured) == pytest.approx(noise_in_sums(5, 20), rel=0.03)
