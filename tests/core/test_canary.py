"""The canary: what is scored, what is published, who is set aside, and what waits meanwhile."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.aggregate.fedit import FedIT
from fedloom.core.canary import Canary, CanaryRecord, Trial, clearly_better, judge, without_sites
from fedloom.core.errors import Refused
from fedloom.core.events import (
    CanaryScored,
    CheckCanary,
    ClientJoined,
    Command,
    Dispatch,
    Publish,
    SetAside,
    Stop,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.limits import Limits
from fedloom.core.policies import Merge
from fedloom.core.server import Server
from fedloom.core.server_state import State
from fedloom.runs.checkpoint import read_checkpoint, write_checkpoint
from fedloom.runs.resume import saved_fields
from fedloom.schedule.fedasync import FedAsync
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.rounds import Rounds
from tests.support import toys
from tests.support.canary_world import ALWAYS, STRICT, Play
from tests.support.storms import tries

CANARY = Canary(examples=10, margin=0.02)


def found(
    score: Callable[[frozenset[str]], float], best: float, margin: float = 0.02, sites: int = 6
) -> tuple[str, ...] | None:
    """The sites that are set aside one after the other, where merges without these sites have this score; None: nobody is.

    All of them where a merge fails and no single one can be told.
    """
    gone: tuple[str, ...] = ()
    record = CanaryRecord(scores=((best,), (0.0,)))  # an early version, and the one before this merge
    while True:
        updates = [toys.make_update(toys.adapter(2), 2, n) for n in range(1, sites + 1) if f"c{n}" not in gone]
        trial = Trial(FedIT().init(toys.adapter(2)), toys.mean_of(updates))
        verdict = judge(trial, (score(frozenset(gone)),), record, margin)
        while verdict.leave_out is not None:
            trial = replace(verdict.trial, absent=verdict.leave_out)
            verdict = judge(trial, (score(frozenset({*gone, verdict.leave_out})),), record, margin)
        gone += verdict.set_aside
        if not verdict.set_aside or len(gone) == sites:
            return gone or None


@given(culprits=st.sets(st.sampled_from([f"c{k}" for k in range(1, 7)]), max_size=3), best=st.floats(0.3, 0.8))
@tries(50)
def test_those_who_carry_the_loss_are_found(culprits: set[str], best: float) -> None:
    """One after the other, where each takes its share off the score; nobody else."""
    assert set(found(lambda out: best + 0.1 - 0.3 * len(culprits - out), best) or ()) == culprits


def test_where_no_single_one_can_be_told_all_are_set_aside() -> None:
    everybody = tuple(f"c{k}" for k in range(1, 7))
    assert found(lambda out: 0.0, best=0.5) == everybody
    assert found(lambda out: 0.0, best=0.5, sites=1) == ("c1",)
    assert found(lambda out: 0.49, best=0.5) is None


def test_who_keeps_the_model_where_it_is_is_set_aside_too() -> None:
    """No score falls; without one site it would gain more than the margin. Less is no reason."""
    assert found(lambda out: 0.03 * ("c4" in out), best=0.0) == ("c4",)
    assert found(lambda out: 0.015 * ("c4" in out), best=0.0) is None


def test_who_brings_less_than_others_is_not_set_aside() -> None:
    """Without a site the others count for more: of six, one that brings nothing takes a sixth of what the merge gains."""
    assert found(lambda out: 0.5 if out else 0.42, best=0.0) is None


@given(chance=st.integers(0, 10**6), shift=st.sampled_from([0.0, 0.1]))
@tries(50)
def test_what_chance_explains_is_not_clear(chance: int, shift: float) -> None:
    """Two hundred examples whose scores differ by 0.2 either way: never clear by chance, always where most of them fall."""
    draw = random.Random(chance)
    others = tuple(draw.random() for _ in range(200))
    scores = tuple(one + shift + draw.choice((-0.2, 0.2)) for one in others)
    assert clearly_better(scores, others, margin=0.05) == (shift > 0)
    assert not clearly_better(others, scores, margin=0.05)


def test_a_liar_seldom_has_an_honest_site_set_aside() -> None:
    """Honest changes are nearly equal; the liar's is one of them, turned or scaled up to five times, at three times the weight."""
    draw = random.Random(0)
    aside = [accused(draw) for _ in range(300)]
    assert sum(one == ("c6",) for one in aside) > 75
    assert sum(len(one) == 1 and one != ("c6",) for one in aside) <= 6


