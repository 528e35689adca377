"""How much each client may do in its next task."""

from __future__ import annotations
