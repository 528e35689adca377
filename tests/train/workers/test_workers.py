"""Cohorts over several processes: the same bytes, each task once, whoever dies; and nobody is left behind."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fedloom.core.errors import Refused
from fedloom.core.policies import Aggregator, Trainer
from fedloom.train.workers import local_processes
from fedloom.train.workers.pool import MOST_DEATHS, WorkerPool, open_pool
from fedloom.train.workers.worker import Workers
from tests.support.hazards import Lethal, Toy, Unsendable, toy_work
from tests.support.same_bytes import COMPARED


@contextmanager
def cohorts(trainer: Trainer, told: int | str = 2) -> Iterator[WorkerPool]:
    with open_pool(trainer, Workers.parse(told)) as made:
        assert isinstance(made, WorkerPool)
        yield made


def children() -> list[psutil.Process]:
    """Our workers, without multiprocessing's resource tracker, and without those that have just died."""
    found = list[psutil.Process]()
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # a zombie counts as one
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
    return found


def gone(processes: list[psutil.Process], seconds: float = 30.0) -> bool:
    return not psutil.wait_procs(processes, seconds)[1]


def plain(answers: Any) -> list[Any]:
    """What must not depend on who trained."""
    return [(r.examples, r.adapter.factors["only"].down.tolist(), local) for r, local in answers]


# With a trainer that needs no model ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cohort_is_divided_and_its_results_are_in_order() -> None:
    work = toy_work(6)
    with cohorts(Toy()) as made:
        answers = made.train(work)
        again = made.train(work[::-1])
        assert plain(again) == plain(answers)[::-1] == plain(Toy().train(work))[::-1]
        pids = {result.metrics["pid"] for result, _ in answers + again}
        assert pids == {process.pid for process in children()}
        assert len(pids) == 2
        assert {result.metrics["threads"] for result, _ in answers} == {torch.get_num_threads()}
        running = children()
    assert gone(running)


def test_what_one_process_can_do_starts_none() -> None:
    with open_pool(trainer := Toy(), Workers.parse(1)) as made:
        assert made is trainer
    with cohorts(Toy(), 3) as made:
        assert made.train([]) == []
        for work in (toy_work(1), toy_work(1, first=2)):
            ((result, _),) = made.train(work)
            assert result.metrics["pid"] == os.getpid()
        assert children() == []


@pytest.mark.slow
def test_a_worker_killed_before_it_answers_costs_time_and_nothing_else(tmp_path: Path) -> None:
    work, trainer = toy_work(5), Lethal(Toy(), tmp_path, task=3)
    with cohorts(trainer) as made:
        assert plain(made.train(work)) == plain(Toy().train(work))
        later = toy_work(3, first=6)
        assert plain(made.train(later)) == plain(Toy().train(later))
        running = children()
        assert len(running) == 2
    assert (tmp_path / "death-0").exists()
    assert Counter(trainer.trained()) == {n: 2 if n == 3 else 1 for n in range(1, 9)}
    assert gone(running)


@pytest.mark.slow
def test_a_worker_that_died_idle_is_replaced() -> None:
    with cohorts(Toy()) as made:
        made.train(toy_work(2))
        for process in (before := children()):
            process.kill()
        assert gone(before)
        work = toy_work(3, first=3)
        assert plain(made.train(work)) == plain(Toy().train(work))
        assert not set(children()) & set(before)


@pytest.mark.slow
def test_a_task_that_kills_every_worker_ends_the_run(tmp_path: Path) -> None:
    with cohorts(Lethal(Toy(), tmp_path, task=2, deaths=99)) as made:
        with pytest.raises(Refused, match="3 workers ended one after the other in task 2 of client c2") as caught:
            made.train(toy_work(3))
        running = children()
    assert caught.value.field == "workers"
    assert len(list(tmp_path.glob("death-*"))) == MOST_DEATHS
    assert gone(running)


@pytest.mark.slow
def test_an_error_of_training_arrives_and_costs_no_worker() -> None:
    with cohorts(Toy()) as made:
        with pytest.raises(ZeroDivisionError, match="by nought") as caught:
            made.train(toy_work(2, t2=-2))
        assert "in _one" in "".join(caught.value.__notes__)  # where it happened
        before = children()
        with pytest.raises(RuntimeError, match="Unsendable: one"):
            made.train(toy_work(2, t1=-1))
        assert plain(made.train(toy_work(2))) == plain(Toy().train(toy_work(2)))
        assert children() == before
    with pytest.raises(Unsendable):
        Toy().train(toy_work(1, t1=-1))


