"""A worker for the tests: gives back what it gets, after some seconds. Arguments: socket, seconds."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fedloom.deploy.site.worker_socket import Listener


def main() -> None:
    """Until it is stopped."""
    path, seconds = Path(sys.argv[1]), float(sys.argv[2])

    def answer(body: bytes) -> bytes:
        time.sleep(seconds)
        return body

    Listener(path, 2**30).serve(answer, lambda: b"", lambda size: b"")


if __name__ == "__main__":
    main()
