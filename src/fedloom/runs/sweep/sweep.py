"""A sweep: many runs in one folder, carried out as far as they are missing, and compared.

runs/methods/                       the sweep: `sweep.json` names its runs, `report.html` compares them
runs/methods/aggregator=HLoRA,seed=0/     a run folder as any other: it can be reported on, exported, resumed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path

from fedloom.core.errors import Refused, refuse_damaged
from fedloom.core.files import DRAFT, LOCKED, numbered_path, require_vacant, write_json
from fedloom.core.text import list_some
from fedloom.report.page import write_report
from fedloom.report.run_log import SWEEP_FILE, read_manifest
from fedloom.runs.comparison import Comparison
from fedloom.runs.prepare import prepare
from fedloom.runs.progress import progress_observer, show_line
from fedloom.runs.resume import as_settled, require_same_settings
from fedloom.runs.run import Run
from fedloom.runs.run_result import open_result
from fedloom.runs.sweep.grid import PlannedRun, plan_runs
from fedloom.runs.sweep.processes import Show, State, failure_text, run_in_processes
from fedloom.runs.trackers.tracker import open_trackers

MOST_NAMED = 3
"""Failed runs that an error names."""


def sweep(
    run: Run,
    grid: Mapping[str, Iterable[object]],
    out: str | Path | None = None,
    jobs: int = 1,
    progress: bool = True,
    report: bool = True,
    to: str | Sequence[str] | None = None,
) -> Comparison:
    """Simulate a run with every combination of the values of a grid, and compare the results.

    Called again with the same folder it carries out what is missing: after Ctrl-C or a crash, or with more seeds or values.

    Args:
        run: the settings that all runs have in common.
        grid: by dotted field of the run the values that it takes, such as {"aggregator": [HLoRA(), FedIT()], "seed": range(3)}.
        out: folder of the sweep, with a run folder for each run (None: `runs/NAME-sweep`, numbered).
        jobs: how many runs are carried out at once. Each of them has its own process and its own copy of the model, and they share
            the cores; a script needs the usual `if __name__ == "__main__":`. 1: one after the other, in this process.
        progress: whether to show a line on how far it is.
        report: whether to write a report of each run, too; the comparison is always written.
        to: trackers of each run, such as "tensorboard".

    Raises:
        Refused: a field or a value that a run does not have; a folder with other runs; or some runs failed, after all others ended.
    """
    folder = Path(out) if out is not None else numbered_path(Path("runs"), f"{run.name}-sweep")
    planned = plan_runs(run, grid, folder)
    try:
        with show_line() if progress else nullcontext(_ignore) as line:
            return carry_out_sweep(planned, folder, jobs, SweepLine(line, len(planned)), report, to)
    except KeyboardInterrupt as stop:
        stop.add_note(f"The sweep is kept in {folder}; it goes on with the same call and out={str(folder)!r}.")
        raise


def _ignore(text: str) -> None:
    pass


def carry_out_sweep(
    planned: Sequence[PlannedRun],
    folder: Path,
    jobs: int,
    show: Show,
    report: bool = True,
    to: str | Sequence[str] | None = None,
) -> Comparison:
    """Carry out what is missing of these runs, write the page that compares them, and return the comparison.

    The other arguments are those of `sweep`.
    """
    if jobs < 1:
        raise Refused("jobs", jobs, "at least one run has to be carried out at a time")
    open_trackers(to)  # a mistake is found before anything is written
    missing = _open_folder(planned, folder)
    failures = dict[str, str]()

    def note(one: PlannedRun, state: State, share: float, text: str) -> None:
        if state == "failed":
            failures[one.name] = text
        show(one, state, share, text)

    for one in planned:
        if one not in missing:
            note(one, "finished", 1.0, "")
    carry_out = partial(carry_out_run, jobs=jobs, report=report, to=to)
    if jobs == 1:
        _run_here(missing, carry_out, note)
    else:
        run_in_processes(missing, jobs, carry_out, note)
    finished = [one.folder for one in planned if one.name not in failures]
    if finished:
        write_report(finished, folder / "report.html")
    if failures:
        named = list_some([f"{name}: {why}" for name, why in failures.items()], MOST_NAMED)
        raise Refused("sweep", f"{len(failures)} of {len(planned)} runs", f"failed and can be tried again ({named})")
    return Comparison(tuple(map(open_result, finished)))


def _open_folder(planned: Sequence[PlannedRun], folder: Path) -> list[PlannedRun]:
    """Make the folder, or go on in it; return the runs that are not finished there.

    Raises Refused for a folder that is no sweep's, and where one of its runs is another than the one that is planned, or is going on.
    """
    if not (folder / SWEEP_FILE).is_file():
        require_vacant(folder)
        folder.mkdir(parents=True, exist_ok=True)
    missing = [one for one in planned if not _is_finished(one)]
    write_json(folder / SWEEP_FILE, {"fedloom": version("fedloom"), "runs": [one.name for one in planned]})
    return missing


def _is_finished(planned: PlannedRun) -> bool:
    if not (planned.folder / "manifest.json").is_file():
        return False
    about = read_manifest(planned.folder)
    with refuse_damaged("run folder", str(planned.folder)):
        require_same_settings(planned.folder, about, as_settled(planned.load(), about["run"]))
    if about["status"] == "running":
        raise Refused("sweep", str(planned.folder), "its run is going on in another process; wait for it or stop it")
    return bool(about["status"] == "finished")


def _run_here(planned: Sequence[PlannedRun], carry_out: Callable[..., None], show: Show) -> None:
    """Carry out runs one after the other in this process."""
    for one in planned:
        show(one, "running", 0.0, "")
        try:
            carry_out(one, partial(show, one, "running"))
        except Exception as error:
            show(one, "failed", 0.0, failure_text(error))
        else:
            show(one, "finished", 1.0, "")


def carry_out_run(
    planned: PlannedRun,
    show: Callable[[float, str], None],
    jobs: int = 1,
    report: bool = True,
    to: str | Sequence[str] | None = None,
) -> None:
    """Carry out one run of a sweep, or what is left of it; `show` is called with how far it is.

    `jobs` runs share the cores, where the run leaves the number of threads open.
    """
    begun = (planned.folder / "manifest.json").is_file()
    if not begun and planned.folder.is_dir():
        _clear_unbegun(planned.folder)
    job = prepare(planned.load(), planned.folder if begun else None, workers=jobs)
    job.execute(planned.folder, [progress_observer(job, show), *open_trackers(to)], report=report)


def _clear_unbegun(folder: Path) -> None:
    """Remove what a run leaves that was killed before it had a manifest."""
    for path in folder.iterdir():
        if path.is_file() and (path.suffix == DRAFT or (path.name == LOCKED and path.stat().st_size == 0)):
            path.unlink()


class SweepLine:
    """Shows a sweep as one line: how many runs are finished, and how far those are that go on."""

    def __init__(self, write: Callable[[str], None], count: int) -> None:
        self.write, self.count = write, count
        self.finished, self.failed = 0, 0
        self.running = dict[str, str]()

    def __call__(self, planned: PlannedRun, state: State, share: float, text: str) -> None:
        """Take the state of a run."""
        if state == "running":
            self.running[planned.name] = f"{planned.name} {100 * share:.0f} %  {text}".strip()
        else:
            self.running.pop(planned.name, None)
            self.finished += state == "finished"
            self.failed += state == "failed"
        failed = f", {self.failed} failed" if self.failed else ""
        self.write("  ".join([f"{self.finished}/{self.count} runs{failed}", *self.running.values()]))
