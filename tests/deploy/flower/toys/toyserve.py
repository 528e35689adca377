"""`fedloom serve` with the toy app. Arguments: folder, port, facts as JSON, and perhaps `insecure`, `resume`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.deploy.flower.serve import serve_deployment
from fedloom.deploy.flower.server_processes import ServerSetup


def main() -> None:
    """Until the run ends or is stopped."""
    folder, port, facts, *more = sys.argv[1:]
    say = partial(print, flush=True)
    try:
        server = ServerSetup(Path(folder), "127.0.0.1", int(port), "insecure" in more, "toyapp:app")
        say("END", serve_deployment(server, json.loads(facts), "resume" in more, say))
    except Refused as error:
        say("REFUSED", error)
    except KeyboardInterrupt:
        say("STOPPED")


if __name__ == "__main__":
    main()
