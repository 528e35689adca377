"""The secret of a site: the owner's alone, made once, and its loss or exchange stops the site."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.core.errors import Refused
from fedloom.core.files import lock
from fedloom.core.seeds import simulated_secret
from fedloom.deploy.site.site_secret import COMMITMENT, SECRET, begin_new_split, read_secret
from fedloom.deploy.site.worker import SiteWorker
from tests.support.federation import write_secret
from tests.support.sites import site_at


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("no_umask")
def test_it_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    secret = read_secret(folder)
    assert len(secret) == 32
    assert read_secret(folder) == secret
    assert read_secret(tmp_path / "other") != secret
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        SECRET: 0o600,
        COMMITMENT: 0o600,
    }
    begin_new_split(folder)
    assert read_secret(folder) != secret
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in (SECRET, COMMITMENT)} == {0o600}


def test_a_process_that_ended_between_the_two_files_has_lost_nothing(tmp_path: Path) -> None:
    secret = read_secret(tmp_path)
    (tmp_path / COMMITMENT).unlink()
    assert read_secret(tmp_path) == secret
    assert (tmp_path / COMMITMENT).exists()


def test_a_test_may_give_a_site_the_secret_of_a_simulation(tmp_path: Path) -> None:
    write_secret(tmp_path / "state", simulated_secret(3, "ward"))
    assert read_secret(tmp_path / "state") == simulated_secret(3, "ward")


def exchange(folder: Path) -> None:
    (folder / SECRET).write_text("ab" * 32 + "\n")


def link(folder: Path) -> None:
    (folder / SECRET).rename(folder.parent / "elsewhere")
    (folder / SECRET).symlink_to(folder.parent / "elsewhere")


def pipe(folder: Path) -> None:
    (folder / SECRET).unlink()
    os.mkfifo(folder / SECRET, 0o600)


SPOILT = {
    "it was there and is lost": lambda folder: (folder / SECRET).unlink(),
    "it is not the one that was here": exchange,
    "it is damaged": lambda folder: (folder / SECRET).write_text("ab" * 31),
    "it is a link": link,
    "it is no regular file": pipe,
    "others on this machine may read it": lambda folder: (folder / SECRET).chmod(0o640),
}


@pytest.mark.parametrize(("reason", "spoil"), SPOILT.items(), ids=[*SPOILT])
def test_the_site_stops_until_its_owner_decides(
    encoder: Path, tmp_path: Path, reason: str, spoil: Callable[[Path], object]
) -> None:
    site = site_at(tmp_path / "site", encoder)
    own = read_secret(site.folder)
    spoil(site.folder)
    there = (site.folder / SECRET).read_bytes() if (site.folder / SECRET).is_file() else b""
    with pytest.raises(Refused, match=reason) as refused:
        SiteWorker(site)
    assert str(site.folder / SECRET) in str(refused.value)
    assert own.hex() not in str(refused.value)
    assert there.decode().strip()[:16] not in str(refused.value) or not there
    done = CliRunner().invoke(app, ["site", "new-split", "--config", str(tmp_path / "site" / "site.toml")])
    assert done.exit_code == 0, done.output
    assert "may be trained on" in re.sub(r"\s+", " ", done.output)
    assert read_secret(site.folder) != own
    assert not (site.folder / SECRET).is_symlink()
    if reason == "it is a link":
        assert (site.folder.parent / "elsewhere").read_text().strip() == own.hex(), "what a link names is let alone"


@pytest.mark.parametrize("reason", ["lost", "not the one", "damaged"])
def test_the_refusal_names_the_command_and_what_it_means(tmp_path: Path, reason: str) -> None:
    read_secret(tmp_path)
    next(spoil for name, spoil in SPOILT.items() if reason in name)(tmp_path)
    with pytest.raises(Refused, match=r"fedloom site new-split --config site\.toml.*held out so far may be trained on"):
        read_secret(tmp_path)


def test_no_new_split_while_a_worker_goes_on_with_the_old_one(tmp_path: Path) -> None:
    secret = read_secret(tmp_path)
    with (tmp_path / "worker.lock").open("w") as held:
        assert lock(held)
        with pytest.raises(Refused, match="the worker of this site is running"):
            begin_new_split(tmp_path)
    assert read_secret(tmp_path) == secret
    begin_new_split(tmp_path)
    assert read_secret(tmp_path) != secret


def test_a_draft_or_a_link_of_a_killed_process_is_in_nobodys_way(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / f"{SECRET}.draft").symlink_to(victim)
    read_secret(tmp_path / "state")
    assert victim.read_text() == "untouched"
