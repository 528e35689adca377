"""Flower's SuperNode, as a process that ends when its work does.

    python -m fedloom.flower.node [--idle SECONDS] -- ARGUMENTS OF flower-supernode

Where the SuperNode's loop fails, by a certificate that has just expired or an answer 500 of the server, its main thread ends but its
HTTP thread keeps the process: it would sit there for good and look alive. Here it ends, and `fedloom join` starts it again.

`--idle` is the one place where something inside Flower is changed, and only if it is asked for: between two questions for work an
idle SuperNode waits three seconds, which is most of a short round trip. `tests/flower/test_contract.py` pins that line.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NoReturn

from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode


def hasten(longest: float) -> None:
    """Let the SuperNode's loop never sleep longer than so many seconds."""
    start_client_internal.time = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, longest)))


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Run the SuperNode; never returns, and leaves no thread."""
    parser = argparse.ArgumentParser(prog="fedloom.flower.node", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--idle", type=float, help="seconds between two questions for work, at most")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    given = parser.parse_args(words)
    if given.idle is not None:
        hasten(given.idle)
    sys.argv = ["flower-supernode", *given.rest[given.rest[:1] == ["--"] :]]
    code = 1
    try:
        flower_supernode()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        logging.shutdown()
        os._exit(code)


if __name__ == "__main__":
    main()
