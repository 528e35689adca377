"""The mean of tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedloom.aggregate.shared.merge_terms import SMALL, weighted_sum

COUNT = 7
SHAPES = [(), (0,), (3,), (4, 5), (2, SMALL // COUNT // 2), (1, SMALL // COUNT + 1), (3, SMALL)]
"""On both sides of the size from which tensors are added up one by one."""


def terms(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[float, Tensor]]:
    draws = torch.Generator().manual_seed(3)
    ranks = [torch.randn(shape, generator=draws) * 10.0**k for k in range(-3, COUNT - 3)]
    return [((-0.7) ** k, tensor.to(dtype)) for k, tensor in enumerate(ranks)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mean_is_the_sum_in_float64_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """To one unit in the last place, where a sum in float32 of terms of seven sizes misses by more."""
    pairs = terms(shape, dtype)
    exact = sum((share * tensor.double() for share, tensor in pairs), torch.zeros(shape, dtype=torch.float64))
    given = weighted_sum(pairs)
    assert (given.dtype, given.shape) == (dtype, exact.shape)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(given.double(), exact, rtol=unit, atol=unit * 1e-6 if dtype != torch.float64 else 1e-11)


@pytest.mark.parametrize("size", [4, SMALL])
def test_terms_may_be_strided_and_of_several_dtypes(size: int) -> None:
    one, other = torch.arange(2.0 * size).view(size, 2).T, torch.ones(2, size, dtype=torch.float16)
    given = weighted_sum([(0.5, one), (2.0, other)])
    assert given.equal(0.5 * one + 2.0)
    assert given.dtype == one.dtype


@pytest.mark.parametrize("size", [4, SMALL])
def test_a_mean_of_one_is_a_tensor_of_its_own(size: int) -> None:
    """Nobody writes into an answer, also not by way of a mean of it."""
    one = torch.ones(size, dtype=torch.float64)
    weighted_sum([(1.0, one)]).zero_()
    assert float(one.sum()) == size
