"""The made-up office tasks: seeded, of different kinds and lengths, and answered from their texts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples, Split
from fedloom.data.office_tasks import OfficeTasks, office_kinds


@pytest.fixture(scope="module")
def split() -> Split:
    return OfficeTasks(per_client=100).load(0)


def by_kind(examples: Examples, column: str) -> dict[str, list[str]]:
    rows = zip(examples.labels, getattr(examples, column), strict=True)
    found: dict[str, list[str]] = {name: [] for name in examples.names}
    for label, text in rows:
        found[examples.names[label]].append(text)
    return found


def test_sizes_clients_and_kinds(split: Split) -> None:
    kinds = [*office_kinds()]
    assert split.train.names == split.test.names == tuple(kinds)
    assert Counter(split.train.clients) == dict.fromkeys(kinds, 100)
    assert Counter(split.test.labels) == dict.fromkeys(range(6), 10)


def test_every_word_is_filled_in_and_no_test_text_is_trained_on(split: Split) -> None:
    for part in (split.train, split.test):
        assert part.pairs is not None
        assert part.answers is not None
        for text in (*part.texts, *part.pairs):
            assert not re.search(r"[{}]|\s\s|^\s|\s$", text), text
        assert all(answer == answer.strip() != "" for answer in part.answers)
    assert split.train.pairs is not None
    assert set(split.train.pairs).isdisjoint(split.test.pairs or ())


def test_kinds_differ_in_length_and_one_kind_is_varied(split: Split) -> None:
    for column, ratio in (("pairs", 2.0), ("answers", 4.0)):
        lengths = [mean(map(len, texts)) for texts in by_kind(split.train, column).values()]
        assert max(lengths) > ratio * min(lengths), column
    assert all(len(set(texts)) >= 98 for texts in by_kind(split.train, "pairs").values())
    assert all(len(set(texts)) >= 50 for texts in by_kind(split.train, "answers").values())


def test_the_registry_files_in_json_what_the_text_says(split: Split) -> None:
    texts, answers = (by_kind(split.train, column)["registry"] for column in ("pairs", "answers"))
    for text, answer in zip(texts, answers, strict=True):
        entry = json.loads(answer)
        assert all(entry[key] in text for key in ("claimant", "town", "defendant"))
        assert entry["filed"] < entry["hearing"]


def test_the_seed_decides_and_the_hash_seed_does_not() -> None:
    small = OfficeTasks(clients=3, per_client=4, test=6)
    assert small.load(1) == small.load(1) != small.load(2)
    code = (
        "from fedloom.data.office_tasks import OfficeTasks; print(OfficeTasks(clients=3, per_client=4, test=6).load(1))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    again = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert again.stdout.strip() == str(small.load(1))


def test_more_offices_than_kinds_are_numbered_and_fewer_are_tested_on_their_kinds_alone() -> None:
    many, few = (OfficeTasks(clients=count, per_client=1, test=8).load(0) for count in (8, 2))
    assert many.train.clients is not None
    assert many.train.clients[-3:] == ("newsroom", "clinic-2", "shop-2")
    assert {*few.test.labels} == {0, 1}


@pytest.mark.parametrize("bad", [{"clients": 0}, {"per_client": 0}, {"test": -1}])
def test_settings_out_of_range_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(Refused, match=f"data.{next(iter(bad))}"):
        OfficeTasks(**bad)
