"""Noise that is correlated over versions, as a server adds it: what it spends, how large it gets, and that nothing of it is kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedloom.aggregate.fedit import FedIT
from fedloom.core.answer_change import sent_part
from fedloom.core.events import Release
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import named_tensors
from fedloom.core.policies import Merge
from fedloom.core.server_state import State
from fedloom.core.types import Model
from fedloom.privacy.correlated_noise import noise_coefficients, noise_in_sums, pattern_sensitivity
from fedloom.privacy.private import Private
from fedloom.privacy.private_merge import PrivateMerge
from fedloom.privacy.secret_noise import SecretNoise
from tests.support.toys import adapter, mean_of, returned, sent

METHOD, APART, CLIP, Z = FedIT(), 3, 0.5, 2.0
BANDED = Private(clip=CLIP, multiplier=Z, most_answers=9, noise="banded", apart=APART)
MECHANISM = PrivateMerge(BANDED, SecretNoise(b"s" * 32, ("test",)))
SIZES = {"wide": (300, 200)}


def merge_of(
    model: Model, clients: Sequence[int], moved: bool = False, weights: Sequence[float] | None = None
) -> Merge:
    """A step along the mean change of these clients, who changed nothing unless they `moved`."""
    updates = []
    for number, client in enumerate(clients, 1):
        update = returned(replace(sent(METHOD, model, 8, number), client=f"c{client}"))
        if not moved:
            update = replace(
                update, result=replace(update.result, adapter=sent_part(update.task.start, update.result.adapter))
            )
        updates.append(update)
    return mean_of(updates, weights, as_delta=True)


def carried_out(rows: Sequence[Sequence[int]], moved: bool = False) -> tuple[list[Model], list[Release]]:
    """The models and releases of versions that hold these clients."""
    first = METHOD.init(adapter(8, layers=SIZES))
    state, models, releases = State(first, first), [first], list[Release]()
    for row in rows:
        state.model, release = MECHANISM.release(METHOD, state, merge_of(first, row, moved))
        state.version += 1
        assert release is not None
        models.append(state.model)
        releases.append(release)
    return models, releases


def flat(model: Model) -> Tensor:
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(named_tensors(model.adapter).items())])


ROWS = ((0, 1), (2, 3), (4,), (0, 5), (2,), (1, 3), (5,), (0, 4))
"""Client 0 is in versions 0, 3 and 7, client 1 in 0 and 5, client 2 in 1 and 4, and so on."""


def test_a_client_spends_the_sensitivity_of_its_own_merges_over_all_releases() -> None:
    _, releases = carried_out(ROWS)
    for client, versions in ((0, (0, 3, 7)), (1, (0, 5)), (2, (1, 4)), (4, (2, 7)), (5, (3, 6))):
        spent = math.hypot(*(release.spent.get(f"c{client}", 0.0) for release in releases))
        assert spent == pytest.approx(
            pattern_sensitivity(APART, len(ROWS), dict.fromkeys(versions, 1.0)) / Z, rel=1e-12
        )
    assert releases[1].spent["c0"] == 0.5 / Z  # it is in the rows of the versions after its own
    assert "c0" not in releases[6].spent


def test_a_share_below_the_largest_spends_less() -> None:
    first = METHOD.init(adapter(8, layers=SIZES))
    _, release = MECHANISM.release(METHOD, State(first, first), merge_of(first, (0, 1), weights=(0.8, 0.2)))
    assert release is not None
    assert release.spent == {"c0": 1 / Z, "c1": pytest.approx(0.25 / Z)}


def test_noise_in_the_running_model_is_as_large_as_computed_and_less_than_independent_noise() -> None:
    """Two clients a version, so half a change each: 4,000 numbers over 8 versions."""
    models, _ = carried_out([(2 * version, 2 * version + 1) for version in range(8)])
    noise = torch.stack([flat(model) - flat(models[0]) for model in models[1:]])
    measured = float(noise.square().mean().sqrt()) / (Z * CLIP / 2)
    assert measured == pytest.approx(noise_in_sums(APART, 8), rel=0.03)
    assert measured < 0.9 * noise_in_sums(1, 8)


def test_the_same_merges_give_the_same_bytes_from_the_releases_alone() -> None:
    """As after a kill: a state that is read from a checkpoint has models and releases, and no noise."""
    models, releases = carried_out(ROWS, moved=True)
    assert all(not model.memory for model in models)
    first = models[0]
    for at in (1, 4, 7):
        state = State(models[at], first, version=at)
        state.releases = list(releases[:at])
        after, release = MECHANISM.release(METHOD, state, merge_of(first, ROWS[at], moved=True))
        assert fingerprint(after.adapter) == fingerprint(models[at + 1].adapter)
        assert release == releases[at]


def test_an_equal_sum_after_another_past_has_draws_of_its_own() -> None:
    """With the same draws, the difference of two branches would be the difference of their pasts, without any noise."""
    one_models, one = carried_out([(0,), (1,)], moved=True)
    other_models, other = carried_out([(0, 2), (1,)], moved=True)
    assert one[1].value != other[1].value
    added = [flat(models[2]) - flat(models[1]) for models in (one_models, other_models)]
    past = [flat(models[1]) - flat(models[0]) for models in (one_models, other_models)]
    weight = noise_coefficients(APART, 2)[1]
    rest = (added[0] - added[1]) - weight * (past[0] - past[1])
    assert float(rest.square().mean().sqrt()) > Z * CLIP


def test_a_version_has_fresh_noise_of_full_size_whatever_is_known_of_the_past() -> None:
    models, _ = carried_out(ROWS)
    noise = torch.stack([flat(after) - flat(before) for before, after in itertools.pairwise(models)])
    shares = [len(row) for row in ROWS]
    unit = torch.stack([one * share / (Z * CLIP) for one, share in zip(noise, shares, strict=True)])
    inverse = torch.zeros(len(ROWS), len(ROWS), dtype=torch.float64)
    for row in range(len(ROWS)):
        for at in range(row + 1):
            inverse[row, at] = noise_coefficients(APART, len(ROWS))[row - at]
    draws = torch.linalg.inv(inverse) @ unit
    covariance = draws @ draws.T / draws.shape[1]
    torch.testing.assert_close(covariance, torch.eye(len(ROWS), dtype=torch.float64), atol=0.08, rtol=0)
