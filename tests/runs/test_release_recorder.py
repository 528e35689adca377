"""Private runs on the disk: the ledger comes first, no exact answer lies in the folder, and after a kill nothing is under-counted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom import Constant, FedBuff, FedIT, Hierarchy, Limits, Private, RandomGroups, Refused, prepare
from fedloom.core.events import Publish, Release, ReleasesCounted, TimerFired
from fedloom.core.lora import named_tensors
from fedloom.core.seeds import simulated_secret
from fedloom.core.types import ClientState
from fedloom.privacy.accounting import Gaussian
from fedloom.privacy.ledger import LEDGER, Ledger, read_ledger, spent_by_unit
from fedloom.privacy.secret_noise import commitment
from fedloom.runs.archive import UPDATES
from fedloom.runs.checkpoint import read_checkpoint
from fedloom.runs.private_run import SIMULATED_SERVER
from fedloom.runs.release_recorder import ReleaseRecorder, later_releases, release_entry, releases_of
from fedloom.runs.replay import replay
from fedloom.runs.resume import CHECKPOINT
from fedloom.runs.rollback import roll_back
from fedloom.runs.state_files import STATES
from fedloom.runs.trace import Trace
from fedloom.schedule.shared.weights import uniform
from tests.support.folder_runs import interrupt_run
from tests.support.tiny_models import tiny_run

RELEASE = Release(1, 0, "independent", 0.5, 2.0, {"ann": 1.0, "bob": 0.5}, {"ann": 0.5, "bob": 0.25}, "ab" * 32)


def private_run(encoder: Path, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "schedule": FedBuff(buffer_size=2, max_in_flight=4, weigh=uniform),
        "aggregator": FedIT(),
        "limits": Limits(versions=6),
        "privacy": Private(clip=0.5, multiplier=1.0, most_answers=6),
        "seed": 5,
    }
    return tiny_run(encoder, **(settings | more))


class Answers:
    """An observer that keeps the bytes of exact answers: whoever finds them in a folder has found the answer."""

    def __init__(self) -> None:
        self.seen = list[bytes]()

    def __call__(self, now: float, event: Any, commands: Any) -> None:
        if hasattr(event, "result"):
            tensors = [tensor for tensor in named_tensors(event.result.adapter).values() if tensor.numel() > 8]
            self.seen += [tensor.contiguous().numpy().tobytes()[:32] for tensor in tensors]

    def found_in(self, folder: Path) -> set[str]:
        """The files that hold one of them."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.name for path in files if any(answer in path.read_bytes() for answer in self.seen)}


