"""`fedloom join` with the toy worker. Arguments: server, folder, seconds of work, and perhaps the files of authority and key."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from fedloom.deploy.flower.join import SiteSetup, join_deployment


def main() -> None:
    """Until it is stopped."""
    server, place, seconds, *pair = sys.argv[1:]
    folder = Path(place)
    ca, key = map(Path, pair) if pair else (None, None)
    worker = [sys.executable, str(Path(__file__).with_name("toyworker.py")), str(folder / "w.sock"), seconds]
    say = partial(print, flush=True)
    try:
        join_deployment(SiteSetup(server, folder, folder / "w.sock", worker, ca, key), say)
    except KeyboardInterrupt:
        say("STOPPED")


if __name__ == "__main__":
    main()
