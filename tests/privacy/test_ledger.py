"""The ledger: written before it returns, read back as it was, never less than what was released."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.privacy.accounting import Gaussian, Laplace, PureEpsilon, SampledGaussian, epsilon_of
from fedloom.privacy.ledger import LEDGER, Ledger, LedgerEntry, largest_epsilon, read_ledger, spent_by_unit

ENTRIES = [
    LedgerEntry({"version": 1, "value": "a"}, {"ann": Gaussian(0.5), "bob": Gaussian(0.25)}),
    LedgerEntry({"version": 2, "value": "b"}, {"ann": Gaussian(0.5), "cho": PureEpsilon(0.1)}),
    LedgerEntry({"task": 7, "clip": 0.5}, {"records": SampledGaussian(0.1, 1.0, 20), "bob": Laplace(0.5)}),
]


def write(path, entries):
    with Ledger.opened(path) as ledger:
        return [ledger.write(entry) for entry in entries]


def test_what_was_written_is_read_back(tmp_path):
    path = tmp_path / LEDGER
    assert write(path, ENTRIES) == [True, True, True]
    assert list(read_ledger(path)) == ENTRIES
    with Ledger.opened(path) as ledger:
        assert ledger.spent == spent_by_unit(ENTRIES)


def test_the_same_release_counts_once_and_another_at_its_place_counts(tmp_path):
    path = tmp_path / LEDGER
    again = LedgerEntry({"version": 1, "value": "other"}, ENTRIES[0].events)
    assert write(path, ENTRIES[:1]) == [True]
    assert write(path, [ENTRIES[0], again, again]) == [False, True, False]
    with Ledger.opened(path) as ledger:
        assert ledger.epsilon(1e-5, "ann") == epsilon_of([Gaussian(0.5), Gaussian(0.5)], 1e-5)
        assert ledger.epsilon(1e-5, "nobody") == 0.0


def test_what_a_release_would_cost_is_what_it_costs(tmp_path):
    with Ledger.opened(tmp_path / LEDGER) as ledger:
        for entry in ENTRIES[:2]:
            ahead = ledger.after(entry, 1e-5)
            ledger.write(entry)
            assert ahead == max(ledger.epsilon(1e-5, unit) for unit in entry.events) == ledger.after(entry, 1e-5)
    assert largest_epsilon(read_ledger(tmp_path / LEDGER), 1e-5)[0] == "ann"
    assert largest_epsilon([], 1e-5) == ("", 0.0)


@given(st.data())
def test_wherever_it_is_cut_short_whole_lines_remain(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / LEDGER
    write(path, ENTRIES)
    whole = path.read_bytes()
    size = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:size])
    lines = whole[:size].count(b"\n")
    assert list(read_ledger(path)) == ENTRIES[:lines]
    assert write(path, ENTRIES[lines:]) == [True] * (3 - lines)
    assert path.read_bytes() == whole


def test_a_damaged_line_is_refused_and_tells_no_value(tmp_path):
    path = tmp_path / LEDGER
    write(path, ENTRIES)
    for damaged in (b'"mu":0.5', b'"mu":-0.5'), (b'"type":"Gaussian"', b'"type":"Free"'), (b'"about"', b'"abuut"'):
        path.write_bytes(path.read_bytes().replace(*damaged, 1))
        with pytest.raises(Refused, match="damaged") as refused, Ledger.opened(path):
            pass
        assert "0.5" not in str(refused.value)
        with pytest.raises(Refused, match="damaged"):
            list(read_ledger(path))
        path.unlink()
        write(path, ENTRIES)


def test_two_processes_do_not_write_one_ledger(tmp_path):
    with (
        Ledger.opened(tmp_path / LEDGER),
        pytest.raises(Refused, match="another process"),
        Ledger.opened(tmp_path / LEDGER),
    ):
        pass


def test_a_release_whose_line_is_not_on_the_disk_is_not_counted(tmp_path, monkeypatch):
    path = tmp_path / LEDGER
    with Ledger.opened(path) as ledger:
        ledger.write(ENTRIES[0])

        def full(descriptor):
            raise OSError(28, "no room")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no room"):
            ledger.write(ENTRIES[1])
        monkeypatch.undo()
        assert path.read_bytes().count(b"\n") == 1
        assert ledger.write(ENTRIES[1])
    assert list(read_ledger(path)) == ENTRIES[:2]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / LEDGER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="link"), Ledger.opened(tmp_path / LEDGER):
        pass
