"""Several clients in one pass: what each of them would have got alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedloom.core.lora import Adapter, cut_factor
from fedloom.core.rate_by_rank import RateByRank
from fedloom.core.types import ClientState, Pruning, Rules, Task
from fedloom.train.base_model import Base, initial_adapter
from fedloom.train.engine import batched_clients, linear_kernel
from fedloom.train.settings import PLAIN
from fedloom.train.trainer import PeftTrainer, engine_notes
from tests.support.families import FAMILIES, Family
from tests.support.tiny_runs import (
    base_of,
    frozen,
    lively,
    same,
    still,
    task_of,
    trainer_of,
    writer_of,
    writing_trainer,
)
from tests.support.toys import factor

KINDS = pytest.mark.parametrize("kind", ["encoder", "decoder"])
COMMON = replace(PLAIN, together=4)
RANKS = {"a": 4, "b": 2}


def tasks(base: Base, steps: int = 1, **rules: object) -> list[Task]:
    """Clients a and b at ranks 4 and 2, a again with other weights."""
    starts = [lively(initial_adapter(base, 4), seed) for seed in range(3)]
    low = Adapter({n: cut_factor(f, 2) for n, f in starts[1].factors.items()}, starts[1].dense)
    made = [task_of(starts[0], "a", steps, 1), task_of(low, "b", steps, 2), task_of(starts[2], "a", steps, 3)]
    return [replace(task, start=replace(task.start, rules=Rules(**rules))) for task in made]  # type: ignore[arg-type]


def both(trainer: PeftTrainer, work: list[Task]) -> tuple[list[tuple], list[tuple]]:  # type: ignore[type-arg]
    """Answers one after the other, and in one pass."""
    pairs = [(task, ClientState()) for task in work]
    common = replace(trainer, engine=COMMON)
    assert len(common.groups(pairs)) == 1
    return trainer.train(pairs), common.train(pairs)


@KINDS
@pytest.mark.parametrize("onednn", [False, True])
def test_gradients_are_those_of_one_after_the_other(request: pytest.FixtureRequest, kind: str, onednn: bool) -> None:
    base = still(base_of(request.getfixturevalue(kind)))
    if onednn:  # before the slots of other ranks are made: each brings a copy of the head
        if not linear_kernel.onednn_available():
            pytest.skip("this build of torch has no oneDNN linear operator")
        linear_kernel.install_linear_kernel(base.model)
        linear_kernel.fuse_adapters(base.model)
    high, low, other_high = tasks(base)
    alone, common = both(trainer_of(base, clip=1e6), [low, high, other_high])  # the first one's slot is used
    for (one, kept), (other, also) in zip(alone, common, strict=True):
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)
        assert (other.tokens, other.steps, other.examples) == (one.tokens, one.steps, one.examples)
        assert kept.moments.keys() == also.moments.keys()
        for name, state in kept.moments.items():  # after one step exp_avg is a tenth of the gradient
            assert state["exp_avg"].shape == also.moments[name]["exp_avg"].shape
            error = float((state["exp_avg"] - also.moments[name]["exp_avg"]).abs().max())
            assert error <= 1e-5 * float(state["exp_avg"].abs().max())


@KINDS
@pytest.mark.parametrize("rules", [{}, {"frozen": ("down",)}, {"frozen": ("dense",), "up_rate": 4.0}, {"up_rate": 2.0}])
def test_many_steps_end_at_the_same_adapter(
    request: pytest.FixtureRequest, kind: str, rules: dict[str, object]
) -> None:
    """In the last of these the learning rate follows the rank, so that clients of one pass have different ones."""
    base = still(base_of(request.getfixturevalue(kind)))
    trainer = trainer_of(base, learning_rate=1e-3, weight_decay=0.1, clip=0.5, batch_size=7)
    rate = RateByRank(1.0, 4) if rules.get("up_rate") == 2.0 else None
    ranks = {task.id: max(f.rank for f in task.start.train.factors.values()) for task in tasks(base)}
    work = [replace(t, budget=replace(t.budget, rank=ranks[t.id], rate=rate)) for t in tasks(base, 8, **rules)]
    alone, common = both(trainer, work)
    for task, (one, _), (other, _) in zip(work, alone, common, strict=True):
        for name, f in one.adapter.factors.items():
            sent, got = task.start.train.factors[name], other.adapter.factors[name]
            assert got.up.shape == f.up.shape
            for side in ("up", "down"):
                moved = (getattr(f, side) - getattr(sent, side)).norm()
                assert (getattr(f, side) - getattr(got, side)).norm() <= 0.03 * moved
        if "down" in rules.get("frozen", ()):  # type: ignore[operator]
            assert all(torch.equal(f.down, task.start.train.factors[n].down) for n, f in other.adapter.factors.items())


def test_moments_go_on_at_each_clients_own_count(encoder: Path) -> None:
    base = still(base_of(encoder))
    trainer = trainer_of(base, learning_rate=1e-3)
    common = replace(trainer, engine=COMMON)
    first, second, _ = tasks(base, 2)
    ((_, old),) = trainer.train([(second, ClientState())])
    work = [(first, ClientState()), (replace(second, id=5), old)]
    assert len(common.groups(work)) == 1
    for (_, one), (_, other) in zip(trainer.train(work), common.train(work), strict=True):
        for name, state in one.moments.items():
            assert float(state["step"]) == float(other.moments[name]["step"])
            torch.testing.assert_close(state["exp_avg_sq"], other.moments[name]["exp_avg_sq"], rtol=0.05, atol=1e-6)
    ((_, kept),) = common.train([work[1]])
    assert {float(state["step"]) for state in kept.moments.values()} == {4.0}


def test_the_same_work_gives_the_same_bytes_and_leaves_the_base_and_the_generator_alone(encoder: Path) -> None:
    base = base_of(encoder, dropout=0.1)
    trainer, work = replace(trainer_of(base), engine=COMMON), [(task, ClientState()) for task in tasks(base, 3)]
    before = frozen(base)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = trainer.train(work)
    torch.rand(3)
    again = trainer.train(work)
    assert all(same(one.adapter, other.adapter) for (one, _), (other, _) in zip(first, again, strict=True))
    after = frozen(base)
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.manual_seed(0)
    trainer.train(work)
    assert torch.equal(torch.get_rng_state(), state)


def test_padded_directions_stay_zero(encoder: Path) -> None:
    base = still(base_of(encoder))
    work = tasks(base, 4)
    members = [
        batched_clients.BatchedClient(t, ClientState(), t.start.train, [[0, 1], [2, 3], [4, 5], [6]]) for t in work
    ]
    trainer = trainer_of(base)
    for (adapter, moments, losses), task in zip(
        batched_clients.train_together(base, trainer.texts, trainer.training, members, 0), work, strict=True
    ):
        assert {f.rank for f in adapter.factors.values()} == {task.budget.rank}
        assert len(losses) == 4
        assert all(state["exp_avg"].isfinite().all() for state in moments.values())


def test_only_what_can_share_a_pass_does(encoder: Path) -> None:
    base = base_of(encoder)
    trainer = replace(trainer_of(base), engine=COMMON)
    plain = [(task, ClientState()) for task in tasks(base)]
    longer = [(task, ClientState()) for task in tasks(base, 2)]
    fold = Adapter({n: factor(2, len(f.up), f.down.shape[1], 1) for n, f in initial_adapter(base, 4).factors.items()})
    folded = [(replace(t, start=replace(t.start, fold=fold)), local) for t, local in plain]
    pruning = [(task, ClientState()) for task in tasks(base, pruning=Pruning())]

    def sizes(trainer: PeftTrainer, work: list[tuple[Task, ClientState]]) -> list[int]:
        return [len(group) for group in trainer.groups(work)]

    assert sizes(trainer, plain + longer) == [3, 3]
    assert sizes(trainer, plain + folded) == [3, 3]
    assert sizes(trainer, pruning) == [1, 1, 1]
    assert sizes(trainer, plain + plain) == [4, 2]
    assert sizes(replace(trainer, engine=PLAIN), plain) == [1, 1, 1]
    assert sizes(replace(trainer, training=replace(trainer.training, proximal=0.1)), plain) == [1, 1, 1]
    assert [task for group in trainer.groups(plain + longer) for task in group] == plain + longer


def test_the_cost_rule_takes_small_steps_together_and_large_ones_apart(encoder: Path) -> None:
    base = base_of(encoder)
    assert batched_clients.clients_per_pass(base, 30) == batched_clients.MOST_CLIENTS
    assert batched_clients.clients_per_pass(base, 500) == 4
    base.model.get_base_model().config.hidden_size = 384
    assert batched_clients.clients_per_pass(base, 50) == batched_clients.MOST_CLIENTS
    assert batched_clients.clients_per_pass(base, 400) == 1
    assert batched_clients.clients_per_pass(base, 600) == 1


# Models in which the rows of a batch do not tell clients apart ---------------------------------------------------------------


def check_together(trainer: PeftTrainer, shared: bool) -> None:
    """In one pass or not, each client gets the losses and gradients of its own adapter."""
    work = [(task, ClientState()) for task in tasks(trainer.base)]
    common = replace(trainer, engine=COMMON)
    assert [len(group) for group in common.groups(work)] == ([3] if shared else [1, 1, 1])
    for (one, kept), (other, also) in zip(trainer.train(work), common.train(work), strict=True):
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-4)
        for name, state in kept.moments.items():
            error = float((state["exp_avg"] - also.moments[name]["exp_avg"]).norm())
            assert error <= 1e-3 * float(state["exp_avg"].norm()) + 1e-9, name


@KINDS
def test_a_trial_leaves_the_model_and_the_generator_as_they_were(request: pytest.FixtureRequest, kind: str) -> None:
    base = base_of(request.getfixturevalue(kind))
    before, start = frozen(base), initial_adapter(base, 4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert batched_clients._gives_each_its_own(base)
    assert batched_clients.can_share_pass(base)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(initial_adapter(base, 4), start)
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen(base).items())
    assert base.model.training


def test_a_layer_that_gets_tokens_before_rows_is_noticed(encoder: Path) -> None:
    base = base_of(encoder)
    query = base.model.get_base_model().bert.encoder.layer[0].attention.self.query
    query.register_forward_pre_hook(lambda _, args: (args[0].transpose(0, 1).contiguous(),))
    query.register_forward_hook(lambda _, args, out: out.transpose(0, 1))
    assert not batched_clients.can_share_pass(base)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "targets", "shared"),
    [
        ("DeBERTa-v3", None, False),  # positions are projected once for all rows
        ("DeBERTa-v2", None, True),
        ("DeBERTa-v2", "all-linear", False),
        ("XLNet", None, False),  # tokens before rows
        ("OPT", "all-linear", True),  # rows and tokens in one axis
        ("BART", "all-linear", True),
        ("T5", None, True),
        ("Mixtral", "all-linear", True),
        ("Qwen3-Next", None, True),
    ],
)
def test_each_client_gets_its_own_in_every_kind_of_model(
    name: str, targets: str | None, shared: bool, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    folder = replace(family, sizes={**family.sizes, "dropout": 0.0}).save(tmp_path)
    check_together(trainer_of(still(base_of(folder, target_modules=targets)), clip=1e6), shared)


@pytest.mark.slow
def test_a_model_that_mixes_padding_with_words_trains_one_client_after_the_other(tmp_path: Path) -> None:
    """FNet has no mask: in a common pass a client's rows are padded to the longest row of another."""
    sizes = {k: v for k, v in FAMILIES["BERT"].sizes.items() if k != "num_attention_heads"}
    folder = Family("FNet", "encoder", "FNetConfig", "FNetModel", sizes, "encoder").save(tmp_path)
    base = still(base_of(folder, target_modules="all-linear"))
    check_together(trainer_of(base, clip=1e6), shared=False)
    (note,) = engine_notes(base, COMMON, None)
    assert note.startswith("engine.together: FNetForSequenceClassification trains one client after the other")


@pytest.mark.slow
def test_layers_that_a_model_does_not_use_stay_as_they_are(tmp_path: Path) -> None:
    """A decoder cut out of an encoder-decoder has cross-attention that nothing reaches."""
    alone = {"is_decoder": True, "is_encoder_decoder": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    sizes = {**FAMILIES["BART"].sizes, **alone, "dropout": 0.0}
    folder = Family("BART", "decoder", "BartConfig", "BartForCausalLM", sizes, "decoder").save(tmp_path)
    trainer = writing_trainer(writer_of(folder, target_modules="all-linear"), clip=1e6)
    check_together(trainer, shared=True)
    (task, *_) = tasks(trainer.base)
    ((result, _),) = trainer.train([(task, ClientState())])
    unused = {name for name in result.adapter.factors if "encoder_attn" in name}
    sent = task.start.train.factors
    assert unused == {n for n, f in result.adapter.factors.items() if torch.equal(f.up, sent[n].up)}
