"""WHEN a new global version is made, from which updates with which weights, and who starts next: one file per schedule.

A schedule (Rounds, FedBuff, FedFa, ...) implements `core.policies.Schedule`: it sees the `Fleet` and decides on a `Merge`, and never
reads a model. Staleness (`shared/staleness.py`), weights of clients (`shared/weights.py`) and the draw of idle clients
(`shared/client_draw.py`) are functions that several schedules use. The room imports `core` only, and a schedule imports no other one.

To add a schedule, write one new file with one frozen dataclass; the laws of `tests/laws` find it in the folder. It is
`fedloom.NAME` then, also in `from fedloom import *`; a line in `fedloom/__init__.pyi` makes it known to type checkers and editors.
"""

from __future__ import annotations
