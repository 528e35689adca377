"""What a command and everything that it starts takes: CPU seconds, wall seconds, peak memory (Linux).

    python -m bench.peers.measure COMMAND...

Prints one JSON line after the output of the command. This process adopts every orphan of the command (it is the subreaper), so
that a daemon is waited for like a child, and the kernel's own account of each (`wait4`) has the CPU seconds of all descendants
that were waited for in turn. Not in it are processes whose parent ignores SIGCHLD, as Ray's does: those are read from /proc ten
times a second. Memory is the sum of proportional sets (PSS), in which a page shared by n processes counts 1/n in each.
What still runs when the command has ended is stopped; the CPU seconds until then count, the wall seconds do not.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL, MEMORY_EVERY, GRACE = 0.1, 5, 5.0
"""Seconds between two looks, looks between two of the memory, seconds to end in after SIGTERM."""

PR_SET_CHILD_SUBREAPER = 36
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc/PID/stat: `own` CPU seconds, and those of `children` that it has waited for."""

    parent: int
    own: float
    children: float


@dataclass(slots=True)
class Account:
    """Counts as time goes on. `unpaid` are processes of which nobody will wait, by pid, `waited` those we waited for."""

    waited: float = 0.0
    peak: int = 0
    unpaid: dict[int, float] = field(default_factory=dict)
    seen: dict[int, float] = field(default_factory=dict)

    @property
    def cpu(self) -> float:
        """CPU seconds of all; never less than what was seen in use."""
        return max(self.waited + sum(self.unpaid.values()), sum(self.seen.values()))

    def look(self, memory: bool) -> None:
        """Read what is running now."""
        family = descendants(os.getpid())
        for pid, process in family.items():
            self.seen[pid] = process.own
            if process.parent in family and ignores_children(process.parent):
                self.unpaid[pid] = process.own + process.children
        if memory:
            self.peak = max(self.peak, sum(map(pss, family)))

    def reap(self) -> dict[int, int]:
        """Wait for all that have ended; returns their exit codes."""
        ended = dict[int, int]()
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return ended
            if not pid:
                return ended
            ended[pid] = os.waitstatus_to_exitcode(status)
            self.waited += usage.ru_utime + usage.ru_stime
            self.unpaid.pop(pid, None)


def descendants(root: int) -> dict[int, Process]:
    """Every process below this one, zombies included."""
    found = {int(entry.name): process for entry in Path("/proc").glob("[0-9]*") if (process := read_stat(entry))}
    children: dict[int, list[int]] = {}
    for pid, process in found.items():
        children.setdefault(process.parent, []).append(pid)
    family, todo = dict[int, Process](), list(children.get(root, ()))
    while todo:
        pid = todo.pop()
        family[pid] = found[pid]
        todo += children.get(pid, ())
    return family


def read_stat(entry: Path) -> Process | None:
    """None if the process is gone."""
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    user, system, children_user, children_system = (int(value) / TICK for value in fields[11:15])
    return Process(int(fields[1]), user + system, children_user + children_system)


def ignores_children(pid: int) -> bool:
    """Whether the kernel discards what its children used."""
    mask = _field(pid, "status", "SigIgn:", 16)
    return bool(mask >> (signal.SIGCHLD - 1) & 1)


def pss(pid: int) -> int:
    """Bytes of memory, shared pages divided by who shares them."""
    return 1024 * _field(pid, "smaps_rollup", "Pss:", 10)


def _field(pid: int, file: str, name: str, base: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:  # gone
        return 0
    return next((int(line.split()[1], base) for line in lines if line.startswith(name)), 0)


def measure(command: Sequence[str]) -> dict[str, object]:
    """Run it to its end, and all that it leaves behind."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "this kernel does not let a process adopt orphans")
    account, begun, looks = Account(), time.perf_counter(), 0
    child = subprocess.Popen(command, start_new_session=True)
    while (code := account.reap().get(child.pid)) is None:
        account.look(memory=looks % MEMORY_EVERY == 0)
        looks += 1
        time.sleep(INTERVAL)
    child.returncode, wall = code, time.perf_counter() - begun
    _stop_rest(account)
    return {"cpu": round(account.cpu, 2), "wall": round(wall, 2), "peak_bytes": account.peak, "code": code}


def _stop_rest(account: Account) -> None:
    """Ask what is left to end, then end it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        due = time.perf_counter() + GRACE
        for pid in descendants(os.getpid()):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        while descendants(os.getpid()) and time.perf_counter() < due:
            account.look(memory=False)
            account.reap()
            time.sleep(INTERVAL)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:])))
