"""Ctrl-C and SIGTERM: both end a command in order, whatever a library makes of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from fedloom.cli.exit_codes import ExitCode
from fedloom.core.errors import Terminated


@dataclass(slots=True)
class StopSignals:
    """What has stopped this process from outside.

    Libraries that are being imported swallow what a signal raises, or raise an error of their own for it. So the signal is noted.

    Fields:
        received: number of the signal that came last (0: none).
    """

    received: int = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Raise KeyboardInterrupt inside for Ctrl-C and for SIGTERM, unless whoever started this process ignores them."""
        self.received = 0
        numbers = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._raise) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def exit_code(self, error: BaseException) -> ExitCode | None:
        """Return the code of a command that ended with this error because a signal came; None where none came."""
        if self.received == signal.SIGTERM or isinstance(error, Terminated):
            return ExitCode.TERMINATED
        return ExitCode.INTERRUPTED if self.received or isinstance(error, KeyboardInterrupt) else None

    def _raise(self, number: int, frame: FrameType | None) -> NoReturn:
        self.received = number
        raise Terminated("stopped by SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt


stops = StopSignals()
"""Those of this process."""
