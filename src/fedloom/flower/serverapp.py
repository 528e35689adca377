"""The ServerApp that a deployment submits to Flower. It carries no code: it names this module, installed at the server."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import ServerApp
from flwr.superlink.grid import HttpGrid

from fedloom.errors import Refused
from fedloom.flower.grid import GridLink
from fedloom.flower.processes import die_with_parent

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator, arg-type]
def main(grid: HttpGrid, context: Context) -> None:
    """Carry out the deployment of the folder that the run's configuration names, and leave word of how it ended."""
    from fedloom.flower import deploy  # type: ignore[attr-defined, unused-ignore]

    die_with_parent()
    folder = Path(str(context.run_config["folder"]))
    note = attempt(folder, int(str(context.run_config["attempt"])))
    _log_to(folder / "logs" / "serverapp.log")
    write(note, pid=os.getpid())
    try:
        write(note, pid=os.getpid(), reason=deploy.run(GridLink(grid), folder))
    except Refused as error:
        write(note, pid=os.getpid(), refused=str(error))
        raise
    except Exception as error:
        traceback.print_exc()
        write(note, pid=os.getpid(), failed=f"{type(error).__name__}: {error}")
        raise


def attempt(folder: Path, number: int) -> Path:
    """Where the ServerApp of the deployment's n-th Flower run says that it lives, and how it ended."""
    return folder / "flower" / f"attempt-{number}.json"


def write(path: Path, **facts: object) -> None:
    """A JSON file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(facts), encoding="utf-8")
    fresh.replace(path)


def _log_to(path: Path) -> None:
    """What this process prints goes there; Flower would throw it away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
