"""The experiment with contexts: what its texts are, and what it compares."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from cllora_llm import (
    ANSWERS,
    BANDS,
    CELLS,
    TEST,
    TRAIN,
    TUNING,
    OneDraw,
    claims,
    compared_with,
    passages,
)
from text_pools import DATA

from fedloom import Corrupted, Instructions

needs_data = pytest.mark.skipif(not (DATA / "dolly").is_dir(), reason="the data of the experiments are not here")


def size(row: Any) -> int:
    return sum(len(row[part].split()) for part in ("instruction", "context", "response"))


@needs_data
@pytest.mark.slow
def test_no_context_is_in_two_parts_and_all_lengths_are_in_each() -> None:
    pool = passages()
    contexts = [row["context"] for part in pool for row in part]
    assert len(set(contexts)) == len(contexts) == len(BANDS) * (TRAIN + TEST + TUNING)
    for part, rows in zip(pool, (TRAIN, TEST, TUNING), strict=True):
        found = Counter(next(band for band in BANDS if band[0] <= size(row) < band[1]) for row in part)
        assert found == dict.fromkeys(BANDS, rows)
        assert all(ANSWERS[0] <= len(row["response"].split()) <= ANSWERS[1] for row in part)


def test_a_damaged_text_is_the_same_at_every_seed() -> None:
    rows = [{"instruction": f"{k} a b. c d. e f.", "answer": str(k)} for k in range(20)]
    source = Corrupted(Instructions(rows), share=0.5)
    assert source.load(1) != source.load(2)
    assert OneDraw(source).load(1) == OneDraw(source).load(2) == source.load(0)


def test_every_cell_but_the_controls_is_compared_with_another_one() -> None:
    controls = {name for name in CELLS if compared_with(name) is None}
    assert controls == {"iid", "damaged"}
    assert {compared_with(name) for name in CELLS if name not in controls} <= CELLS.keys()
    assert compared_with("length/0.1/stratified") == "length/0.1"
    assert compared_with("quality/0.1") == "damaged"


def test_effects_are_differences_of_the_same_seed() -> None:
    def line(cell: str, seed: int, loss: float) -> dict[str, Any]:
        version = {"version": 4, "loss": loss, "bin_losses": [loss - 1, loss + 1], "local_loss": loss + 2}
        return {"cell": cell, "seed": seed, "rounds": [version | {"version": 0, "loss": 9.0}, version]}

    cells = {"iid": 1.0, "length/0.1": 1.5, "length/0.1/stratified": 1.25, "damaged": 2.0, "quality/0.1": 2.25}
    found = [line(cell, seed, loss + seed) for seed in (0, 1) for cell, loss in cells.items()] + [line("iid", 2, 1.0)]
    effects = {claim.name: claim.values for claim in claims(found)}
    assert effects["cllora-length-global"] == effects["cllora-length-local"] == (0.5, 0.5)
    assert effects["cllora-quality-global"] == effects["cllora-quality-local"] == (0.25, 0.25)
    assert effects["cllora-remedy"] == (-0.25, -0.25)
