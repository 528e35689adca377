"""A log that machines can read: a line of JSON for each thing that happens, on stderr."""

from __future__ import annotations

import json
import logging
import sys


class JsonLines(logging.Formatter):
    """Each record as one line of JSON, a traceback inside it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        told |= {"of": record.name, "says": record.getMessage()}
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


def to_stderr() -> None:
    """From now on what fedloom logs goes there."""
    handler, log = logging.StreamHandler(sys.stderr), logging.getLogger("fedloom")
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
