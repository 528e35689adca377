"""Every attack fails at the default limits, and succeeds where what stops it is lifted: else the test would be blind.

`make redteam` tries all; `make test` those that stand for their kind (`Attack.in_gate`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedloom.core.types import Result, TaskStart
from fedloom.deploy.messages.messages import EvaluateResult, Welcome
from tests.attacks.attack import Attack
from tests.attacks.every_attack import ATTACKS
from tests.attacks.site_stage import STEPS, stage_at

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="many addresses of loopback, /proc")]


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(attack, id=f"{kind}: {attack.name}", marks=[] if attack.in_gate else [pytest.mark.redteam])
        for kind, attacks in ATTACKS.items()
        for attack in attacks
    ],
)
def test_it_fails_unless_the_limit_is_lifted(attack: Attack, tmp_path: Path) -> None:
    for place in ("kept", "lifted"):
        (tmp_path / place).mkdir()
    assert not attack.run(tmp_path / "kept", False)
    assert attack.run(tmp_path / "lifted", True)


def test_every_attack_has_a_name_of_its_own() -> None:
    names = [attack.name for attacks in ATTACKS.values() for attack in attacks]
    assert len(names) == len(set(names))
    assert len(names) >= 40


def test_an_honest_run_is_within_the_default_limits(tmp_path: Path) -> None:
    stage = stage_at(tmp_path, lifted=False)
    terms = stage.terms()
    start = TaskStart(stage.first(terms), "x")
    assert isinstance(stage.join(terms), Welcome)
    assert isinstance(stage.task(terms, start, STEPS), Result)
    assert isinstance(stage.evaluate(terms, start.train), EvaluateResult)
