"""`fedloom worker` as a process: kill -9 at any moment costs time and nothing else. Real processes; no port is used."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom.aggregate.fedit import FedIT
from fedloom.core.codec import DeltaInt8
from fedloom.core.errors import Refused
from fedloom.core.types import Budget, Result
from fedloom.deploy.flower.executor import ask_until_answered
from fedloom.deploy.messages.messages import JoinRequest, Refusal, TaskRequest, decode_reply, encode_request
from fedloom.deploy.site import worker_socket
from fedloom.deploy.site.consent import terms_hash
from fedloom.deploy.site.settings import Site
from fedloom.deploy.site.worker import SiteWorker, serve_worker
from tests.support.sites import accept, accepting, site_at, task_of, terms_of, trainer_of
from tests.support.tiny_runs import same

pytestmark = pytest.mark.slow
STEPS = 400


@contextmanager
def running(site: Site) -> Iterator[subprocess.Popen[bytes]]:
    """The process, once it listens; killed at the end."""
    code = "from fedloom.cli.main import main; main()"
    words = [sys.executable, "-c", code, "worker", "--config", str(site.folder.parent / "site.toml")]
    with (site.folder.parent / "log").open("ab") as log:
        process = subprocess.Popen(words, stderr=log)
    try:
        _until(lambda: status(site) is not None, process)
        yield process
    finally:
        process.kill()
        process.wait()


def status(site: Site) -> dict[str, object] | None:
    try:
        told: dict[str, object] = json.loads(worker_socket.worker_status(site.socket))
        return told
    except OSError:
        return None


def _until(holds: object, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not holds():  # type: ignore[operator]
        assert process.poll() is None, "it ended"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def tasks(encoder: Path) -> list[TaskRequest]:
    """Three tasks of a second or so, each answer accepted."""
    trainer = trainer_of(encoder, terms_of())
    plain = [task_of(FedIT(), trainer, DeltaInt8(), number) for number in (1, 2, 3)]
    return [
        TaskRequest(terms_of(), 1, replace(task, budget=Budget(4, STEPS)), settled)
        for settled, task in enumerate(plain)
    ]


def result(work: TaskRequest, reply: bytes) -> Result:
    told = decode_reply(reply, 10**8, {work.task.id: work.task})
    assert isinstance(told, tuple), told
    return told[2]


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.storms)])
def test_kill_9_in_training_and_after_it(encoder: Path, tmp_path: Path, count: int) -> None:
    calm, site = accepting(SiteWorker(site_at(tmp_path / "calm", encoder))), site_at(tmp_path / "stormy", encoder)
    accept(site, terms_of())
    for name in ("secret", "secret.sha256"):
        shutil.copy(calm.site.folder / name, site.folder / name)
    draw = random.Random(0)
    for work in tasks(encoder)[:count]:
        body = encode_request(work)
        wanted = result(work, calm.answer(body))
        with running(site) as process:  # in the middle
            asking = os.fork()
            if asking == 0:
                try:
                    worker_socket.ask_worker(site.socket, body)
                finally:
                    os._exit(0)
            _until(lambda: str((status(site) or {}).get("doing", "")).startswith("task"), process)
            time.sleep(draw.uniform(0.0, 0.5))
            assert str((status(site) or {}).get("doing", "")).startswith("task")
            process.send_signal(signal.SIGKILL)
            os.waitpid(asking, 0)
        with running(site):
            reply = worker_socket.ask_worker(site.socket, body)
        with running(site):  # killed after it had answered, perhaps before anybody heard it
            assert worker_socket.ask_worker(site.socket, body) == reply
            assert (status(site) or {})["trained"] == 0
        assert same(result(work, reply).adapter, wanted.adapter)


def test_junk_leaves_the_process_alive_and_its_memory_flat(encoder: Path, tmp_path: Path) -> None:
    site, draw = site_at(tmp_path, encoder), random.Random(1)
    good = encode_request(tasks(encoder)[0])
    with running(site) as process:

        def storm(count: int) -> int:
            for _ in range(count):
                body = draw.choice((good[: draw.randrange(len(good))], draw.randbytes(draw.randrange(3000))))
                assert isinstance(decode_reply(worker_socket.ask_worker(site.socket, body), 10**6, {}), Refusal)
            told = Path(f"/proc/{process.pid}/status").read_text()
            return int(told.partition("VmRSS:")[2].split()[0])

        before = storm(1_000)
        assert storm(4_000) - before < 4_000, "kilobytes"
        assert status(site) == {"name": "ward", "pid": process.pid, "doing": "nothing", "run": None} | {
            "trained": 0, "repeated": 0, "refused": 5_000,
        }  # fmt: skip


def test_one_worker_at_a_site_and_an_orderly_end(encoder: Path, tmp_path: Path) -> None:
    site = site_at(tmp_path, encoder)
    with running(site) as process:
        with pytest.raises(Refused, match="another worker of this site is running"):
            serve_worker(site)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not site.socket.exists()
    for line in (tmp_path / "log").read_text().splitlines():
        assert json.loads(line).keys() >= {"time", "level", "logger", "message"}


def test_a_request_that_takes_too_long_ends_the_worker_and_is_refused_by_the_next(
    encoder: Path, tmp_path: Path
) -> None:
    """The executor, which asks until it is answered, has the reason at the second time."""
    terms = terms_of()
    more = f'[terms]\naccepted = ["{terms_hash(terms)}"]\n\n[limits]\nseconds = 0.02\n'
    site = site_at(tmp_path, encoder, more=more)
    with ThreadPoolExecutor(1) as executor, running(site) as first:
        asked = executor.submit(ask_until_answered, site.socket, encode_request(JoinRequest(terms, 1)), 60.0)
        assert first.wait(timeout=60) == -signal.SIGALRM
        with running(site):
            reply = decode_reply(asked.result(timeout=60), 10**8, {})
    assert isinstance(reply, Refusal)
    assert "longer than the 0.02 s" in reply.reason
