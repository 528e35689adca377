"""The core and the policies: no clock, no network, no threads, no randomness but the seeded kind, no heavy library."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedloom

ROOT = Path(fedloom.__file__).parent
ROOMS = ("core", "aggregate", "schedule", "plan", "hierarchy")
TOUCHES_FILES = {
    "core/files.py": {"imports io", "imports os", "imports pathlib", "imports shutil", "calls open"},
    "core/packed_log.py": {"imports io", "imports os"},
    "core/schema.py": {"imports pathlib"},
}
"""The first opens files without following links, and writes them whole or not at all, for every room above; the second packs what is
written to a file that was opened; for the third a path is one of the values that it reads and writes.
"""
CORE = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
CORE = [path for path in CORE if str(path.relative_to(ROOT)) not in TOUCHES_FILES]
IMPURE = {
    "time", "datetime", "socket", "ssl", "http", "urllib", "asyncio", "threading", "_thread", "multiprocessing",
    "concurrent", "subprocess", "signal", "sched", "select", "selectors", "queue", "os", "io", "pathlib", "shutil",
    "tempfile", "secrets", "uuid", "pickle", "marshal", "shelve", "ctypes", "logging", "builtins", "importlib",
}  # fmt: skip
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "dropout"}
DRAWS |= {"rand_like", "randn_like", "randint_like", "svd_lowrank", "pca_lowrank"}
IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_", "geometric_", "cauchy_"}
GLOBAL_STATE = {
    "torch.manual_seed",
    "torch.seed",
    "torch.initial_seed",
    "torch.set_num_threads",
    "torch.set_default_dtype",
}
DEVICE = {"torch.cuda", "torch.random", "torch.default_generator"}
BUILTINS = {"open", "print", "input", "exec", "eval", "compile", "__import__", "hash", "id", "globals"}


def imports(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """(module, names taken from it) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or "", [alias.name for alias in node.names]


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain; what is not a name is `?`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def impurities(source: str) -> list[str]:
    """What a file does that the core must not."""
    tree, found = ast.parse(source), []
    for module, names in imports(tree):
        top = module.split(".")[0]
        if top not in {"torch", "fedloom"} and (top not in sys.stdlib_module_names or top in IMPURE):
            found.append(f"imports {module}")
        if module == "random" and names and set(names) != {"Random"}:
            found.append(f"takes {names} from random")
        if top == "torch" and any(
            part in {"random", "cuda", "distributed", "multiprocessing"} for part in module.split(".")
        ):
            found.append(f"imports {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += called(node)
        elif isinstance(node, ast.Attribute) and dotted(node) in DEVICE:
            found.append(dotted(node))
    return found


def called(call: ast.Call) -> list[str]:
    """What is wrong with one call."""
    name = dotted(call.func)
    last = name.split(".")[-1]
    if name in BUILTINS or name in GLOBAL_STATE:
        return [f"calls {name}"]
    if name.startswith("random.") and name != "random.Random":
        return [f"calls {name}: the stream that everyone shares"]
    if name == "random.Random" and not call.args:
        return [f"calls {name} without a seed"]
    draws = last in IN_PLACE or (name.startswith("torch.") and (last in DRAWS or ".init." in name))
    return [f"calls {name} without a generator"] if draws and not generated(call) else []


def generated(call: ast.Call) -> bool:
    return any(keyword.arg == "generator" for keyword in call.keywords)


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_core_module_is_pure(path: Path) -> None:
    assert impurities(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", TOUCHES_FILES)
def test_an_exception_touches_files_and_is_pure_otherwise(name: str) -> None:
    found = impurities((ROOT / name).read_text(encoding="utf-8"))
    assert {*found} == TOUCHES_FILES[name]


@pytest.mark.parametrize(
    "source",
    [
        "import time", "from datetime import datetime", "import socket", "import threading", "import asyncio.events",
        "import numpy as np", "from transformers import pipeline", "import safetensors.torch",
        "from random import random",
        "import random\nrandom.random()", "import random\nrandom.shuffle(x)", "import random\nrandom.Random()",
        "import torch\ntorch.rand(3)", "import torch\ntorch.randn(3, dtype=d)", "import torch\ntorch.manual_seed(0)",
        "x.normal_()", "torch.nn.init.kaiming_uniform_(w)", "import os\nos.environ['X']", "open('x')", "hash(name)",
        "torch.cuda.synchronize()", "def f():\n    import uuid",
    ],
)  # fmt: skip
def test_the_watch_sees_impurity(source: str) -> None:
    assert impurities(source)


@pytest.mark.parametrize(
    "source",
    [
        "import random\nrandom.Random(3)", "torch.randn(3, generator=g)", "torch.Generator().manual_seed(0)",
        "import math", "from fedloom.core.lora import cut",
    ],
)  # fmt: skip
def test_the_watch_lets_purity_pass(source: str) -> None:
    assert impurities(source) == []
