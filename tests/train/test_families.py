"""The law over the model families: facts of one of each kind in fast tests, all of it in slow ones, all families in storms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tests.support.families import FAMILIES
from tests.support.family_law import Case, Finding, cases_of, has_class, measure

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
"""What PEFT and transformers say where a user of theirs loads what was exported."""

ONE_OF_EACH_KIND = (
    "DeBERTa-v3",
    "Llama",
    "Gemma 2",
    "Qwen3-MoE",
    "Mamba 2",
    "Qwen3.5, linear alone",
    "T5",
    "Gemma 3, vision",
)
CHEAP = ("depth", "depth gradients", "common pass", "merge")

REFUSED = {
    ("ALBERT", "labels", "depth"): "no list of blocks, each passed once",
    ("ALBERT", "labels", "depth gradients"): "no list of blocks, each passed once",
    ("ALBERT", "labels", "kept activations"): "no list of blocks, each passed once",
    ("T5", "answers", "loads"): "encoder-decoder",
    ("BART", "answers", "loads"): "encoder-decoder",
}
"""All that is refused and that transformers has a class for, by family, use and fact, with what the reason says."""


def faults(findings: Sequence[Finding]) -> list[str]:
    """A line for each fact that does not hold, or that is refused without being known to be."""
    lines = []
    for one in findings:
        known = REFUSED.get((one.case.family.name, "answers" if one.case.writes else "labels", one.fact))
        if not has_class(one.case):
            known = "transformers has no"
        if not one.holds or (known or "") not in one.refused or bool(one.refused) != bool(known):
            lines.append(f"{one.case}: {one.fact}: gap {one.gap:.2g} {one.refused}{one.failed}")
    return lines


def test_there_is_one_family_of_each_kind() -> None:
    assert {FAMILIES[name].kind for name in ONE_OF_EACH_KIND} == {family.kind for family in FAMILIES.values()}
    assert len(FAMILIES) >= 40
    assert len({family for family, _, _ in REFUSED}) <= 4


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_one_family_of_each_kind(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    case = Case(family, family.kind not in ("encoder", "encoder-decoder"), None)
    findings, _ = measure(case, tmp_path, CHEAP)
    assert not faults(findings)


def law_holds(cases: Iterable[Case], folder: Path) -> bool:
    """Whether all facts of the cases hold."""
    findings = list[Finding]()
    for number, case in enumerate(cases):
        place = folder / str(number)
        place.mkdir()
        findings += measure(case, place)[0]
    assert not faults(findings)
    return bool(findings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_the_law_holds_for_one_family_of_each_kind(tmp_path: Path, name: str) -> None:
    """Labels with the default layers, answers with all linear ones; encoders, which write nothing, labels with both."""
    family = FAMILIES[name]
    crossed = (
        case for case in cases_of(family) if family.kind == "encoder" or case.writes == (case.targets is not None)
    )
    assert law_holds(crossed, tmp_path)


@pytest.mark.slow
@pytest.mark.storms
@pytest.mark.parametrize("name", FAMILIES)
def test_the_law_holds_for_every_family(tmp_path: Path, name: str) -> None:
    assert law_holds(cases_of(FAMILIES[name]), tmp_path)
