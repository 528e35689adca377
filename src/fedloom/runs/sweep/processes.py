"""Several runs of a sweep at once, each in a process of its own: one that dies takes no other with it."""

from __future__ import annotations

import _thread
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Literal, TypeAlias

from fedloom.core.errors import Refused
from fedloom.core.text import first_line
from fedloom.runs.progress import SHOWN_EVERY
from fedloom.runs.sweep.grid import PlannedRun
from fedloom.train.workers.local_processes import interrupts_blocked

State: TypeAlias = Literal["running", "finished", "failed"]
Show: TypeAlias = Callable[[PlannedRun, State, float, str], None]
"""Shows how far a run is: its state, the share that is done (0 to 1), and what it has reached, or why it failed."""
CarryOut: TypeAlias = Callable[[PlannedRun, Callable[[float, str], None]], None]
"""Carries out a run, and calls the function with the share that is done and what it has reached."""


@dataclass(frozen=True, slots=True)
class RunProcess:
    """A process that carries out a run; it lives while the other end of its pipe is open."""

    planned: PlannedRun
    process: BaseProcess
    pipe: Connection


def run_in_processes(planned: Sequence[PlannedRun], jobs: int, carry_out: CarryOut, show: Show) -> None:
    """Carry out runs, `jobs` at a time; a failure of one does not touch the others.

    Ctrl-C ends all of them, each with a folder that can go on; so does the death of this process, however it comes.
    """
    _check_can_be_sent(planned, jobs)
    waiting, running = deque(planned), dict[Connection, RunProcess]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                started = _start(waiting.popleft(), carry_out)
                running[started.pipe] = started
                show(started.planned, "running", 0.0, "")
            for pipe in wait([*running]):
                assert isinstance(pipe, Connection)
                if not _follow(running[pipe], show):
                    del running[pipe]
    finally:
        for one in running.values():
            one.pipe.close()
        for one in running.values():
            one.process.join()


def _check_can_be_sent(planned: Sequence[PlannedRun], jobs: int) -> None:
    for one in planned:
        try:
            pickle.dumps(one)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            remedy = f"its settings cannot be sent to another process ({first_line(error)}); use 1 job"
            raise Refused("jobs", jobs, remedy) from error


def _start(planned: PlannedRun, carry_out: CarryOut) -> RunProcess:
    context = get_context("spawn")  # torch's threads do not survive a fork
    mine, its = context.Pipe()
    process = context.Process(target=_run_in_child, args=(planned, carry_out, its), name=planned.name)
    with interrupts_blocked():  # Ctrl-C reaches all processes of a terminal: this one ends the others, once
        process.start()
    its.close()
    return RunProcess(planned, process, mine)


def _follow(one: RunProcess, show: Show) -> bool:
    """Show what a process says, and return whether it goes on."""
    try:
        state, share, text = one.pipe.recv()
    except (EOFError, OSError):
        one.process.join()
        state, share, text = "failed", 0.0, f"its process ended with exit code {one.process.exitcode}"
    show(one.planned, state, share, text)
    if state == "running":
        return True
    one.process.join()
    one.pipe.close()
    return False


def _run_in_child(planned: PlannedRun, carry_out: CarryOut, pipe: Connection) -> None:
    """Carry out the run of this process, and say how it ended."""
    threading.Thread(target=_interrupt_with, args=(pipe,), daemon=True).start()
    said_at = -SHOWN_EVERY

    def say(state: State, share: float, text: str) -> None:
        nonlocal said_at
        if state == "running" and time.monotonic() - said_at < SHOWN_EVERY:
            return
        said_at = time.monotonic()
        with suppress(OSError):  # nobody listens any more, and the thread is about to interrupt: once is enough
            pipe.send((state, share, text))

    try:
        carry_out(planned, lambda share, text: say("running", share, text))
    except KeyboardInterrupt:
        return
    except Exception as error:
        say("failed", 0.0, failure_text(error))
    else:
        say("finished", 1.0, "")


def _interrupt_with(pipe: Connection) -> None:
    """Interrupt this process as Ctrl-C would when the pipe can be read: nothing is ever sent, so its other end was closed."""
    pipe.poll(None)
    _thread.interrupt_main()


def failure_text(error: Exception) -> str:
    """Return why a run failed: a refusal in its own words, anything else with its class."""
    return str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {first_line(error)}"
