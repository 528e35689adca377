"""The attacks find what is there to be found and nothing where there is nothing; the page shows the kept figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bench.leakage import labels, places, rows
from bench.leakage.cells import CELLS, QUICK, allowed
from bench.leakage.page import PAGE, kept_lines, summary, with_table
from bench.leakage.scene import Observation, Scene, Setting, make_scene
from bench.leakage.statistics import fit_logistic
from bench.leakage.vocabulary import Vocabulary
from bench.leakage.words import answer_features, judge
from fedloom.audit.membership import attack_scores, membership, presence
from fedloom.audit.statistics import auc
from fedloom.audit.token_span import down_changes
from fedloom.data.examples import Examples
from tests.support.tiny_models import tiny_encoder, toy_rows

WIDTH, TOKENS = 48, 400


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    model = tiny_encoder(tmp_path_factory.mktemp("model"), hidden_size=64)
    toys = toy_rows(80)
    names = ("pet", "colour")
    examples = Examples(
        tuple(row["text"] for row in toys), None, tuple(names.index(row["label"]) for row in toys), names, None
    )
    return make_scene(str(model), examples, 0, dropout=0.0)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """Random embeddings with a common mean; the first tokens are common, the last in no public row."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(TOKENS, WIDTH, generator=draw) + 2.0
    counts = torch.linspace(100, 0, TOKENS).floor()
    rare, centre = torch.arange(20, TOKENS), vectors.mean(0)
    white = (vectors[rare] - centre).double()
    return Vocabulary(nn.Identity(), vectors, centre, torch.eye(WIDTH).double(), counts, counts, rare, white)


# What must be nothing -------------------------------------------------------------------------------------------------


def moved(seen: Observation, side: str) -> bool:
    pairs = ((factor, seen.start.train.factors[name]) for name, factor in seen.answer.factors.items())
    return any(not getattr(new, side).equal(getattr(old, side)) for new, old in pairs)


@pytest.mark.slow
def test_the_first_step_of_the_first_task_leaves_down_as_it_was_to_the_bit(scene: Scene) -> None:
    for steps, moves in ((1, False), (2, True)):
        setting = Setting(rows=8, batch=4, steps=steps, later=False)
        seen = scene.observe(scene.start(setting), scene.private[:8], setting, "one")
        assert moved(seen, "down") is moves
        assert any(bool(change.any()) for change in down_changes(seen.start.train, seen.answer).values()) is moves
        assert moved(seen, "up")


@pytest.mark.slow
def test_a_frozen_down_tells_nothing_however_long_it_is_trained(scene: Scene) -> None:
    setting = Setting(rows=8, batch=4, steps=6, frozen=("down",))
    seen = scene.observe(scene.start(setting), scene.private[:8], setting, "one")
    assert not moved(seen, "down")
    assert moved(seen, "up")


@pytest.mark.slow
def test_a_client_that_did_nothing_is_told_from_nobody(scene: Scene) -> None:
    start, pool = scene.start(Setting()), scene.private[:20]
    before = rows.row_losses(scene, start, start.train, pool)
    after = np.stack([rows.row_losses(scene, start, start.train, pool) for _ in range(6)])
    members = rows.draw_members(np.random.default_rng(0), 6, 18, 2)
    scores = attack_scores(before, after, np.zeros(6), members)
    for attack in ("shift", "margin", "lira"):
        assert membership(scores, members)[attack] == 0.5
    assert set(presence(scores, members).values()) == {0.5}


# What must be found ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_token_is_told_where_the_step_is_linear_and_the_row_has_no_more_tokens_than_down_has_rows(
    scene: Scene,
) -> None:
    linear = Setting(rows=1, batch=1, steps=1, learning_rate=1e10, clip=1e-16, length=16, seed_known=True)
    assert places.measure(scene, linear, 4)["exact"] == 1.0
    ordinary = Setting(rows=8, batch=8, steps=2)
    assert places.measure(scene, ordinary, 2)["exact"] < 0.5


@pytest.mark.slow
def test_a_planted_text_that_is_trained_on_for_long_is_found(scene: Scene) -> None:
    figures = rows.measure(scene, Setting(rows=4, batch=4, steps=16, learning_rate=2e-2), 4)
    assert figures["canary_shift"] > 0.6
    assert figures["membership_loss"] > 0.6


@pytest.mark.slow
def test_the_bias_moves_towards_the_labels_of_the_client(scene: Scene) -> None:
    assert labels.measure(scene, Setting(rows=12, batch=4, steps=3), 6)["correlation"] > 0.5


def test_rows_of_down_that_point_towards_some_tokens_name_them(vocabulary: Vocabulary) -> None:
    there = [30, 77, 250, 399]
    mix = torch.randn(4, len(there), generator=torch.Generator().manual_seed(1))
    features = answer_features(vocabulary, {"query": mix @ (vocabulary.vectors[there] - vocabulary.centre)})
    own = vocabulary.holds(there)
    assert own.sum() == len(there)
    for column in features.T:
        assert auc(column[own], column[~own]) > 0.9
    assert judge(features[:, 0], own, vocabulary)["auc"] > 0.9


def test_losses_that_fall_for_members_alone_are_told_by_every_attack() -> None:
    members = rows.draw_members(np.random.default_rng(0), 8, 20, 2)
    assert (members[:, :20].sum(1) == 10).all()
    assert (members[:, 20:].sum(0) == 4).all()
    noise = np.random.default_rng(1).normal(0, 0.01, members.shape)
    scores = attack_scores(np.ones(22), np.where(members, 0.5, 1.0) + noise, np.zeros(8), members)
    assert all(value > 0.99 for value in membership(scores, members).values())
    assert all(value > 0.99 for value in presence(scores, members).values())


# Figures --------------------------------------------------------------------------------------------------------------


def test_the_logistic_rule_puts_what_is_right_first() -> None:
    features = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double()
    right = features[:, 1] > 0.3
    scores = fit_logistic(features, right)(features)
    assert auc(scores[right], scores[~right]) > 0.99


def test_cells_of_the_last_line_are_within_the_default_limits() -> None:
    ordinary = {name for name, cell in CELLS.items() if cell.ordinary}
    assert {CELLS[name].kind for name in ordinary} == {"words", "places", "rows", "labels"}
    assert all(allowed(CELLS[name].setting) and CELLS[name].seeds == 5 for name in ordinary)
    assert not allowed(Setting(steps=2)), "an answer about 16 rows, however many the site has"
    assert not allowed(Setting(rank=16))
    assert QUICK in CELLS


def test_the_page_shows_what_was_measured() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text, kept_lines()) == text, "run python -m bench.leakage --table"
    assert all(value is not None for value in summary(kept_lines()).values())