def mapped(process: psutil.Process, size: int) -> Any:
    """The shared file in a process's memory; it has no name."""
    (found,) = (m for m in process.memory_maps(grouped=False) if "/#" in m.path and m.size >= size)
    return found


@pytest.mark.slow
def test_memory_holds_one_base_and_what_each_process_wrote() -> None:
    size = 2**26
    with cohorts(Toy(torch.ones(size // 4))) as made:
        made.train(toy_work(2))
        made.train(toy_work(1))  # here
        everyone = [mapped(process, size) for process in (psutil.Process(), *children())]
        assert sum(one.pss for one in everyone) == pytest.approx(size, rel=0.01)
        assert [one.rss for one in everyone] == pytest.approx([size] * 3, rel=0.01)
    with cohorts(Toy(torch.ones(size // 4), write=True)) as made:
        sums = [float(r.adapter.factors["only"].down[0, 0]) for r, _ in made.train(toy_work(2))]
        assert sums == pytest.approx([size / 4 + size / 8, size / 4 + 2 * size / 8])  # nobody saw what the other wrote
        own = [mapped(process, size).private_dirty for process in children()]
        assert own == pytest.approx([size / 2] * 2, rel=0.02)


@pytest.mark.slow
def test_no_descriptor_stays_open() -> None:
    with cohorts(Toy()) as made:
        counts = []
        for round_ in range(4):
            made.train(toy_work(4, first=1 + 4 * round_))
            gc.collect()  # what other tests left to the collector may be closed now, and not between two counts
            counts.append(len(os.listdir("/proc/self/fd")))
        for process in children():
            process.kill()
        made.train(toy_work(4, first=50))
    assert len(set(counts)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError])
def test_nobody_is_left_when_a_run_is_cut_short(end: type[BaseException]) -> None:
    running = []

    def cut_short() -> None:
        with cohorts(Toy()) as made:
            made.train(toy_work(2))
            running.extend(children())
            raise end

    with pytest.raises(end):
        cut_short()
    assert len(running) == 2
    assert gone(running)


SCRIPT = """
import signal
from fedloom.train.workers.pool import open_pool
from fedloom.train.workers.worker import Workers
from tests.support.hazards import Toy, toy_work
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
    with open_pool(Toy(seconds=0.0), Workers.parse(2)) as made:
        made.train(toy_work(2))
    with open_pool(Toy(seconds=600.0), Workers.parse(2)) as made:
        print("begins", flush=True)
        made.train(toy_work(4))
"""


@pytest.mark.slow
@pytest.mark.parametrize("starting", [True, False])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, how: signal.Signals, starting: bool) -> None:
    """Ctrl-C goes to all processes of a terminal; kill -9 to the parent alone. Both while training and while starting."""
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join(["src", ".", *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    with subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begins\n"
        made = psutil.Process(parent.pid)
        while len(running := [p for p in made.children() if "spawn_main" in " ".join(p.cmdline())]) < 2:
            time.sleep(0.01)
        if not starting:
            time.sleep(6)
        if how == signal.SIGINT:
            os.killpg(parent.pid, how)
        else:
            parent.send_signal(how)
        _, said = parent.communicate(timeout=60)
        assert gone(running)
    if how == signal.SIGINT:  # no word from the workers
        assert said.count("Traceback") == 1


def test_no_room_is_said_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_processes, "MEMORY", Path("/nowhere"))
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/else")
    with (
        cohorts(Toy()) as made,
        pytest.raises(Refused, match=r"no room for the shared base in /nowhere or .*--shm-size"),
    ):
        made.train(toy_work(2))
    assert children() == []


def test_what_cannot_be_sent_is_said() -> None:
    trainer: Any = Toy(weights=lambda: 1)  # type: ignore[arg-type]
    with cohorts(trainer) as made, pytest.raises(Refused, match="define its functions and classes in a module"):
        made.train(toy_work(2))


@pytest.mark.parametrize(
    ("told", "count", "ray"),
    [(2, 2, None), ("12", 12, None), ("ray", None, ""), ("ray:auto", None, "auto"), ("4@ray", 4, ""),
     ("4@ray:ray://head:10001", 4, "ray://head:10001"), ("1@ray", 1, "")],
)  # fmt: skip
def test_what_may_be_said(told: int | str, count: int | None, ray: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    made = Workers.parse(told)
    assert (made.count, made.ray) == (count, ray)
    assert str(made) == str(told)


@pytest.mark.parametrize("told", [0, -1, "0@ray", "two", "", "ray:", "2.5", "2@", "@ray", "2@rays", "2 ", True])
def test_what_may_not(told: int | str) -> None:
    with pytest.raises(Refused, match="say a number from 1, or ray"):
        Workers.parse(told)


def test_without_ray_one_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"pip install 'fedloom\[ray\]'"):
        Workers.parse("ray")


# Whole runs of a real model -----------------------------------------------------------------------------------------------

METHODS = (
    "ProductDelta()",
    "FLoRA()",
    "Scaffold(clients=6)",
    *(pytest.param(method, marks=pytest.mark.storms) for method in ("FedEx()", "FedSA()", "LoRAA2()")),
)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install ray)")
Execute = Callable[..., Path]


@pytest.fixture
def execute(encoder: Path, tmp_path: Path) -> Execute:
    import fedloom
    from tests.support.tiny_runs import tiny_run

    def call(told: int | str, method: str = "ProductDelta()", **more: Any) -> Path:
        aggregator: Aggregator = eval(method, vars(fedloom) | {n: getattr(fedloom, n) for n in fedloom.__all__})
        # one client after the other, so that a cohort is more than one group
        engine = fedloom.Engine("torch", together=1)
        run = tiny_run(encoder, seed=5, aggregator=aggregator, engine=engine, **more)
        return fedloom.prepare(run).execute(tmp_path / f"{method}-{told}", workers=told).folder

    return call


def same_bytes(one: Path, other: Path) -> None:
    for name in COMPARED:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_processes_writes_the_same_bytes(execute: Execute, method: str) -> None:
    alone = execute(1, method)
    count = 3 if method == METHODS[0] else 2
    together = execute(count, method)
    same_bytes(alone, together)
    assert manifest(alone)["workers"] == "1"
    assert manifest(together)["workers"] == str(count)
    assert manifest(alone)["run_hash"] == manifest(together)["run_hash"]


@pytest.mark.slow
def test_a_run_that_starts_one_task_at_a_time_keeps_two_processes_busy(
    execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each event of FedFa dispatches one task; faults hit some."""
    from fedloom import Faults, FedFa, Limits, World

    given: dict[str, Any] = {
        "schedule": FedFa(window=3, max_in_flight=5),
        "limits": Limits(versions=8),
        "world": World(),
    }
    given["faults"] = Faults(dropout=0.1, back_after=1.0, late=0.5)
    busy, collect = [0], WorkerPool._collect

    def watched(self: WorkerPool, seconds: float | None = None) -> None:
        collect(self, seconds)
        busy.append(len(self.running))

    monkeypatch.setattr(WorkerPool, "_collect", watched)
    alone = execute(1, **given)
    assert max(busy) == 0
    same_bytes(alone, execute(2, **given))
    assert max(busy) == 2
    assert busy.count(2) > len(busy) / 4


@pytest.fixture
def lethal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The worker that has trained task 6, in the middle of the second cohort, is killed before it answers."""
    from fedloom.train.trainer import PeftTrainer

    folder = tmp_path / "deaths"
    folder.mkdir()
    monkeypatch.setattr(
        "fedloom.runs.execute.PeftTrainer", lambda *parts, **more: Lethal(PeftTrainer(*parts, **more), folder, task=6)
    )
    return folder


def survived(lethal: Path, alone: Path, together: Path) -> None:
    same_bytes(alone, together)
    assert [path.name for path in lethal.glob("death-*")] == ["death-0"]
    lines = [int(line) for line in (lethal / "trained").read_text().split()]
    assert Counter(lines) == {n: 3 if n == 6 else 2 for n in range(1, 13)}  # of two runs, one without workers


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ProductDelta()", pytest.param("FLoRA()", marks=pytest.mark.storms)])
def test_a_run_survives_the_death_of_a_worker(execute: Execute, lethal: Path, method: str) -> None:
    survived(lethal, execute(1, method), execute(2, method))


@pytest.mark.slow
@needs_ray
def test_actors_of_ray_write_the_same_bytes_also_when_one_dies(
    execute: Execute, lethal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))  # actors find `lethal`
    survived(lethal, execute(1, "FLoRA()"), execute("2@ray", "FLoRA()"))


@pytest.mark.slow
@needs_ray
def test_ray_refuses_what_the_cluster_has_no_room_for() -> None:
    with cohorts(Toy(), "999@ray") as made, pytest.raises(Refused, match=r"the cluster has .* an actor takes"):
        made.train(toy_work(2))
    with cohorts(Toy(), "ray:127.0.0.1:1") as made, pytest.raises(Refused, match="no Ray cluster can be reached"):
        made.train(toy_work(2))
