"""The call by which Python starts a simulation: `fedloom.run(run)`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from fedloom.core.files import numbered_path, require_vacant
from fedloom.core.policies import Observer
from fedloom.runs.prepare import prepare
from fedloom.runs.progress import progress_line
from fedloom.runs.run import Run
from fedloom.runs.run_result import RunResult
from fedloom.runs.trackers.tracker import Tracker, open_trackers


def run(
    run: Run,
    out: str | Path | None = None,
    workers: int | str = 1,
    progress: bool = True,
    observers: Sequence[Observer | Tracker] = (),
    to: str | Sequence[str] | None = None,
    resume: str | Path | None = None,
    more: int | None = None,
) -> RunResult:
    """Simulate a run to its end, fill its run folder, and return the result.

    After Ctrl-C, or the stop button of a notebook, continue with `run(run, resume=folder)`.

    Args:
        run: the settings.
        out: the run folder, which must not exist yet (None: `runs/NAME`, numbered).
        workers: how many processes train. The results do not depend on it, except for the last digits where the run leaves its
            number of threads open (processes share the cores). A script that asks for 2 or more needs the usual
            `if __name__ == "__main__":`.
        progress: whether to show the progress of the run.
        observers: each is called with every step; trackers get the figures.
        to: trackers by name, "tensorboard" or "mlflow", each with ":PLACE" behind it where that is not the usual one.
        resume: folder of an unfinished run to continue, or with `more` of a finished one.
        more: number of versions to add to the finished run.

    Raises:
        Refused: a setting or an input that cannot be used, with its field, its value and the remedy.
    """
    trackers = open_trackers(to)  # a mistake is found before anything is loaded
    given = Path(out) if out is not None else None if resume is not None else numbered_path(Path("runs"), run.name)
    if given is not None and resume is None:
        require_vacant(given)
    job = prepare(run, resume, more, workers)
    try:
        with progress_line(job) if progress else nullcontext() as line:
            return job.execute(given, [*([line] if line else []), *observers, *trackers], workers)
    except KeyboardInterrupt as stop:
        stop.add_note(f"Saved to {resume or given}; continue with fedloom.run(run, resume={str(resume or given)!r}).")
        raise
