"""What a start may order, on a real (tiny) model: frozen, private and chosen parts, rates, pruning, control variates, folds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2Model

from fedloom.core.lora import Adapter, Factor, compact_with_fold, cut_factor
from fedloom.core.rate_by_rank import RateByRank
from fedloom.core.types import ClientState, Pruning, Result, Rules, Task
from fedloom.train import objective, peft_weights
from fedloom.train.base_model import Base, initial_adapter
from fedloom.train.objective import client_variate, personal_adapter
from fedloom.train.tokenised import encode_texts, plan_batches
from fedloom.train.trainer import PeftTrainer
from tests.support.tiny_models import WORDS
from tests.support.tiny_runs import base_of, examples, frozen, lively, logits, same, task_of, trainer_of


@pytest.fixture
def base(encoder: Path) -> Base:
    return base_of(encoder, scaling=3.0)  # no power of two: a round trip through PEFT rounds


@pytest.fixture
def gpt2(encoder: Path, tmp_path: Path) -> Path:
    """A decoder whose attention is a Conv1D, which keeps its weights as (in, out)."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    marks = {"bos_token_id": 2, "eos_token_id": 3}
    GPT2Model(GPT2Config(vocab_size=len(WORDS) + 4, initializer_range=0.2, **sizes, **marks)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((encoder / name).read_bytes())
    return tmp_path


def ordered(start: Adapter, steps: int = 3, number: int = 1, rules: Rules | None = None, **more: Any) -> Task:
    task = task_of(start, steps=steps, number=number)
    return replace(task, start=replace(task.start, rules=rules or Rules(), **more))


def train(trainer: PeftTrainer, task: Task, local: ClientState | None = None) -> tuple[Result, ClientState]:
    (done,) = trainer.train([(task, local or ClientState())])
    return done


def distance(one: Adapter, other: Adapter) -> dict[str, float]:
    """How far the sides of all layers are apart, by side."""
    found: dict[str, float] = {}
    after = objective.flatten_adapter(other)
    for name, tensor in objective.flatten_adapter(one).items():
        key = objective.side_of(name)
        found[key] = found.get(key, 0.0) + float((tensor - after[name]).norm())
    return found


@pytest.mark.parametrize("sides", [("down",), ("up",), ("dense",), ("down", "dense"), ("up", "dense")])
def test_frozen_sides_come_back_to_the_bit_and_the_others_move(base: Base, sides: Any) -> None:
    start, trainer = lively(initial_adapter(base, 4)), trainer_of(base, weight_decay=0.1)
    result, local = train(trainer, ordered(start, rules=Rules(frozen=sides)))
    moved = {side for side, far in distance(result.adapter, start).items() if far > 0}
    assert moved == {"down", "up", "dense"} - set(sides)
    assert {objective.side_of(name) for name in local.moments} == moved
    free, _ = train(trainer, ordered(start, number=2))  # in the same slot
    assert all(far > 0 for far in distance(free.adapter, start).values())


def test_private_sides_come_back_to_the_bit_and_are_used_again_the_next_time(base: Base) -> None:
    start, trainer = lively(initial_adapter(base, 4)), trainer_of(base)
    rules = Rules(private=("up", "dense"))
    result, local = train(trainer, ordered(start, rules=rules))
    assert {side for side, far in distance(result.adapter, start).items() if far > 0} == {"down"}
    assert local.private
    assert all(far > 0 for far in distance(local.private, start).values())
    shared = lively(initial_adapter(base, 4), seed=5)
    second = ordered(shared, number=2, rules=rules)
    own = Adapter(
        {n: Factor(f.down, local.private.factors[n].up) for n, f in shared.factors.items()}, local.private.dense
    )
    assert same(personal_adapter(second.start, local), own)
    again, _ = train(trainer, second, local)
    wanted, _ = train(trainer, ordered(own, number=2), replace(local, private=None))
    assert distance(again.adapter, wanted.adapter)["down"] == 0.0
    other, _ = train(trainer, second, replace(local, private=None))
    assert distance(again.adapter, other.adapter)["down"] > 0


def test_a_private_side_survives_a_task_of_lower_rank(base: Base) -> None:
    start, trainer = lively(initial_adapter(base, 4)), trainer_of(base)
    rules = Rules(private=("up",))
    _, local = train(trainer, ordered(start, rules=rules))
    low = Adapter({n: cut_factor(f, 2) for n, f in start.factors.items()}, start.dense)
    _, later = train(trainer, ordered(low, number=2, rules=rules), replace(local, basis="of another rank"))
    assert local.private
    for name, f in personal_adapter(ordered(start, rules=rules).start, later).factors.items():
        assert f.up[:, 2:].equal(local.private.factors[name].up[:, 2:])
        assert not f.up[:, :2].equal(local.private.factors[name].up[:, :2])


@pytest.mark.parametrize("count", [1, 5])
def test_directions_that_were_not_chosen_stay_to_the_bit(base: Base, count: int) -> None:
    """LoRA-A2: one step in five finds out which, the others train no more than `count` over all layers."""
    start = lively(initial_adapter(base, 4))
    trainer = trainer_of(base, weight_decay=0.1)
    result, local = train(trainer, ordered(start, steps=5, rules=Rules(frozen=("down",), select=count)))
    trial, _ = train(trainer, ordered(start, steps=1, rules=Rules(frozen=("down",))))
    wanted = objective.most_moved_directions(start, trial.adapter, count)
    moved = {n: (f.up != start.factors[n].up).any(0) for n, f in result.adapter.factors.items()}
    assert sum(int(mask.sum()) for mask in moved.values()) == count
    assert all(mask.equal(wanted[name]) for name, mask in moved.items())
    assert (result.steps, result.metrics["first_loss"]) == (5, trial.metrics["first_loss"])
    assert {int(state["step"]) for state in local.moments.values()} == {4}


def test_a_higher_rate_moves_up_further_and_down_as_before(base: Base) -> None:
    start, trainer = lively(initial_adapter(base, 4)), trainer_of(base)
    plain, fast = (train(trainer, ordered(start, 1, rules=Rules(up_rate=rate)))[0].adapter for rate in (1.0, 5.0))
    before, after = distance(plain, start), distance(fast, start)
    assert after["up"] == pytest.approx(5.0 * before["up"], rel=0.01)
    assert (after["down"], after["dense"]) == (before["down"], before["dense"])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_rate_by_rank_is_a_rate_of_the_factors_alone(base: Base, power: float) -> None:
    """A task of rank 4 where rank 16 has the run's rate moves its factors as at 4 ** power times that rate, to the byte."""
    start, at_rank = lively(initial_adapter(base, 4)), RateByRank(power, reference=16)
    task = ordered(start, 2, rules=Rules(frozen=("dense",), up_rate=3.0))
    ruled = replace(task, budget=replace(task.budget, rank=4, rate=at_rank))
    alone, scaled = trainer_of(base, learning_rate=1e-3), trainer_of(base, learning_rate=1e-3 * 4**power)
    assert same(train(alone, ruled)[0].adapter, train(scaled, task)[0].adapter)
    plain, faster = (train(alone, ordered(start, 1))[0].adapter, replace(ordered(start, 1), budget=ruled.budget))
    after = train(alone, replace(faster, budget=replace(ruled.budget, steps=1)))[0].adapter
    assert distance(after, start)["dense"] == distance(plain, start)["dense"]
    assert distance(after, start)["down"] == pytest.approx(4**power * distance(plain, start)["down"], rel=0.01)


def test_a_proximal_term_keeps_a_client_nearer_to_its_start(base: Base) -> None:
    start = lively(initial_adapter(base, 4))
    far, near, nearest = (
        sum(distance(train(trainer_of(base, proximal=mu), ordered(start, 12))[0].adapter, start).values())
        for mu in (0.0, 1.0, 100.0)
    )
    assert nearest < 0.9 * near < 0.9 * far


def test_a_strong_penalty_prunes_and_is_no_part_of_the_loss_that_is_told(base: Base) -> None:
    start, trainer = lively(initial_adapter(base, 4)), trainer_of(base)
    plain, _ = train(trainer, ordered(start, 1))
    pruned, local = train(trainer, ordered(start, rules=Rules(pruning=Pruning(strength=100.0, keep=0.6))))
    assert {f.rank for f in pruned.adapter.factors.values()} == {2}
    assert pruned.metrics["first_loss"] == plain.metrics["first_loss"]
    assert local.basis == "0"


def gradient(trainer: PeftTrainer, task: Task) -> dict[str, Tensor]:
    """Of the loss on the first batch of the task, in PEFT's parametrisation (up / scaling)."""
    model, shard = trainer.base.model.train(), trainer.shards[task.client]
    (batch,) = plan_batches(
        trainer.texts.lengths(shard), trainer.training.batch_size, 1, True, trainer.seed(task, "batches")
    )
    weights = peft_weights.slot_parameters(model, trainer.base.put(task.start.train))
    with torch.random.fork_rng():
        torch.manual_seed(trainer.seed(task, "dropout"))
        loss = model(**trainer.texts.batch([shard[i] for i in batch], trainer.base.device)).loss
    return dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))


