"""A recorded run through a fresh server: the same bytes, or the first line that is not the same."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedloom import FedBuff, FedIT, Limits, Momentum, Rounds, prepare
from fedloom.core.errors import Refused
from fedloom.core.fingerprint import fingerprint
from fedloom.core.policies import Fleet
from fedloom.core.schema import jsonable
from fedloom.core.types import Profile
from fedloom.runs.replay import Replayed, replay, server_from_manifest
from fedloom.schedule.shared.weights import uniform
from tests.support import toys
from tests.support.folder_runs import interrupt_run
from tests.support.tiny_runs import tiny_run


@pytest.fixture(scope="module")
def recorded(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its answers."""
    out = tmp_path_factory.mktemp("recorded") / "out"
    prepare(tiny_run(encoder, schedule=Rounds(cohort_size=3, weigh=uniform))).execute(
        out, report=False, keep_updates=True
    )
    return out


def test_a_recorded_run_gives_the_same_bytes_without_its_model(recorded: Path) -> None:
    lines = (recorded / "trace.jsonl").read_bytes().count(b"\n")
    assert replay(recorded) == Replayed(lines)
    assert len(list((recorded / "updates").iterdir())) == 1 + 3 * 3


@pytest.mark.slow
def test_a_run_with_a_compressed_trace_goes_on_and_is_repeated_like_any_other(
    recorded: Path, encoder: Path, tmp_path: Path
) -> None:
    """Interrupted and gone on with, it holds the lines of an undisturbed run with a plain trace, and any tool for gzip reads it."""
    run = tiny_run(encoder, schedule=Rounds(cohort_size=3, weigh=uniform), compress_trace=True)
    out = interrupt_run(run, tmp_path / "out", 2, checkpoint_seconds=0.0, keep_updates=True)
    prepare(run, resume=out).execute(report=False)
    packed, plain = (out / "trace.jsonl").read_bytes(), (recorded / "trace.jsonl").read_bytes()
    assert gzip.decompress(packed) == plain
    assert replay(out) == replay(recorded)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (recorded / name).read_bytes()


def change(recorded: Path, to: Path, number: int, old: bytes, new: bytes) -> Path:
    """A copy with one line of the trace changed."""
    shutil.copytree(recorded, to)
    lines = (to / "trace.jsonl").read_bytes().split(b"\n")
    assert old in lines[number]
    lines[number] = lines[number].replace(old, new, 1)
    (to / "trace.jsonl").write_bytes(b"\n".join(lines))
    return to


def line_of(recorded: Path, part: bytes) -> int:
    """The first line that holds this."""
    lines = (recorded / "trace.jsonl").read_bytes().split(b"\n")
    return next(number for number, line in enumerate(lines) if part in line)


@pytest.mark.parametrize(
    ("part", "old", "new", "said"),
    [
        (b'"Publish"', b'"version":1', b'"version":4', "commands[0].version: 4 there, 1 here"),
        (b'"Publish"', b'"Model","adapter":"sha256:', b'"Model","adapter":"sha256:x', "commands[0].model.adapter"),
        (b'"UpdateArrived"', b'"examples":', b'"examples":1', "event.result.examples"),
        (b'"UpdateArrived"', b'"task":', b'"task":9', "was not kept"),
        (b'"UpdateArrived"', b'"client":"c', b'"client":"x', "commands"),
        (b'"UpdateArrived"', b'{"time":', b'{"time":-', "events in order of time"),
        (b'"ClientJoined"', b'"ClientJoined"', b'"ClientJoint"', "no kind 'ClientJoint'"),
        (b'"ClientJoined"', b'"commands"', b' "commands"', "the same JSON in other bytes"),
        (b'"ClientJoined"', b'"event"', b'"events"', "tells no event"),
        (b'"ScoresReady"', b"{", b"", "line "),
    ],
)  # fmt: skip
def test_a_changed_line_is_found(
    recorded: Path, tmp_path: Path, part: bytes, old: bytes, new: bytes, said: str
) -> None:
    number = line_of(recorded, part)
    found = replay(change(recorded, tmp_path / "out", number, old, new))
    assert said in found.difference
    assert found.events == number, "what comes before is the same"
    assert found.difference.startswith(f"line {number + 1}")


