"""What `fedloom serve` was told to do, as its folder keeps it for the ServerApp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.errors import Refused
from fedloom.flower.driven import Patience
from fedloom.override import override
from fedloom.run import Run
from fedloom.runfile import run_of

ORDER, RUN = "deployment.json", "run"
"""The file that an order is in, and the folder of the run."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be deployed: the run file with its `--set` settings, the clients to wait for before it begins, how long to wait.

    `metrics_port` is where the server tells its figures to Prometheus, on this machine only (None: nowhere). `above`: this is a
    region, and the site of the server above it that this file describes.
    """

    runfile: str
    settings: tuple[str, ...] = ()
    clients: int = 1
    patience: Patience = field(default_factory=Patience)
    metrics_port: int | None = None
    above: str | None = None

    @classmethod
    def of(cls, folder: Path) -> Order:
        """From the folder of a deployment. Raises Refused where there is none."""
        path = folder / ORDER
        try:
            told: Mapping[str, Any] = json.loads(path.read_bytes())
            patience = Patience(**told.get("patience", {}))
            port, settings = told.get("metrics_port"), tuple(told.get("settings", ()))
            return cls(told["runfile"], settings, int(told.get("clients", 1)), patience, port, told.get("above"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise Refused(
                "folder", str(folder), f"it holds no usable {ORDER} ({error}); `fedloom serve` writes one"
            ) from error

    def run(self) -> Run:
        """The Run value."""
        return override(run_of(Path(self.runfile)), self.settings)
