"""What tests of commands share."""

from __future__ import annotations

from collections.abc import Callable

Fedloom = Callable[..., tuple[int | str | None, str]]
"""The command, given its arguments: its exit code, and all that it said on one line."""
