"""Client states in files: what comes back, what is removed when, what a private run shows, and what is refused."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fedloom.core import files
from fedloom.core.errors import Refused
from fedloom.core.types import ClientState
from fedloom.runs import state_files
from fedloom.runs.state_files import StateFiles
from tests.support import toys


def state(seed: int, basis: str = "0/2") -> ClientState:
    draws = torch.Generator().manual_seed(seed)
    moments = {"w": {"exp_avg": torch.randn(4, 6, generator=draws).T, "step": torch.tensor(float(seed))}}
    return ClientState(basis, moments, private=toys.fresh(2), residual=toys.fresh(2, seed))


def same(one: ClientState, other: ClientState) -> bool:
    """To the bit, with the strides by which products round."""
    pairs = [(one.moments["w"][name], other.moments["w"][name]) for name in ("exp_avg", "step")]
    assert one.private
    assert other.private
    pairs += [(one.private.factors[name].up, factor.up) for name, factor in other.private.factors.items()]
    return one.basis == other.basis and all(a.equal(b) and a.stride() == b.stride() for a, b in pairs)


def there(store: StateFiles) -> set[str]:
    return {path.stem for path in store.folder.glob("*")}


def checkpoint(store: StateFiles, *names: str) -> None:
    """Let a checkpoint be written that names these."""
    store.needed = lambda: frozenset(names)
    with store.named():
        pass


@pytest.mark.parametrize("secret", [b"", b"s" * 32], ids=["open", "sealed"])
def test_a_state_comes_back_to_the_bit_and_is_called_by_what_it_holds(tmp_path: Path, secret: bytes) -> None:
    store, again = StateFiles(tmp_path / "clients", secret), StateFiles(tmp_path / "again", secret)
    name = store.put(state(1), task=7)
    assert same(store.get(name), state(1))
    assert again.put(state(1), task=7) == name, "a run that goes on writes the same file again"
    assert (again.folder / f"{name}.safetensors").read_bytes() == (store.folder / f"{name}.safetensors").read_bytes()
    assert again.put(state(2), task=7) != name
    assert again.put(state(1), task=8) != name, "equal states of two tasks do not show where they are sealed"


def test_the_files_of_a_private_run_hold_no_number_and_no_digest_of_one(tmp_path: Path) -> None:
    name = StateFiles(tmp_path, b"s" * 32).put(state(1), 1)
    data = (tmp_path / f"{name}.safetensors").read_bytes()
    assert state(1).moments["w"]["exp_avg"].numpy().tobytes()[:16] not in data
    assert b"basis" not in data
    for wrong in (b"", b"t" * 32):
        with pytest.raises(Refused, match="cannot be read"):
            StateFiles(tmp_path, wrong).get(name)


def test_files_go_when_neither_the_checkpoint_nor_the_run_needs_them(tmp_path: Path) -> None:
    store = StateFiles(tmp_path / "clients")
    old, other = store.put(state(1), 1), store.put(state(2), 2)
    checkpoint(store, old, other)
    new = store.put(state(3), 3)
    assert there(store) == {old, other, new}, "the run needs the new one, the checkpoint the old ones"
    checkpoint(store, new, other)
    assert there(store) == {new, other}
    late = store.put(state(4), 4)
    store.needed = lambda: frozenset((new, late))
    store.remove_others()
    assert there(store) == {new, other}, "no run goes on from what came after the last checkpoint"
    resumed = StateFiles(store.folder, needed=lambda: frozenset((new, other)))
    store.put(state(4), 4)
    resumed.reopen()
    assert resumed.present == {new, other, late}
    checkpoint(resumed)
    assert not resumed.folder.exists()
    checkpoint(resumed)


def test_files_do_not_pile_up_between_two_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "LEAST_FILES", 8)
    store, told = StateFiles(tmp_path, most=4), list[str]()
    old = store.put(state(0), 0)
    checkpoint(store, old)
    store.needed = lambda: frozenset(told[-3:])
    for task in range(1, 3 * state_files.LEAST_FILES):
        told.append(store.put(state(task), task))
        assert {old, *told[-3:]} <= there(store) == store.present
        assert len(store.present) <= state_files.LEAST_FILES
    checkpoint(store, *told[-3:])
    assert there(store) == set(told[-3:])


def test_what_a_checkpoint_names_is_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, store = list[Path](), StateFiles(tmp_path)
    monkeypatch.setattr(state_files, "sync_path", synced.append)
    name, _ = store.put(state(1), 1), store.put(state(2), 2)
    store.needed = lambda: frozenset((name,))
    with store.named():
        assert synced == [tmp_path / f"{name}.safetensors", tmp_path]
    checkpoint(store, name)
    assert len(synced) == 2, "once is enough"


def test_a_checkpoint_that_fails_takes_nothing_away(tmp_path: Path) -> None:
    store = StateFiles(tmp_path)
    old = store.put(state(1), 1)
    checkpoint(store, old)
    new = store.put(state(2), 2)
    store.needed = lambda: frozenset((new,))
    with pytest.raises(OSError, match="full"), store.named():
        raise OSError("full")
    store.remove_others()
    assert there(store) == {old, new}, "either checkpoint may lie there: Ctrl-C can come just after the new one"


def test_what_is_gone_damaged_forged_or_elsewhere_is_refused(tmp_path: Path) -> None:
    store = StateFiles(tmp_path / "clients", needed=frozenset)
    name, other = store.put(state(1), 1), store.put(state(2), 2)
    path = store.folder / f"{name}.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), (store.folder / f"{other}.safetensors").read_bytes()):
        path.write_bytes(data)
        with pytest.raises(Refused, match="cannot be read"):
            store.get(name)
    path.unlink()
    for named in (name, "../secret", "", "A" * 64):
        with pytest.raises(Refused, match="cannot be read"):
            store.get(named)
    missing = StateFiles(store.folder, needed=lambda: frozenset((name, other)))
    with pytest.raises(Refused, match="1 files are gone"):
        missing.reopen()


def test_a_link_in_the_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / f"{'0' * 64}.safetensors").write_bytes(b"precious")
    os.symlink(victim, tmp_path / "clients")
    store = StateFiles(tmp_path / "clients")
    for act in (store.reopen, lambda: store.put(state(1), 1)):
        with pytest.raises(Refused, match="a link or a file lies"):
            act()
    store.remove_others()
    assert list(victim.iterdir()) == [victim / f"{'0' * 64}.safetensors"]


def test_a_draft_that_is_not_synced_is_still_whole_or_not_there(tmp_path: Path) -> None:
    with files.atomic_write(tmp_path / "one", synced=False) as draft:
        draft.write_text("whole")
    with suppress(ZeroDivisionError), files.atomic_write(tmp_path / "one", synced=False) as draft:
        draft.write_text("half" * (1 // 0))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("one", "whole")]