def accused(draw: random.Random) -> tuple[str, ...]:
    """Who is set aside of five honest sites and a liar, c6, somewhere on the way to what is to be learnt."""
    changes = {f"c{k}": draw.uniform(0.9, 1.1) for k in range(1, 6)}
    changes["c6"] = draw.uniform(-5.0, 5.0) * changes["c1"]
    weights = {site: 3.0 if site == "c6" else 1.0 for site in changes}
    reached, own = draw.uniform(0.0, 1.5), draw.uniform(0.1, 0.4)

    def scores(out: str | None) -> tuple[float, ...]:
        left = [site for site in changes if site != out]
        step = sum(weights[site] * changes[site] for site in left) / sum(weights[site] for site in left)
        return at(reached + own * step)

    def at(place: float) -> tuple[float, ...]:
        return tuple(math.exp(-((place - target) ** 2)) for target in (1.8, 2.0, 2.2))

    updates = [toys.make_update(toys.adapter(2), 2, number) for number in range(1, 7)]
    merge = Merge(tuple((weights[one.task.client] / 8, one) for one in updates))
    trial, record = Trial(FedIT().init(toys.adapter(2)), merge), CanaryRecord(scores=(at(reached),))
    verdict = judge(trial, scores(None), record, 0.02)
    while verdict.leave_out is not None:
        trial = replace(verdict.trial, absent=verdict.leave_out)
        verdict = judge(trial, scores(trial.absent), record, 0.02)
    return verdict.set_aside


def test_a_version_is_compared_with_the_best_of_the_last_ten() -> None:
    """Small losses do not add up: each is within the margin of the last version, the third is not of the best one."""
    server, checks = _rounds(Limits(versions=20))
    model = server.state.model
    for score, published in ((0.80, True), (0.79, True), (0.785, True), (0.77, False)):
        before = server.state.version
        _play_round(server, checks, score)
        assert (server.state.version > before) == published
    record = CanaryRecord()
    for version in range(15):
        record = record.passed(version, model, (0.9 if version == 4 else 0.5,))
    assert (len(record.scores), record.best) == (10, (0.5,))  # version 4 was eleven versions ago


def _rounds(limits: Limits, canary: Canary = CANARY) -> tuple[Server, list[CheckCanary]]:
    """A server over two clients in rounds, version 0 scored at 0.5, and the checks that it has asked for."""
    server = toys.server(Rounds(cohort_size=2), limits=limits, canary=canary)
    for profile in toys.profiles(2).values():
        server.handle(0.0, ClientJoined(profile))
    (*_, check) = server.handle(0.0, TimerFired())
    assert isinstance(check, CheckCanary)
    assert check.version == 0
    assert not server.state.busy  # nobody starts before version 0 has its score
    server.handle(0.0, CanaryScored(check.check, (0.5,)))
    return server, [check]


def _play_round(server: Server, checks: list[CheckCanary], *scores: float) -> list[Command]:
    """Both clients answer, the checks get these scores, the last of them again and again; returns all commands."""
    now, commands, told = server.state.now + 1.0, list[Command](), list(scores)
    for task in list(server.state.busy.values()):
        result = toys.make_result(toys.changed(task.start, task.id))
        commands += server.handle(now, UpdateArrived(task.client, task.id, result))
    while commands and isinstance(commands[-1], CheckCanary):
        check = commands[-1]
        checks.append(check)
        score = told.pop(0) if len(told) > 1 else told[0]
        commands += server.handle(now, CanaryScored(check.check, (score,)))
    return commands


def test_a_run_in_which_no_version_passes_comes_to_its_end() -> None:
    server, checks = _rounds(Limits(versions=5, failures=7))
    for _ in range(4):
        commands = _play_round(server, checks, 0.1)
    (stop,) = (one for one in commands if isinstance(one, Stop))
    assert server.state.version == 0
    assert stop.reason.startswith("8 tasks failed in a row, the last one: the canary score of a version with it is 0.1")
    assert server.state.failures == 8
    assert server.handle(9.0, CanaryScored(99, (1.0,))) == []


def test_one_that_is_scored_now_and_then_goes_back_to_the_version_that_passed() -> None:
    """Versions 1 is published unseen; 2 fails whoever is left out, and so does 1 by itself: 3 is version 0 again."""
    server, checks = _rounds(Limits(versions=9), Canary(10, 0.02, every=2))
    first = server.state.model
    assert [one.version for one in _play_round(server, checks, 0.1) if isinstance(one, Publish)] == [1]
    commands = _play_round(server, checks, 0.1)
    assert [(one.version, one.updates) for one in commands if isinstance(one, Publish)] == [(2, ())]
    assert sum(isinstance(one, SetAside) for one in commands) == 2
    assert server.state.model is first
    assert len(checks) == 1 + 1 + 2 + 1  # version 0, the merge, without either, version 1 by itself
    assert any(isinstance(one, Dispatch) for one in commands)


