"""What a run was, as plain JSON: its settings, a hash of them, the versions and the kind of machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedloom.core.types import Rules

LIBRARIES = ("torch", "transformers", "peft", "datasets", "numpy", "safetensors")


def settings_hash(settings: object) -> str:
    """Twelve hex digits that name these settings: two runs with the same hash had the same, wherever their files lay.

    What is off (None, False, 0, empty) does not count, so that a new option does not rename all earlier runs.
    """
    text = json.dumps(portable_settings(settings), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def portable_settings(value: object) -> object:
    """Settings without what is off, and with `shortened` paths."""
    match value:
        case dict():
            return {key: portable_settings(item) for key, item in value.items() if item}
        case list():
            return [portable_settings(item) for item in value]
    return short_paths(value)


def short_paths(value: object) -> object:
    """Absolute paths by their last two parts: what a table is, not where a machine keeps it."""
    match value:
        case dict():
            return {key: short_paths(item) for key, item in value.items()}
        case list():
            return [short_paths(item) for item in value]
        case str() if Path(value).is_absolute():
            return "/".join(Path(value).parts[-2:])
    return value


def as_json(value: object) -> Any:
    """The value as it comes back from a file."""
    return json.loads(json.dumps(value))


def json_differences(there: object, here: object, path: str = "", *, off: bool = False) -> Iterator[str]:
    """Where two values of JSON differ, as "field: 5 there, 6 here"; with `off` two ways of saying "nothing" are the same."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in [*there, *(name for name in here if name not in there)]:
            yield from json_differences(there.get(name), here.get(name), f"{path}.{name}".lstrip("."), off=off)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (one, other) in enumerate(zip(there, here, strict=True)):
            yield from json_differences(one, other, f"{path}[{number}]", off=off)
    elif off and not there and not here:
        return
    elif there != here or type(there) is not type(here):
        yield f"{path}: {_short(there)} there, {_short(here)} here"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def majority_share(labels: Sequence[int]) -> float:
    """The share of the commonest label: what always giving that one would reach."""
    return max(labels.count(label) for label in set(labels)) / len(labels)


def method_notes(rules: Rules, head: bool) -> list[str]:
    """What a reader of the figures has to know about a method with these rules; `head`: whether the model has one of its own."""
    found = []
    if rules.private:
        sides = " and ".join({"dense": "the head"}.get(side, f"`{side}`") for side in rules.private)
        found.append(
            f"Every client has a model of its own ({sides} stay there): the test accuracy says nothing, read the clients'."
        )
    if "dense" in rules.frozen and head:
        found.append("The head is not trained: if the model came without one, it stays random.")
    return found


def library_versions() -> dict[str, str]:
    """Versions of what decides on the numbers."""
    return {name: metadata.version(name) for name in LIBRARIES if _installed(name)}


def machine_kind() -> dict[str, object]:
    """The kind of machine, not which one: processor, the widest instructions that torch uses there, cores, Python."""
    return {
        "cpu": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
