"""The error for settings and inputs that the user can mend: it names the field, the value and the remedy."""

from __future__ import annotations


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
