"""Tasks of a depth on real (tiny) models: the gradients are those of full depth, and nothing below is trained, kept or sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
)

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter
from fedloom.core.partial_depth import fold_layers
from fedloom.core.types import ClientState, Task
from fedloom.plan.depth import DepthByMemory, FixedDepth, check_blocks
from fedloom.train import loss, peft_weights
from fedloom.train.base_model import Base, initial_adapter
from fedloom.train.engine import batched_clients
from fedloom.train.engine.frozen_layers import ActivationCache
from fedloom.train.evaluate import score
from fedloom.train.settings import PLAIN
from fedloom.train.trainer import PeftTrainer, enable_gradients
from tests.support.tiny_models import SIZES, WORDS, tiny_decoder, tiny_encoder
from tests.support.tiny_runs import base_of, frozen, lively, same, still, task_of, trainer_of

BLOCKS = 4
MAKERS = {"encoder": tiny_encoder, "decoder": tiny_decoder}
KINDS = pytest.mark.parametrize("kind", MAKERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: made(tmp_path_factory.mktemp(kind), num_hidden_layers=BLOCKS) for kind, made in MAKERS.items()}


def deep(base: Base, depth: int | None, number: int = 1, seed: int = 0, **more: Any) -> Task:
    """A task of this depth on the same adapter."""
    task = task_of(lively(initial_adapter(base, 4), seed), number=number, **more)
    start = fold_layers(task.start, base.shape().untrained_modules(task.start.train.factors, depth))
    return replace(task, start=start, budget=replace(task.budget, depth=depth))


def gradients(trainer: PeftTrainer, task: Task, batch: Sequence[int]) -> dict[str, Tensor]:
    """What the trainer's loss says of one batch."""
    base, start = trainer.base, task.start
    slot = base.put(start.train, start.scaling, start.fold)
    weights = enable_gradients(peft_weights.slot_parameters(base.model, slot), start)
    base.model.train()
    found = trainer._batch_loss(task, [*start.train.factors], loss.mean_loss)(batch)
    return dict(zip(weights, torch.autograd.grad(found, [*weights.values()]), strict=True))


@KINDS
@pytest.mark.parametrize("room", [0, 10**6])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_the_gradients_are_those_of_full_depth(folders: dict[str, Path], kind: str, room: int, depth: int) -> None:
    base = still(base_of(folders[kind]))
    trainer = replace(trainer_of(base), engine=replace(PLAIN, cache=room))
    full, part = (gradients(trainer, deep(base, d), [7, 3, 20, 11]) for d in (None, depth))
    assert part.keys() <= full.keys()
    assert sum(name.endswith(".up") for name in part) == 2 * depth
    for name, slope in part.items():
        assert float((slope - full[name]).norm()) <= 2e-5 * float(full[name].norm()), name


@KINDS
def test_what_deeper_clients_change_leaves_the_kept_activations_below_it_as_they_are(
    folders: dict[str, Path], kind: str
) -> None:
    """A shallow client, over two versions in which clients of depth 2 took part; with and without kept activations."""
    base = base_of(folders[kind], dropout=0.1)
    depths, tasks = base.shape().depths, list[Task]()
    for seed in (1, 2):
        task = deep(base, 1, seed=seed)
        assert task.start.fold is not None
        fold = Adapter({name: f for name, f in task.start.fold.factors.items() if depths[name] == 2})
        tasks.append(replace(task, start=replace(task.start, fold=fold)))
    _, blocks = peft_weights.transformer_blocks(base.model) or ("", [])
    warm, calls = replace(trainer_of(base), engine=replace(PLAIN, cache=10**7)), {1: 0, 2: 0}
    cold = [replace(warm, cache=ActivationCache()).train([(task, ClientState())]) for task in tasks]
    plain = [trainer_of(base).train([(task, ClientState())]) for task in tasks]
    ours = [warm.train([(tasks[0], ClientState())])]

    def count(at: int) -> None:
        calls[at] += 1

    hooks = [blocks[at].register_forward_hook(lambda *_, at=at: count(at)) for at in calls]
    ours.append(warm.train([(tasks[1], ClientState())]))
    for hook in hooks:
        hook.remove()
    assert calls[1] == 0 < calls[2]
    for ((one, _),), ((other, _),), ((whole, _),), task in zip(ours, cold, plain, tasks, strict=True):
        assert same(one.adapter, other.adapter)
        for name, sent in task.start.train.factors.items():
            moved = (one.adapter.factors[name].up - sent.up).norm()
            assert (one.adapter.factors[name].up - whole.adapter.factors[name].up).norm() <= 1e-3 * moved


@KINDS
def test_nothing_below_is_trained_kept_or_sent(folders: dict[str, Path], kind: str) -> None:
    base = base_of(folders[kind], dropout=0.1)
    before = frozen(base)
    for depth in (1, 2, BLOCKS):
        task = deep(base, depth)
        ((result, local),) = trainer_of(base).train([(task, ClientState())])
        names = {f"{name}.{side}" for name in task.start.train.factors for side in ("down", "up")}
        assert result.adapter.factors.keys() == task.start.train.factors.keys()
        assert len(result.adapter.factors) == 2 * depth
        assert local.moments.keys() == names | task.start.train.dense.keys()
        asked = {n for n, p in base.model.named_parameters() if p.requires_grad and "lora_" in n and ".r4" in n}
        assert len(asked) == 2 * 2 * depth
    base.put(lively(initial_adapter(base, 4)))
    after = frozen(base)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_moments_of_another_depth(folders: dict[str, Path]) -> None:
    """What was trained in the last task goes on from its moments; what was not begins anew, whatever came before."""
    base = still(base_of(folders["encoder"]))
    trainer = trainer_of(base)

    def after(task: Task, local: ClientState) -> tuple[Adapter, ClientState]:
        ((result, kept),) = trainer.train([(task, local)])
        return result.adapter, kept

    whole, one, two = deep(base, None, 1), deep(base, 1, 2), deep(base, 2, 3)
    _, first = after(whole, ClientState())
    _, second = after(one, first)
    assert second.moments.keys() < first.moments.keys()
    given, third = after(two, second)
    assert not same(given, after(two, first)[0]), "of a layer that was not trained in between they would be stale"
    steps = {float(state["step"]) for state in third.moments.values()}
    assert steps == {3.0, 9.0}


