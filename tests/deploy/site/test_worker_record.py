"""A worker and its record: all is written down before it leaves, limits count from it, and nothing of the rows is in it."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedloom.aggregate.fedit import FedIT
from fedloom.core.codec import Half
from fedloom.core.errors import Refused
from fedloom.core.files import private_tree
from fedloom.deploy.messages.messages import (
    EvaluateRequest,
    EvaluateResult,
    JoinRequest,
    Refusal,
    Request,
    TaskRequest,
    decode_evaluation,
    decode_reply,
    encode_request,
)
from fedloom.deploy.site.request_record import RecordChain, RecordEntry
from fedloom.deploy.site.settings import Site, read_site
from fedloom.deploy.site.worker import SiteWorker
from tests.support.sites import LABELS, simulated_worker, site_at, task_of, terms_of, trainer_of
from tests.support.tiny_models import toy_rows


@pytest.fixture(scope="module")
def works(encoder: Path) -> list[TaskRequest]:
    trainer = trainer_of(encoder, terms_of())
    return [TaskRequest(terms_of(), 1, task_of(FedIT(), trainer, Half(), number), 0) for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def exam(works: list[TaskRequest]) -> EvaluateRequest:
    return EvaluateRequest(terms_of(held_out=0.5), 1, "ward", works[0].task.start, 0)


def record_of(site: Site) -> list[dict[str, Any]]:
    return [*RecordChain().lines(site.folder / "record.jsonl")]


def reason(worker: SiteWorker, request: Request) -> str:
    """Why it was refused; "" where it was not."""
    data = worker.answer(encode_request(request))
    if isinstance(request, EvaluateRequest):
        reply: object = decode_evaluation(data, 10**8, request)
    else:
        reply = decode_reply(data, 10**8, {request.task.id: request.task} if isinstance(request, TaskRequest) else {})
    return reply.reason if isinstance(reply, Refusal) else ""


def test_what_is_asked_and_sent_stands_in_the_record_and_nothing_of_the_rows(
    encoder: Path, tmp_path: Path, works: list[TaskRequest], exam: EvaluateRequest
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "ward.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    file = site_at(tmp_path, encoder).folder.parent / "site.toml"
    file.write_text('key = "ward.key"\n' + file.read_text())
    site = read_site(file)
    worker = simulated_worker(site)
    assert not reason(worker, JoinRequest(terms_of(), 1))
    sent = worker.answer(encode_request(works[0]))
    assert worker.answer(encode_request(replace(works[0], incarnation=2))) == sent
    assert not reason(worker, exam)
    assert reason(worker, replace(works[1], task=replace(works[1].task, client="other")))
    worker.answer(b"no message")
    worker.refuse_oversized(10**9)
    chain = RecordChain([key.public_key()])
    lines = [*chain.lines(site.folder / "record.jsonl")]
    assert chain.unsigned == 0
    kinds = ["started", "accepted", "terms seen", "profile sent", "task asked", "task answered", "task answered"]
    kinds += ["accepted", "evaluation asked", "evaluation answered", "refused", "refused", "refused"]
    assert [line["kind"] for line in lines] == kinds
    first, again = (line for line in lines if line["kind"] == "task answered")
    assert (first["bytes_out"], first["sent"]) == (again["bytes_out"], again["sent"]) == (len(sent), first["sent"])
    assert (first["rows"], first["steps"], first["rank"], "again" in first, again["again"]) == (40, 3, 4, False, True)
    text = (site.folder / "record.jsonl").read_text()
    words = {word for row in toy_rows(40) for word in row["text"].split() if len(word) > 3}
    told = {word for line in lines for value in line.values() if isinstance(value, str) for word in value.split()}
    assert not told & {*words, *LABELS}
    assert not any(row["text"] in text for row in toy_rows(40))
    sizes = [len(raw) for raw, line in zip(text.splitlines(), lines, strict=True) if line["kind"].startswith("task")]
    assert max(sizes) < 1024, "docs/site.md says so"


def test_an_evaluation_is_given_once_a_run_and_again_after_a_lost_reply(
    encoder: Path, tmp_path: Path, exam: EvaluateRequest
) -> None:
    site = site_at(tmp_path, encoder, more="[limits]\nevaluations = 1\n")
    once = simulated_worker(site).answer(encode_request(exam))
    assert isinstance(decode_evaluation(once, 10**8, exam), EvaluateResult)
    restarted = simulated_worker(site)
    for incarnation in (1, 2, 7):
        assert restarted.answer(encode_request(replace(exam, incarnation=incarnation))) == once
    assert (restarted.prepared, restarted.repeated) == (None, 3), "nothing is computed again"
    for other in (replace(exam, seconds=901.0), replace(exam, last_accepted=3)):
        assert "limits.evaluations" in reason(restarted, other)
    for file in (site.folder / "evaluations").rglob("*.safetensors"):
        file.unlink()
    assert "no longer stored" in reason(simulated_worker(site), exam), "new rows would make the difference tell of them"


def test_an_evaluation_that_was_cut_off_is_done_and_counts_once(
    encoder: Path, tmp_path: Path, exam: EvaluateRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_at(tmp_path, encoder, more="[limits]\nevaluations = 1\n")
    worker = simulated_worker(site)
    with monkeypatch.context() as power_cut:
        power_cut.setattr("fedloom.deploy.site.worker.evaluate_held_out", lambda *_: exit())
        with pytest.raises(SystemExit):
            worker.answer(encode_request(exam))
    worker = simulated_worker(site)
    assert "limits.evaluations" in reason(worker, replace(exam, seconds=901.0))
    assert not reason(worker, exam)
    assert [line["kind"] for line in record_of(site)].count("evaluation answered") == 1


@pytest.mark.parametrize("limit", ["tasks_a_day = 1", pytest.param("total_epochs = 0.7", marks=pytest.mark.slow)])
def test_tasks_and_epochs_count_once_however_often_they_are_asked_for(
    encoder: Path, tmp_path: Path, works: list[TaskRequest], limit: str
) -> None:
    """A task here is three steps of eight of forty rows: 0.6 of a pass."""
    site = site_at(tmp_path, encoder, more=f"[limits]\n{limit}\n")
    for _ in range(2):
        worker = simulated_worker(site)
        assert not reason(worker, works[0])
        assert not reason(worker, works[0])
        assert f"limits.{limit.partition(' ')[0]}" in reason(worker, works[1])
    for file in (site.folder / "journal").rglob("*.safetensors"):
        file.unlink()
    assert reason(simulated_worker(site), works[0]), "to train it anew would be another answer over the rows"


def test_a_task_that_was_cut_off_counts_once(
    encoder: Path, tmp_path: Path, works: list[TaskRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_at(tmp_path, encoder, more="[limits]\ntasks_a_day = 1\n")
    worker = simulated_worker(site)
    with monkeypatch.context() as power_cut:
        power_cut.setattr("fedloom.deploy.site.worker.encode_answer", lambda *_: exit())
        with pytest.raises(SystemExit):
            worker.answer(encode_request(works[0]))
    assert "limits.tasks_a_day" in reason(simulated_worker(site), works[1])
    assert not reason(simulated_worker(site), works[0])
    assert "limits.tasks_a_day" in reason(simulated_worker(site), works[1])


def test_what_would_be_too_much_for_a_day_is_not_sent(encoder: Path, tmp_path: Path, works: list[TaskRequest]) -> None:
    site = site_at(tmp_path, encoder)
    size = len(simulated_worker(site_at(tmp_path / "other", encoder)).answer(encode_request(works[0])))
    file = tmp_path / "site.toml"
    old = next(line for line in file.read_text().splitlines() if line.startswith("megabytes_a_day"))
    file.write_text(file.read_text().replace(old, f"megabytes_a_day = {2.5 * size / 1e6}"))
    worker = simulated_worker(read_site(file))
    assert [bool(reason(worker, works[0])) for _ in range(4)] == [False, False, True, True]
    sent = sum(line.get("bytes_out", 0) for line in record_of(site) if line["kind"] == "task answered")
    assert sent <= 2.5 * size


def test_nothing_leaves_that_could_not_be_written_down(
    encoder: Path, tmp_path: Path, works: list[TaskRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_at(tmp_path, encoder)
    worker = simulated_worker(site)
    append = worker.record.append

    def full(entry: RecordEntry) -> None:
        if entry.bytes_out:
            raise OSError(28, "No space left on device")
        append(entry)

    monkeypatch.setattr(worker.record, "append", full)
    assert "OSError" in reason(worker, works[0])
    assert "OSError" in reason(worker, works[0]), "nor from the journal"
    monkeypatch.undo()
    assert not reason(worker, works[0])


def test_a_record_that_was_altered_stops_the_site(encoder: Path, tmp_path: Path, works: list[TaskRequest]) -> None:
    site = site_at(tmp_path, encoder)
    assert not reason(simulated_worker(site), works[0])
    path = site.folder / "record.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(Refused, match=r"line 3 .*move it away"):
        simulated_worker(site)
    path.rename(tmp_path / "record.jsonl")
    simulated_worker(site)


def test_what_a_site_writes_is_its_owner_s_alone(encoder: Path, tmp_path: Path, works: list[TaskRequest]) -> None:
    site = site_at(tmp_path, encoder, more="[privacy]\nclip = 1.0\nmultiplier = 1.0\n")
    before = os.umask(0)
    try:
        site.folder.mkdir(0o777)
        worker = SiteWorker(site)
        worker.answer(encode_request(JoinRequest(terms_of(), 1)))
        assert not reason(simulated_worker(site), works[0])
    finally:
        os.umask(before)
    names = {path.name for path in site.folder.iterdir()}
    assert names >= {"record.jsonl", "spent.jsonl", "journal", "secret"}
    assert stat.S_IMODE(site.folder.stat().st_mode) == 0o700
    wide = [path for path in site.folder.rglob("*") if path.stat().st_mode & 0o077]
    assert not wide


def test_what_others_could_read_is_closed_and_links_are_left_alone(tmp_path: Path) -> None:
    """A folder of an earlier version, which the umask had left open."""
    folder, outside = tmp_path / "state", tmp_path / "outside"
    (folder / "journal" / "run").mkdir(parents=True)
    for path in (folder / "record.jsonl", folder / "journal" / "run" / "1.safetensors", outside):
        path.touch()
        path.chmod(0o644)
    (folder / "link").symlink_to(outside)
    assert private_tree(folder) == 4
    assert private_tree(folder) == 0
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644
    inside = [path for path in folder.rglob("*") if not path.is_symlink()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in inside} == {0o700, 0o600}
