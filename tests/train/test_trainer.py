"""Local training on the shared base: a function of its arguments, which learns and touches nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fedloom.core.lora import Adapter, cut_factor, pad
from fedloom.core.seeds import simulated_secret
from fedloom.core.types import ClientState
from fedloom.train.base_model import initial_adapter, load_base
from fedloom.train.settings import Engine, LoRA
from fedloom.train.tokenised import encode_texts
from tests.support.tiny_runs import base_of, examples, frozen, lively, logits, same, task_of, trainer_of


def test_the_same_task_gives_the_same_bytes_in_any_company_and_order(encoder: Path) -> None:
    base = base_of(encoder, dropout=0.1)
    trainer, start = trainer_of(base), lively(initial_adapter(base, 4))
    low = Adapter({n: cut_factor(f, 2) for n, f in start.factors.items()}, start.dense)
    one, two = task_of(start, "a", number=1), task_of(low, "b", number=2)
    forwards = trainer.train([(one, ClientState()), (two, ClientState())])
    torch.rand(7)  # draws of others must not matter
    backwards = trainer.train([(two, ClientState()), (one, ClientState())])
    for (result, _), (again, _) in zip(forwards, reversed(backwards), strict=True):
        assert same(result.adapter, again.adapter)
        assert result.metrics == again.metrics


def test_what_a_client_draws_follows_from_its_secret_run_and_task_and_from_nothing_that_is_sent(encoder: Path) -> None:
    """Who sends work twice, or knows the run's seed, learns nothing of the draws; dropout and batches are drawn apart."""
    base = base_of(encoder, dropout=0.1)
    trainer, task = trainer_of(base), task_of(lively(initial_adapter(base, 4)))
    others = [
        (trainer, replace(task, id=2)),
        (trainer, replace(task, client="b")),
        (replace(trainer, run="another"), task),
        (replace(trainer, secret_of=partial(simulated_secret, 1)), task),
    ]
    found = {
        drawn.seed(sent, purpose) for drawn, sent in [(trainer, task), *others] for purpose in ("batches", "dropout")
    }
    assert len(found) == 10
    again = replace(
        task, version=7, sent=9.0, budget=replace(task.budget, steps=1), start=replace(task.start, basis="x")
    )
    assert trainer.seed(again, "dropout") == trainer.seed(task, "dropout")
    ((result, _),) = trainer.train([(task, ClientState())])
    (other, sent), twin = others[3], trainer.shards["a"]
    ((drawn, _),) = replace(other, shards={"a": twin}).train([(sent, ClientState())])
    assert not same(result.adapter, drawn.adapter)


def test_training_leaves_the_generator_of_others_alone(encoder: Path) -> None:
    base = base_of(encoder, dropout=0.1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    trainer_of(base).train([(task_of(initial_adapter(base, 4)), ClientState())])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_base_is_untouched_and_the_start_too(request: pytest.FixtureRequest, kind: str) -> None:
    base = base_of(request.getfixturevalue(kind))
    start = lively(initial_adapter(base, 4))
    copied = Adapter({n: pad(f, 4) for n, f in start.factors.items()}, {n: t.clone() for n, t in start.dense.items()})
    before = frozen(base)
    ((result, _),) = trainer_of(base).train([(task_of(start), ClientState())])
    after = frozen(base)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert same(start, copied)
    assert not same(result.adapter, start)


def test_nothing_but_lora_and_head_would_be_trained(encoder: Path) -> None:
    base = base_of(encoder)
    slot = base.put(initial_adapter(base, 4))
    trained = {n for n, p in base.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(f".{slot}." in name and ("lora_" in name or "classifier" in name) for name in trained)


def test_one_adapter_is_the_same_function_at_every_rank(encoder: Path) -> None:
    base = base_of(encoder, rank=2, scaling=3.0)
    texts = encode_texts(examples(12), base.tokenizer, 32)
    start = lively(initial_adapter(base, 2))
    low = logits(base, start, texts)
    for rank in (3, 4, 8):
        padded = Adapter({n: pad(f, rank) for n, f in start.factors.items()}, start.dense)
        assert torch.allclose(logits(base, padded, texts), low, atol=1e-5)


def test_the_scaling_of_a_start_changes_the_parametrisation_and_not_the_function(encoder: Path) -> None:
    base = base_of(encoder)
    texts = encode_texts(examples(12), base.tokenizer, 32)
    start = lively(initial_adapter(base, 4))
    assert torch.allclose(logits(base, start, texts, 2.0), logits(base, start, texts, 8.0), atol=1e-6)


def test_moments_stay_while_the_basis_does(encoder: Path) -> None:
    base = base_of(encoder)
    trainer, start = trainer_of(base), initial_adapter(base, 4)
    ((_, kept),) = trainer.train([(task_of(start, basis="7/4"), ClientState())])
    fresh, same_basis, other_basis = (
        trainer.train([(task_of(start, number=2, basis=basis), local)])[0][0].adapter
        for basis, local in (("7/4", ClientState()), ("7/4", kept), ("8/4", kept))
    )
    assert kept.basis == "7/4"
    assert not same(same_basis, fresh)
    assert same(other_basis, fresh)


def test_moments_are_not_kept_when_the_setting_says_so(encoder: Path) -> None:
    base = base_of(encoder)
    ((_, local),) = trainer_of(base, keep_moments=False).train([(task_of(initial_adapter(base, 4)), ClientState())])
    assert local.moments == {}


def test_a_task_does_not_change_the_moments_it_was_given(encoder: Path) -> None:
    base = base_of(encoder)
    trainer, start = trainer_of(base), initial_adapter(base, 4)
    ((_, kept),) = trainer.train([(task_of(start), ClientState())])
    before = {n: {k: v.clone() for k, v in state.items()} for n, state in kept.moments.items()}
    trainer.train([(task_of(start, number=2), kept)])
    assert all(torch.equal(before[n][k], v) for n, state in kept.moments.items() for k, v in state.items())


def test_the_result_counts_what_was_done(encoder: Path) -> None:
    base = base_of(encoder)
    trainer = trainer_of(base, batch_size=30)
    ((result, _),) = trainer.train([(task_of(initial_adapter(base, 4), steps=2), ClientState())])
    assert (result.examples, result.steps) == (30, 2)
    assert result.tokens == 2 * sum(trainer.texts.lengths(range(30)))  # two passes, padding not counted


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_loss_goes_down_on_what_can_be_learnt(request: pytest.FixtureRequest, kind: str) -> None:
    base = base_of(request.getfixturevalue(kind), rank=8)
    trainer = trainer_of(base, count=120)
    ((result, _),) = trainer.train([(task_of(initial_adapter(base, 8), steps=80), ClientState())])
    ((longer, _),) = trainer.train([(task_of(result.adapter, steps=5, number=2), ClientState())])
    assert longer.metrics["loss"] < 0.75 * result.metrics["first_loss"]


def test_computing_layers_again_gives_the_same_bytes_dropout_included(encoder: Path) -> None:
    found = []
    for checkpointing in (False, True):
        engine = Engine("torch", checkpointing=checkpointing)
        base = load_base(str(encoder), 2, LoRA(dropout=0.1), 4, seed=3, engine=engine)
        ((result, _),) = trainer_of(base).train([(task_of(lively(initial_adapter(base, 4))), ClientState())])
        found.append(result.adapter)
    assert same(*found)
