"""The bench of privacy says what it could not measure, and its parts measure what they say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from bench.privacy import __main__ as bench
from bench.privacy import kills, noise, robust
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.privacy.accounting import Gaussian
from fedloom.privacy.ledger import LEDGER, Ledger, LedgerEntry
from tests.support import toys

# The frame -------------------------------------------------------------------------------------------------------------


def fails(quick: bool) -> Mapping[str, object]:
    raise ArithmeticError("it does not work")


def test_a_part_that_fails_is_shown_and_takes_no_other_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    measured, failed = bench.measure({"broken": fails, "whole": lambda quick: {"noise_left": 1.0}}, quick=True)
    assert (measured, failed) == ({"noise_left": 1.0}, ["broken"])
    assert "it does not work" in capsys.readouterr().out


def test_each_figure_of_the_last_line_is_explained_and_stands_once() -> None:
    keys = [key for _, part in bench.PARTS.values() for key in part]
    assert len(keys) == len(set(keys)) == 12
    assert all(f"`{key}`" in str(bench.__doc__) for key in keys)


# noise -----------------------------------------------------------------------------------------------------------------


def test_every_number_that_a_folder_tells_is_tried_as_the_secret(tmp_path: Path) -> None:
    secret = hashlib.sha256(b"written by mistake").digest()
    (tmp_path / "manifest.json").write_text(json.dumps({"commitment": secret.hex()}), encoding="utf-8")
    tried = set(noise.secrets_in(tmp_path))
    assert {secret, hashlib.sha256(secret).digest(), b""} <= tried
    assert noise.SECRET not in tried


def test_what_is_left_is_the_root_of_the_mean_square() -> None:
    assert noise.left(noise.flat({"b": torch.tensor([4.0]), "a": torch.tensor([[0.0, 3.0], [0.0, 0.0]])})) == 5**0.5


# kills -----------------------------------------------------------------------------------------------------------------


def test_a_release_that_a_ledger_lacks_or_counts_too_low_is_seen(tmp_path: Path) -> None:
    with Ledger.opened(tmp_path / LEDGER) as ledger:
        ledger.write(LedgerEntry({"value": "one"}, {"c0": Gaussian(1.0), "c1": Gaussian(0.5)}))
    step = [{"type": "Release", "value": "one", "spent": {"c0": 1.0, "c1": 0.6}}]
    inside = {"type": "InsideEdge", "command": {"type": "Release", "value": "two", "spent": {"c2": 1.0}}}
    lines = [json.dumps({"commands": step}), json.dumps({"commands": [inside]}), '{"commands": [{"type": "Rel']
    (tmp_path / "trace.jsonl").write_text("\n".join(lines), encoding="utf-8")
    seen = kills.released(tmp_path)
    assert seen == {"one": {"c0": 1.0, "c1": 0.6}, "two": {"c2": 1.0}}
    assert [row.rpartition(": ")[2] for row in kills.uncounted(seen, tmp_path)] == ["c1 in one", "c2 in two"]


# robust ----------------------------------------------------------------------------------------------------------------


def test_each_lie_is_what_its_name_says() -> None:
    """The first four clients lie, of mixed ranks; the others answer as they trained."""
    draw, method = torch.Generator().manual_seed(0), ProductDelta()
    model = method.init(toys.adapter(8, layers={"out": (robust.CLASSES, robust.WIDTH)}))
    tasks = [toys.sent(method, model, robust.RANKS[k % 3], k + 1) for k in range(robust.CLIENTS)]
    sent = [toys.products(task.start.train)["out"] for task in tasks]
    answers = [(f.down, 1.1 * f.up) for f in (toys.changed(task.start, task.id).factors["out"] for task in tasks)]
    honest = [up.double() @ down.double() - begun for (down, up), begun in zip(answers, sent, strict=True)]
    for attack in ("sign", "sign x3", "noise", "little", "inner", "median", "sleeper"):
        given = robust.lied(tasks, answers, attack, draw)
        assert all(one is other for one, other in zip(given[4:], answers[4:], strict=True))
        for k in range(4):
            assert given[k][0].shape == answers[k][0].shape
        changed = given[2][1].double() @ given[2][0].double() - sent[2]  # rank 8, which is not cut
        cosine = float((changed * honest[2]).sum() / changed.norm() / honest[2].norm())
        assert (cosine < -0.999) is (attack in ("sign", "sign x3", "median", "sleeper"))
        assert not torch.equal(changed, honest[2])
    assert robust.lied(tasks, answers, "labels", draw) == answers
