"""The ServerApp that a deployment submits to Flower. It carries no code: it names this module, installed at the server."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import ServerApp
from flwr.superlink.grid import HttpGrid

from fedloom.core.errors import Refused
from fedloom.core.files import disk_full_error, open_regular, private_folder
from fedloom.deploy import json_log
from fedloom.deploy.flower.app_outcome import AppOutcome, write_outcome
from fedloom.deploy.flower.grid import GridTransport
from fedloom.deploy.flower.server_processes import HOME
from fedloom.deploy.flower.site_calls import AWAITED
from fedloom.deploy.flower.supervisor import die_with_parent
from fedloom.deploy.link import Transport

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator, arg-type]
def main(grid: HttpGrid, context: Context) -> None:
    """Carry out the deployment of the folder that the run's configuration names, and leave the outcome."""
    from fedloom.deploy.start import run_deployment  # heavy

    run_server_app(grid, context, run_deployment)


def run_server_app(grid: HttpGrid, context: Context, run: Callable[[Transport, Path], str]) -> None:
    """Call `run` with a transport, with a log, and leave the outcome for the server that waits for it."""
    die_with_parent(os.getppid())
    folder, attempt = Path(str(context.run_config["folder"])), int(str(context.run_config["attempt"]))
    _log_to(folder / "logs" / "serverapp.log")
    pid = os.getpid()
    write_outcome(folder, attempt, AppOutcome(pid))
    try:
        write_outcome(
            folder, attempt, AppOutcome(pid, reason=run(GridTransport(grid, folder / HOME / AWAITED), folder))
        )
    except Refused as error:
        write_outcome(folder, attempt, AppOutcome(pid, refused=str(error)))
        raise
    except Exception as error:
        lack = disk_full_error(error)
        how = {"full": str(lack.filename or folder)} if lack else {"failed": f"{type(error).__name__}: {error}"}
        write_outcome(folder, attempt, AppOutcome(pid, **how))
        with suppress(OSError):  # the log is on the same disk
            traceback.print_exc()
        raise


def _log_to(path: Path) -> None:
    """Send the output of this process there; Flower would throw it away."""
    private_folder(path.parent)
    with open_regular(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    json_log.to_stderr()
