"""Whether the tree can be read: rooms on floors, names that stand once, no private words, a short gate.

    python -m bench.house [--quick]

Counts modules, imports and names of `src/fedloom` with Python's own parser. Without `--quick` it also runs `make check` and `.ci/run`
and keeps their seconds in `results/house.jsonl`; with `--quick` it repeats the last ones that were kept.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fedloom.runs.public_names import HOMES, METHOD_FOLDERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fedloom"
RESULTS = ROOT / "results" / "house.jsonl"
FLOORS = (
    ("cli",),
    ("deploy", "audit"),
    ("runs",),
    ("report", "simulate"),
    ("train",),
    ("hierarchy",),
    ("data",),
    ("privacy",),
    ("plan", "schedule", "aggregate"),
    ("core",),
)
"""Rooms, from the top down: a room imports only rooms on lower floors."""
PRIVATE_WORDS = frozenset(
    [
        "told",
        "heard",
        "led",
        "sat",
        "sat_below",
        "seat",
        "sheet",
        "begun",
        "kept",
        "handed",
        "driven",
        "telling",
        "said",
        "untellable",
        "misfit",
    ]
)
"""Words that no other federated system uses; nothing in `src` may bear one of them as its whole name."""
REASONS: Mapping[str, str] = {
    "audit.audit_page": "the page of `fedloom audit`",
    "audit.labels": "an attack",
    "audit.membership": "an attack",
    "audit.noise_check": "an algorithm: the server's noise made again with canaries",
    "audit.run_audit": "what one command does; a library may call it too",
    "audit.token_span": "an attack",
    "cli.record_view": "what one command shows",
    "core.truncated_svd": "an algorithm",
    "deploy.flower.join": "the door through which a site's command starts its processes",
    "deploy.flower.local_federation": "the processes that one command starts, apart from how they are shown",
    "deploy.flower.serve": "the door through which the server's command starts its processes",
    "deploy.region.region": "the process of a region, one of the two that a deployment's folder can start",
    "deploy.server.nodes": "which nodes are there and what was sent to them: state of its own beside the driver's",
    "deploy.site.deadline": "ends the process; the only user of faulthandler",
    "deploy.server.sum_exchange": "who is asked what while a sum is opened: state of its own beside the driver's",
    "deploy.site.export_sites": "one command",
    "deploy.site.machine_speed": "times steps of training: what the settings of a site may say instead",
    "deploy.site.site_noise": "an algorithm: noise on a whole answer",
    "deploy.site.worker": "what the process of a site does, beside how it is started",
    "deploy.site.sum_member": "the site's part in sums: state of its own beside the worker's",
    "privacy.secure_sum.group": "one of the two state machines of a round, apart from the other",
    "runs.dry_run.step_times": "measures this machine, apart from what is said of it",
    "runs.release_recorder": "the first observer of a private run, apart from how a run is carried out",
    "runs.run_template": "what one command writes",
    "runs.rollback": "one command; a replay whose versions are merged again",
    "deploy.start": "what Flower's server app calls; knows nothing of Flower",
    "hierarchy.near_iid": "an algorithm",
    "hierarchy.tree": "the machine behind the value `Hierarchy`",
    "report.figures_timeline": "drawings, apart from the facts: they import matplotlib",
    "report.live.folder_feed": "what of a folder is new: state of its own, apart from how it is served",
    "report.live.live_state": "what a page shows, apart from where the lines come from",
    "report.live.log_tail": "an algorithm: reads a log while it is written, cut and compressed",
    "report.live.server": "the door to what serves pages",
    "report.heterogeneity_page": "the page of `fedloom inspect`",
    "train.demo_model": "the door to the packages that bring the demo's weights",
    "train.engine.answer_tokens": "an algorithm that a field of `Engine` switches",
    "train.engine.first_token": "an algorithm that a field of `Engine` switches",
    "train.engine.linear_kernel": "an algorithm that a field of `Engine` switches",
    "train.engine.record_gradients": "an algorithm that `Run.privacy` switches",
    "train.workers.local_processes": "one kind of worker",
    "train.workers.pool": "an algorithm: divides work over workers of any kind",
    "train.workers.ray_actors": "the only door to Ray",
}
"""Modules that exactly one other imports, and why each is a file of its own."""
COMMANDS = "fedloom.cli.main"
"""The module that knows each command by its name."""


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(prog="bench.house", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="do not run the gate: repeat its last figures")
    quick = parser.parse_args(arguments).quick
    modules = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    imports = {name: sorted(imported_by(name, tree, modules.keys())) for name, tree in modules.items()}
    figures: dict[str, object] = {
        "top_level": len({path.name for path in PACKAGE.iterdir() if is_code(path)}),
        "circles": listed("circle", circles(imports)),
        "imports_upward": listed("import upward", upward(imports)),
        "public_names_twice": listed("class twice", twice(modules, ast.ClassDef)),
        "public_functions_twice": listed("function twice", twice(modules, ast.FunctionDef)),
        "private_vocabulary": listed("private word", private_words(modules)),
        "largest_flat_folder": max(len(list(folder.glob("*.py"))) for folder in folders()),
        "modules_with_one_importer": listed("one importer", one_importer(imports)),
        **(last_gate() if quick else gate()),
        "tests": tests(),
        "src_lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")),
    }
    for name, figure in figures.items():
        print(f"{name:28s} {figure}")
    print(json.dumps(figures))


def listed(what: str, rows: Iterable[str]) -> int:
    """Print each row; how many there are."""
    found = list(rows)
    for row in found:
        print(f"{what}: {row}")
    return len(found)


def name_of(path: Path) -> str:
    """Dotted name of the module in this file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_code(path: Path) -> bool:
    """Whether this entry of the package is a folder or a module that a reader finds."""
    return (path.is_dir() and any(path.glob("*.py"))) or (
        path.suffix == ".py" and path.stem not in ("__init__", "__main__")
    )


