"""A real PostgreSQL server of the system's packages, started for a test in a folder of its own and ended with it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

NOBODY = "postgres"
"""The user of the system's package: the server refuses to be started by root."""


def programs() -> Path | None:
    """Return the folder of `initdb` and `pg_ctl`; None where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    here = shutil.which("initdb")
    return found[-1].parent if found else Path(here).parent if here else None


@contextmanager
def postgres_server(port: int) -> Iterator[str]:
    """Start a server on a port of this machine; inside, its address is `postgresql://...`, with the password "secret"."""
    where = programs()
    assert where is not None
    with TemporaryDirectory(prefix="fedloom-postgres-") as folder:  # pytest's own folders are closed to other users
        data, password = Path(folder) / "data", Path(folder) / "password"
        password.write_text("secret\n")
        if os.geteuid() == 0:
            for path in (Path(folder), password):
                shutil.chown(path, NOBODY)
        _as_nobody(
            [where / "initdb", "-D", data, "-U", "ward", f"--pwfile={password}", "-A", "scram-sha-256", "-E", "UTF8"]
        )
        options = f"-p {port} -k {folder} -h 127.0.0.1 -c fsync=off"
        _as_nobody([where / "pg_ctl", "-D", data, "-w", "-l", data / "log", "-o", options, "start"])
        try:
            yield f"postgresql://ward@127.0.0.1:{port}/postgres"
        finally:
            _as_nobody([where / "pg_ctl", "-D", data, "-m", "immediate", "stop"])


def _as_nobody(command: Sequence[str | Path]) -> None:
    prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.geteuid() == 0 else []
    subprocess.run([*prefix, *map(str, command)], check=True, capture_output=True, cwd="/")
