"""HOW adapters of different rank are added, and handed out again: one file per method, nothing to register."""

from __future__ import annotations
