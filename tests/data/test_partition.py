"""Partitions: every example at exactly one client, in the promised sizes, the same for the same seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.core.seeds import simulated_secret
from fedloom.core.text import without_surrogates
from fedloom.data.examples import Examples, Turn
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
        texts=tuple("word " * (i % 3) + str(i) for i in range(size)),
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


def sides(
    parts: dict[str, tuple[int, ...]], examples: Examples, share: float = 0.2, seed: int = 0
) -> tuple[Shard, ...]:
    """As a simulation of this seed divides them."""
    return hold_out(parts, examples, share, partial(simulated_secret, seed))


@tries(100)
@given(partitions(), st.integers(96, 200), st.floats(0.0, 0.99), st.floats(0.0, 0.99), st.integers(0, 99))
def test_every_client_trains_and_a_larger_share_holds_out_what_a_smaller_does(
    how: Partition, size: int, share: float, other: float, seed: int
) -> None:
    examples = toy(size, clients=5)
    parts = how.split(examples, seed)
    less, more = (sides(parts, examples, one, seed) for one in sorted((share, other)))
    for small, large in zip(less, more, strict=True):
        assert small.train
        assert large.train
        assert {*small.held_out} <= {*large.held_out}
        assert sorted(large.train + large.held_out) == sorted(parts[large.client])


def said(examples: Examples, indices: tuple[int, ...]) -> set[tuple[str, str]]:
    assert examples.pairs is not None
    return {(examples.texts[i], examples.pairs[i]) for i in indices}


WORDS = st.text(alphabet='ab/"', max_size=3)


@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=30),
    st.lists(st.tuples(WORDS, WORDS), max_size=30),
    st.data(),
)
def test_new_examples_move_none_and_equal_ones_are_on_one_side(
    old: list[tuple[str, str]], new: list[tuple[str, str]], data: st.DataObject
) -> None:
    """Wherever the new ones are put, and whatever the labels are."""
    both = data.draw(st.permutations([*old, *new]))
    before, after = (
        Examples(*zip(*rows, strict=True), tuple(k % 3 for k in range(len(rows))), ("x", "y", "z"), None)  # type: ignore[arg-type]
        for rows in (old, both)
    )
    (first,), (then,) = (sides({"c": tuple(range(len(one.texts)))}, one, 0.4) for one in (before, after))
    assert said(after, then.train).isdisjoint(said(after, then.held_out))
    assert said(before, first.held_out) <= said(after, then.held_out)
    # those that stayed only because all fell below the share may move
    moved = said(before, first.train) & said(after, then.held_out)
    assert not moved or len(said(before, first.train)) == 1


def test_every_part_of_an_example_but_its_label_decides_its_side() -> None:
    rows = [str(k) for k in range(200)]
    same = ("",) * 200

    def held(
        texts: Any = same, pairs: Any = None, answers: Any = None, before: Any = None, seed: int = 0
    ) -> tuple[int, ...]:
        examples = Examples(tuple(texts), pairs, (0,) * 200, ("",), None, answers=answers, before=before)
        return sides({"c": tuple(range(200))}, examples, 0.3, seed)[0].held_out

    found = [
        held(rows), held(pairs=tuple(rows)), held(answers=tuple(rows)), held(before=tuple((Turn("user", row),) for row in rows)),
        held(rows, seed=1), held([*rows[100:], *rows[:100]]),
    ]  # fmt: skip
    assert all(30 < len(one) < 90 for one in found), "about 60, wherever it is that they differ"
    assert not held(), "all are equal, and they are not all held out"
    assert found[0] != found[4]
    assert {rows[(i + 100) % 200] for i in found[5]} == {rows[i] for i in found[0]}, "the order of the rows is nothing"
    halves = tuple(f"{row} \ud83d" for row in rows)
    assert held(halves) == held(tuple(map(without_surrogates, halves))), "as a site reads them"


def test_the_share_is_held_out_on_average() -> None:
    counts = [len(sides({"c": tuple(range(50))}, toy(50), 0.2, seed)[0].held_out) for seed in range(200)]
    assert abs(sum(counts) / 200 - 10) < 0.8  # four standard errors
    assert min(counts) < 7
    assert max(counts) > 13


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
        return partition_statistics(examples, sides(how.split(examples, 0), examples))

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
        "from fedloom.core.seeds import simulated_secret;"
        "e = Examples(tuple(map(str, range(60))), None, tuple(i % 3 for i in range(60)), ('x', 'y', 'z'), ('p', 'q') * 30);"
        "hows = IID(4), LabelDirichlet(4), Shards(4), QuantityDirichlet(4), ByClient();"
        "print([hold_out(how.split(e, 5), e, 0.3, lambda client: simulated_secret(5, client)) for how in hows])"
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
        lambda: sides({"c00": (0, 1)}, toy(10), share=1.0),
        lambda: sides({"c00": (0, 99)}, toy(10)),
        lambda: sides({"c00": ()}, toy(10)),
    ],
)
def test_impossible_partitions_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(Refused):
        make()


def test_a_client_that_holds_none_out_trains_on_all_without_being_scored_and_is_counted() -> None:
    shards = sides({"c00": tuple(range(40)), "c01": (40,)}, toy(41), 0.99)
    assert len(shards[0].held_out) > 30
    assert (shards[1].train, shards[1].held_out) == ((40,), ()), "at any share: one example is trained on"
    assert partition_notes(toy(41), shards, 0.2) == [
        "1 of 2 clients have too few examples to hold any out: they train on all of them and are not evaluated."
    ]
    assert partition_notes(toy(41), shards, 0.0) == []
    with pytest.raises(Refused, match=r"partition\.client = 2: this client has no example") as refused:
        sides({"c00": (0, 1), "SECRET": ()}, toy(10))
    assert "SECRET" not in str(refused.value)


def test_clients_below_the_smallest_size_are_left_out_and_counted() -> None:
    examples = replace(toy(9), clients=("a", "b", "b", "c", "c", "c", "d", "d", "d"))
    shards = sides(ByClient(smallest=3).split(examples, 0), examples)
    assert [shard.client for shard in shards] == ["c", "d"]
    assert partition_notes(examples, shards, 0.0) == [
        "3 of 9 training examples belong to no client and are not used, those of 2 clients with too few examples "
        "(partition.smallest)."
    ]
    assert ByClient().split(examples, 0) == ByClient(1).split(examples, 0)
    with pytest.raises(Refused, match=r"partition\.smallest = 4: no client has so many examples; the largest has 3"):
        ByClient(smallest=4).split(examples, 0)
    with pytest.raises(Refused, match=r"partition\.smallest"):
        ByClient(smallest=0)
    with pytest.raises(Refused, match=r"'ward': the column of clients belongs to the data"):
        ByClient("ward")  # type: ignore[arg-type]


@tries(100)
@given(partitions(), st.integers(96, 200), st.integers(0, 99))
def test_nobody_vanishes_without_a_note(how: Partition, size: int, seed: int) -> None:
    examples = toy(size, clients=5)
    for one in (how, ClientDirichlet(3, size=20), ByClient(size // 5 + 1) if size % 5 else how):
        shards = sides(one.split(examples, seed), examples, 0.2, seed)
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
    assert [(shard.train, shard.held_out) for shard in sides(parts, toy(10), 0.0)] == [((0, 1, 2), ()), ((3,), ())]
