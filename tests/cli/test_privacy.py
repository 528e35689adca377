"""`fedloom privacy`: what it says of a ledger, of a run folder and of a run file; and of none of them, one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom import FFA, Limits, Private, ProductDelta, Rounds
from fedloom.cli.privacy import privacy_command
from fedloom.cli.replay import read_secret_file
from fedloom.core.errors import Refused
from fedloom.core.schema import jsonable
from fedloom.privacy.accounting import Gaussian
from fedloom.privacy.correlated_noise import noise_in_sums, noise_saved
from fedloom.privacy.ledger import LEDGER, Ledger, LedgerEntry
from fedloom.runs.prepare import prepare
from fedloom.runs.privacy_plan import client_plan, record_plan, what_leaves
from fedloom.schedule.shared.weights import uniform
from tests.support.tiny_models import tiny_run

PRIVATE = Private(clip=0.5, multiplier=4.0, most_answers=10, budget=(3.5, 1e-5))
ALIKE = Rounds(cohort_size=2, weigh=uniform)


def folder_of(tmp_path: Path, privacy: Private | None, **section: Any) -> Path:
    """A run folder with a manifest, and a ledger in which ann has answered ten times."""
    run = tiny_run(Path("model"), aggregator=FFA(), schedule=ALIKE, privacy=privacy)
    about = {"run": jsonable(run), "privacy": section}
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    with Ledger.opened(tmp_path / LEDGER) as ledger:
        for version in range(10):
            ledger.write(LedgerEntry({"version": version}, {"ann": Gaussian(0.25), f"b{version}": Gaussian(0.125)}))
    return tmp_path


def test_what_was_released_is_said_with_what_was_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    privacy_command(folder_of(tmp_path, PRIVATE, unit="client", noise="simulated noise: no privacy"))
    told = capsys.readouterr().out
    assert "no privacy" in told
    assert "10 releases, 11 units" in told
    assert "epsilon 3.34141 at delta 1e-05 (ann)" in told
    assert "Guaranteed at most: epsilon 3.34141" in told
    privacy_command(tmp_path / LEDGER, delta=1e-6)
    assert "at delta 1e-06 (ann)" in capsys.readouterr().out


def test_what_nobody_knows_is_not_told_as_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path, PRIVATE, unit="client")
    (folder / LEDGER).unlink()
    with pytest.raises(Refused, match="not known"):
        privacy_command(folder)
    (tmp_path / "plain").mkdir()
    privacy_command(folder_of(tmp_path / "plain", None))
    assert "its versions are exact" in capsys.readouterr().out
    (tmp_path / "records").mkdir()
    record = Private(clip=1.0, multiplier=1.0, most_answers=2, unit="record")
    told = folder_of(tmp_path / "records", record, unit="record", noise="by a secret of the sites")
    (told / LEDGER).unlink()
    privacy_command(told)
    assert "spent.jsonl" in capsys.readouterr().out
    for path in (tmp_path / "nothing.py", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(Refused):
            privacy_command(path)
    with pytest.raises(Refused, match="run file"):
        privacy_command(folder, settings=["seed=1"])


def test_a_file_that_holds_no_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.key").write_text("ab" * 32 + "\n")
    assert read_secret_file(tmp_path / "noise.key") == b"\xab" * 32
    assert read_secret_file(None) is None
    (tmp_path / "other").write_text("not hex")
    for path in (tmp_path / "other", tmp_path / "missing"):
        with pytest.raises(Refused, match=r"noise[.]key"):
            read_secret_file(path)


def test_what_leaves_a_site_follows_the_run() -> None:
    said = {
        privacy: dict(what_leaves(tiny_run(Path("model"), privacy=privacy, held_out=0.2)))
        for privacy in (None, PRIVATE)
    }
    assert said[None]["training losses and token counts"] == "exact"
    assert said[None]["scores on held-out examples"] == "exact"
    assert said[PRIVATE]["training losses and token counts"] == "not sent"
    assert said[PRIVATE]["scores on held-out examples"] == "not sent"


@pytest.mark.slow
def test_a_run_file_says_what_each_unit_takes(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Product methods get noise on whole matrices; twice the answers in a version halve noise over signal."""
    (tmp_path / "run.py").write_text(
        "from pathlib import Path\nfrom fedloom import *\nfrom fedloom.schedule.shared.weights import uniform\n"
        "from tests.support.tiny_models import tiny_run\n"
        f"run = tiny_run(Path({str(encoder)!r}), aggregator=FFA(), schedule=Rounds(cohort_size=2, weigh=uniform),\n"
        "               privacy=Private(clip=0.5, multiplier=4.0, most_answers=10, budget=(3.5, 1e-5)))\n"
    )
    privacy_command(tmp_path / "run.py")
    told = capsys.readouterr().out
    assert "Guarantee epsilon 3.34141 at delta 1e-05 for a client" in told
    assert "noise protects nobody" in told
    assert "To reach epsilon 3.5" in told
    run = tiny_run(encoder, aggregator=FFA(), schedule=ALIKE, privacy=PRIVATE, limits=Limits(versions=4))
    job = prepare(run)
    mine = client_plan(job, 1e-5)
    assert mine.multiplier == 4.0
    assert mine.whole == pytest.approx(mine.once / 2)
    less = client_plan(job, 1e-5, epsilon=8.0)
    assert less.epsilon <= 8.0 < less.epsilon * 1.01
    assert record_plan(job, 1e-5, epsilon=8.0).epsilon <= 8.0
    other = prepare(tiny_run(encoder, aggregator=ProductDelta(), schedule=Rounds(4, weigh=uniform), privacy=PRIVATE))
    assert client_plan(other, 1e-5).of > mine.of
    assert client_plan(other, 1e-5).once == pytest.approx(4.0 * client_plan(other, 1e-5).of ** 0.5 / 4)
    banded = replace(PRIVATE, budget=None, noise="banded", apart=2)
    correlated = client_plan(prepare(replace(run, privacy=banded)), 1e-5)
    assert correlated.whole == pytest.approx(mine.whole * noise_in_sums(2, 4) / noise_in_sums(1, 4))
    privacy_command(tmp_path / "run.py", settings=["privacy.noise=banded", "privacy.apart=2", "privacy.multiplier=9"])
    assert f"{noise_saved(3, 10, 2):.2f} of independent noise" in capsys.readouterr().out