@KINDS
def test_depth_does_not_change_what_is_scored(folders: dict[str, Path], kind: str) -> None:
    """A start of any depth is the same model, and a task of it leaves the base as it was."""
    base = base_of(folders[kind])
    trainer = trainer_of(base)
    texts = trainer.texts
    expected = score(base, deep(base, None).start.train, texts, range(40))
    for depth in (1, 3):
        start = deep(base, depth).start
        trainer.train([(deep(base, depth), ClientState())])
        found = score(base, start.train, texts, range(40), start.fold)
        assert torch.allclose(found.losses, expected.losses, atol=1e-5)
    again = score(base, deep(base, None).start.train, texts, range(40))
    assert torch.equal(again.losses, expected.losses)


def test_a_common_pass_is_for_tasks_of_one_depth(folders: dict[str, Path]) -> None:
    base = base_of(folders["encoder"])
    deeps = [deep(base, depth, number) for number, depth in enumerate((None, None, 4, 2, 2, 1), 1)]
    assert batched_clients.pass_key(deeps[0]) == batched_clients.pass_key(deeps[2])  # the same layers
    assert len({batched_clients.pass_key(task) for task in deeps}) > 2
    trainer = replace(trainer_of(base), engine=replace(PLAIN, together=8))
    groups = trainer.groups([(task, ClientState()) for task in deeps])
    assert [[task.id for task, _ in group] for group in groups] == [[1, 2, 3], [4], [5], [6]]


# Where blocks are found ------------------------------------------------------------------------------------------------


def saved(model: Any, encoder: Path, to: Path) -> Path:
    model.save_pretrained(to)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (to / name).write_bytes((encoder / name).read_bytes())
    return to


def others(encoder: Path, to: Path) -> list[tuple[Path, str]]:
    """A folder, and what to adapt."""
    words = len(WORDS) + 4
    gpt2 = GPT2Config(vocab_size=words, n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3)
    distil = DistilBertConfig(vocab_size=words, dim=32, n_layers=3, n_heads=2, hidden_dim=64)
    return [
        (saved(GPT2Model(gpt2), encoder, to / "gpt2"), "c_attn"),
        (saved(DistilBertModel(distil), encoder, to / "distilbert"), "v_lin"),
    ]


def test_blocks_are_found_in_models_of_other_names(folders: dict[str, Path], tmp_path: Path) -> None:
    for path, target in others(folders["encoder"], tmp_path):
        shape = base_of(path, target_modules=(target,)).shape()
        assert shape.layers == 3
        assert [*shape.depths.values()] == [3, 2, 1]  # input to output


def test_what_is_adapted_above_the_blocks_is_trained_at_every_depth(folders: dict[str, Path]) -> None:
    base = base_of(folders["encoder"], target_modules=("query", "pooler.dense"))
    shape, names = base.shape(), [*initial_adapter(base, 4).factors]
    assert [*shape.depths.values()] == [4, 3, 2, 1, 0]
    assert shape.untrained_modules(names, 1) == {name for name in names if "layer" in name and ".3." not in name}
    trainer = replace(trainer_of(base), engine=replace(PLAIN, cache=10**6))
    ((result, _),) = trainer.train([(deep(base, 1), ClientState())])
    assert [name.rpartition(".layer.")[2] for name in result.adapter.factors] == [
        "3.attention.self.query",
        "bert.pooler.dense",
    ]
    assert trainer.cache.entries, "what lies below the top block is kept"


def test_a_depth_that_the_model_does_not_have_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shape = base_of(folders["encoder"]).shape()
    for rule in (FixedDepth(4), DepthByMemory(least=4)):
        check_blocks(rule, shape)
    for rule in (FixedDepth(5), DepthByMemory(least=5)):
        with pytest.raises(Refused, match=r"plan\.depth = 5: the model has 4 blocks"):
            check_blocks(rule, shape)
    lowest = base_of(folders["encoder"], target_modules="bert.encoder.layer.[01].attention.self.query").shape()
    with pytest.raises(Refused, match="the top 2 blocks hold nothing adapted; choose at least 3"):
        check_blocks(FixedDepth(2), lowest)
    check_blocks(FixedDepth(3), lowest)
    config = AlbertConfig(
        vocab_size=len(WORDS) + 4, num_hidden_layers=3, **{k: v for k, v in SIZES.items() if "layers" not in k}
    )
    shared = base_of(
        saved(AlbertModel(config), folders["encoder"], tmp_path / "albert"), target_modules=("query",)
    ).shape()
    with pytest.raises(Refused, match=r"no list of blocks.*leave plan.depth out"):
        check_blocks(FixedDepth(1), shared)
