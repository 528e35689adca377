"""A site is told that its clock is wrong, and what the server's refusals mean."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fedloom.deploy.flower import keys
from fedloom.deploy.flower.gate import CLOCK_CODE
from fedloom.deploy.flower.join import RUN_ENDED, WORKER_LOG, SiteLogs, clock_ahead, clock_warning, explain
from fedloom.deploy.flower.supervisor import LogFollower, free_port
from fedloom.deploy.json_log import JsonLines
from fedloom.deploy.site import worker as worker_module


@pytest.mark.parametrize("seconds", [5.0, 0.0, -5.0])
def test_a_clock_that_is_nearly_right_is_not_spoken_of(seconds: float) -> None:
    assert clock_warning(seconds) == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(40.2, "40 s ahead of the server's"), (-400.0, "400 s behind the server's")]
)
def test_a_wrong_clock_is(seconds: float, words: str) -> None:
    assert words in clock_warning(seconds)
    assert "NTP" in clock_warning(seconds)


def test_a_server_that_is_not_there_has_no_clock(tmp_path: Path) -> None:
    assert clock_ahead(f"localhost:{free_port()}", keys.new(tmp_path, ["localhost"])) is None


def test_a_site_with_a_wrong_clock_is_not_said_to_have_an_unknown_key() -> None:
    words = explain(
        f"supernode ended with code 1; restarting in 1 s: 305 Failed. [code: {CLOCK_CODE}] the clock of this machine"
    )
    assert "clock" in words
    assert "key" not in words


def test_an_owner_reads_what_the_site_does_and_each_warning_once(tmp_path: Path) -> None:
    supernode, worker, said = LogFollower(tmp_path / "supernode.log"), LogFollower(tmp_path / "worker.log"), list[str]()
    logs = SiteLogs("fed.example.org:8080", supernode, worker, said.append)
    formatter = JsonLines()

    def wrote(level: int, message: str, event: str = "", name: str = "fedloom.worker") -> None:
        record = logging.LogRecord(name, level, "", 0, message, None, None)
        record.event = event
        with worker.path.open("a") as file:
            file.write(formatter.format(record) + "\n")

    supernode.path.write_text("INFO: SuperNode ID: 7\nconnect failed, retrying in 1 s\nretrying in 2 s\n")
    wrote(logging.INFO, "listens")
    wrote(logging.INFO, "task 3 answered", "task answered")
    wrote(logging.WARNING, "refused: too late")
    wrote(logging.WARNING, "refused: too late")
    wrote(logging.WARNING, "some library", name="other")
    worker.path.write_text(worker.path.read_text() + 'Traceback\n{"message": 3}\n[]\n')
    assert not logs.look()
    assert said == [
        "connected to the server at fed.example.org:8080",
        "the server at fed.example.org:8080 does not answer; retrying until it does",
        "task 3 answered",
        "refused: too late",
    ]
    wrote(logging.INFO, "run toy has ended", RUN_ENDED)
    assert logs.look()
    assert said[-1] == "run toy has ended"


def test_the_words_of_the_worker_are_those_that_join_looks_for() -> None:
    assert (worker_module.RUN_ENDED, worker_module.LOG.name) == (RUN_ENDED, WORKER_LOG)