@pytest.fixture(scope="module")
def whole(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished private run, its answers kept."""
    out = tmp_path_factory.mktemp("private") / "out"
    prepare(private_run(encoder)).execute(out, report=False, keep_updates=True, checkpoint_seconds=0.0)
    return out


def test_a_release_is_in_the_ledger_before_anybody_else_sees_it(tmp_path: Path) -> None:
    with Ledger.opened(tmp_path / LEDGER) as ledger:
        record = ReleaseRecorder(ledger, Gaussian(1.0))
        record(0.0, TimerFired(), [RELEASE])
        assert list(read_ledger(tmp_path / LEDGER)) == [release_entry("", RELEASE)]
        record(0.0, TimerFired(), [RELEASE])  # made again to the same bytes
        assert ledger.spent["ann"] == (Gaussian(0.5),)


def test_more_than_was_promised_is_refused_and_not_written(tmp_path: Path) -> None:
    with Ledger.opened(tmp_path / LEDGER) as ledger:
        record = ReleaseRecorder(ledger, Gaussian(0.6))
        record(0.0, TimerFired(), [RELEASE])
        other = Release(1, 0, "independent", 0.5, 2.0, RELEASE.shares, RELEASE.spent, "cd" * 32)
        with pytest.raises(Refused, match="than the run promises"):
            record(0.0, TimerFired(), [other])
    assert len(list(read_ledger(tmp_path / LEDGER))) == 1


def test_what_was_released_after_a_checkpoint_is_counted() -> None:
    other = replace(RELEASE, version=4, shares={"ann": 1.0})
    found = later_releases([release_entry("", other), release_entry("", RELEASE)])
    assert found == ReleasesCounted({"ann": 2, "bob": 1}, {"ann": 4, "bob": 1})
    assert later_releases([]) is None


@pytest.mark.slow
def test_each_version_has_its_line_and_no_client_more_than_was_promised(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "trace.jsonl").read_text().splitlines()]
    released = [one for line in lines for one in line["commands"] if one["type"] == "Release"]
    entries = list(read_ledger(whole / LEDGER))
    assert [one["value"] for one in released] == [entry.about["value"] for entry in entries]
    assert len(entries) == 6
    for client, (event,) in spent_by_unit(entries).items():  # type: ignore[misc]
        spent = sum(one["spent"].get(client, 0.0) ** 2 for one in released)
        assert event.mu**2 == pytest.approx(spent)  # type: ignore[union-attr]
        assert event.mu <= 6**0.5  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_folder_tells_no_exact_answer_and_no_measure(encoder: Path, tmp_path: Path, whole: Path) -> None:
    """With the control that they are found where a run is not private."""
    found = []
    for name, privacy in (("plain", None), ("private", private_run(encoder).privacy)):
        answers, out = Answers(), tmp_path / name
        run = private_run(encoder, privacy=privacy)
        prepare(run).execute(out, [answers], report=False, keep_updates=True, checkpoint_seconds=0.0)
        found.append(answers.found_in(out))
        assert len(answers.seen) > 20
    assert len(found[0]) > 10
    assert found[1] == set()
    events = [json.loads(line)["event"] for line in (whole / "trace.jsonl").read_text().splitlines()]
    digests = [event["result"]["adapter"] for event in events if "result" in event]
    assert len(digests) >= 12
    assert all(digest.startswith("hmac:") for digest in digests)
    told = [event[part]["examples"] for event in events for part in ("profile", "result") if part in event]
    assert {*told} == {1}
    metrics = (whole / "metrics.jsonl").read_text()
    assert '"tokens":0' in metrics
    assert '"loss":null' in metrics
    assert '"kind":"client"' not in metrics


@pytest.mark.slow
def test_the_manifest_commits_to_the_secret_and_says_that_a_simulation_protects_nobody(whole: Path) -> None:
    about = json.loads((whole / "manifest.json").read_text())
    secret = simulated_secret(5, SIMULATED_SERVER)
    assert about["privacy"]["commitment"] == commitment(secret)
    assert about["privacy"]["noise"] == "simulated noise: no privacy"
    assert any("Simulated noise protects nobody" in note for note in about["notes"])
    assert secret.hex() not in (whole / "manifest.json").read_text()


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_private_one_says_that_another_ledger_counts_too(encoder: Path, whole: Path) -> None:
    notes = prepare(private_run(encoder, start=str(whole))).describe()["notes"]
    assert any("has a ledger of its own" in note for note in notes)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the ledger", "after the ledger", "after the trace"])
def test_a_run_that_died_around_a_release_goes_on_to_the_same_files(
    encoder: Path, tmp_path: Path, whole: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is released twice, and no release is without its line; the ledger is the same, byte for byte."""
    die_at(monkeypatch, moment, 3)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(private_run(encoder)).execute(out, report=False, keep_updates=True, checkpoint_seconds=0.0)
    monkeypatch.undo()
    seen = (out / "trace.jsonl").read_text().count('"type":"Release"')
    assert seen <= len(list(read_ledger(out / LEDGER))) <= 3
    prepare(private_run(encoder), resume=out).execute(report=False, keep_updates=True)
    for name in (LEDGER, "trace.jsonl", "metrics.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def die_at(monkeypatch: pytest.MonkeyPatch, moment: str, release: int) -> None:
    """Stop a run at its n-th release, at this moment of it."""
    owner: Any = Ledger if "ledger" in moment else Trace
    name, count = ("write" if owner is Ledger else "__call__"), 0
    written: Callable[..., Any] = getattr(owner, name)

    def dies(self: Any, *step: Any) -> Any:
        nonlocal count
        count += owner is Ledger or any(True for _ in releases_of(step[-1]))
        if count == release and moment.startswith("before"):
            raise KeyboardInterrupt
        found = written(self, *step)
        if count == release:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(owner, name, dies)


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["Ctrl-C", "overspent", "full disk"])
def test_a_version_that_is_not_in_the_ledger_leaves_no_adapter(
    encoder: Path, tmp_path: Path, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has made it when its line is written, and its model is in memory; the folder gets the version before."""
    before, out = interrupt_run(private_run(encoder), tmp_path / "before", version=2), tmp_path / "out"
    error: Any = {"Ctrl-C": KeyboardInterrupt, "overspent": Refused, "full disk": OSError}[reason]
    if reason == "Ctrl-C":
        die_at(monkeypatch, "before the ledger", 3)
    elif reason == "overspent":
        monkeypatch.setattr(
            ReleaseRecorder, "_overspent", lambda self, entry: "c00" if entry.about["version"] == 3 else None
        )
    else:
        written = Ledger.write
        monkeypatch.setattr(
            Ledger, "write", lambda self, one: written(self, one) if one.about["version"] < 3 else os.truncate("/", 0)
        )
    with pytest.raises(error):
        prepare(private_run(encoder)).execute(out, report=False)
    assert len(list(read_ledger(out / LEDGER))) == 2
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (before, out)]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_a_run_is_not_made_longer_than_its_budget(encoder: Path, tmp_path: Path) -> None:
    """With correlated noise more versions tell more of a client, though it gives no more answers."""
    privacy = Private(clip=0.5, multiplier=1.0, most_answers=3, noise="banded", apart=2, budget=(5.5, 1e-5))
    schedule = FedBuff(buffer_size=2, max_in_flight=4, weigh=uniform, discount=Constant())
    out, run = tmp_path / "out", private_run(encoder, privacy=privacy, schedule=schedule, limits=Limits(versions=2))
    prepare(run).execute(out, report=False)
    with pytest.raises(Refused, match=r"may spend .* fewer most_answers or versions"):
        prepare(run, resume=out, more=3)


@pytest.mark.slow
def test_a_ledger_that_was_changed_or_lost_stops_the_run(encoder: Path, tmp_path: Path) -> None:
    half = interrupt_run(private_run(encoder), tmp_path / "half", version=3, checkpoint_seconds=0.0)
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[400:])):
        out = shutil.copytree(half, tmp_path / "out", dirs_exist_ok=True)
        damage(out / LEDGER)
        with pytest.raises(Refused, match="what was spent is not known"):
            prepare(private_run(encoder), resume=out)
        (out / CHECKPOINT).unlink()
    (out / LEDGER).unlink()
    with pytest.raises(Refused, match="what was spent is not known"):
        prepare(private_run(encoder), resume=out)


@pytest.mark.slow
@pytest.mark.parametrize("tree", [None, Hierarchy(RandomGroups(groups=2))], ids=["flat", "tree"])
def test_a_replay_without_the_secret_checks_all_but_the_noise(
    encoder: Path, tmp_path: Path, whole: Path, tree: Hierarchy | None
) -> None:
    out = whole
    if tree is not None:
        out = tmp_path / "tree"
        prepare(private_run(encoder, hierarchy=tree)).execute(out, report=False, keep_updates=True)
    lines = (out / "trace.jsonl").read_bytes().count(b"\n")
    found = replay(out)
    assert (found.events, found.difference, found.unverified) == (lines, "", "")
    told = shutil.copytree(out, tmp_path / "told")
    found = replay(without_seed(told))
    assert (found.events, found.difference) == (lines, "")
    assert "not verified without the secret" in found.unverified
    with pytest.raises(Refused, match="not the one"):
        replay(told, secret=b"x" * 32)
    assert replay(told, secret=simulated_secret(5, SIMULATED_SERVER)).unverified == ""
    trace = (told / "trace.jsonl").read_text()
    cut = trace.index('"spent":{')
    (told / "trace.jsonl").write_text(trace[:cut] + trace[cut:].replace(":1.0", ":0.9", 1))
    assert "spent" in replay(told).difference
    (told / "trace.jsonl").write_text(trace)
    first, *_, last = sorted((told / UPDATES).glob("release-*.safetensors"))
    first.write_bytes(last.read_bytes())
    assert replay(told).difference


@pytest.mark.slow
def test_where_only_the_latest_answers_are_kept_a_replay_needs_the_secret(encoder: Path, tmp_path: Path) -> None:
    """It begins at a state of the server, which holds exact answers and is sealed."""
    out, privacy = tmp_path / "out", Private(clip=0.5, multiplier=1.0, most_answers=12)
    run = private_run(encoder, privacy=privacy, limits=Limits(versions=12))
    prepare(run).execute(out, report=False, keep_updates=150_000)
    found = replay(out)
    assert (found.difference, found.unverified) == ("", "")
    assert 0 < found.version < 12
    kept = {int(path.stem.rpartition("-")[2]) for path in (out / UPDATES).glob("release-*.safetensors")}
    assert kept == set(range(min(kept), 13))
    assert 1 < min(kept) <= found.version + 1
    with pytest.raises(Refused, match="sealed"):
        replay(without_seed(out))


def without_seed(folder: Path) -> Path:
    """The folder as that of a deployment: its secret does not follow from the seed."""
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"name"', '"deployed": true,\n "name"', 1))
    return folder


@pytest.mark.slow
def test_answers_are_not_released_once_more_by_a_rollback(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="once more"):
        roll_back(whole, without="c01", out=tmp_path / "other")


@pytest.mark.slow
def test_a_checkpoint_opens_with_its_secret_only(whole: Path) -> None:
    about = read_checkpoint(whole / CHECKPOINT, simulated_secret(5, SIMULATED_SERVER)).about
    assert 0 < about[LEDGER] <= (whole / LEDGER).stat().st_size
    with pytest.raises(ValueError, match="sealed"):
        read_checkpoint(whole / CHECKPOINT)
    kept = list((whole / STATES).glob("*.safetensors"))
    assert kept
    for path in kept:
        stored = read_checkpoint(path, simulated_secret(5, SIMULATED_SERVER), path.stem)
        assert stored.read({"state": ClientState})["state"].moments
        with pytest.raises(ValueError, match="sealed"):
            read_checkpoint(path)


def test_commands_without_a_release_write_nothing() -> None:
    assert list(releases_of([Publish.__new__(Publish)])) == []
