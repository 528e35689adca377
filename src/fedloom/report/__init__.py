"""The report of a run: what it reached, what it cost, who was served badly, and how to load the result."""

from __future__ import annotations

from fedloom.report.html import write
from fedloom.report.read import RunLog, read
from fedloom.report.tables import summary

__all__ = ["RunLog", "read", "summary", "write"]
