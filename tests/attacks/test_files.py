"""Run folders and state folders of others: whatever lies in them, no other file changes, no command hangs or shows a traceback."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from fedloom.core import files
from fedloom.core.errors import Refused
from fedloom.deploy.flower.app_outcome import read_outcome
from fedloom.deploy.flower.superlink import SuperLink
from fedloom.deploy.flower.supervisor import LogFollower, Supervisor, hold_folder, last_text, write_secret
from fedloom.deploy.server.config import DeploymentConfig
from fedloom.deploy.server.status import read_status
from fedloom.runs import resume
from fedloom.runs.checkpoint import read_checkpoint
from tests.attacks.files import (
    KINDS,
    ODD,
    bent,
    call,
    contents,
    harm_by_place,
    in_order,
    journal_forgets,
    leaves,
    names_in,
    open_to_others,
    put,
    runs_at,
    seal,
    text_of,
    time_limit,
)
from tests.support.storms import STORMS

WORST = [
    *(
        (name, "link", "resume")
        for name in ("trace.jsonl", "metrics.jsonl", "updates", "adapter", "checkpoint.safetensors")
    ),
    *((name, "pipe", "resume") for name in ("trace.jsonl", "manifest.json", "updates/1.safetensors")),
    *((name, "device", "report") for name in ("trace.jsonl", "metrics.jsonl", "manifest.json")),
    *(
        (name, "link", "more")
        for name in ("adapter/README.md", "adapter/base/config.json", "adapter/adapter_config.json")
    ),
    ("trace.jsonl", "second name", "resume"),
    ("trace.jsonl", "device", "replay"),
    ("adapter/config.json", "pipe", "start"),
]
"""A file, what lies in its place, and the command that opens it."""


@pytest.fixture(scope="module")
def runs(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file, a run that was interrupted, and a finished one, with all files that a run can have."""
    return runs_at(tmp_path_factory.mktemp("others"), encoder)


def command(name: str, runs: Path, folder: Path) -> list[object]:
    """The command of this name on a folder."""
    new = folder.with_name("new")
    shutil.rmtree(new, ignore_errors=True)
    return {
        "resume": ["run", runs / "run.py", "--resume", folder, "--no-report"],
        "more": ["run", runs / "run.py", "--resume", folder, "--more", 1, "--no-report"],
        "report": ["report", folder],
        "replay": ["replay", folder],
        "export": ["export", folder, "--rank", 2, "--out", new],
        "start": [
            "run",
            runs / "run.py",
            "--set",
            f"start={folder}",
            "--set",
            "limits.versions=1",
            "--out",
            new,
            "--no-report",
        ],
    }[name]


def copied(runs: Path, name: str, tmp_path: Path) -> Path:
    """A copy of the run folder that a command of this name is for."""
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(runs / ("interrupted" if name == "resume" else "finished"), folder, symlinks=True)


@pytest.mark.slow
def test_nothing_in_the_place_of_a_file_does_harm(runs: Path, tmp_path: Path) -> None:
    commands, dice = ("resume", "more", "report", "replay", "export", "start"), random.Random(0)
    every = [(name, kind, one) for name in names_in(runs / "finished") for kind in KINDS for one in commands]
    for name, kind, one in [*WORST, *dice.sample(every, 10 if STORMS == 1 else 300)]:
        folder = copied(runs, one, tmp_path)
        harm = harm_by_place(kind, name, folder, command(one, runs, folder), tmp_path / "victims")
        assert not harm


@pytest.mark.slow
def test_a_run_goes_on_from_a_forged_checkpoint_or_says_why_not(runs: Path, tmp_path: Path) -> None:
    stored, dice = read_checkpoint(runs / "interrupted" / resume.CHECKPOINT), random.Random(0)
    text = text_of(stored)
    places = [*leaves(text)]
    for _ in range(8 * STORMS):
        folder = copied(runs, "resume", tmp_path)
        forged = bent(text, dice.choice(places), dice.choice(ODD), dice.random() < 0.2)
        seal(folder / resume.CHECKPOINT, json.dumps(forged), stored.numbers)
        code, said = call(*command("resume", runs, folder))
        assert in_order(code, said), said


@pytest.mark.slow
def test_forged_metrics_traces_and_manifests_are_a_sentence(runs: Path, tmp_path: Path) -> None:
    dice = random.Random(0)
    for number in range(8 * STORMS):
        name, one = (
            ("trace.jsonl", "replay"),
            ("metrics.jsonl", "report"),
            ("manifest.json", "replay"),
            ("manifest.json", "report"),
        )[number % 4]
        folder = copied(runs, one, tmp_path)
        lines = (folder / name).read_text().splitlines() if name != "manifest.json" else [(folder / name).read_text()]
        at = dice.randrange(len(lines))
        value = json.loads(lines[at])
        lines[at] = json.dumps(bent(value, dice.choice([*leaves(value)]), dice.choice(ODD), dice.random() < 0.2))
        (folder / name).write_text("\n".join(lines) + "\n")
        code, said = call(*command(one, runs, folder))
        assert in_order(code, said), said


def _hold(folder: Path) -> None:
    with hold_folder(folder / "flower" / "lock", folder):
        pass


SERVER_FILES: list[tuple[str, Callable[[Path], object]]] = [
    ("deployment.json", DeploymentConfig.from_folder),
    ("status.json", read_status),
    ("flower/attempt-1.json", lambda folder: read_outcome(folder, 1)),
    ("flower/lock", _hold),
    ("flower/secret", lambda folder: write_secret(folder / "flower" / "secret")),
    ("flower/config.toml", lambda folder: SuperLink(folder / "flower", 1, None).prepare("app")),
    ("flower/app/pyproject.toml", lambda folder: SuperLink(folder / "flower", 1, None).prepare("app")),
    ("logs/superlink.log", lambda folder: LogFollower(folder / "logs" / "superlink.log").lines()),
    ("logs/superlink.log", lambda folder: last_text(folder / "logs" / "superlink.log")),
    ("logs/gate.log", lambda folder: Supervisor([], folder / "logs", print).look()),
]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_the_folder_of_a_server_does_harm(tmp_path: Path, kind: str) -> None:
    victims = tmp_path / "victims"
    victims.mkdir()
    (victims / "file").write_text("precious")
    before = contents(victims)
    for name, use in SERVER_FILES:
        folder = tmp_path / "server"
        shutil.rmtree(folder, ignore_errors=True)
        put(kind, folder / name, victims / "file")
        with time_limit(20), suppress(Refused):
            use(folder)
        assert contents(victims) == before, name


def test_a_journal_remembers_what_it_has_just_given_out_whatever_the_clock_says(tmp_path: Path) -> None:
    assert not journal_forgets(tmp_path / "back")
    assert not journal_forgets(tmp_path / "on", -3600.0)


def test_a_journal_is_open_to_nobody_else_whatever_the_umask(tmp_path: Path) -> None:
    assert open_to_others(tmp_path) == []


def test_a_link_in_a_run_folder_is_not_entered_when_drafts_are_removed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.draft").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "updates").symlink_to(tmp_path / "elsewhere")
    (run / "a.draft").mkdir()
    (run / "b.draft").symlink_to(tmp_path / "elsewhere" / "mine.draft")
    with resume.locked(run):
        pass
    assert (tmp_path / "elsewhere" / "mine.draft").read_text() == "precious"
    assert not (run / "b.draft").is_symlink()
    assert files.read_regular(run / "trace.jsonl") == b""