def test_the_change_of_the_control_variate_is_the_mean_gradient(base: Base) -> None:
    """SCAFFOLD: c_i+ - c_i, with c_i+ the gradient over the task; here of one step."""
    start, trainer = lively(initial_adapter(base, 4)), trainer_of(base)
    common, own = lively(start, seed=3), lively(start, seed=4)
    task = ordered(start, 1, control=common)
    wanted = gradient(trainer, task)
    result, local = train(trainer, task, ClientState(control=own))
    assert result.control
    assert local.control
    before, after = objective.flatten_adapter(own), objective.flatten_adapter(local.control)
    for name, change in objective.flatten_adapter(result.control).items():
        torch.testing.assert_close(after[name], wanted[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(change, wanted[name] - before[name], rtol=1e-4, atol=1e-6)


def test_a_control_variate_that_is_the_clients_own_corrects_nothing(base: Base) -> None:
    start, trainer = lively(initial_adapter(base, 4)), trainer_of(base)
    common = lively(start, seed=3)
    plain, _ = train(trainer, ordered(start))
    corrected, _ = train(trainer, ordered(start, control=common), ClientState(control=common))
    other, _ = train(trainer, ordered(start, control=common))
    assert same(corrected.adapter, plain.adapter)
    assert not same(other.adapter, plain.adapter)


def test_control_variates_belong_to_directions_and_private_sides_have_none(base: Base) -> None:
    start, trainer = lively(initial_adapter(base, 4)), trainer_of(base)
    low = Adapter({n: cut_factor(f, 2) for n, f in start.factors.items()}, start.dense)
    first = ordered(low, directions=(4, 6), control=lively(low), rules=Rules(private=("up",)))
    result, local = train(trainer, first)
    assert result.control
    for name, f in result.control.factors.items():
        assert not bool(f.up.any())
        assert bool(f.down.any())
        for slots, taken in (((4, 6), [0, 1]), ((1, 6), [None, 1]), ((0, 5), [None, None])):
            again = client_variate(replace(first.start, directions=slots), local).factors[name].down
            for row, at in zip(again, taken, strict=True):
                assert row.equal(0.0 * row if at is None else f.down[at])


def fold_of(start: Adapter, rank: int) -> Adapter:
    grown = {n: Factor(f.down[:1].expand(rank, -1), f.up[:, :1].expand(-1, rank)) for n, f in start.factors.items()}
    return Adapter(lively(Adapter(grown), seed=9).factors)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "gpt2"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_fold_is_the_same_function_as_the_whole_adapter(request: pytest.FixtureRequest, kind: str, rank: int) -> None:
    base = base_of(request.getfixturevalue(kind))
    texts, start = encode_texts(examples(12), base.tokenizer, 32), lively(initial_adapter(base, 4))
    fold, inputs = fold_of(start, rank), texts.batch(range(12), base.device)
    wanted, plain = logits(base, compact_with_fold(start, fold), texts), logits(base, start, texts)
    base.put(start, fold=fold)
    with torch.no_grad():
        given = base.model.eval()(**inputs).logits
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-4)
    assert float((given - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["encoder", "decoder", "gpt2"])
def test_the_base_is_what_it_was_after_training_over_a_fold(request: pytest.FixtureRequest, kind: str) -> None:
    """Folds come and go, the frozen weights come back to the bit as soon as somebody runs without one."""
    base = base_of(request.getfixturevalue(kind))
    start, before, trainer = lively(initial_adapter(base, 4)), frozen(base), trainer_of(base)
    plain, _ = train(trainer, ordered(start))
    results = [train(trainer, ordered(start, fold=fold_of(start, rank)))[0] for rank in (1, 2, 1)]
    assert same(results[0].adapter, results[2].adapter)
    assert not same(results[0].adapter, results[1].adapter)
    again, _ = train(trainer, ordered(start))
    assert same(again.adapter, plain.adapter)
    assert all(tensor.equal(before[name]) for name, tensor in frozen(base).items())
