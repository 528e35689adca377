"""The page of an audit: what it says in words, for whom, and beside which chance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedloom.audit.audit_page import audit_page, audit_sentence, write_audit
from fedloom.audit.epsilon_estimate import EpsilonEstimate
from fedloom.audit.findings import AuditReport, Finding, NoiseCheck, Unmeasured
from fedloom.core.errors import Refused

AREA = "area under the ROC curve"
SHOWN = EpsilonEstimate(1e-5, 256, 1.0, 4.0, 3.5, 4.5, 3.0, 1.2)


def finding(value: float, low: float, adversary: str = "server", attack: str = "membership") -> Finding:
    return Finding(adversary, attack, AREA, value, 0.5, low, 1.0, "40 rows")  # type: ignore[arg-type]


def report(*outcomes: Finding | Unmeasured, noise: NoiseCheck | None = None) -> AuditReport:
    epsilon = noise and noise.accounted
    return AuditReport("run", True, 6, 3, outcomes, epsilon, 1e-5, "client" if noise else "", noise)


def test_a_verdict_is_the_way_from_chance_to_certainty_and_nothing_where_chance_is_in_the_interval() -> None:
    verdicts = [finding(*both).verdict for both in ((0.9, 0.8), (0.7, 0.6), (0.55, 0.51), (0.9, 0.5), (0.2, 0.1))]
    assert verdicts == ["clearly", "partly", "slightly", "nothing measurable", "nothing measurable"]


def test_the_sentence_names_the_worst_of_each_adversary_and_what_is_not_known() -> None:
    said = audit_sentence(report(finding(0.6, 0.55), finding(0.95, 0.9, attack="words"), finding(0.5, 0.4, "reader")))
    assert "The curious server can tell words of a client's texts (clearly)." in said
    assert "A reader of the published model learnt nothing measurable." in said
    assert "What another member can tell was not measured." in said
    assert "the run adds no noise" in said


def test_noise_that_is_too_small_is_a_warning_at_the_top() -> None:
    sound = NoiseCheck("client", 3, 4.2, SHOWN, 0.99, 500)
    assert sound.sound
    assert audit_page(report(noise=sound)).warnings == []
    for faulty in (NoiseCheck("client", 3, 2.0, SHOWN, 0.99, 500), NoiseCheck("client", 3, 4.2, SHOWN, 0.7, 500)):
        assert not faulty.sound
        (warning,) = audit_page(report(noise=faulty)).warnings
        assert "The noise is less than what was accounted" in warning


def test_page_and_figures_lie_side_by_side_and_load_nothing(tmp_path: Path) -> None:
    sound = NoiseCheck("client", 3, 4.2, SHOWN, 0.99, 500)
    found = report(finding(0.9, 0.8), Unmeasured("reader", "labels", "a reason"), noise=sound)
    page, data = write_audit(found, tmp_path / "new" / "audit.html")
    text = page.read_text(encoding="utf-8")
    for words in ("0.90", "0.80 to 1.00", "a reason", "What this page does not say", "4.20", "prefers-color-scheme"):
        assert words in text
    assert "<script" not in text
    assert "http" not in text
    figures = json.loads(data.read_text(encoding="utf-8"))
    assert figures["noise"]["sound"] is True
    assert [one["verdict"] for one in figures["outcomes"]] == ["clearly", "not measured"]
    with pytest.raises(Refused, match="name the page"):
        write_audit(found, tmp_path / "audit.json")
