"""pytest on another copy of the package, in forks of one process that has the heavy libraries imported already.

A fresh process imports torch and hypothesis for three seconds before its first test; a fork begins with them.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
SECONDS = 300
"""Of processor time; a fork that takes more is killed, because the bug made a loop without end."""


@dataclass(frozen=True)
class Ran:
    """pytest's exit code (1: tests failed; negative: killed by that signal) and what it printed."""

    code: int
    output: str


class WarmPytest:
    """The process that forks; use it as a context."""

    def __enter__(self) -> WarmPytest:
        """Start it; it imports while the caller goes on."""
        command = [sys.executable, str(Path(__file__))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "STORMS": "5"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.process.communicate()

    def run(self, source: Path, tests: Sequence[str]) -> Ran:
        """Run these tests (paths and node ids below `tests/`) on the package in the folder `source`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        output = source / "output.txt"
        request = {"source": str(source), "output": str(output), "tests": list(tests)}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return Ran(int(self.process.stdout.readline()), output.read_text(encoding="utf-8"))


class _TestsTheCopy:
    """A plugin of pytest: fails when another copy of the package was imported."""

    def __init__(self, source: str) -> None:
        self.source = source

    def pytest_collection_finish(self) -> None:
        import fedloom

        assert Path(fedloom.__file__).is_relative_to(self.source)


def _serve() -> None:
    """Fork for each request of standard input; print the exit code of each fork."""
    import hypothesis
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401

    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # what fails need not become small
    hypothesis.settings.register_profile("hurried", phases=phases, database=None)
    hypothesis.settings.load_profile("hurried")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(source: str, output: str, tests: list[str]) -> None:
    """Run pytest in this fork, and end it."""
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[:0] = [source, str(ROOT)]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0", f"--rootdir={ROOT}"]
    options += [
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
        "-o",
        f"pythonpath={source} {ROOT}",
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    code = pytest.main([*options, *(str(TESTS / test) for test in tests)], [_TestsTheCopy(source)])
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
