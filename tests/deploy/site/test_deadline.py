"""A request that takes too long ends the worker, whatever holds it, is refused by the next one, and is never begun again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom.aggregate.fedit import FedIT
from fedloom.deploy.messages.messages import JoinRequest, Refusal, TaskRequest, Welcome, decode_reply, encode_request
from fedloom.deploy.site.deadline import TRACE, UNDER_WAY, Deadline
from fedloom.deploy.site.request_record import request_digest
from fedloom.deploy.site.settings import Site, read_site
from fedloom.deploy.site.worker import SiteWorker
from tests.support.sites import simulated_worker, site_at, task_of, terms_of, trainer_of

HELD = {  # what holds a process, of which none lets another thread of Python run, or a signal of Python in
    "re": "import re; re.match('(([a-z]+)[._0-9]?)+Z', 'a' * 40)",
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(600)",
}


def work_for(worker: SiteWorker, request: JoinRequest | TaskRequest) -> object:
    tasks = {request.task.id: request.task} if isinstance(request, TaskRequest) else {}
    return decode_reply(worker.answer(encode_request(request)), 10**8, tasks)


def leave_overdue(site: Site, request: JoinRequest | TaskRequest) -> None:
    """What a worker leaves that was ended by a request: its note, and where it was."""
    seen = list[bytes]()

    def ended() -> float:
        seen.append((site.folder / UNDER_WAY).read_bytes())
        raise SystemExit

    with pytest.raises(SystemExit):
        simulated_worker(site, hour=ended).answer(encode_request(request))
    (site.folder / UNDER_WAY).write_bytes(seen[0])
    (site.folder / TRACE).write_text("Stack (most recent call first):\n  File x, line 1 in train\n")


@pytest.mark.slow
@pytest.mark.parametrize("held", HELD, ids=str)
def test_the_process_ends_whatever_holds_it(tmp_path: Path, held: str) -> None:
    code = f"""
from pathlib import Path
from fedloom.deploy.site.deadline import Deadline
with Deadline(Path({str(tmp_path)!r}), 0.5).watch({{"request": "r1"}}):
    print("begun", flush=True)
    {HELD[held].replace("; ", chr(10) + "    ")}
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == b"begun\n"
        began = time.monotonic()
        assert process.wait(timeout=60) == -signal.SIGALRM
    assert time.monotonic() - began < 10
    deadline = Deadline(tmp_path, 0.5)
    assert deadline.overdue() == {"request": "r1"}
    assert "in <module>" in (tmp_path / TRACE).read_text(), "the log says where"
    deadline.forget()
    assert deadline.overdue() is None


def test_a_request_in_time_leaves_nothing_and_no_alarm(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Deadline(tmp_path, 0.05).watch({"request": "r1"}):
        raise KeyError
    with Deadline(tmp_path, 30.0).watch({"request": "r2"}):
        assert json.loads((tmp_path / UNDER_WAY).read_text()) == {"request": "r2"}
    time.sleep(0.1)  # the alarm of the first would have rung
    assert not [*tmp_path.iterdir()]


def test_a_worker_that_was_killed_by_something_else_begins_again(tmp_path: Path) -> None:
    """The note is there and the trace is empty: that is also how a trace of an earlier request does not count for this one."""
    (tmp_path / UNDER_WAY).write_text('{"request": "r1"}')
    assert Deadline(tmp_path, 1.0).overdue() is None
    (tmp_path / TRACE).touch()
    assert Deadline(tmp_path, 1.0).overdue() is None
    for damaged in (b"", b"{", b"[]", b"\xff"):
        (tmp_path / UNDER_WAY).write_bytes(damaged)
        (tmp_path / TRACE).write_text("Stack")
        assert Deadline(tmp_path, 1.0).overdue() is None


def test_what_took_too_long_is_refused_and_never_begun_again(encoder: Path, tmp_path: Path) -> None:
    site, terms = site_at(tmp_path, encoder), terms_of()
    asked = TaskRequest(terms, 1, task_of(FedIT(), trainer_of(encoder, terms), None, 1), 0)
    leave_overdue(site, asked)
    for incarnation in (1, 2):  # of the server; the worker starts again each time
        worker = simulated_worker(site)
        reply = work_for(worker, replace(asked, incarnation=incarnation))
        assert isinstance(reply, Refusal)
        assert "limits.seconds" in reply.reason
        assert (reply.task, reply.lasting) == (1, False), "a smaller task may do"
        assert worker.prepared is None
        assert not (site.folder / UNDER_WAY).exists()
    lines = [json.loads(line) for line in (site.folder / "record.jsonl").read_text().splitlines()]
    (overdue,) = (line for line in lines if "seconds" in line)
    assert (overdue["kind"], overdue["request"], overdue["seconds"]) == (
        "refused",
        request_digest(asked),
        site.limits.seconds,
    )
    assert isinstance(work_for(worker, replace(asked, last_accepted=9)), tuple), "another task is done"


def test_an_owner_who_allows_more_time_has_it_tried_again(encoder: Path, tmp_path: Path) -> None:
    site = site_at(tmp_path, encoder, more="[limits]\nseconds = 60\n")
    asked = JoinRequest(terms_of(), 1)
    leave_overdue(site, asked)
    refusal = work_for(simulated_worker(site), asked)
    assert isinstance(refusal, Refusal)
    assert refusal.lasting, "the run as a whole"
    file = tmp_path / "site.toml"
    file.write_text(file.read_text().replace("seconds = 60", "seconds = 120"))
    assert isinstance(work_for(simulated_worker(read_site(file)), asked), Welcome)


@pytest.mark.slow
def test_a_kill_is_no_deadline(encoder: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from fedloom.deploy.site.deadline import Deadline
with Deadline(Path({str(tmp_path)!r}), 60.0).watch({{"request": "r1"}}):
    print("begun", flush=True)
    while True: pass
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == b"begun\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / UNDER_WAY).exists()
    assert Deadline(tmp_path, 60.0).overdue() is None