def folders() -> Iterator[Path]:
    """The package and the folders in it."""
    yield PACKAGE
    yield from (path for path in PACKAGE.rglob("*") if path.is_dir() and any(path.glob("*.py")))


def imported_by(name: str, tree: ast.AST, known: Iterable[str]) -> set[str]:
    """The package's own modules that a module imports, wherever in it the statement stands."""
    names, found = set(known), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & names
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & names
            if len(modules) < len(node.names):
                modules |= {node.module} & names
            found |= modules
    return found - {name}


def circles(imports: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Groups of modules that import each other, `fedloom` itself left out: its public names are imported when they are used."""
    graph = {name: [one for one in to if one != "fedloom"] for name, to in imports.items() if name != "fedloom"}
    reach = {name: reachable(graph, name) for name in graph}
    seen = set[str]()
    for name in sorted(graph):
        circle = {other for other in reach[name] if name in reach[other]}
        if circle and name not in seen:
            seen |= circle
            yield " <-> ".join(sorted(circle))


def reachable(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """What `start` imports, directly or not."""
    found, todo = set[str](), list(graph[start])
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += graph.get(name, ())
    return found


def upward(imports: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Imports of a room on the same or a higher floor."""
    floor = {room: number for number, rooms in enumerate(reversed(FLOORS)) for room in rooms}
    for name, modules in imports.items():
        here = name.split(".")[1] if "." in name else ""
        for module in modules:
            there = module.split(".")[1] if "." in module else ""
            if here in floor and (not there or (here != there and floor.get(there, -1) >= floor[here])):
                yield f"{name} -> {module}"


def twice(modules: Mapping[str, ast.Module], kind: type[ast.ClassDef] | type[ast.FunctionDef]) -> Iterator[str]:
    """Public names that are defined at the top of more than one module."""
    homes = defaultdict[str, list[str]](list)
    for module, tree in modules.items():
        for node in tree.body:
            if isinstance(node, kind) and not node.name.startswith("_") and node.name != "main":
                homes[node.name].append(module)
    yield from (f"{name}: {', '.join(own)}" for name, own in sorted(homes.items()) if len(own) > 1)


def private_words(modules: Mapping[str, ast.Module]) -> Iterator[str]:
    """Functions, classes, fields, parameters and modules whose name is a private word."""
    for module, tree in modules.items():
        if module.rpartition(".")[2] in PRIVATE_WORDS:
            yield f"module {module}"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and node.name in PRIVATE_WORDS:
                yield f"{module}:{node.lineno} {node.name}"
            elif isinstance(node, ast.arg) and node.arg in PRIVATE_WORDS:
                yield f"{module}:{node.lineno} parameter {node.arg}"
            if isinstance(node, ast.ClassDef):
                fields = [one.target for one in node.body if isinstance(one, ast.AnnAssign)]
                names = [one for one in fields if isinstance(one, ast.Name) and one.id in PRIVATE_WORDS]
                yield from (f"{module}:{one.lineno} field {node.name}.{one.id}" for one in names)


def one_importer(imports: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Modules that exactly one other one imports, with the reason for which they are files of their own.

    Not those that users reach by name: the modules of public names, the methods that are found by looking, and the commands.
    """
    commands = {name for name in imports[COMMANDS] if name.startswith("fedloom.cli.")}
    public = {*HOMES.values(), *commands, *(name for name in imports if name.startswith(METHOD_FOLDERS))}
    inside = {name: own for name, own in imports.items() if name != "fedloom"}
    counts = Counter(module for own in inside.values() for module in set(own))
    for name in sorted(inside):
        if counts[name] == 1 and name not in public:
            (by,) = (other for other, own in inside.items() if name in own)
            yield f"{name} (by {by}): {REASONS.get(name.removeprefix('fedloom.'), 'NO REASON GIVEN')}"


def gate() -> dict[str, object]:
    """Seconds of `make check` and of `.ci/run`, run now, and kept."""
    seconds = {}
    for name, command in (("check_seconds", ["make", "check"]), ("gate_seconds", ["bash", ".ci/run"])):
        start = time.monotonic()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds[name] = round(time.monotonic() - start)
    line = {**seconds, "load": round(os.getloadavg()[0], 1), "cores": os.cpu_count(), "machine": platform.processor()}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return dict(seconds)


def last_gate() -> dict[str, object]:
    """What `gate` kept last."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    kept = json.loads(lines[-1]) if lines else {}
    return {name: kept.get(name) for name in ("check_seconds", "gate_seconds")}


def tests() -> int:
    """Cases that pytest collects, slow ones too."""
    command = [".venv/bin/python", "-m", "pytest", "--collect-only", "-q", "-m", ""]
    ran = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return sum(int(count) for count in re.findall(r": (\d+)$", ran.stdout, re.MULTILINE)) or len(
        re.findall(r"::", ran.stdout)
    )


if __name__ == "__main__":
    main()
