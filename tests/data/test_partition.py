"""Partitions: every example at exactly one client, in the promised sizes, the same for the same seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples
from fedloom.data.partition import (
    IID,
    ByClient,
    ClientDirichlet,
    LabelDirichlet,
    Partition,
    QuantityDirichlet,
    Shard,
    Shards,
    hold_out,
    partition_notes,
    partition_statistics,
)
from tests.support.storms import tries


def toy(size: int, labels: int = 4, clients: int | None = None) -> Examples:
    return Examples(
        texts=tuple("word " * (1 + i % 3) for i in range(size)),
        pairs=None,
        labels=tuple(i * 7 % labels for i in range(size)),
        names=tuple(f"name {i}" for i in range(labels)),
        clients=None if clients is None else tuple(f"site {i % clients}" for i in range(size)),
    )


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    clients, alpha = draw(st.integers(1, 12)), draw(st.floats(1e-3, 1e3))
    kinds: tuple[Partition, ...] = (
        IID(clients),
        LabelDirichlet(clients, alpha, draw(st.integers(1, 8))),
        Shards(clients, draw(st.integers(1, 3))),
        QuantityDirichlet(clients, alpha, draw(st.integers(1, 8))),
        ByClient(),
    )
    return draw(st.sampled_from(kinds))


@tries(100)
@given(partitions(), st.integers(96, 300), st.integers(1, 6), st.integers(0, 2**40))
def test_every_example_goes_to_exactly_one_client(how: Partition, size: int, labels: int, seed: int) -> None:
    examples = toy(size, labels, clients=5)
    parts = how.split(examples, seed)
    assert sorted(index for part in parts.values() for index in part) == list(range(size))
    assert list(parts) == sorted(parts)
    assert parts == how.split(examples, seed)
    if not isinstance(how, ByClient):
        assert len(parts) == how.clients  # type: ignore[attr-defined]
    if isinstance(how, LabelDirichlet | QuantityDirichlet):
        assert min(map(len, parts.values())) >= how.smallest


@tries(100)
@given(partitions(), st.integers(96, 200), st.floats(0.01, 0.99), st.integers(0, 99))
def test_every_client_trains_and_holds_out(how: Partition, size: int, share: float, seed: int) -> None:
    examples = toy(size, clients=5)
    parts = {client: part for client, part in how.split(examples, seed).items() if len(part) > 1}
    for shard in hold_out(parts, examples, share, seed):
        assert shard.train
        assert shard.held_out
        assert tuple(sorted(shard.train + shard.held_out)) == parts[shard.client]


def test_client_names_sort_by_number() -> None:
    assert list(IID(3).split(toy(9), 0)) == ["c00", "c01", "c02"]
    assert list(IID(101).split(toy(101), 0))[::50] == ["c000", "c050", "c100"]


def test_iid_is_even_and_shards_hold_few_labels() -> None:
    assert {len(part) for part in IID(7).split(toy(100), 0).values()} == {14, 15}
    examples = toy(400, labels=10)
    held = [{examples.labels[i] for i in part} for part in Shards(20, 2).split(examples, 0).values()]
    assert max(map(len, held)) <= 2


def test_alpha_sets_how_uneven_the_clients_are() -> None:
    examples = toy(2000)

    def uneven(how: Partition) -> dict[str, float]:
        return partition_statistics(examples, hold_out(how.split(examples, 0), examples))

    skewed, mild = uneven(LabelDirichlet(10, 0.05)), uneven(LabelDirichlet(10, 100.0))
    assert skewed["label_js"] > 0.3 > 0.02 > mild["label_js"]
    assert uneven(QuantityDirichlet(10, 0.3))["size_cv"] > 0.5 > uneven(QuantityDirichlet(10, 100.0))["size_cv"]
    assert uneven(IID(10))["size_cv"] == 0


def test_extreme_skew_is_repaired_to_the_smallest_size() -> None:
    for how in (LabelDirichlet(10, 1e-3, 10), QuantityDirichlet(10, 1e-3, 10)):
        assert [len(part) for part in how.split(toy(100), 0).values()] == [10] * 10


def test_seeds_differ_and_hash_seeds_do_not() -> None:
    code = (
        "from fedloom.data.partition import *; from fedloom.data.examples import Examples;"
        "e = Examples(('a b',) * 60, None, tuple(i % 3 for i in range(60)), ('x', 'y', 'z'), ('p', 'q') * 30);"
        "hows = IID(4), LabelDirichlet(4), Shards(4), QuantityDirichlet(4), ByClient();"
        "print([hold_out(how.split(e, 5), e, 0.3, 5) for how in hows])"
    )
    source = str(Path(__file__).parents[2] / "src")
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": source},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert IID(4).split(toy(60), 0) != IID(4).split(toy(60), 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: IID(0),
        lambda: LabelDirichlet(alpha=0),
        lambda: LabelDirichlet(alpha=float("nan")),
        lambda: LabelDirichlet(smallest=0),
        lambda: QuantityDirichlet(alpha=float("inf")),
        lambda: QuantityDirichlet(clients=-1),
        lambda: Shards(per_client=0),
        lambda: IID(11).split(toy(10), 0),
        lambda: Shards(4, 3).split(toy(10), 0),
        lambda: LabelDirichlet(3, smallest=4).split(toy(10), 0),
        lambda: QuantityDirichlet(3, smallest=4).split(toy(10), 0),
        lambda: ByClient().split(toy(10), 0),
        lambda: ByClient().split(Examples(("a", "b"), None, (0, 1), ("x", "y"), ("site", " ")), 0),
        lambda: hold_out({"c00": (0, 1)}, toy(10), share=1.0),
        lambda: hold_out({"c00": (0, 99)}, toy(10)),
        lambda: hold_out({"c00": ()}, toy(10)),
    ],
)
def test_impossible_partitions_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(Refused):
        make()


def test_a_client_with_one_example_trains_on_it_without_being_scored_and_is_counted() -> None:
    shards = hold_out({"c00": (0, 1), "c01": (2,)}, toy(3))
    assert [(len(shard.train), len(shard.held_out)) for shard in shards] == [(1, 1), (1, 0)]
    assert partition_notes(toy(3), shards, 0.2) == [
        "1 of 2 clients have a single example: they train on it and are not scored."
    ]
    assert partition_notes(toy(3), shards, 0.0) == []
    with pytest.raises(Refused, match=r"partition\.client = 2: this client has no example") as refused:
        hold_out({"c00": (0, 1), "SECRET": ()}, toy(10))
    assert "SECRET" not in str(refused.value)


def test_clients_below_the_smallest_size_are_left_out_and_counted() -> None:
    examples = replace(toy(9), clients=("a", "b", "b", "c", "c", "c", "d", "d", "d"))
    shards = hold_out(ByClient(smallest=3).split(examples, 0), examples)
    assert [shard.client for shard in shards] == ["c", "d"]
    assert partition_notes(examples, shards, 0.2) == [
        "3 of 9 training examples are at no client and are not used, those of 2 clients with too few examples "
        "(partition.smallest)."
    ]
    assert ByClient().split(examples, 0) == ByClient(1).split(examples, 0)
    with pytest.raises(Refused, match=r"partition\.smallest = 4: no client has so many examples; the largest has 3"):
        ByClient(smallest=4).split(examples, 0)
    with pytest.raises(Refused, match=r"partition\.smallest"):
        ByClient(smallest=0)


@tries(100)
@given(partitions(), st.integers(96, 200), st.integers(0, 99))
def test_nobody_vanishes_without_a_note(how: Partition, size: int, seed: int) -> None:
    examples = toy(size, clients=5)
    for one in (how, ClientDirichlet(3, size=20), ByClient(size // 5 + 1) if size % 5 else how):
        shards = hold_out(one.split(examples, seed), examples, 0.2, seed)
        used = sum(len(shard.train) + len(shard.held_out) for shard in shards)
        assert any(note.startswith(f"{size - used} of {size}") for note in partition_notes(examples, shards, 0.2)) == (
            used < size
        )


def test_statistics_by_hand() -> None:
    examples = Examples(("one", "two words", "a", "a b c"), None, (0, 0, 1, 1), ("no", "yes"), None)
    stats = partition_statistics(examples, (Shard("left", (0,), (1,)), Shard("right", (2,), (3,))))
    assert stats["clients"]["left"] == {"examples": 1, "held_out": 1, "labels": [2, 0], "mean_words": 1.5}
    assert stats["label_names"] == ["no", "yes"]
    assert stats["label_js"] == pytest.approx(0.3113, abs=1e-4)  # H(3/4, 1/4) - 1/2
    assert stats["size_cv"] == 0
    assert json.loads(json.dumps(stats)) == stats


def test_nothing_is_set_aside_where_no_client_is_to_be_scored() -> None:
    parts = {"c00": (0, 1, 2), "c01": (3,)}
    assert [(shard.train, shard.held_out) for shard in hold_out(parts, toy(10), 0.0)] == [((0, 1, 2), ()), ((3,), ())]
