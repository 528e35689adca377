"""Counter-based randomness."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.seeds import derive, keyed_seed, rng, simulated_secret

NAMES = st.lists(st.one_of(st.integers(-5, 5), st.text(alphabet="abc", max_size=3)), min_size=1, max_size=3)


@given(st.integers(), NAMES)
def test_a_seed_has_63_bits_and_is_a_function_of_its_names(seed: int, names: list[int | str]) -> None:
    assert 0 <= derive(seed, *names) < 2**63
    assert derive(seed, *names) == derive(seed, *names)
    assert rng(seed, *names).random() == rng(seed, *names).random()


def test_streams_differ_by_seed_by_name_and_by_place() -> None:
    streams = [
        (s, *names)
        for s in range(5)
        for names in [("a",), ("b",), ("a", 1), ("a", 2), (1, "a"), ("a", 1, 2), ("a", 12)]
    ]
    assert len({derive(*stream) for stream in streams}) == len(streams)


@pytest.mark.parametrize("draw", [derive, lambda seed, *names: keyed_seed(simulated_secret(seed, "c"), *names)])
def test_all_bits_vary(draw: Callable[..., int]) -> None:
    seen = [draw(0, "bits", k) for k in range(500)]
    assert all(150 < sum(seed >> bit & 1 for seed in seen) < 350 for bit in range(63))


def test_the_values_are_the_same_in_every_process_and_for_ever() -> None:
    """A change here changes every published run: it needs a decision, not a new number in this test."""
    assert derive(7, "cohort", 12) == 3082430237246471762
    code = "from fedloom.core.seeds import derive; print(derive(7, 'cohort', 12))"
    for salt in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": salt, "PYTHONPATH": os.pathsep.join(sys.path)}
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert int(out.stdout) == 3082430237246471762


@given(st.binary(max_size=40), NAMES, st.binary(max_size=40), NAMES)
def test_a_keyed_seed_is_a_function_of_secret_and_names_and_no_two_spell_alike(
    secret: bytes, names: list[int | str], other: bytes, others: list[int | str]
) -> None:
    seed = keyed_seed(secret, *names)
    assert 0 <= seed < 2**63
    alike = secret.rstrip(b"\0") == other.rstrip(b"\0") and repr(names) == repr(
        others
    )  # HMAC fills short keys up with zeros
    assert (seed == keyed_seed(other, *others)) == alike


def test_names_are_spelt_so_that_no_separator_can_be_forged() -> None:
    spelt = [("a/b",), ("a", "b"), ('a","b',), ("1",), (1,), ("a", "b", ""), ("", "a", "b"), ("a,b",)]
    assert len({keyed_seed(b"key", *names) for names in spelt}) == len(spelt)


def test_simulated_secrets_differ_by_seed_and_client_and_stay_for_ever() -> None:
    """A change here changes every published run."""
    secrets = {simulated_secret(seed, client) for seed in range(20) for client in ("", "a", "b", "1", "11")}
    assert len(secrets) == 100
    assert {len(one) for one in secrets} == {32}
    assert keyed_seed(simulated_secret(7, "c12"), "task", "", 3, "batches") == 2133197975428340185
