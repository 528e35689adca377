"""`fedloom audit`: what it audits, where it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.audit import run_audit
from fedloom.audit.findings import AuditReport, Finding
from fedloom.cli.audit import audit_command
from fedloom.core.errors import Refused
from fedloom.runs import run_file

FOUND = Finding("server", "labels", "share guessed", 1.0, 0.2, 0.9, 1.0, "20 answers")
REPORT = AuditReport("run", True, 2, 3, [FOUND])


def test_a_folder_gets_its_page_and_a_run_file_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = list[object]()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_audit, "audit_folder", lambda *given: asked.append(given) or REPORT)
    monkeypatch.setattr(run_audit, "audit_plan", lambda *given: asked.append(given) or REPORT)
    monkeypatch.setattr(run_file, "load_run_file", lambda path: f"run of {path}")
    (tmp_path / "mine").mkdir()
    audit_command(Path("mine"))
    audit_command(Path("mine"), file=Path("file.py"), page=Path("there.html"))
    audit_command(Path("file.py"))
    assert asked == [(Path("mine"), None), (Path("mine"), "run of file.py"), ("run of file.py",)]
    assert sorted(path.as_posix() for path in Path().rglob("*.*")) == [
        "audit.html",
        "audit.json",
        "mine/audit.html",
        "mine/audit.json",
        "there.html",
        "there.json",
    ]
    said = " ".join(capsys.readouterr().out.split())
    assert "The curious server, labels: 1.00 (by chance 0.20), clearly" in said


def test_a_run_file_beside_a_run_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="belongs to a run folder"):
        audit_command(tmp_path / "one.py", file=tmp_path / "two.py")
    with pytest.raises(Refused, match="there is no such file"):
        audit_command(tmp_path / "none.py")
