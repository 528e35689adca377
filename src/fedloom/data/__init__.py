"""Where examples come from, and how they are divided over clients."""

from __future__ import annotations
