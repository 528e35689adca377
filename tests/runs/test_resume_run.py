"""Runs of a tiny model that are interrupted or killed and go on to the same files; what cannot be resumed is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom import (
    Averaged,
    DeltaInt8,
    FedBuff,
    FedFa,
    FedIT,
    FedSA,
    FLoRA,
    Hierarchy,
    Immediate,
    Limits,
    Link,
    Momentum,
    Plan,
    RandomGroups,
    RandomRank,
    RateByRank,
    Refused,
    Rounds,
    Rows,
    prepare,
)
from fedloom.core.schema import Malformed
from fedloom.report.run_log import read_run_log
from fedloom.runs import checkpoint
from fedloom.runs.replay import replay
from fedloom.runs.resume import (
    CHECKPOINT,
    locked,
)
from fedloom.runs.state_files import STATES
from tests.support import killed_runs
from tests.support.folder_runs import at_version, interrupt_run, stop_at
from tests.support.same_bytes import COMPARED
from tests.support.tiny_models import tiny_run, toy_rows

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(fedloom.__file__).parents[1]), str(ROOT)]),
}


def asynchronous(encoder: Path, **more: Any) -> Any:
    return tiny_run(
        encoder, **({"schedule": FedFa(window=3, max_in_flight=4), "limits": Limits(versions=8), "seed": 5} | more)
    )


@pytest.fixture(scope="module")
def undisturbed(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its answers kept."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(asynchronous(encoder)).execute(out, report=False, keep_updates=True)
    return out


@pytest.fixture(scope="module")
def half(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, interrupted; tests must not write into it."""
    return interrupt_run(asynchronous(encoder), tmp_path_factory.mktemp("half") / "out", checkpoint_seconds=0.0)


def test_an_interrupted_run_goes_on_to_the_same_files(
    encoder: Path, undisturbed: Path, half: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    (out / "checkpoint.draft").write_bytes(b"half")
    job = prepare(asynchronous(encoder), resume=out)
    assert job.resumed_from is not None
    assert "version 4" in job.resumed_from.resume_point
    outcome = job.execute(report=False)
    assert (len(outcome.scores), outcome.folder) == (9, out)
    for name in (*COMPARED, "manifest.json"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not (out / "checkpoint.draft").exists()
    with pytest.raises(Refused, match=r"its run is finished .* --more N adds N versions"):
        prepare(asynchronous(encoder), resume=out)


@pytest.mark.slow
def test_a_run_without_a_checkpoint_begins_again_in_its_folder(
    encoder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = interrupt_run(asynchronous(encoder), tmp_path / "out")
    assert not (out / CHECKPOINT).exists(), "half a minute had not passed"
    job = prepare(asynchronous(encoder), resume=out)
    assert job.resumed_from is not None
    assert "version 0" in job.resumed_from.resume_point
    job.execute(report=False)
    for name in COMPARED:
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"schedule": FedFa(window=4, max_in_flight=4)}, ("schedule.window: 3 there, 4 here",)),
        ({"schedule": Rounds()}, ("schedule.type", "FedFa", "Rounds")),
        ({"data": Rows(toy_rows(120))}, ("data.rows.rows: 240 there, 120 here",)),
        ({"seed": 6}, ("seed: 5 there, 6 here",)),
        ({"seed": 0}, ("seed: 5 there, 0 here",)),
        ({"held_out": 0.0}, ("held_out: 0.2 there, 0.0 here",)),
    ],
)
def test_another_run_is_refused_with_what_differs(
    encoder: Path, half: Path, more: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(Refused, match="not the one that was begun") as caught:
        prepare(asynchronous(encoder, **more), resume=half)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_other_data_under_the_same_name_are_refused(encoder: Path, half: Path, tmp_path: Path) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    text = (out / "manifest.json").read_text(encoding="utf-8")
    (out / "manifest.json").write_text(text.replace('"majority": 0.5', '"majority": 0.6'), encoding="utf-8")
    with pytest.raises(
        Refused, match=r"its data or its model are not what .*baselines\.majority: 0\.6 there, 0\.5 here"
    ):
        prepare(asynchronous(encoder), resume=out)


def test_another_base_model_under_the_same_name_is_refused(encoder: Path, half: Path, tmp_path: Path) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    about = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    (out / "manifest.json").write_text(json.dumps(about | {"base_weights": "0123456789ab"}), encoding="utf-8")
    with pytest.raises(Refused, match=r"its data or its model are not what .*base_weights: \"0123456789ab\" there"):
        prepare(asynchronous(encoder), resume=out)
    del about["base_weights"]  # a manifest of an earlier fedloom
    (out / "manifest.json").write_text(json.dumps(about), encoding="utf-8")
    assert prepare(asynchronous(encoder), resume=out).resumed_from is not None


def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(encoder: Path, half: Path, tmp_path: Path) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    good = (out / CHECKPOINT).read_bytes()
    newer = good.replace(b"[%d, " % checkpoint.FORMAT, b"[%d, " % (checkpoint.FORMAT + 1), 1)
    assert newer != good
    for bad in (b"", good[:-1], good[:99] + b"x" + good[100:], newer):
        (out / CHECKPOINT).write_bytes(bad)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(Refused, match=r"cannot be used: .* remove it to begin again at version 0"):
            prepare(asynchronous(encoder), resume=out)
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / CHECKPOINT).write_bytes(good)
    (out / "trace.jsonl").write_bytes(b"")
    with pytest.raises(Refused, match=r"trace\.jsonl is shorter"):
        prepare(asynchronous(encoder), resume=out)


