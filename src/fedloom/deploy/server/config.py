"""What `fedloom serve` was told to do, as its folder keeps it for the ServerApp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.core.errors import Refused
from fedloom.runs.run import Run
from fedloom.runs.run_file import override, load_run_file


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a deployment waits, in seconds.

    A task whose answer is not there after `task` is given to somebody else (None: never). A client that cannot be reached is waited
    for `away` seconds, in which its task is kept, before it counts as lost. A site that refused to work is asked again after `pause`,
    one that a message did not get to after `again`, and twice that the next time. What was sent `doubt` ago is sent again. The
    link is looked at every `poll`, for new sites every `look`.
    """

    task: float | None = None
    away: float = 180.0
    pause: float = 60.0
    retry: float = 2.0
    doubt: float = 900.0
    poll: float = 0.2
    look: float = 2.0

    def __post_init__(self) -> None:
        for name in ("task", "away", "pause", "again", "doubt", "poll", "look"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise Refused(f"patience.{name}", value, "give positive seconds")


CONFIG_FILE, RUN_FOLDER = "deployment.json", "run"
"""The file that an order is in, and the folder of the run."""


@dataclass(frozen=True, slots=True)
class DeploymentConfig:
    """What is to be deployed: the run file with its `--set` settings, the clients to wait for before it begins, how long to wait.

    `metrics_port` is where the server tells its figures to Prometheus, on this machine only (None: nowhere). `above`: this is a
    region, and the site of the server above it that this file describes.
    """

    runfile: str
    settings: tuple[str, ...] = ()
    min_clients: int = 1
    timeouts: Timeouts = field(default_factory=Timeouts)
    metrics_port: int | None = None
    above: str | None = None

    @classmethod
    def of(cls, folder: Path) -> DeploymentConfig:
        """From the folder of a deployment. Raises Refused where there is none."""
        path = folder / CONFIG_FILE
        try:
            told: Mapping[str, Any] = json.loads(path.read_bytes())
            patience = Timeouts(**told.get("patience", {}))
            port, settings = told.get("metrics_port"), tuple(told.get("settings", ()))
            return cls(told["runfile"], settings, int(told.get("clients", 1)), patience, port, told.get("above"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise Refused(
                "folder", str(folder), f"it holds no usable {CONFIG_FILE} ({error}); `fedloom serve` writes one"
            ) from error

    def run(self) -> Run:
        """The Run value."""
        return override(load_run_file(Path(self.runfile)), self.settings)
