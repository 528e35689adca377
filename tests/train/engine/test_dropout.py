"""Dropout from random bytes: the law of the masks, the gradients of attention, and a base that drops only where it is asked to."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedloom.core.types import ClientState
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.engine import dropout
from fedloom.train.settings import PLAIN, Engine, LoRA, Training
from tests.support.families import FAMILIES
from tests.support.tiny_runs import lively, task_of, trainer_of

BYTES = Engine("torch", first_token=False, together=1, cache=0)
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def drawn(shape: tuple[int, ...], dropped: int, seed: int = 0) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dropout.dropout_mask(torch.empty(shape), dropped)


@pytest.mark.parametrize("dropped", [1, 13, 26, 128, 255])
def test_a_number_is_dropped_as_often_as_bytes_say_wherever_it_lies(dropped: int) -> None:
    """Each place of a word of eight bytes alike: six standard deviations of a coin."""
    mask, count = drawn((20_000, 8), dropped), 20_000
    share = dropped / 256
    assert {*mask.unique().tolist()} == {0.0, torch.tensor(1 / (1 - share)).item()}
    gaps = ((mask == 0).double().mean(0) - share).abs()
    assert bool((gaps < 6 * math.sqrt(share * (1 - share) / count)).all())


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (2, 3, 8)])
def test_a_mask_has_the_shape_that_was_asked_for_and_follows_from_the_seed(shape: tuple[int, ...]) -> None:
    mask = drawn(shape, 128)
    assert mask.shape == shape
    assert torch.equal(mask, drawn(shape, 128))


def test_masks_of_two_calls_and_two_seeds_differ() -> None:
    one, other = drawn((2, 1000), 128)
    assert not torch.equal(one, other)
    assert not torch.equal(one, drawn((2, 1000), 128, seed=1)[0])


@pytest.mark.parametrize(
    ("probability", "dropped"), [(0.1, 26), (0.05, 13), (0.5, 128), (0.0, 0), (0.001, 0), (0.999, 0), (1.0, 0)]
)
def test_probabilities_for_which_bytes_are_too_coarse_are_left_to_torch(probability: float, dropped: int) -> None:
    assert dropout.bytes_dropped(probability) == dropped


@pytest.mark.parametrize("x", [torch.ones(4, 4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.bfloat16)])
def test_other_types_get_torchs_own_dropout(x: Tensor) -> None:
    layer = dropout.ByteDropout(0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = layer(x)
        torch.manual_seed(0)
        assert torch.equal(found, nn.functional.dropout(x, 0.5))
    assert torch.equal(layer.eval()(x), x)


def attention_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, generator=draw, dtype=dtype) for _ in range(3))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    return query, key, value, mask


@pytest.mark.parametrize("added", [False, True])
def test_attention_is_that_of_float64_with_the_same_mask_and_so_are_its_gradients(added: bool) -> None:
    *given, mask = attention_inputs()
    leaves = [tensor.requires_grad_() for tensor in given]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    bias = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = dropout.attend(*leaves, bias if added else mask, 0.5, 0.5)
    weights = torch.softmax(exact[0] @ exact[1].mT * 0.5 + bias.double(), -1)
    expected = (weights * drawn(weights.shape, 128, seed=3).double()) @ exact[2]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_a_query_that_may_look_nowhere_gives_numbers() -> None:
    *given, mask = attention_inputs()
    mask[0] = False
    assert bool(dropout.attend(*given, mask, 0.1, 0.5).isfinite().all())


def model_of(kind: str, **more: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "pad_token_id": 0, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def test_a_model_with_dropout_gets_the_attention_and_one_without_keeps_its_own() -> None:
    assert dropout.install_attention(model_of("Bert"))
    for plain in (model_of("Bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), model_of("Llama")):
        assert not dropout.install_attention(plain)
        assert plain.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("padded", [False, True])
def test_no_token_sees_a_later_one_while_dropout_is_on(padded: bool) -> None:
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))  # type: ignore[no-untyped-call]
    assert dropout.install_attention(model)
    dropout.install_byte_dropout(model)
    ids, mask = torch.arange(12).reshape(2, 6), torch.ones(2, 6).long()
    mask[1, 4:] = 0 if padded else 1
    found = []
    for last in (7, 8):
        ids[:, -1] = last
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            found.append(model.train()(input_ids=ids, attention_mask=mask).logits)
    assert torch.equal(found[0][:, :-1], found[1][:, :-1])
    assert padded or not torch.equal(found[0], found[1])


def test_over_many_draws_the_mean_of_attention_is_that_without_dropout() -> None:
    query, key, value, mask = attention_inputs()
    whole = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = torch.stack([dropout.attend(query, key, value, mask, 0.1, 0.5) for _ in range(300)])
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - whole).abs() <= 6 * error + 1e-6).all())


def drops(base: Base) -> list[tuple[str, bool]]:
    return [(name, module.training) for name, module in base.model.named_modules() if isinstance(module, nn.Dropout)]


@pytest.mark.parametrize("on", [True, False])
def test_the_base_drops_only_if_it_shall_and_adapters_always(encoder: Path, on: bool) -> None:
    base = load_base(str(encoder), 2, LoRA(dropout=0.1), 4, seed=3, engine=BYTES)
    before = drops(base)
    with dropout.training_mode(base.model, on):
        modes = drops(base)
    assert {training for name, training in modes if ".lora_dropout." in name} == {True}
    assert {training for name, training in modes if ".lora_dropout." not in name} == {on}
    assert drops(base) == before


def losses_of(base: Base, **training: Any) -> set[float]:
    """Losses of one step on the same examples in tasks that draw apart: one number where nothing is dropped."""
    trainer, start = trainer_of(base, batch_size=30, **training), lively(initial_adapter(base, 4))
    work = [(task_of(start, steps=1, number=number), ClientState()) for number in (1, 2, 3)]
    return {round(result.metrics["loss"], 4) for result, _ in trainer.train(work)}


@pytest.mark.parametrize(
    "engine",
    [
        BYTES,
        pytest.param(PLAIN, marks=pytest.mark.slow),
        pytest.param(replace(BYTES, checkpointing=True), marks=pytest.mark.slow),
    ],
    ids=["bytes", "torch", "again"],
)
def test_a_setting_switches_dropout_of_the_base(encoder: Path, engine: Engine) -> None:
    base = load_base(str(encoder), 2, LoRA(dropout=0.0), 4, seed=3, engine=engine)
    assert len(losses_of(base)) == 3, "the default where labels are predicted"
    assert len(losses_of(base, base_dropout=False)) == 1
    assert len(losses_of(base, base_dropout=True)) == 3


@pytest.mark.slow
def test_an_engine_without_random_bytes_draws_none_anywhere(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "dropout_mask", None)
    base = load_base(str(encoder), 2, LoRA(dropout=0.1), 4, seed=3, engine=Engine("torch", byte_dropout=False))
    assert base.computation["first_token"]
    assert len(losses_of(base)) == 3


@pytest.mark.slow
def test_layers_that_drop_in_themselves_and_are_computed_again_are_switched_too(tmp_path: Path) -> None:
    family = FAMILIES["OPT"]
    folder = str(replace(family, sizes={**family.sizes, "dropout": 0.5}).save(tmp_path))
    base = load_base(folder, 2, LoRA(dropout=0.0), 4, seed=3, engine=replace(BYTES, checkpointing=True))
    assert len(losses_of(base, base_dropout=True)) == 3
    assert len(losses_of(base, base_dropout=False)) == 1
    assert len(losses_of(base, base_dropout=True)) == 3, "nothing stays switched off"


def test_the_default_is_dropout_where_labels_are_predicted() -> None:
    assert Training().has_base_dropout(2)
    assert not Training().has_base_dropout(None)
    assert Training(base_dropout=True).has_base_dropout(None)
    assert not Training(base_dropout=False).has_base_dropout(2)
