"""The noise made again with canaries: sound noise passes, and each fault that a privacy mechanism can have sets off the alarm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from bench.privacy.audit import HalvedDraws, HalvedNoise
from fedloom.audit import noise_check
from fedloom.audit.noise_check import check_client_noise, check_record_noise
from fedloom.core.events import Release
from fedloom.core.participation import Participation
from fedloom.privacy.private import Private
from fedloom.privacy.private_merge import PrivateMerge
from fedloom.privacy.record_draws import RecordDraws
from fedloom.privacy.secret_noise import SecretNoise

DELTA = 1e-5
ONCE = Private(0.5, 1.0, 1)
SOURCE = SecretNoise(bytes(32), ("test",))


@pytest.fixture(autouse=True)
def few_canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_check, "CANARIES", 160)
    monkeypatch.setattr(noise_check, "SIDE", 30)
    monkeypatch.setattr(noise_check, "HEAD", 90)


@pytest.mark.slow
@pytest.mark.parametrize(
    "private", [ONCE, Private(1e-7, 1.0, 3), Private(0.5, 1.0, 2, noise="banded", apart=3)], ids=str
)
def test_declared_noise_passes_and_half_of_it_does_not(private: Private) -> None:
    sound = check_client_noise(private, SOURCE, 0, DELTA)
    assert sound.sound
    assert sound.deviation == pytest.approx(1.0, abs=0.3)
    assert sound.shown.low < sound.accounted < sound.shown.high
    halved = check_client_noise(private, HalvedNoise(bytes(32), ("test",)), 0, DELTA)
    assert halved.accounted == sound.accounted
    assert halved.shown.contradicts(halved.accounted)
    assert halved.deviation == pytest.approx(0.5, abs=0.1)


class SilentHead(SecretNoise):
    """Adds no noise to the head."""

    def normals(self, shapes: Mapping[str, Tensor], *names: str | int) -> Iterator[Tensor]:
        drawn = SecretNoise.normals(self, shapes, *names)
        return (noise * (name != "dense:head") for name, noise in zip(sorted(shapes), drawn, strict=True))


@pytest.mark.slow
def test_noise_that_misses_a_tensor_is_noticed() -> None:
    found = check_client_noise(ONCE, SilentHead(bytes(32), ("test",)), 0, DELTA)
    assert not found.sound


@pytest.mark.slow
def test_a_client_that_is_merged_more_often_than_it_was_promised_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    once = check_client_noise(ONCE, SOURCE, 0, DELTA)
    parts = noise_check.server_privacy

    def without_cap(*given: Any) -> Any:
        return replace(parts(*given), participation=Participation(100))

    monkeypatch.setattr(noise_check, "server_privacy", without_cap)
    twice = check_client_noise(ONCE, SOURCE, 0, DELTA)
    assert twice.shown.separation > 1.2 * once.shown.separation
    assert twice.accounted == once.accounted


@pytest.mark.slow
def test_a_release_that_says_it_spent_half_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PrivateMerge.release

    def modest(self: PrivateMerge, *given: Any) -> tuple[Any, Release]:
        model, release = plain(self, *given)
        return model, replace(release, spent={client: mu / 2 for client, mu in release.spent.items()})

    monkeypatch.setattr(PrivateMerge, "release", modest)
    assert not check_client_noise(ONCE, SOURCE, 0, DELTA).sound


@pytest.mark.slow
def test_steps_of_a_site_pass_and_half_of_their_noise_does_not() -> None:
    pytest.importorskip("dp_accounting")
    private = Private(1.0, 1.0, 5, unit="record")
    sound = check_record_noise(private, RecordDraws(bytes(32), "test", 1), 100, 50, 20, 0, DELTA)
    assert sound.sound
    assert sound.unit == "record"
    assert not check_record_noise(private, HalvedDraws(bytes(32), "test", 1), 100, 50, 20, 0, DELTA).sound
