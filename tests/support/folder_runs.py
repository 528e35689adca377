"""Runs of tiny models that are carried out in a folder: over groups, and cut short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom import FedFa, Hierarchy, HLoRA, Limits, Link, by_work, prepare
from fedloom.core.events import Command, Event, Publish
from fedloom.hierarchy.grouping import Given
from tests.support.tiny_runs import tiny_run

GROUPS = Given((("c00", "c03", "c05"), ("c01", "c02", "c04")))


def grouped_run(encoder: Path, **more: Any) -> Any:
    """FedFa over HLoRA over two groups, on slow links to a distant server."""
    given: dict[str, Any] = {"aggregator": HLoRA(), "limits": Limits(versions=6)}
    given |= {"schedule": FedFa(window=2, max_in_flight=2, weigh=by_work)}
    given |= {"hierarchy": Hierarchy(GROUPS, rounds=2, link=Link(1e6, 1e6), inner_speedup=4.0)}
    return tiny_run(encoder, **(given | more))


def at_version(version: int, act: Callable[[], object]) -> Any:
    """An observer that does this when the version is published."""

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        if any(isinstance(command, Publish) and command.version == version for command in commands):
            act()

    return observe


def stop_at(error: type[BaseException], version: int) -> Any:
    """An observer that raises the error when this version is published."""

    def stop() -> None:
        raise error("enough")

    return at_version(version, stop)


def interrupt_run(run: Any, out: Path, version: int = 5, **more: Any) -> Path:
    """The folder of a run that Ctrl-C ended."""
    with pytest.raises(KeyboardInterrupt):
        prepare(run).execute(out, [stop_at(KeyboardInterrupt, version)], report=False, **more)
    return out
