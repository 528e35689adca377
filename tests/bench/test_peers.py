"""What a command takes is counted whole: children, daemons, and children of a process that does not wait for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 0.6
BURN = f"""
import os, signal, subprocess, sys, time

def burn():
    while time.process_time() < {SECONDS}: pass

def leaf():
    subprocess.run([sys.executable, __file__, "leaf"])

def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            burn()
            time.sleep(60)
        os._exit(0)
    os.wait()
    time.sleep(1)

match sys.argv[1]:
    case "child":
        leaf()
    case "daemon":
        daemon()
    case "unwaited":
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        leaf()
burn()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("how", "processes"), [("leaf", 1), ("child", 2), ("daemon", 2), ("unwaited", 2)])
def test_every_process_of_a_command_is_counted_once(tmp_path: Path, how: str, processes: int) -> None:
    script = tmp_path / "burn.py"
    script.write_text(BURN)
    command = [sys.executable, "-m", "bench.peers.measure", sys.executable, str(script), how]
    taken = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert taken["code"] == 0
    # the interpreter's own start is in the seconds of each process; the last look at an unwaited one may be early
    assert SECONDS * processes - 0.15 <= taken["cpu"] <= (SECONDS + 0.25) * processes
    assert taken["wall"] < 30  # a daemon's end is not waited for
    assert taken["peak_bytes"] > 4e6
