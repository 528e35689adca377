"""WHEN a new global version is made, from which updates, and who starts next: one file per method."""

from __future__ import annotations
