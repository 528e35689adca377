"""`fedloom join` with the toy worker. Arguments: server, folder, seconds of work, and perhaps the files of authority and key."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from fedloom.flower.join import Seat, join

server, place, seconds, *pair = sys.argv[1:]
folder = Path(place)
ca, key = map(Path, pair) if pair else (None, None)
worker = [sys.executable, str(Path(__file__).with_name("toyworker.py")), str(folder / "w.sock"), seconds]
try:
    join(Seat(server, folder, folder / "w.sock", worker, ca, key), partial(print, flush=True))
except KeyboardInterrupt:
    print("STOPPED", flush=True)
