"""Training the top layers alone: what lies below is computed once, and never an old one."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter
from fedloom.core.partial_depth import fold_layers
from fedloom.core.seeds import simulated_secret
from fedloom.core.types import ClientState, Task
from fedloom.train import peft_weights
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.engine import frozen_layers
from fedloom.train.engine.frozen_layers import LayerSplit
from fedloom.train.loss import example_losses
from fedloom.train.settings import PLAIN, LoRA, Training
from fedloom.train.tokenised import EncodedTexts
from fedloom.train.trainer import PeftTrainer, enable_gradients, engine_notes
from tests.support.families import FAMILIES, Family
from tests.support.tiny_runs import answered, base_of, lively, same, task_of, trainer_of, writer_of
from tests.support.toys import factor

KINDS = pytest.mark.parametrize("kind", ["encoder", "decoder"])
ROOM = replace(PLAIN, cache=1_000_000)


def top(adapter: Adapter) -> Adapter:
    """The second of the two layers, and the head."""
    return Adapter({n: f for n, f in adapter.factors.items() if ".1." in n}, adapter.dense)


def fold_of(adapter: Adapter, seed: int) -> Adapter:
    return Adapter({n: factor(2, len(f.up), f.down.shape[1], seed) for n, f in adapter.factors.items()})


def shallow(base: Base, number: int = 1, fold: int | None = None, steps: int = 3) -> Task:
    """A task that trains the top layer, over a fold of all layers."""
    start = lively(initial_adapter(base, 4))
    task = task_of(top(start), number=number, steps=steps)
    return replace(task, start=replace(task.start, fold=None if fold is None else fold_of(start, fold)))


def trained(trainer: PeftTrainer, task: Task) -> Adapter:
    ((result, _),) = trainer.train([(task, ClientState())])
    return result.adapter


@KINDS
@pytest.mark.parametrize("fold", [None, 5])
def test_loss_and_gradients_are_those_of_the_whole_model(
    request: pytest.FixtureRequest, kind: str, fold: int | None
) -> None:
    base = base_of(request.getfixturevalue(kind))
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    task, texts = shallow(base, fold=fold), trainer_of(base).texts
    slot = base.put(task.start.train, fold=task.start.fold)
    weights = enable_gradients(peft_weights.slot_parameters(base.model, slot), task.start)
    place = frozen_layers.split_layers(base, [*task.start.train.factors])
    assert place is not None
    below = frozen_layers.frozen_features(
        base, texts, place, range(30), (task.start.fold,), frozen_layers.ActivationCache(), 0
    )
    found = []
    for begin in (place.starting_from(below.for_batch([7, 3, 20, 11])), nullcontext()):
        with begin:
            loss = base.model.train()(**texts.batch([7, 3, 20, 11], base.device)).loss
        slopes = torch.autograd.grad(loss, [*weights.values()])
        found.append([loss.detach(), *slopes])
    assert len(weights) == 2 * len(task.start.train.factors) + len(task.start.train.dense)
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def test_only_what_the_start_holds_is_trained_and_sent_back(encoder: Path) -> None:
    base = base_of(encoder)
    task = shallow(base)
    ours = trained(trainer_of(base), task)
    assert ours.factors.keys() == task.start.train.factors.keys()
    assert all(not torch.equal(f.up, task.start.train.factors[n].up) for n, f in ours.factors.items())


@KINDS
def test_a_hit_and_a_miss_give_the_same_bytes_and_no_cache_at_all_the_same_numbers(
    request: pytest.FixtureRequest, kind: str
) -> None:
    """Dropout included: the plain way draws as many numbers, none of them below the trained blocks."""
    base = base_of(request.getfixturevalue(kind), dropout=0.1)
    tasks = [shallow(base, number, fold) for number, fold in ((1, 3), (2, 3), (3, 4), (4, 3), (5, None))]
    warm, small = replace(trainer_of(base), engine=ROOM), replace(trainer_of(base), engine=replace(PLAIN, cache=9_000))
    kept = [trained(warm, task) for task in tasks]
    assert all(same(trained(small, task), adapter) for task, adapter in zip(tasks, kept, strict=True))
    alone = trained(trainer_of(base), tasks[0])
    for name, sent in tasks[0].start.train.factors.items():
        one, other = kept[0].factors[name], alone.factors[name]
        assert (one.up - other.up).norm() <= 1e-3 * (one.up - sent.up).norm()
    assert len(warm.cache.entries) == 3  # two folds and none
    assert trainer_of(base).cache.entries == {}


def test_the_layers_below_are_not_computed_again(encoder: Path) -> None:
    base = base_of(encoder)
    trainer = replace(trainer_of(base), engine=ROOM)
    frozen_layers.split_at(base, 1)  # tried on the model, once
    calls = []
    lowest = base.model.get_base_model().get_submodule("bert.encoder.layer.0")
    hook = lowest.register_forward_hook(lambda *_: calls.append(1))
    trained(trainer, shallow(base, 1, 3, steps=2))  # one pass over 30 examples in batches of 16
    first = len(calls)
    trained(trainer, shallow(base, 2, 3, steps=2))
    hook.remove()
    assert (first, len(calls)) == (30, 30)  # each example by itself


def test_the_blocks_are_all_there_again_and_dropout_is_on_above_only(encoder: Path) -> None:
    base = base_of(encoder, dropout=0.5)
    before = [name for name, _ in base.model.named_modules()]
    below = [
        module for name, module in base.model.named_modules() if ".layer.0." in name and isinstance(module, nn.Dropout)
    ]
    seen = []
    hooks = [module.register_forward_hook(lambda m, *_: seen.append(m.training)) for module in below]
    trained(trainer_of(base), shallow(base))
    for hook in hooks:
        hook.remove()
    assert [name for name, _ in base.model.named_modules()] == before
    assert seen
    assert not any(seen)


def test_an_error_on_the_way_leaves_the_model_whole(encoder: Path) -> None:
    base = base_of(encoder)
    place = frozen_layers.split_layers(base, [n for n in lively(initial_adapter(base, 4)).factors if ".1." in n])
    assert place is not None
    before = [name for name, _ in base.model.named_modules()]
    with pytest.raises(RuntimeError), place.starting_from(torch.zeros(3, 3, 3)):
        base.model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    assert [name for name, _ in base.model.named_modules()] == before
    base.model.eval()
    assert len(place.frozen_output({"input_ids": torch.zeros(1, 2, dtype=torch.long)})) == 1


def test_the_cache_throws_away_what_was_not_used_for_longest() -> None:
    cache = frozen_layers.ActivationCache()
    for key in "abc":
        cache.entry(key)[0] = torch.zeros(10)
    cache.entry("a")
    cache.trim(80)
    assert [*cache.entries] == ["c", "a"]
    cache.trim(0)
    assert not cache.entries


def test_all_layers_trained_or_a_layer_outside_of_the_blocks_means_the_plain_way(encoder: Path) -> None:
    base = base_of(encoder)
    names = [*initial_adapter(base, 4).factors]
    assert frozen_layers.split_layers(base, names) is None
    assert frozen_layers.split_layers(base, ["classifier.dense"]) is None
    firsts = [frozen_layers.split_layers(base, names[i:]) for i in range(len(names) // 2, len(names))]
    assert [place and place.first for place in firsts] == [1] * len(firsts)
    assert all(a == b for a, b in pairwise(firsts))


# Blocks keep their places -----------------------------------------------------------------------------------------------

SPLIT = (
    "Gemma 3",
    "Gemma 2",
    "OLMo3",
    "Cohere2",
    "gpt-oss",
    "Qwen2, sliding window",
    "Qwen3.5",
    "Qwen3-Next",
    "SmolLM3",
    "ModernBERT",
    "DeBERTa-v2",
    "XLNet",
    "BART",
    "Mamba",
    "Gemma 3, vision",
)


def family_base(name: str, folder: Path, **engine: object) -> Base:
    """A model of this family without dropout; a decoder writes."""
    family = FAMILIES[name]
    writes = family.kind not in ("encoder", "encoder-decoder")
    base = load_base(
        str(family.save(folder)), None if writes else 2, LoRA(dropout=0.0), 4, seed=3, engine=replace(PLAIN, **engine)
    )
    return without_dropout(base)


def without_dropout(base: Base) -> Base:
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


def texts_of(base: Base) -> EncodedTexts:
    return answered(base, 12) if base.labels is None else trainer_of(base, 12).texts


def losses_and_gradients(base: Base, texts: EncodedTexts, first: int, split: LayerSplit | None) -> list[Tensor]:
    """What a pass of the plain model, or from the first trained block on, says of the trained layers."""
    depths = base.shape().depths
    count = len(split.blocks) if split else base.shape().layers
    batch = texts.batch([7, 3, 11, 0, 5], base.device)
    weights = peft_weights.slot_parameters(base.model, "r4")
    for name, weight in weights.items():
        weight.requires_grad_(depths.get(name.rpartition(".")[0], 0) <= count - first)
    trained = [weight for weight in weights.values() if weight.requires_grad]
    base.model.eval()
    hidden = (
        split.frozen_output({name: column for name, column in batch.items() if name != "labels"}) if split else None
    )
    base.model.train()
    with nullcontext() if split is None or hidden is None else split.starting_from(hidden):
        losses = example_losses(base, batch)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), trained, allow_unused=True, materialize_grads=True)]


def check_split(base: Base, *places: int) -> None:
    """From these blocks on, or from every one: losses and gradients are those of the plain model, to the bit."""
    base.put(lively(initial_adapter(base, 4)))
    texts = texts_of(base)
    for first in places or range(1, base.shape().layers):
        split = frozen_layers.split_at(base, first)
        assert split.form is not None, first
        plain, ours = (losses_and_gradients(base, texts, first, place) for place in (None, split))
        assert len(ours) > 1
        assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True)), first


def test_blocks_above_see_the_masks_and_positions_of_their_own_places(tmp_path: Path) -> None:
    """Gemma 3 gives its sixth block another mask and another rotary embedding, chosen by its place."""
    check_split(family_base("Gemma 3", tmp_path), 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
def test_a_pass_from_the_first_trained_block_is_the_plain_pass_to_the_bit(name: str, tmp_path: Path) -> None:
    check_split(family_base(name, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma 3", "Qwen3.5", "XLNet", "BART", "T5"])
def test_kept_activations_train_what_the_plain_pass_trains(name: str, tmp_path: Path) -> None:
    """With kept activations, with each layer computed again in the backward pass, and with neither."""
    bases = [family_base(name, tmp_path)]
    with suppress(Refused):  # XLNet cannot compute its layers again
        bases.append(family_base(name, tmp_path, checkpointing=True))
    adapter = lively(initial_adapter(bases[0], 4))
    top = bases[0].shape().untrained_modules(adapter.factors, 1)
    task = task_of(adapter, steps=3)
    task = replace(task, start=fold_layers(task.start, top))
    found = []
    for base in bases:
        for cache in (0, 1, 10**8):
            training, shards = Training(batch_size=5, learning_rate=1e-2), {"a": tuple(range(12))}
            trainer = PeftTrainer(base, texts_of(base), shards, training, partial(simulated_secret, 0))
            found.append(trained(replace(trainer, engine=replace(PLAIN, cache=cache)), task))
    assert found[0].factors.keys() == task.start.train.factors.keys()
    for other in found[1:]:
        for layer, one in found[0].factors.items():
            moved = (one.up - task.start.train.factors[layer].up).norm()
            assert (one.up - other.factors[layer].up).norm() <= 1e-3 * moved


def test_what_blocks_hand_on_beside_hidden_states_is_not_lost(decoder: Path) -> None:
    """A model in which the first block hands something to the second, past its output: such a model is passed as a whole."""
    base = without_dropout(base_of(decoder))
    assert keeps_all(base)
    base.trials.clear()
    inner = base.model.get_base_model().model
    handed: list[Tensor] = []
    inner.register_forward_pre_hook(lambda *_: handed.clear())
    inner.layers[0].register_forward_hook(lambda _, args, out: handed.append(args[0]))
    inner.layers[1].mlp.register_forward_pre_hook(lambda _, args: (args[0] + sum(handed),))
    assert not keeps_all(base)
    assert any("a pass that begins above them gives other logits" in note for note in engine_notes(base, ROOM, (1, 1)))
    assert engine_notes(base, ROOM, None) == engine_notes(base, PLAIN, (1, 1)) == ()
    task = shallow(base)
    assert same(trained(replace(trainer_of(base), engine=ROOM), task), trained(trainer_of(base), task))


def keeps_all(base: Base) -> bool:
    return frozen_layers.keeps_activations(base, 1, None)


@pytest.mark.slow
def test_shared_keys_and_position_biases_are_not_lost(tmp_path: Path) -> None:
    assert not keeps_all(family_base("T5", tmp_path / "t5"))
    sizes = {
        **FAMILIES["Gemma 3"].sizes,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    more = {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": sizes["vocab_size"],
    }
    others = {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4}
    sizes.pop("query_pre_attn_scalar")
    family = Family("Gemma 3n", "mixed attention", "Gemma3nTextConfig", "Gemma3nForCausalLM", sizes | more | others)
    base = writer_of(family.save(tmp_path / "gemma"), target_modules=("q_proj", "v_proj"))
    assert not keeps_all(base)


def test_a_layer_that_is_called_before_the_blocks_though_it_is_declared_after_them(encoder: Path) -> None:
    """It is trained at every depth, so its gradient must come through all blocks."""
    base = without_dropout(base_of(encoder, target_modules=("query", "pooler.dense")))
    assert keeps_all(base)
    base.trials.clear()
    bert = base.model.get_base_model().bert
    bert.encoder.register_forward_pre_hook(lambda _, args: (args[0] + 0.1 * bert.pooler(args[0])[:, None], *args[1:]))
    assert not keeps_all(base)
