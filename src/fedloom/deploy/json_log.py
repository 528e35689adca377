"""A log that machines can read: a line of JSON for each thing that happens, on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator

from fedloom.core.text import printable

NOTED = frozenset({"warning", "error", "critical"})
"""Levels of the lines that somebody should see also where they tell of no event."""


class JsonLines(logging.Formatter):
    """Formats each record as one line of JSON, a traceback inside it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line of JSON, with what a terminal would obey in escapes of JSON: a reader gets the same text."""
        fields = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        fields |= {"logger": record.name, "message": record.getMessage()}
        if event := getattr(record, "event", ""):
            fields["event"] = event
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return printable(json.dumps(fields, ensure_ascii=False))


def to_stderr() -> None:
    """Send what fedloom logs to stderr from now on, as lines of JSON."""
    handler, log = logging.StreamHandler(sys.stderr), logging.getLogger("fedloom")
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def event(name: str) -> dict[str, str]:
    """Return what a call of a logger takes as `extra`, for a line that tells of an event by this name."""
    return {"event": name}


def notable_lines(lines: Iterable[str], logger: str) -> Iterator[tuple[str, str]]:
    """Yield (event, message) of the lines that one logger has written to a log and that its reader should see.

    Those are events, and warnings and errors, which have the event "". What is no line of JSON is passed over.
    """
    for line in lines:
        try:
            fields = json.loads(line)
            name, message = str(fields.get("event", "")), str(fields["message"])
            if fields["logger"] == logger and (name or fields["level"] in NOTED):
                yield name, message
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue
