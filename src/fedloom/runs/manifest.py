"""The manifest of a run, `manifest.json`: its settings, a hash of them, the versions and the kind of machine.

The settings are the run's value as `schema.jsonable` writes it. Two runs with the same hash had the same settings: results are
compared and runs are resumed by it. `replay` makes a server from the settings; the report shows them. A manifest holds no data:
examples that stand in a run file are told by their number and their sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from fedloom.aggregate.shared.parts import summed_by_factors
from fedloom.core.policies import Aggregator, aggregator_layers
from fedloom.core.text import list_some
from fedloom.core.types import Rules
from fedloom.hierarchy.hierarchy import Hierarchy

NAMED_LABELS = 6
"""Labels that a note lists by name."""
AS_BEFORE: Mapping[tuple[object, str], object] = {
    **{(source, "missing"): "refuse" for source in ("Table", "Rows", "Hub", "Instructions")},
    ("ByClient", "smallest"): 1,
    ("Engine", "answer_tokens"): True,
    ("Engine", "byte_dropout"): True,
    ("Limits", "norm_ratio"): 5.0,
    ("Limits", "step_ratio"): 3.0,
    ("Training", "base_dropout"): None,
}
"""Options that came later and are not off by default, by class and name, with the value that changes nothing of earlier runs."""
PLACES = frozenset({("Engine", "cache_dir"), ("Engine", "cache_dir_bytes")})
"""Options, by class and name, that only say where something is kept: no byte of a run depends on them."""
LIBRARIES = ("torch", "transformers", "peft", "datasets", "numpy", "safetensors")


def settings_hash(settings: object) -> str:
    """Twelve hex digits that name settings: two runs with the same hash had the same, wherever their files lay.

    What is off (None, False, 0, empty, or as in `AS_BEFORE`) does not count, so that a new option does not rename all earlier runs;
    nor do `PLACES`.
    """
    text = json.dumps(portable_settings(settings), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def portable_settings(value: object) -> object:
    """Settings without what is off, and with short paths."""
    match value:
        case dict():
            kind = value.get("type")
            on = {key: item for key, item in value.items() if _counts(item, (kind, key))}
            return {key: portable_settings(item) for key, item in on.items()}
        case list():
            return [portable_settings(item) for item in value]
    return short_paths(value)


def _counts(value: object, option: tuple[object, str]) -> bool:
    """Whether a setting is another than that of a run before this option was there; to switch one off that is on counts."""
    return option not in PLACES and (value != AS_BEFORE[option] if option in AS_BEFORE else bool(value))


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


def json_differences(recorded: object, current: object, path: str = "", *, off: bool = False) -> Iterator[str]:
    """The differences of two values of JSON, as "field: 5 there, 6 here"; with `off` all ways of saying "nothing" are the same."""
    if isinstance(recorded, dict) and isinstance(current, dict):
        for name in [*recorded, *(name for name in current if name not in recorded)]:
            yield from json_differences(recorded.get(name), current.get(name), f"{path}.{name}".lstrip("."), off=off)
    elif isinstance(recorded, list) and isinstance(current, list) and len(recorded) == len(current):
        for number, (one, other) in enumerate(zip(recorded, current, strict=True)):
            yield from json_differences(one, other, f"{path}[{number}]", off=off)
    elif off and not recorded and not current:
        return
    elif recorded != current or type(recorded) is not type(current):
        yield f"{path}: {_short(recorded)} there, {_short(current)} here"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def metric_meanings(names: Sequence[str], majority: int, of: str) -> dict[str, str]:
    """Say which label each metric is about; `majority` is the commonest label of `of`, by which the baseline answers."""
    f1 = {"f1": f"F1 of {names[1]!r}"} if len(names) == 2 else {"f1_macro": "mean of the F1 of each label"}
    return {**f1, "majority_label": names[majority], "majority_of": of}


def choice_meaning(choices: int) -> dict[str, str]:
    """Say of a model that writes one of so many answers what its label accuracy is about; empty where it writes freely."""
    return {"label_accuracy": f"among the {choices} different answers of the examples"} if choices else {}


def label_notes(names: Sequence[str], labels: Sequence[int]) -> list[str]:
    """Note which labels no test example has, given the label of each."""
    absent = [name for number, name in enumerate(names) if number not in set(labels)]
    if not absent:
        return []
    listed = list_some([f"{name!r:.40}" for name in absent], NAMED_LABELS)
    return [f"No test example has the label {listed}: its recall is not measured."]


def canary_notes(canaries: int, rows: int) -> list[str]:
    """Note how many of the test rows decide what is published and score nothing."""
    if not canaries:
        return []
    what = f"{canaries} of the {rows:,} test examples are canaries: they decide which versions are published"
    return [f"{what}, and are not scored."]


def protection(aggregator: Aggregator, hierarchy: Hierarchy | None) -> dict[str, str]:
    """Say which was chosen, that nobody sees a single answer or that single answers are judged: both at once there is not."""
    if hierarchy is not None and hierarchy.secure is not None:
        return {"protection": "secrecy"}
    judged = any(getattr(layer, "judges_answers", False) for layer in aggregator_layers(aggregator))
    return {"protection": "robustness"} if judged else {}


def secrecy_notes(aggregator: Aggregator, hierarchy: Hierarchy | None, simulated: bool) -> list[str]:
    """Notes on sums over members of a group, of which no answer is seen."""
    if hierarchy is None or hierarchy.secure is None:
        return []
    notes = [
        f"Secure aggregation: answers are summed over at least {hierarchy.secure.least} members, so none can be rejected by itself."
    ]
    if simulated:
        notes.append(
            "Secure sums are simulated without masks and protect nobody here. A deployment computes the same numbers."
        )
    why = summed_by_factors(hierarchy.aggregator or aggregator)
    return [*notes, f"Merging a sum only approximates merging single answers: {why}."] if why else notes


def method_notes(rules: Rules, head: bool) -> list[str]:
    """Notes for a reader of the figures of a method with these rules; `head`: whether the model has one of its own."""
    notes = []
    if rules.private:
        sides = " and ".join({"dense": "the head"}.get(side, f"`{side}`") for side in rules.private)
        notes.append(
            f"Every client has a personal model ({sides} stay local): read the scores of clients, not the global test score."
        )
    if "dense" in rules.frozen and head:
        notes.append("The head is frozen: if the model came without one, it stays random.")
    return notes


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide on the numbers."""
    return {name: metadata.version(name) for name in LIBRARIES if _installed(name)}


def machine_kind() -> dict[str, object]:
    """The kind of machine, not which one: processor, the widest instructions that torch uses there, cores, Python."""
    return {
        "cpu": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
    }


def computing_environment() -> dict[str, object]:
    """Software and hardware on which the last digits of a run depend."""
    return {**library_versions(), **machine_kind(), "fedloom": metadata.version("fedloom")}


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
