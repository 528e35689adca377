"""Damaged and forged files of a run folder: each is refused in a sentence, none raises anything else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.core.schema import Malformed
from fedloom.core.types import ClientState, Model, Update
from fedloom.deploy.flower.app_outcome import AppOutcome, last_attempt, read_outcome, write_outcome
from fedloom.deploy.server.config import DeploymentConfig
from fedloom.deploy.server.status import read_status
from fedloom.report.run_log import read_run_log
from fedloom.runs.checkpoint import StoredValues, read_checkpoint, write_checkpoint
from fedloom.runs.resume import LOGS, CheckpointWriter, log_sizes, open_log
from tests.attacks.files import ODD, ODD_TEXTS, bent, leaves, seal, text_of
from tests.support import toys
from tests.support.fake_runs import write_run
from tests.support.malformed_files import STATUS
from tests.support.storms import STORMS, tries

HINTS: Mapping[str, Any] = {"updates": list[Update], "model": Model, "states": dict[str, ClientState]}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StoredValues]:
    """A checkpoint with tensors, references and tables, and a place for forged ones."""
    path = tmp_path_factory.mktemp("stored") / "good.safetensors"
    model = Model(toys.adapter(4), memory={"velocity": toys.adapter(4, 1)})
    updates = [Update(toys.make_task(model.adapter, 4), toys.make_result(toys.adapter(4, 2)), model)]
    write_checkpoint(path, {"updates": updates, "model": model, "states": {"c": ClientState("b")}}, {"version": 1})
    return path.with_name("forged.safetensors"), read_checkpoint(path)


@given(seed=st.integers(0, 2**32))
@tries(1000)
def test_a_forged_checkpoint_is_malformed_or_read(stored: tuple[Path, StoredValues], seed: int) -> None:
    (path, whole), dice = stored, random.Random(seed)
    text = text_of(whole)
    for _ in range(dice.randint(1, 3)):
        text = bent(text, dice.choice([*leaves(text)]), dice.choice(ODD), dice.random() < 0.2)
    opened(path, json.dumps(text), whole)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_checkpoint_with_another_text_is_malformed(stored: tuple[Path, StoredValues], text: str) -> None:
    assert not opened(stored[0], text, stored[1])


def opened(path: Path, text: str, whole: StoredValues) -> bool:
    try:
        read_checkpoint(seal(path, text, whole.numbers)).read(HINTS)
    except Malformed:
        return False
    return True


@pytest.mark.parametrize("change", [{"shape": [10**12], "stride": [0]}, {"shape": [2**40, 2**40], "stride": [0, 0]}])
def test_a_tensor_is_not_much_larger_than_its_memory(
    stored: tuple[Path, StoredValues], change: dict[str, list[int]]
) -> None:
    path, whole = stored
    text = text_of(whole)
    number = next(n for n, one in enumerate(whole.objects) if one["type"] == "Tensor")
    text["objects"][number] = {**whole.objects[number], **change}
    assert not opened(path, json.dumps(text), whole)


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("place", [0, 37, -2])
def test_a_byte_before_the_checkpoint_that_changed_is_found(tmp_path: Path, name: str, place: int) -> None:
    logs = [open_log(tmp_path / log, 0) for log in LOGS]
    writer = CheckpointWriter(tmp_path, 0.0, (), logs)
    for _ in range(3):
        for log in logs:
            log.write(json.dumps({"a line": 1}) + "\n")
        writer.write()
    sizes = log_sizes(tmp_path, read_checkpoint(tmp_path / "checkpoint.safetensors"))
    assert sizes == {log: (tmp_path / log).stat().st_size for log in LOGS}
    logs[0].write("more")
    for log in logs:
        log.close()
    log_sizes(tmp_path, read_checkpoint(tmp_path / "checkpoint.safetensors"))  # what came later does not count
    data = bytearray((tmp_path / name).read_bytes()[: sizes[name]])
    data[place] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Malformed, match=f"{name} is not what it was"):
        log_sizes(tmp_path, read_checkpoint(tmp_path / "checkpoint.safetensors"))
    (tmp_path / name).write_bytes(data[:-5])
    with pytest.raises(Malformed, match=f"{name} is shorter"):
        log_sizes(tmp_path, read_checkpoint(tmp_path / "checkpoint.safetensors"))


def _deployment(folder: Path) -> object:
    return DeploymentConfig.from_folder(folder)


def _outcome(folder: Path) -> object:
    return (read_outcome(folder, 1), last_attempt(folder))


@pytest.mark.parametrize(
    ("name", "good", "read"),
    [
        ("deployment.json", {"runfile": "r.py", "clients": 2, "patience": {"task": 1.0}, "until": None}, _deployment),
        ("status.json", STATUS, read_status),
        ("flower/attempt-1.json", {"pid": 1, "reason": "", "refused": "", "failed": "", "full": ""}, _outcome),
    ],
)
def test_a_forged_file_of_a_deployment_is_refused_or_read(
    tmp_path: Path, name: str, good: dict[str, Any], read: Callable[[Path], object]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(good))
    assert read(tmp_path)
    forged = [json.dumps(bent(good, at, odd)) for at in leaves(good) for odd in ODD]
    for text in [
        *forged[:: 10 // STORMS or 1],
        *ODD_TEXTS,
        *(json.dumps(bent(good, at, None, True)) for at in leaves(good)),
    ]:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with suppress(Refused):
            read(tmp_path)


def test_a_note_that_is_no_attempt_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "flower").mkdir()
    write_outcome(tmp_path, 3, AppOutcome(1))
    for odd in ("x", "", "-1", "9" * 100, "²"):
        (tmp_path / "flower" / f"attempt-{odd}.json").write_text("{}")
    assert last_attempt(tmp_path) == 3


@given(seed=st.integers(0, 2**32))
@tries(500)
def test_forged_metrics_and_a_forged_manifest_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, fake_run: Path, seed: int
) -> None:
    dice, folder = random.Random(seed), tmp_path_factory.mktemp("forged")
    manifest = json.loads((fake_run / "manifest.json").read_text())
    lines = [json.loads(line) for line in (fake_run / "metrics.jsonl").read_text().splitlines()]
    whole = [manifest, *lines]
    for _ in range(dice.randint(1, 3)):
        number = dice.randrange(len(whole)) if dice.random() < 0.7 else 0
        places = [*leaves(whole[number])]
        if places:
            whole[number] = bent(whole[number], dice.choice(places), dice.choice(ODD), dice.random() < 0.2)
    (folder / "manifest.json").write_text(json.dumps(whole[0]))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, whole[1:])) + "\n")
    with suppress(Refused):
        read_run_log(folder)


@pytest.fixture(scope="module")
def fake_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("fake") / "run")
