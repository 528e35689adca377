"""MLflow: figures for a tracking server or a local database, one MLflow run for each run.

Without a place it is where MLflow itself would write: MLFLOW_TRACKING_URI, or a database in the working folder. Figures are sent by
MLflow's own thread, so that a slow server does not hold up the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedloom.core.errors import Refused
from fedloom.core.files import read_json, write_json
from fedloom.core.text import first_line
from fedloom.runs.trackers.tracker import Tracker, settings_texts

LINK = "mlflow.json"
"""In a run folder: which MLflow run it is, so that a run that goes on goes on there."""
EXPERIMENT = "fedloom"
"""Experiment of the runs where MLFLOW_EXPERIMENT_NAME names no other."""
ENDS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
LONGEST = 6000
"""Characters of a setting that MLflow takes."""
TRIES = "2"
"""Attempts to reach a server, unless MLFLOW_HTTP_REQUEST_MAX_RETRIES says otherwise; by MLflow's own number they take minutes."""


class MLflow(Tracker):
    """Writes to the MLflow server or database at `place`."""

    def __init__(self, place: str = "") -> None:
        if find_spec("mlflow") is None:
            raise Refused("to", "mlflow", "install it first: pip install mlflow-skinny, or mlflow for its pages too")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow would report its use to its makers
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", TRIES)
        from mlflow.tracking import MlflowClient

        try:
            self.client = MlflowClient(place or None)
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            known = self.client.get_experiment_by_name(name)
            self.experiment = known.experiment_id if known else self.client.create_experiment(name)
        except Exception as error:  # each of its stores raises what its library does
            remedy = f"MLflow cannot write there: {type(error).__name__}: {first_line(error)}"
            raise Refused("to", f"mlflow:{place}" if place else "mlflow", remedy) from error
        self.run = ""
        self.sent: list[Any] = []

    def begin(self, folder: Path, manifest: Mapping[str, Any], version: int) -> None:
        """Create the MLflow run, or open again that of the run that goes on."""
        from mlflow.entities import Param

        link = {"uri": str(self.client.tracking_uri), "experiment": self.experiment}
        known = read_json(folder / LINK) if (folder / LINK).exists() else {}
        if {**known, "run": ""} == {**link, "run": ""}:
            self.run = str(known["run"])
            self.client.update_run(self.run, status="RUNNING")
            return
        name = str(manifest["name"] if manifest.get("deployed") else folder.resolve().name)
        tags = {"fedloom.version": str(manifest["fedloom"]), "fedloom.run_hash": str(manifest["run_hash"])}
        self.run = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        settings = [Param(key, text) for key, text in settings_texts(manifest).items() if len(text) <= LONGEST]
        for first in range(0, len(settings), 100):  # as many as MLflow takes at once
            self.client.log_batch(self.run, params=settings[first : first + 100])
        write_json(folder / LINK, {**link, "run": self.run})

    def write(self, version: int, figures: Mapping[str, float]) -> None:
        """Hand the figures to MLflow's thread."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        points = [Metric(name, value, now, version) for name, value in figures.items()]
        self.sent.append(self.client.log_batch(self.run, metrics=points, synchronous=False))

    def end(self, status: str) -> None:
        """Wait for what is on its way, and end the MLflow run."""
        for operations in self.sent:
            operations.wait()
        self.client.set_terminated(self.run, ENDS.get(status, "FAILED"))
