"""Every decomposition method against a float64 dense reference, on ordinary and on degenerate factors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.core import truncated_svd
from fedloom.core.truncated_svd import Triple
from tests.support.degenerate import CASES, Case, size
from tests.support.storms import one_in, tries


def krylov(up: Tensor, down: Tensor, rank: int) -> Triple:
    """Krylov as `svd` uses it: with its fallback."""
    return truncated_svd.krylov([up, down], rank) or truncated_svd.gram(up, down, rank)


def warm(up: Tensor, down: Tensor, rank: int) -> Triple:
    """Krylov started from the Gram matrices of the factors, as a merge uses it."""
    near, _ = truncated_svd.grams(up, down)
    return truncated_svd.krylov([up, down], rank, near) or truncated_svd.gram(up, down, rank)


def formed(up: Tensor, down: Tensor, rank: int) -> Triple:
    """Krylov on the product itself, as a sum wider than its layer uses it."""
    q = min(rank, up.shape[1])
    return truncated_svd.krylov([up @ down], q) or truncated_svd.dense_gram(up @ down, q)


METHODS: dict[str, Callable[[Tensor, Tensor, int], Triple]] = {
    "svd": truncated_svd.svd,
    "dense": lambda up, down, rank: truncated_svd.dense(up @ down, min(rank, up.shape[1])),
    "householder": truncated_svd.householder,
    "krylov": krylov,
    "warm": warm,
    "formed": formed,
    "svd_dense": lambda up, down, rank: truncated_svd.svd_dense(up @ down, min(rank, up.shape[1])),
    "gram": truncated_svd.gram,
    "dense_gram": lambda up, down, rank: truncated_svd.dense_gram(up @ down, min(rank, up.shape[1])),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def factors(d_out: int, d_in: int, stacked: int, seed: int = 0, decay: float = 0.5) -> tuple[Tensor, Tensor]:
    """Random factors whose product has a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.arange(1, stacked + 1) ** -decay
    up = torch.randn(d_out, stacked, generator=generator) / d_out**0.5
    return up * sizes, torch.randn(stacked, d_in, generator=generator) / d_in**0.5


def check(up: Tensor, down: Tensor, rank: int, triple: Triple) -> None:
    """Right shapes, orthonormal, sorted, and as near to the product as the best, up to what float32 can show."""
    left, values, right = (part.double() for part in triple)
    q = min(rank, *up.shape, down.shape[1])
    assert (left.shape, values.shape, right.shape) == ((up.shape[0], q), (q,), (q, down.shape[1]))
    eye = torch.eye(q, dtype=torch.float64)
    torch.testing.assert_close(left.T @ left, eye, rtol=0, atol=2e-6)
    torch.testing.assert_close(right @ right.T, eye, rtol=0, atol=2e-6)
    assert bool((values >= 0).all())
    assert bool((values.diff() <= 0).all())
    product = up.double() @ down.double()
    exact = torch.linalg.svdvals(product)
    rounding = 2e-6 * size(up, down)
    torch.testing.assert_close(values, exact[:q], rtol=0, atol=rounding)
    error, best = (product - (left * values) @ right).norm(), exact[q:].norm()
    assert error <= ((best * (1 + 1e-6)) ** 2 + rounding**2) ** 0.5


@every_method
@pytest.mark.parametrize(
    ("d_out", "d_in", "stacked", "rank"),
    [(300, 280, 40, 8), (40, 300, 60, 8), (300, 40, 30, 64), (290, 310, 200, 16), (270, 300, 320, 8), (5, 3, 9, 4)],
)
def test_is_the_best_approximation(
    method: Callable[[Tensor, Tensor, int], Triple], d_out: int, d_in: int, stacked: int, rank: int
) -> None:
    up, down = factors(d_out, d_in, stacked)
    check(up, down, rank, method(up, down, rank))


@every_method
@pytest.mark.parametrize("case", one_in(3, CASES), ids=[case.name for case in CASES])
def test_degenerate_factors(method: Callable[[Tensor, Tensor, int], Triple], case: Case) -> None:
    up, down, rank = case.build()
    check(up, down, rank, method(up, down, rank))


@every_method
def test_exact_gap(method: Callable[[Tensor, Tensor, int], Triple]) -> None:
    """Where the truncation error is far above rounding, the gap to the optimum is under 1e-6."""
    up, down = factors(400, 380, 300, decay=0.2)
    left, values, right = (part.double() for part in method(up, down, 16))
    product = up.double() @ down.double()
    best = torch.linalg.svdvals(product)[16:].norm()
    assert float((product - (left * values) @ right).norm() / best - 1) <= 1e-6


