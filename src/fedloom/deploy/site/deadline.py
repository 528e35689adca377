"""The deadline of a request at a site, which ends the worker where nothing else can.

A timer of the system ends the process (SIGALRM): also where a regular expression or a kernel never gives Python's lock back. What is
at work is noted before it begins (`under-way.json`), and a handler in C (`faulthandler`) writes where the process was before it ends
(`too-long.txt`: names of files and functions, no values). So a worker that starts again tells a request that took too long from one
that was cut off by something else, which may be asked again.
"""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from fedloom.core.errors import Refused
from fedloom.core.files import open_regular, read_json, read_regular, write_json

LOG = getLogger("fedloom.worker")
UNDER_WAY, TRACE = "under-way.json", "too-long.txt"
LARGEST_TRACE = 2**20
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """The deadline of each request.

    Fields:
        folder: state folder of the site.
        seconds: how long a request may take (s).
    """

    folder: Path
    seconds: float

    @contextmanager
    def watch(self, facts: Mapping[str, object]) -> Iterator[None]:
        """End this process by SIGALRM where the block takes longer; `facts` say what it does.

        In the main thread, and not to be nested.
        """
        with open_regular(self.folder / TRACE, "ab") as trace:
            trace.truncate(0)
            write_json(self.folder / UNDER_WAY, facts)
            # Only the frames of the thread that the signal stopped: those of one that runs cannot be read safely.
            faulthandler.register(signal.SIGALRM, file=trace, all_threads=False, chain=True)
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                faulthandler.unregister(signal.SIGALRM)
                self.forget()

    def overdue(self) -> dict[str, Any] | None:
        """Return the facts of the request that took too long and ended the last worker; None if none did."""
        try:
            trace = read_regular(self.folder / TRACE, LARGEST_TRACE).decode("utf-8", "replace")
            facts = read_json(self.folder / UNDER_WAY, LARGEST_TRACE)
        except (FileNotFoundError, Refused):
            return None
        if not trace:
            return None
        LOG.error("a request took too long: %s", trace)
        return facts

    def forget(self) -> None:
        """Remove the note of what was at work."""
        for name in (UNDER_WAY, TRACE):
            (self.folder / name).unlink(missing_ok=True)
