"""A site is told that its clock is wrong, and what the server's refusals mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.deploy.flower import keys
from fedloom.deploy.flower.gate import CLOCK_CODE
from fedloom.deploy.flower.join import clock_ahead, clock_warning, explain
from fedloom.deploy.flower.supervisor import free_port


@pytest.mark.parametrize("seconds", [5.0, 0.0, -5.0])
def test_a_clock_that_is_nearly_right_is_not_spoken_of(seconds: float) -> None:
    assert clock_warning(seconds) == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(40.2, "40 s ahead of the server's"), (-400.0, "400 s behind the server's")]
)
def test_a_wrong_clock_is(seconds: float, words: str) -> None:
    assert words in clock_warning(seconds)
    assert "NTP" in clock_warning(seconds)


def test_a_server_that_is_not_there_has_no_clock(tmp_path: Path) -> None:
    assert clock_ahead(f"localhost:{free_port()}", keys.new(tmp_path, ["localhost"])) is None


def test_a_site_with_a_wrong_clock_is_not_said_to_have_an_unknown_key() -> None:
    words = explain(
        f"supernode ended with code 1; again in 1 s: 305 Failed. [code: {CLOCK_CODE}] the clock of this machine"
    )
    assert "clock" in words
    assert "key" not in words
