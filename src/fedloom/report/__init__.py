"""The report of a run: what it reached, what it cost, who was served badly, and how to load the result."""

from __future__ import annotations

from fedloom.report.page import write
from fedloom.report.run_log import RunLog, read
from fedloom.report.tables import summary

__all__ = ["RunLog", "read", "summary", "write"]
