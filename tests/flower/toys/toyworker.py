"""A worker for the tests: gives back what it gets, after some seconds. Arguments: socket, seconds."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

from fedloom.flower.pipe import LENGTH, received


def main() -> None:
    """Until it is stopped."""
    path, seconds = Path(sys.argv[1]), float(sys.argv[2])
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen()
        while True:
            line, _ = door.accept()
            with line:
                try:
                    size = received(line, LENGTH)
                    body = received(line, int.from_bytes(size, "big"))
                    time.sleep(seconds)
                    line.sendall(size + body)
                except OSError:
                    pass


if __name__ == "__main__":
    main()
