"""Configuration of a deployment: the file that `fedloom serve` leaves for the ServerApp, and how long the driver waits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.core.errors import UNREADABLE, Refused
from fedloom.core.files import read_json
from fedloom.core.schema import Decoder
from fedloom.privacy.private import client_level
from fedloom.privacy.secret_file import SERVER_NOISE
from fedloom.runs.run import Run
from fedloom.runs.run_file import load_run_file, override


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Waiting times of a deployment, in seconds; set by `--set patience.FIELD=SECONDS`.

    Fields:
        task: time after which an unanswered task is given to another client (default None: never).
        away: time after which a client that cannot be reached counts as lost, with its task (default 180).
        pause: time after which a site that refused is asked again (default 60).
        retry: time after which an undelivered request is sent again; it doubles each time, up to `pause` (default 2).
        doubt: time after which a request without any reply is sent again (default 900).
        poll: time between two turns of the driver (default 0.2).
        look: time between two updates of the nodes (default 2).
        sum: time that sites have for a step of a masked sum (default 60).
        end: time for which the server waits at the end of the run until each site knows of it (default 30).
    """

    task: float | None = None
    away: float = 180.0
    pause: float = 60.0
    retry: float = 2.0
    doubt: float = 900.0
    poll: float = 0.2
    look: float = 2.0
    sum: float = 60.0
    end: float = 30.0

    def __post_init__(self) -> None:
        for name in ("task", "away", "pause", "retry", "doubt", "poll", "look", "sum", "end"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise Refused(f"patience.{name}", value, "give positive seconds")


CONFIG_FILE, RUN_FOLDER, SECRET_FOLDER = "deployment.json", "run", "secret"
"""In the folder of a deployment: the file with its configuration, the folder of the run, and what no reader of that may have."""

_FIELDS: Mapping[str, tuple[Any, object]] = {
    "runfile": (str, None),
    "settings": (list[str], []),
    "clients": (int, 1),
    "patience": (dict[str, float | None], {}),
    "metrics_port": (int | None, None),
    "above": (str | None, None),
    "until": (int | None, None),
    "kept_megabytes": (int, 2000),
    "trackers": (list[str], []),
}
"""The fields of the file, with their kinds and their defaults."""


@dataclass(frozen=True, slots=True)
class DeploymentConfig:
    """Configuration of a deployment, as `fedloom serve` or `fedloom region` leaves it in the folder for the ServerApp.

    Fields:
        runfile: path of the run file.
        settings: fields of the Run that were given with `--set`.
        min_clients: the run begins when so many clients are there (key `clients` in the file).
        timeouts: how long to wait for what (key `patience` in the file).
        metrics_port: port of this machine at which Prometheus may ask for figures (None: none).
        above: this is a region, and this file describes it as a site of the server above (None: it is no region).
        until: the version up to which a finished run is made longer (None: it is not).
        kept_megabytes: megabytes of answers that are kept for a replay or a rollback, the latest (at least 1; default 2000).
        trackers: names of trackers that get the figures of the run.
    """

    runfile: str
    settings: tuple[str, ...] = ()
    min_clients: int = 1
    timeouts: Timeouts = field(default_factory=Timeouts)
    metrics_port: int | None = None
    above: str | None = None
    until: int | None = None
    kept_megabytes: int = 2000
    trackers: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> DeploymentConfig:
        """Read the configuration in the folder of a deployment. Raises Refused where there is none."""
        path = folder / CONFIG_FILE
        try:
            data, decoder = read_json(path), Decoder(finite=True)
            fields = {name: decoder.read(hint, data.get(name, value)) for name, (hint, value) in _FIELDS.items()}
            clients, patience = (fields.pop(name) for name in ("clients", "patience"))
            texts: dict[str, Any] = {name: tuple(fields.pop(name)) for name in ("settings", "trackers")}
            return cls(min_clients=clients, timeouts=Timeouts(**patience), **texts, **fields)
        except (*UNREADABLE, OSError) as error:
            raise Refused(
                "folder", str(folder), f"it holds no usable {CONFIG_FILE} ({error}); `fedloom serve` writes one"
            ) from error

    def run(self) -> Run:
        """Load the run file and apply the settings. Raises Refused."""
        return override(load_run_file(Path(self.runfile)), self.settings)


def server_secret(run: Run, folder: Path) -> bytes:
    """Return the secret of the noise that the server of this folder adds; it is made at first use (empty: it adds none)."""
    return SERVER_NOISE.read(folder / SECRET_FOLDER) if client_level(run.privacy) else b""
