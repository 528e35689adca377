"""Real training: transformers and peft live here and nowhere else."""

from __future__ import annotations
