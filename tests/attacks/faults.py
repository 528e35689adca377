"""What breaks, or is broken on purpose, at a site: clocks, kills, a full disk, lost and altered files of its state folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric import ec

from fedloom.deploy.site import answer_journal
from fedloom.deploy.site.answer_journal import RUNS, AnswerJournal
from fedloom.deploy.site.request_record import BrokenRecord, RecordChain, RecordEntry, RequestCounts, RequestRecord
from fedloom.deploy.site.site_secret import begin_new_split, read_secret
from fedloom.runs import resume
from tests.attacks.attack import Attack, succeeds
from tests.attacks.files import journal_forgets, open_to_others

NOON = datetime(2030, 5, 5, 12, tzinfo=UTC)


# Clocks --------------------------------------------------------------------------------------------------------------


def clock_set_back(folder: Path, lifted: bool) -> bool:
    """An answer is forgotten as soon as it is given. Lifted: runs are forgotten by the times of their folders, as they once were."""

    def forget_oldest(self: AnswerJournal, run: str) -> None:
        runs = sorted((one for one in self.folder.iterdir() if one.is_dir()), key=lambda one: -one.stat().st_mtime)
        for old in runs[RUNS:]:
            shutil.rmtree(old)

    kept = AnswerJournal._forget_runs
    with patch.object(AnswerJournal, "_forget_runs", forget_oldest if lifted else kept):
        return journal_forgets(folder)


def second_day(folder: Path, lifted: bool) -> bool:
    """A clock that is set back opens a second quota of the day. Lifted: each line opens the day that it names."""

    def turn(self: RequestCounts, time: str) -> None:
        if time[:10] != self.day:
            self.day, self.tasks, self.sent, self.lines = time[:10], 0, 0, 0

    now = [NOON]
    with patch.object(RequestCounts, "turn_to", turn if lifted else RequestCounts.turn_to):
        record = RequestRecord(folder / "record.jsonl", None, lambda: now[0])
        record.append(RecordEntry("task asked", run_hash="r", terms="t", task=1, request="q"))
        now[0] -= timedelta(days=1)
        return record.usage(RecordEntry("task asked", run_hash="r", terms="t", task=2, request="p")).tasks_today == 0


# Files of the state folder -------------------------------------------------------------------------------------------


def altered_record(folder: Path, lifted: bool) -> bool:
    """Somebody who can write the file writes the record anew, without what was asked. Lifted: the site has no key."""
    key, public = ec.generate_private_key(ec.SECP384R1()), list[ec.EllipticCurvePublicKey]()
    if not lifted:
        public = [key.public_key()]
    record = RequestRecord(folder / "record.jsonl", None if lifted else key)
    record.append(RecordEntry("task asked", run_hash="r", terms="t", task=1, request="q"))
    forged = folder / "forged.jsonl"
    other = RequestRecord(forged, None if lifted else ec.generate_private_key(ec.SECP384R1()))
    other.append(RecordEntry("started"))
    forged.replace(folder / "record.jsonl")
    lines = RecordChain(public).lines(folder / "record.jsonl")
    return succeeds(lambda: [*lines], "signature does not fit", BrokenRecord)


def removed_line(folder: Path, lifted: bool) -> bool:
    """A line is taken out of the record, so that its task counts for nothing. Lifted: it is the last one (docs/site.md says so)."""
    path = folder / "record.jsonl"
    record = RequestRecord(path)
    for number in range(3):
        record.append(RecordEntry("task asked", run_hash="r", terms="t", task=number + 1, request=str(number)))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] if lifted else [lines[0], lines[2]]))
    return succeeds(lambda: RequestRecord(path), "were removed")


def exchanged_secret(folder: Path, lifted: bool) -> bool:
    """Another secret, so that rows held out so far are trained on. Lifted: the owner begins a new split."""
    before = read_secret(folder)
    if lifted:
        begin_new_split(folder)
    else:
        (folder / "secret").write_text("0" * 64)
    return succeeds(lambda: read_secret(folder), "not the one that was here") and read_secret(folder) != before


def readable_by_others(folder: Path, lifted: bool) -> bool:
    """Another user of the machine reads what a site has learnt. Lifted: folders are made as the umask has it."""
    made = (lambda path: os.makedirs(path, exist_ok=True)) if lifted else answer_journal.private_folder  # type: ignore[attr-defined]
    with patch.object(answer_journal, "private_folder", made):
        return bool(open_to_others(folder))


def second_process(folder: Path, lifted: bool) -> bool:
    """Two processes write one run folder. Lifted: no lock is taken."""
    with patch.object(resume, "lock", (lambda file: True) if lifted else resume.lock), resume.locked(folder):  # type: ignore[attr-defined]
        return succeeds(lambda: resume.locked(folder).__enter__(), "process")


# Kills, a full disk, work without end --------------------------------------------------------------------------------

WRITE = """
import os, resource, signal, sys
from contextlib import nullcontext
from pathlib import Path
from fedloom.core.files import atomic_write
path, how, lifted = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
with nullcontext(path) if lifted else atomic_write(path) as place, open(place, "w", buffering=1) as file:
    for _ in range(10):
        file.write("nine signs" + chr(10))
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
"""


def half_written(folder: Path, lifted: bool, how: str) -> bool:
    """A file is half written. Lifted: it is written in its place."""
    path = folder / "state.json"
    path.write_text("whole")
    done = subprocess.run([sys.executable, "-c", WRITE, str(path), how, str(lifted)], capture_output=True, check=False)
    assert done.returncode != 0, "it was cut off"
    if how == "full" and not lifted:
        assert [one.name for one in folder.iterdir()] == ["state.json"], "nothing is left behind"
    return path.read_text() != "whole"


def killed_while_writing(folder: Path, lifted: bool) -> bool:
    """A process is killed in the middle of a file."""
    return half_written(folder, lifted, "killed")


def full_disk(folder: Path, lifted: bool) -> bool:
    """No room is left in the middle of a file."""
    return half_written(folder, lifted, "full")


HANG = """
import re, sys
from pathlib import Path
from fedloom.deploy.site.deadline import Deadline
with Deadline(Path(sys.argv[1]), float(sys.argv[2])).watch({"kind": "refused", "request": "q"}):
    re.fullmatch(r"(([a-z]+)[._0-9]?)+Z", "base_model.model.bert.encoder.layer.attention.self.query")
"""


def work_without_end(folder: Path, lifted: bool) -> bool:
    """Something holds the interpreter for ever. Lifted: the owner allows a day for each task."""
    command = [sys.executable, "-c", HANG, str(folder), "86400" if lifted else "1"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(15 if not lifted else 8)
        except subprocess.TimeoutExpired:
            process.kill()
            return True
    assert "fullmatch" in (folder / "too-long.txt").read_text()
    assert json.loads((folder / "under-way.json").read_text())["request"] == "q", "it is known, and is not begun again"
    return False


def _attacks() -> Iterator[Attack]:
    yield Attack("a clock set back makes the journal forget", clock_set_back, in_gate=True)
    yield Attack("a clock set back opens a second quota", second_day)
    yield Attack("the record is written anew", altered_record)
    yield Attack("a line is taken out of the record", removed_line)
    yield Attack("the secret of a site is exchanged", exchanged_secret)
    yield Attack("another user reads a site's state", readable_by_others)
    yield Attack("two processes write one run folder", second_process)
    yield Attack("a kill leaves half a file", killed_while_writing, processes=True, in_gate=True)
    yield Attack("a full disk leaves half a file", full_disk, processes=True)
    yield Attack("work without end holds a worker", work_without_end, processes=True)


ATTACKS = tuple(_attacks())
