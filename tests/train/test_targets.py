"""Which layers are adapted: PEFT's default or the layers of the blocks, never what reads no text, and PEFT's own reasons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from fedloom.core.errors import Refused
from fedloom.train import peft_weights
from fedloom.train.base_model import Base, load_base
from fedloom.train.settings import PLAIN, LoRA
from fedloom.train.targets import unfit_layers
from tests.support.families import FAMILIES, Family

Load = Callable[..., Base]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = FAMILIES[name].save(tmp_path_factory.mktemp("model") / "m")
        return made[name]

    return of


@pytest.fixture
def load(folder: Callable[[str], Path]) -> Load:
    def loaded(name: str, targets: tuple[str, ...] | str | None, writes: bool = True, **lora: Any) -> Base:
        return load_base(str(folder(name)), None if writes else 2, LoRA(targets, **lora), 4, seed=0, engine=PLAIN)

    return loaded


def adapted(base: Base) -> list[str]:
    return [*peft_weights.lora_layers(base.model)]


def leaves(base: Base) -> set[str]:
    return {name.rpartition(".")[2] for name in adapted(base)}


def told(base: Base, words: str) -> bool:
    return any(words in note for note in base.notes)


def test_the_default_of_peft_stays_where_it_has_one(load: Load) -> None:
    base = load("Llama", None)
    assert leaves(base) == {"q_proj", "v_proj"}
    assert not told(base, "target_modules")


def test_without_a_default_the_linear_layers_of_the_blocks_are_adapted_and_a_note_says_so(load: Load) -> None:
    base = load("DistilBERT", None, writes=False)
    assert leaves(base) == {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}
    assert all(".layer." in name for name in adapted(base)), "no head"
    assert told(base, "PEFT gives no default for DistilBertForSequenceClassification")


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, "all-linear", ("q_proj", "v_proj")])
def test_what_reads_no_text_is_not_adapted(load: Load, targets: tuple[str, ...] | str | None) -> None:
    base = load("Gemma 3, vision", targets)
    assert all(name.startswith("model.language_model.") for name in adapted(base))
    assert told(base, "parts that read no text are left out: model.vision_tower")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "remedy"),
    [
        (("fc1",), "all layers of this name are in a part that reads no text"),
        (r".*\.q_proj", "model.vision_tower.*reads no text; let it match layers of the language part"),
    ],
)
def test_layers_that_read_no_text_are_refused(load: Load, targets: tuple[str, ...] | str, remedy: str) -> None:
    with pytest.raises(Refused, match=remedy):
        load("Gemma 3, vision", targets)


@pytest.mark.parametrize("dropout", [0.05, pytest.param(0.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["Qwen3-MoE", *[pytest.param(n, marks=pytest.mark.slow) for n in ("Mixtral", "Qwen3-Next")]]
)
def test_of_experts_the_other_linear_layers_are_adapted(load: Load, name: str, dropout: float) -> None:
    base = load(name, "all-linear", dropout=dropout)
    assert leaves(base) >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any(".experts" in layer for layer in adapted(base))
    assert told(base, "no linear layers get no adapter: experts.down_proj, experts.gate_up_proj")


@pytest.mark.slow
def test_peft_gives_its_own_reason(load: Load) -> None:
    with pytest.raises(
        Refused, match=r"ParamWrapper does not work with lora_dropout != 0; name linear layers of Qwen3Nex"
    ):
        load("Qwen3-Next", ("q_proj", "gate_proj", "up_proj", "down_proj"))
    with pytest.raises(Refused, match=r"no such layer; experts\.down_proj, experts\.gate_up_proj are no linear layers"):
        load("Qwen3-MoE", ("q_proj", "up_proj"))
    with pytest.raises(Refused, match=r"out_proj.*incompatible with Mamba-based models"):
        load("Mamba 2", ("out_proj",))


def test_a_layer_whose_weight_is_used_without_it_is_left_out_or_refused(load: Load) -> None:
    """Mamba multiplies by the weight of `dt_proj`: an adapter there would be merged and never computed."""
    base = load("Mamba", None)
    assert leaves(base) == {"in_proj", "x_proj"}
    assert told(base, "would not be computed: dt_proj (the model uses its weight without calling it)")
    with pytest.raises(Refused, match=r"an adapter of backbone\.layers\.0\.mixer\.dt_proj would not be computed"):
        load("Mamba", ("dt_proj",))


@pytest.mark.slow
def test_a_layer_that_returns_more_than_a_product_is_left_out(tmp_path: Path) -> None:
    """PEFT adds its product to what a layer returns; the router of Phi-3.5-MoE returns a tuple."""
    family = Family("Phi-3.5-MoE", "mixture of experts", "PhimoeConfig", "PhimoeForCausalLM", FAMILIES["Mixtral"].sizes)
    base = load_base(str(family.save(tmp_path)), None, LoRA(), 4, seed=0, engine=PLAIN)
    assert leaves(base) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert told(base, "router (it returns more than a product)")


@pytest.mark.parametrize("name", ["Llama", pytest.param("Mixtral", marks=pytest.mark.slow)])
def test_a_regular_expression_adapts_what_it_matches_and_nothing_else(load: Load, name: str) -> None:
    """PEFT alone would adapt all blocks of a Mixtral: it takes the last part of each name that matches."""
    base = load(name, r"model\.layers\.[23]\.self_attn\.(q|v)_proj")
    assert len(adapted(base)) == 4
    assert all(".2." in layer or ".3." in layer for layer in adapted(base))


@pytest.mark.parametrize(
    ("targets", "remedy"),
    [("(q_proj", "not a regular expression"), ("q_proj", "not found in the base model; name linear layers of Llama")],
)
def test_a_regular_expression_that_adapts_nothing_is_refused(load: Load, targets: str, remedy: str) -> None:
    with pytest.raises(Refused, match=remedy):
        load("Llama", targets)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("Llama", None),
        ("Llama", "all-linear"),
        ("Llama", ("q_proj", "down_proj")),
        ("Llama", r"model\.layers\.3\..*_proj"),
        ("Mixtral", None),
        ("Mixtral", "all-linear"),
        ("Gemma 3, vision", None),
        ("Qwen3-Next", "all-linear"),
    ],
)
def test_slots_of_several_ranks_adapt_the_same_layers(load: Load, name: str, targets: Any) -> None:
    base = load(name, targets)
    before = adapted(base)
    slots = {base.slot(rank) for rank in (4, 2, 1)}
    assert adapted(base) == before
    for layer in peft_weights.lora_layers(base.model).values():
        assert slots <= layer.lora_A.keys()


def test_asking_peft_leaves_the_model_as_it_was(folder: Callable[[str], Path]) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder("BERT"))
    before = {name: (type(module), module.training) for name, module in model.named_modules()}
    assert unfit_layers(model) == {}
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