def test_a_changed_answer_is_found(recorded: Path, tmp_path: Path) -> None:
    out = shutil.copytree(recorded, tmp_path / "out")
    shutil.copy(out / "updates" / "2.safetensors", out / "updates" / "3.safetensors")
    found = replay(out)
    assert "event.result.adapter" in found.difference
    (out / "updates" / "3.safetensors").write_bytes(b"junk")
    assert "damaged" in replay(out).difference


def test_a_line_that_a_killed_run_left_unfinished_is_passed_over(recorded: Path, tmp_path: Path) -> None:
    out = shutil.copytree(recorded, tmp_path / "out")
    text = (out / "trace.jsonl").read_bytes()
    (out / "trace.jsonl").write_bytes(text[:-30])
    about = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(about | {"status": "running"}))
    assert replay(out) == Replayed(text.count(b"\n") - 1)


@pytest.mark.parametrize("kept", [0, 8])
@pytest.mark.parametrize("torn", [b"", b'{"time":'])
def test_a_finished_run_whose_trace_was_cut_off_is_found(
    recorded: Path, tmp_path: Path, kept: int, torn: bytes
) -> None:
    out = shutil.copytree(recorded, tmp_path / "out")
    lines = (out / "trace.jsonl").read_bytes().splitlines(keepends=True)
    (out / "trace.jsonl").write_bytes(b"".join(lines[:kept]) + torn)
    found = replay(out)
    assert found.events == kept
    assert "ends early" in found.difference


def test_a_run_without_its_answers_says_how_to_record_them(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--keep-updates"):
        replay(finished)
    with pytest.raises(Refused, match="no trace"):
        replay(tmp_path)


def test_policies_of_ones_own_are_given_in_python(encoder: Path, tmp_path: Path) -> None:
    class Mine(Rounds):
        """Not fedloom's."""

    run = tiny_run(encoder, schedule=Mine(cohort_size=3), limits=Limits(versions=1))
    job = prepare(run)
    job.execute(tmp_path / "out", report=False, keep_updates=True)
    with pytest.raises(Refused, match=r"no kind 'Mine'.*replay\(folder, server\)"):
        replay(tmp_path / "out")
    assert not replay(tmp_path / "out", prepare(run).server).difference


@pytest.mark.parametrize(
    "policies",
    [
        *({"aggregator": method, "schedule": Rounds()} for method in toys.aggregators()),
        *({"schedule": schedule} for schedule in toys.schedules()),
        {
            "aggregator": Momentum(FedIT(), beta=0.5),
            "schedule": FedBuff(buffer_size=2, weigh=uniform),
            "transfer": None,
        },
    ],
    ids=lambda policies: "-".join(map(toys.called, policies.values())),
)
def test_every_policy_comes_back_from_the_manifest(recorded: Path, tmp_path: Path, policies: dict[str, Any]) -> None:
    out = tmp_path / "out"
    (out / "updates").mkdir(parents=True)
    shutil.copy(recorded / "updates" / "start.safetensors", out / "updates")
    about = json.loads((recorded / "manifest.json").read_text(encoding="utf-8"))
    about["run"] |= {name: jsonable(policy) for name, policy in policies.items()}
    (out / "manifest.json").write_text(json.dumps(about), encoding="utf-8")
    server = server_from_manifest(out)
    for name, policy in policies.items():
        assert toys.called(getattr(server, name)) == toys.called(policy)
    assert server.limits == Limits(versions=3)


def test_the_server_begins_with_the_first_model(recorded: Path, encoder: Path) -> None:
    job = prepare(tiny_run(encoder))
    server = server_from_manifest(recorded)
    assert fingerprint(server.state.model.adapter) == fingerprint(job.server.state.model.adapter)
    assert server.shape == job.server.shape
    fleet: Fleet = server.fleet()
    assert server.budget_rule(Profile("c", 10), fleet).steps == 4
