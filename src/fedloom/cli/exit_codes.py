"""The exit codes of `fedloom`, and what each of them means. `docs/command-line.md` has the same table."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended, for the shell."""

    DONE = 0
    DIFFERS = 1
    REFUSED = 2
    BUG = 70
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


MEANINGS: Mapping[ExitCode, str] = {
    ExitCode.DONE: "The command did what was asked.",
    ExitCode.DIFFERS: "A check ran and failed: a replay differs, or an audit found too little noise.",
    ExitCode.REFUSED: "The command, a file or a setting is wrong, or the disk is full. One sentence says what.",
    ExitCode.BUG: "An error that nobody expected, with a traceback. Please report it.",
    ExitCode.INTERRUPTED: "Stopped by Ctrl-C (SIGINT). A run can be continued.",
    ExitCode.BROKEN_PIPE: "The reader of the output went away, as `head` does.",
    ExitCode.TERMINATED: "Stopped by SIGTERM (Slurm, systemd, docker stop). A run can be continued.",
}