def test_krylov_sees_a_tail_far_below_the_top() -> None:
    """A flat floor at 1e-3 of the top: the last directions carry 1e-7 of the energy, yet must be the right ones."""
    up, down = factors(400, 400, 300, decay=0)
    up[:, :4] *= 1000
    triple = truncated_svd.krylov([up, down], 16)
    assert triple is not None
    left, values, right = (part.double() for part in triple)
    product = up.double() @ down.double()
    best = torch.linalg.svdvals(product)[16:].norm()
    assert float((product - (left * values) @ right).norm() / best - 1) <= 1e-6


def test_krylov_corrects_a_poor_first_probe() -> None:
    """Two directions met by two random ones: the first basis is bad when those are nearly parallel."""
    for seed in range(40):
        up, down = factors(10, 10, 2, seed)
        triple = truncated_svd.krylov([up, down], 2)
        assert triple is not None
        check(up, down, 2, triple)


def test_gram_matrices_save_blocks() -> None:
    """A block is two products from either side: with a start from the Gram matrices fewer are asked for."""
    up, down = factors(600, 600, 500)
    near, _ = truncated_svd.grams(up, down)
    assert truncated_svd.krylov([up, down], 32, blocks=5) is None
    assert truncated_svd.krylov([up, down], 32, near, blocks=4) is not None


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_energy_of_a_product(case: Case) -> None:
    up, down, _ = case.build()
    _, energy = truncated_svd.grams(up, down)
    assert energy == pytest.approx(float((up.double() @ down.double()).square().sum()), abs=1e-6 * size(up, down) ** 2)


@pytest.mark.parametrize("by", [1e-30, 1e15])
def test_energy_beyond_the_range_of_float32(by: float) -> None:
    up, down = factors(300, 280, 200)
    exact = float((up.double() @ down.double()).square().sum())
    assert truncated_svd.grams(up * by, down * by)[1] / by / by / by / by == pytest.approx(exact, rel=1e-6)


def test_krylov_says_when_it_did_not_converge() -> None:
    up, down = factors(300, 300, 300, decay=0)
    assert truncated_svd.krylov([up, down], 64, blocks=2) is None


@every_method
@pytest.mark.parametrize("by", [1e-14, 1e14])
def test_scale_does_not_matter(method: Callable[[Tensor, Tensor, int], Triple], by: float) -> None:
    up, down = factors(300, 300, 100)
    left, values, right = method(up * by, down * by, 8)
    check(up, down, 8, (left, (values.double() / by**2).float(), right))


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 40), st.integers(1, 30), st.integers(0, 5))
@tries(60)
def test_any_shape(d_out: int, d_in: int, stacked: int, rank: int, zeros: int) -> None:
    up, down = factors(d_out, d_in, stacked, seed=zeros)
    up[:, :zeros] = 0
    for method in METHODS.values():
        check(up, down, rank, method(up, down, rank))


@pytest.mark.parametrize("stacked", [100, 320])
def test_float64_stays_float64(stacked: int) -> None:
    up, down = (part.double() for part in factors(300, 300, stacked))
    left, values, right = truncated_svd.svd(up, down, 300)
    assert left.dtype == values.dtype == right.dtype == torch.float64
    torch.testing.assert_close((left * values) @ right, up @ down, rtol=0, atol=1e-13)


def test_half_precision_is_raised_to_float32() -> None:
    up, down = (part.bfloat16() for part in factors(40, 30, 8))
    check(up, down, 4, truncated_svd.svd(up, down, 4))


@pytest.mark.parametrize(("stacked", "rank"), [(0, 4), (4, 0)])
def test_no_directions(stacked: int, rank: int) -> None:
    left, values, right = truncated_svd.svd(torch.ones(6, stacked), torch.ones(stacked, 5), rank)
    assert (left.shape, values.shape, right.shape) == ((6, 0), (0,), (0, 5))


@every_method
def test_repeats_and_leaves_the_global_generator_alone(method: Callable[[Tensor, Tensor, int], Triple]) -> None:
    up, down = factors(300, 280, 100)
    state = torch.get_rng_state()
    first, second = method(up, down, 8), method(up, down, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_a_large_layer_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thin factors of a 20000 x 20000 layer: the dense product would be 1.6 GB and take minutes."""
    for name in ("dense", "dense_gram"):
        monkeypatch.delattr(truncated_svd, name)
    up, down = factors(20000, 20000, 24)
    assert truncated_svd.svd(up, down, 8)[1].shape == (8,)
