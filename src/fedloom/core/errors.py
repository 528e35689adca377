"""The error for settings and inputs that the user can mend: it names the field, the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedloom.core.text import first_line

UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a reader raises, each in its own way, where data are not what it counts on."""


class Refused(ValueError):
    """A setting or an input that fedloom cannot honour.

    The command line prints it as one sentence and leaves with exit code 2; a library user catches it like any `ValueError`.

    >>> str(Refused("rank", 0, "choose a whole number of at least 1"))
    'rank = 0: choose a whole number of at least 1'
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field} = {value!r}: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy

    def __reduce__(self) -> tuple[type[Refused], tuple[str, object, str]]:
        """Pickle by the three arguments, so that it comes out of a worker process as it was raised."""
        return type(self), (self.field, self.value, self.remedy)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which Slurm, systemd and containers send: it ends a run as Ctrl-C does, in order.

    >>> issubclass(Terminated, KeyboardInterrupt)
    True
    """


@contextmanager
def refuse_damaged(field: str, value: object) -> Iterator[None]:
    """Raise what goes wrong in a block that goes by what somebody has written as Refused: its parts do not belong together."""
    try:
        yield
    except Refused:
        raise
    except UNREADABLE as error:
        remedy = f"{type(error).__name__}: {first_line(error)}; if nothing else explains this, it is damaged or not from fedloom"
        raise Refused(field, value, remedy) from error
