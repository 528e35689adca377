"""The inside of a measured process: `python -m bench.peers.child SYSTEM FOLDER` does a job and prints what came out."""

from __future__ import annotations

import time

BEGUN = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from importlib import import_module  # noqa: E402
from pathlib import Path  # noqa: E402

from bench.peers.clock import Clock  # noqa: E402


def main() -> None:
    """Started from here so that the module of a system is never `__main__`: Ray would send it along with every message."""
    clock = Clock(BEGUN)
    system, folder = sys.argv[1:]
    module = import_module(f"bench.peers.peer_{system}")
    clock.mark("import")
    report = module.run(Path(folder), clock)
    clock.mark("end")
    print(json.dumps(report | {"phases": clock.phases}), flush=True)


if __name__ == "__main__":
    main()