def test_what_is_no_run_or_still_goes_on_is_refused(encoder: Path, half: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(Refused, match=r"holds a manifest\.json"):
            prepare(asynchronous(encoder), resume=place)
    out = shutil.copytree(half, tmp_path / "out")
    job = prepare(asynchronous(encoder), resume=out)
    before = (out / "manifest.json").read_bytes()
    with locked(out), pytest.raises(Refused, match="still going on"):
        job.execute()
    assert (out / "manifest.json").read_bytes() == before
    with pytest.raises(Refused, match="continues in its own folder"):
        job.execute(tmp_path / "elsewhere")


def test_the_kernel_is_the_one_that_was_chosen_first(encoder: Path, half: Path, tmp_path: Path) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    text = (out / "manifest.json").read_text(encoding="utf-8")
    other = {"onednn": "torch", "torch": "onednn", "fused": "torch"}
    found = next(name for name in other if f'"kernel": "{name}",' in text)
    (out / "manifest.json").write_text(
        text.replace(f'"kernel": "{found}",', f'"kernel": "{other[found]}",'), encoding="utf-8"
    )
    job = prepare(asynchronous(encoder), resume=out)
    assert job.base.computation["kernel"] == other[found]


def test_other_libraries_are_noted(encoder: Path, half: Path, tmp_path: Path) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    text = (out / "manifest.json").read_text(encoding="utf-8")
    (out / "manifest.json").write_text(text.replace('"peft": "', '"peft": "9.', 1), encoding="utf-8")
    (note,) = prepare(asynchronous(encoder), resume=out).describe()["notes"]  # type: ignore[misc]
    assert "peft 9." in note
    assert "last digits" in note


@pytest.mark.slow
@pytest.mark.parametrize("kills", [9, pytest.param(50, marks=pytest.mark.storms)])
def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(tmp_path: Path, kills: int) -> None:
    """kill -9 from outside at any moment, and from inside in the middle of a checkpoint, a rename, a line, the last files."""
    command = [sys.executable, str(Path(killed_runs.__file__)), str(tmp_path), str(kills), "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=590, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1].removesuffix(" kills")) >= kills


def version_at(path: Path) -> int:
    """Of a checkpoint that is replaced now and then; one that was replaced while it was read is looked at again."""
    while True:
        with suppress(Malformed):
            return int(checkpoint.read_checkpoint(path).about["version"])


LONGER: dict[str, dict[str, Any]] = {
    "rounds": {},
    "asynchronous, a rate by rank": {
        "schedule": FedFa(window=3, max_in_flight=4),
        "plan": Plan(RandomRank(2, 8), 4, rate=RateByRank(1.0)),
    },
    "private, compressed": {
        "schedule": FedBuff(buffer_size=2, max_in_flight=4),
        "aggregator": FedSA(),
        "transfer": DeltaInt8(),
    },
    "folds, stragglers cancelled": {"schedule": Rounds(cohort_size=3, over_selection=1.5), "aggregator": FLoRA()},
    "server memory": {"schedule": Immediate(max_in_flight=3), "aggregator": Averaged(Momentum(FedIT()))},
    "edges": {
        "schedule": FedFa(window=2, max_in_flight=2),
        "hierarchy": Hierarchy(RandomGroups(groups=2), link=Link(1e6, 1e6)),
    },
}


NUMBERS = ("trace.jsonl", "metrics.jsonl", "adapter/adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "every"),
    [
        pytest.param(kind, every, marks=[pytest.mark.storms] * (k % 2))
        for k, (kind, every) in enumerate(zip(LONGER, (1, 0, 3, 1, 2, 1), strict=True))
    ],
)
def test_a_finished_run_made_longer_is_the_longer_run(encoder: Path, tmp_path: Path, kind: str, every: int) -> None:
    """Also killed in between: the same bytes, a trace that replays, and a manifest that says where it had ended."""

    def run(versions: int) -> Any:
        return tiny_run(encoder, **LONGER[kind], limits=Limits(versions=versions, evaluate_every=every), seed=5)

    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare(run(6)).execute(whole, report=False)
    assert not (whole / STATES).exists(), "it ended before its first checkpoint, so nothing goes on from these files"
    prepare(run(3)).execute(out, report=False, checkpoint_seconds=0.0 if every else 30.0, keep_updates=True)
    name = json.loads((out / "manifest.json").read_bytes())["run_hash"]
    child = os.fork()
    if not child:
        try:
            dies = [at_version(5, lambda: os.kill(os.getpid(), signal.SIGKILL))]
            prepare(run(3), resume=out, more=3).execute(observers=dies, report=False, checkpoint_seconds=0.0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    prepare(run(3), resume=out).execute(report=False)
    for file in NUMBERS:
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file
    assert replay(out).difference == ""
    about, wanted = (json.loads((folder / "manifest.json").read_bytes()) for folder in (out, whole))
    assert about.pop("extended") == [{"version": 3, "run_hash": name}]
    assert about == wanted
    prepare(run(3), resume=out, more=1).execute(report=False)
    about = json.loads((out / "manifest.json").read_bytes())
    assert about["status_reason"] == "7 versions made"
    assert [entry["version"] for entry in about["extended"]] == [3, 6]


@pytest.mark.slow
def test_a_run_that_time_ended_is_made_longer_without_its_limit(encoder: Path, tmp_path: Path) -> None:
    def run(**limits: Any) -> Any:
        return tiny_run(encoder, limits=Limits(**limits))

    prepare(run(versions=4)).execute(tmp_path / "whole", report=False)
    ends = [line["time"] for line in read_run_log(tmp_path / "whole").versions]
    timed, out = run(versions=90, seconds=(ends[1] + ends[2]) / 2), tmp_path / "out"
    prepare(timed).execute(out, report=False)
    assert len(read_run_log(out).versions) == 2
    prepare(timed, resume=out, more=2).execute(report=False)
    for file in NUMBERS:
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.slow
def test_an_extension_cut_short_before_the_old_end_leaves_the_old_adapter(encoder: Path, tmp_path: Path) -> None:
    """A run without a checkpoint is computed again from the beginning; until it is where it was, its adapter stays."""
    run, out = tiny_run(encoder), tmp_path / "out"
    prepare(run).execute(out, report=False)
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        prepare(run, resume=out, more=1).execute(observers=[stop_at(KeyboardInterrupt, 2)], report=False)
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_only_a_finished_run_is_made_longer_and_only_the_same_run(encoder: Path, undisturbed: Path, half: Path) -> None:
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    for more, folder, run, why in (
        (1, half, asynchronous(encoder), "has not come to its end; go on with --resume"),
        (0, undisturbed, asynchronous(encoder), "at least 1"),
        (1, None, asynchronous(encoder), "name the folder of the finished run"),
        (1, undisturbed, asynchronous(encoder, seed=6), r"seed: 5 there, 6 here; .* with start=DIR"),
    ):
        with pytest.raises(Refused, match=why):
            prepare(run, resume=folder, more=more)
    assert before == {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_it_may_go_on_with_other_workers(encoder: Path, tmp_path: Path) -> None:
    """Killed while two processes train, which end with it, and resumed by one."""
    run = tiny_run(encoder, limits=Limits(versions=6))
    prepare(run).execute(tmp_path / "alone", report=False)
    code = "import sys; from pathlib import Path; from tests.support.tiny_models import *; settle(); from fedloom import *\n"
    code += "if __name__ == '__main__':\n    run = tiny_run(Path(sys.argv[1]), limits=Limits(versions=6))\n"
    code += "    prepare(run).execute(Path(sys.argv[2]), workers=2, report=False, checkpoint_seconds=0)\n"
    (tmp_path / "start.py").write_text(code, encoding="utf-8")
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "start.py"), str(encoder), str(out)], cwd=ROOT, env=ENVIRONMENT
    )
    while child.poll() is None and not (out / CHECKPOINT).exists():
        time.sleep(0.01)
    while child.poll() is None and version_at(out / CHECKPOINT) < 2:
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    job = prepare(run, resume=out)
    assert job.resumed_from is not None
    assert job.resumed_from.version >= 2
    job.execute(report=False)
    for name in COMPARED:
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
