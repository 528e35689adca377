"""Who may come: the holder of a key of the roster, by a signature over a time that is now."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.deploy.flower import keys
from fedloom.deploy.flower.roster import HEADERS, ROSTER, NotAuthenticated, Roster, RosterEntry, WrongTime, write_roster

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEY = ec.generate_private_key(ec.SECP384R1())
PEM = bytes(public_key_to_bytes(KEY.public_key()))
ENTRY = RosterEntry(PEM.decode(), "one", 11)


def headers(key: ec.EllipticCurvePrivateKey = KEY, stamp: str = NOW.isoformat()) -> list[tuple[bytes, bytes]]:
    values = [
        base64.b64encode(bytes(public_key_to_bytes(key.public_key()))),
        stamp.encode(),
        base64.b64encode(sign_message(key, stamp.encode())),
    ]
    return list(zip(HEADERS, values, strict=True))


@pytest.fixture(scope="module")
def roster(tmp_path_factory: pytest.TempPathFactory) -> Roster:
    path = tmp_path_factory.mktemp("server") / ROSTER
    write_roster(path, [ENTRY])
    return Roster(path)


def test_a_known_key_is_its_entry_and_another_is_nobody(roster: Roster) -> None:
    assert roster.authenticate(headers(), NOW) == ENTRY
    with pytest.raises(NotAuthenticated, match="does not know this key"):
        roster.authenticate(headers(ec.generate_private_key(ec.SECP384R1())), NOW)


def test_a_signature_of_another_key_or_time_is_none(roster: Roster) -> None:
    other, later = (
        headers(ec.generate_private_key(ec.SECP384R1())),
        headers(stamp=(NOW + timedelta(seconds=1)).isoformat()),
    )
    for forged in (other, later):
        with pytest.raises(NotAuthenticated, match="signature"):
            roster.authenticate([*headers()[:2], forged[2]], NOW)


@given(st.floats(-1000, 1000))
@settings(max_examples=20)
def test_the_window_is_that_of_flower(roster: Roster, age: float) -> None:
    now = NOW + timedelta(seconds=age)
    if -SYSTEM_TIME_TOLERANCE < (now - NOW).total_seconds() < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
        assert roster.authenticate(headers(), now) == ENTRY
    else:
        with pytest.raises(WrongTime, match=f"{abs(age):.0f} s {'behind' if age > 0 else 'ahead of'}"):
            roster.authenticate(headers(), now)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(HEADERS),
            st.binary(max_size=40) | st.sampled_from([value for _, value in headers()]) | st.just(b"9999-99-99"),
        ),
        max_size=5,
    )
)
@settings(max_examples=30)
def test_other_headers_prove_nothing_and_upset_nothing(roster: Roster, found: list[tuple[bytes, bytes]]) -> None:
    if sorted(found) != sorted(headers()):
        with pytest.raises(NotAuthenticated):
            roster.authenticate(found, NOW)
    with pytest.raises(NotAuthenticated):
        roster.authenticate([*headers(), *headers()], NOW)


def test_who_is_removed_or_added_is_known_at_once(tmp_path: Path) -> None:
    path = tmp_path / ROSTER
    roster = Roster(path)
    assert roster.find(ENTRY.key) is None
    for entries in ([ENTRY], [], [ENTRY]):
        write_roster(path, entries)
        assert roster.find(ENTRY.key) == (ENTRY if entries else None)
    path.unlink()
    assert roster.find(ENTRY.key) is None


def test_a_registered_key_is_what_flower_sends(tmp_path: Path) -> None:
    _, public = keys.site("one", tmp_path)
    from fedloom.deploy.flower.register_keys import read_public_key

    assert keys.add(public, "one", tmp_path / "server").key.encode() == read_public_key(public)
