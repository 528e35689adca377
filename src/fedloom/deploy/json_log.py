"""A log that machines can read: a line of JSON for each thing that happens, on stderr."""

from __future__ import annotations

import json
import logging
import sys

from fedloom.core.text import printable


class JsonLines(logging.Formatter):
    """Formats each record as one line of JSON, a traceback inside it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line of JSON, with what a terminal would obey in escapes of JSON: a reader gets the same text."""
        fields = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        fields |= {"logger": record.name, "message": record.getMessage()}
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
