"""The made-up tickets: seeded, varied, different by client, and not solved by counting words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from fedloom.core.errors import Refused
from fedloom.core.seeds import simulated_secret
from fedloom.data.examples import Examples, Split
from fedloom.data.partition import ByClient, hold_out, partition_statistics
from fedloom.data.tickets import INTENTS, Tickets, phrases


@pytest.fixture(scope="module")
def split() -> Split:
    return Tickets().load(0)


def test_sizes_clients_and_labels(split: Split) -> None:
    assert (len(split.train), len(split.test)) == (2400, 480)
    assert split.train.names == split.test.names == INTENTS
    assert Counter(split.train.clients) == dict.fromkeys(phrases().trades, 300)
    assert Counter(split.test.clients) == dict.fromkeys(phrases().trades, 60)
    assert Counter(split.test.labels) == dict.fromkeys(range(6), 80)


def test_tickets_are_varied_short_and_whole(split: Split) -> None:
    texts = split.train.texts + split.test.texts
    assert len(set(texts)) > 0.98 * len(texts)
    assert set(split.train.texts).isdisjoint(split.test.texts)
    words = [len(text.split()) for text in texts]
    assert 15 < sum(words) / len(words) < 30
    assert max(words) <= 60
    assert not any(re.search(r"[{}]|\s\s|^\s|\s$", text) for text in texts)


def test_clients_differ_in_labels_and_words(split: Split) -> None:
    shards = hold_out(ByClient().split(split.train, 0), split.train, 0.2, partial(simulated_secret, 0))
    stats = partition_statistics(split.train, shards)
    assert stats["label_js"] > 0.05
    words = [client["mean_words"] for client in stats["clients"].values()]
    assert max(words) > 1.3 * min(words)


def test_the_seed_decides_and_the_hash_seed_does_not() -> None:
    small = Tickets(clients=3, per_client=5, test=6)
    assert small.load(1) == small.load(1) != small.load(2)
    code = "from fedloom.data.tickets import Tickets; print(Tickets(clients=3, per_client=5, test=6).load(1))"
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    again = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert again.stdout.strip() == str(small.load(1))


def test_more_clients_than_trades_are_numbered() -> None:
    train = Tickets(clients=10, per_client=2, test=1).load(0).train
    assert train.clients is not None
    assert train.clients[-4:] == ("bank-2", "bank-2", "clinic-2", "clinic-2")


def test_without_noise_no_word_is_mistyped() -> None:
    clean, noisy = (set(_words(" ".join(Tickets(noise=noise).load(0).train.texts))) for noise in (0.0, 0.3))
    assert "yours" in clean
    assert len(noisy) > 1.5 * len(clean)


@pytest.mark.parametrize(
    "bad", [{"clients": 0}, {"per_client": 0}, {"test": -1}, {"alpha": 0.0}, {"tangled": 1.5}, {"noise": -0.1}]
)
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(Refused, match=f"data.{next(iter(bad))}"):
        Tickets(**bad)  # type: ignore[arg-type]


def test_counting_words_is_neither_useless_nor_enough(split: Split) -> None:
    """A linear classifier over words beats chance (1/6) by far and stays far below a fine-tuned encoder (about 0.9)."""
    counts = Counter(word for text in split.train.texts for word in _words(text))
    vocabulary = {word: i for i, word in enumerate(sorted(word for word, count in counts.items() if count > 4))}
    train, test = (_counts(part, vocabulary) for part in (split.train, split.test))
    wanted = torch.nn.functional.one_hot(torch.tensor(split.train.labels)).float()
    weights = torch.linalg.solve(
        train.T @ train + 10 * torch.eye(len(vocabulary)), train.T @ wanted
    )  # ridge regression
    accuracy = (test @ weights).argmax(1).eq(torch.tensor(split.test.labels)).float().mean().item()
    assert 0.4 < accuracy < 0.75


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _counts(examples: Examples, vocabulary: dict[str, int]) -> torch.Tensor:
    counts = torch.zeros(len(examples), len(vocabulary))
    for row, text in enumerate(examples.texts):
        for word in set(_words(text)) & vocabulary.keys():
            counts[row, vocabulary[word]] = 1.0
    return counts