def test_where_the_published_version_passes_by_itself_it_stays() -> None:
    server, checks = _rounds(Limits(versions=9), Canary(10, 0.02, every=2))
    _play_round(server, checks, 0.1)
    kept = server.state.model
    commands = _play_round(server, checks, 0.1, 0.1, 0.1, 0.6)
    assert not any(isinstance(one, Publish) for one in commands)
    assert server.state.model is kept
    assert (server.state.version, server.state.canary.scores) == (1, ((0.5,), (0.6,)))


def test_answers_wait_in_their_order_and_clients_go_on_from_the_published_version() -> None:
    """An asynchronous server whose driver takes its time to score."""
    server = toys.server(FedAsync(max_in_flight=3), limits=Limits(versions=3, evaluate_every=0), canary=CANARY)
    for profile in toys.profiles(5).values():
        server.handle(0.0, ClientJoined(profile))
    (check,) = server.handle(0.0, TimerFired())
    commands = server.handle(0.0, CanaryScored(1, (0.5,)))
    one, two, three = (command.task for command in commands if isinstance(command, Dispatch))
    answer = toys.make_result(toys.changed(one.start, 7))
    (check,) = server.handle(1.0, UpdateArrived(one.client, one.id, answer))
    assert isinstance(check, CheckCanary)
    server.handle(1.0, CanaryScored(check.check - 1, (0.9,)))
    assert server.state.version == 0  # that was the score of another check
    for number, task in enumerate((three, two), 2):
        commands = server.handle(float(number), UpdateArrived(task.client, task.id, answer))
        assert commands
        assert {type(command) for command in commands} == {Dispatch}
        assert all(command.task.version == 0 for command in commands if isinstance(command, Dispatch))
    merged = list[int]()
    for _ in range(3):
        commands = server.handle(4.0, CanaryScored(check.check, (0.5,)))
        merged += [update.task.id for command in commands if isinstance(command, Publish) for update in command.updates]
        check = commands[-1] if isinstance(commands[-1], CheckCanary) else check
    assert merged == [one.id, three.id, two.id]
    assert isinstance(commands[-1], Stop)


@pytest.mark.parametrize("aside", [False, True])
def test_a_server_that_is_restored_while_a_score_is_outstanding_goes_on_to_the_same_bytes(
    tmp_path: Path, aside: bool
) -> None:
    """At every check of a run in which merges fail, of the merge itself and of those without a site."""
    restored = 0
    canary = STRICT if aside else ALWAYS
    play = Play(FedBuff(buffer_size=3, max_in_flight=4), FedIT(), canary, poisoned=("c3",) if aside else (), versions=3)
    handle = play.server.handle

    def through_a_file(now: float, event: object) -> list[Command]:
        nonlocal restored
        if isinstance(event, CanaryScored):
            hints = saved_fields(State)
            write_checkpoint(tmp_path / "state", {name: getattr(play.server.state, name[6:]) for name in hints})
            for name, value in read_checkpoint(tmp_path / "state").read(hints).items():
                setattr(play.server.state, name[6:], value)
            restored += 1
        return handle(now, event)  # type: ignore[arg-type]

    play.server.handle = through_a_file  # type: ignore[method-assign]
    plain = Play(play.schedule, play.method, canary, poisoned=play.poisoned, versions=3).run()
    assert play.run().told == plain.told
    assert play.model == plain.model
    assert restored == len(plain.checks) >= 4
    assert bool(plain.set_aside) == aside


def test_a_merge_without_some_of_its_sites() -> None:
    updates = [toys.make_update(toys.adapter(2), 2, number) for number in (1, 2, 3)]
    merge = Merge(((0.5, updates[0]), (0.3, updates[1]), (0.2, updates[2])))
    left = without_sites(merge, {"c1"})
    assert left is not None
    assert [update.task.client for _, update in left.weighted_updates] == ["c2", "c3"]
    assert [weight for weight, _ in left.weighted_updates] == pytest.approx([0.6, 0.4])
    assert without_sites(merge, {"c9"}) is merge
    assert without_sites(merge, {"c1", "c2", "c3"}) is None
    nothing = without_sites(Merge(((1.0, updates[0]), (0.0, updates[1]), (0.0, updates[2]))), {"c1"})
    assert nothing is not None
    assert [weight for weight, _ in nothing.weighted_updates] == [0.5, 0.5]


@pytest.mark.parametrize(("name", "value"), [("examples", 0), ("margin", -0.1), ("margin", math.nan), ("every", 0)])
def test_settings_without_a_meaning_are_refused(name: str, value: Any) -> None:
    with pytest.raises(Refused, match=f"canary.{name}"):
        replace(CANARY, **{name: value})
