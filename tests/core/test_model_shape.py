"""Costs, counted by hand and against numbers known from elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedloom.core.model_shape import Shape

ROBERTA = Shape(303_309_824, 52_000_000, 24, 1024, ((1024, 1024),) * 48, 1_051_650)
"""RoBERTa-large with LoRA on query and value, and its classification head (1024 x 1024 + 1024 + 1024 x 2 + 2)."""

TINY = Shape(
    parameters=100, embeddings=50, layers=4, hidden=8, modules=((8, 8), (16, 8)), dense=10, depths={"a": 4, "b": 1}
)


def test_parameters_of_roberta_large() -> None:
    """98,304 r adapter parameters; 7.35 MB at r = 8 and 4.99 MB at r = 2 with the head (methods 0.4, fact 1)."""
    assert ROBERTA.adapter_parameters(1) == 98_304
    assert ROBERTA.adapter_parameters(8) + ROBERTA.dense == 1_838_082
    assert ROBERTA.payload(8) / 1e6 == pytest.approx(7.35, abs=0.01)
    assert ROBERTA.payload(2) / 1e6 == pytest.approx(4.99, abs=0.01)


def test_payload_is_four_bytes_a_parameter_and_the_head_goes_along_at_every_rank() -> None:
    assert TINY.adapter_parameters(3) == 3 * (16 + 24)
    assert TINY.payload(3) == 4 * (120 + 10)
    assert TINY.payload(0) == 40


def test_training_costs_two_flop_a_weight_each_way_and_six_for_lora() -> None:
    assert TINY.train_flops(tokens=5, rank=3) == 5 * (4 * 100 + 6 * 120)
    assert TINY.train_flops(tokens=0, rank=3) == 0


def test_less_depth_saves_the_backward_pass_only() -> None:
    assert TINY.train_flops(5, 3, depth=4) == TINY.train_flops(5, 3)
    assert TINY.train_flops(5, 3, depth=1) == 5 * (2 * 100 * 1.25 + 6 * 72)
    assert TINY.train_flops(5, 3, depth=0) == 5 * 2 * 100


def test_a_depth_counts_the_modules_of_its_blocks_and_those_above() -> None:
    """Depth is counted from the output (methods 4a): 1 is the top block."""
    assert [TINY.adapter_parameters(3, depth) for depth in (0, 1, 3, 4, None)] == [0, 72, 72, 120, 120]
    assert TINY.payload(3, 1) == 4 * (72 + 10)
    assert [TINY.untrained_modules("ab", depth) for depth in (0, 1, 4, None)] == [{"a", "b"}, {"a"}, set(), set()]
    with pytest.raises(ValueError, match="zip"):
        replace(TINY, depths={}).payload(3, 1)


def test_memory_is_base_optimiser_and_activations() -> None:
    """float32 base; weight, gradient, two moments of what is trained; 16 activations a token and layer."""
    assert TINY.train_memory(rank=3, batch_tokens=7) == 4 * 150 + 16 * 130 + 7 * 16 * 4 * 8 * 4
    assert TINY.train_memory(3, 7, depth=1) == 4 * 150 + 16 * (72 + 10) + 7 * 16 * 1 * 8 * 4
    assert TINY.train_memory(8, 7) > TINY.train_memory(3, 7)
    assert TINY.train_memory(3, 8) > TINY.train_memory(3, 7)


SMOLLM2 = Shape(
    134_515_008,
    0,
    30,
    576,
    modules=((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)) * 30,
    dense=0,
    depths={f"{block}.{module}": 30 - block for block in range(30) for module in range(7)},
    vocabulary=49_152,
)
"""SmolLM2-135M with LoRA on all linear layers of its 30 blocks."""


@pytest.mark.parametrize(
    ("width", "depth", "megabytes"),
    [(64, 1, 96), (64, 8, 239), (64, 30, 692), (128, 1, 116), (128, 8, 403), (128, 30, 1306)],
)
def test_memory_of_a_language_model_is_what_was_measured(width: int, depth: int, megabytes: float) -> None:
    """Rise of the resident set in steps of 8 texts at rank 8, 16 tokens of each predicted: at depth 1 most of it is logits."""
    base = 4 * (SMOLLM2.parameters + SMOLLM2.embeddings)
    said = SMOLLM2.train_memory(8, 8 * width, depth, answer_tokens=8 * 16) - base
    assert said / 1e6 == pytest.approx(megabytes, rel=0.1)


def test_where_nobody_says_what_is_predicted_it_is_half_of_the_text_and_labels_have_no_vocabulary() -> None:
    assert SMOLLM2.train_memory(8, 512) == SMOLLM2.train_memory(8, 512, answer_tokens=256)
    assert SMOLLM2.train_memory(8, 512) > replace(SMOLLM2, vocabulary=0).train_memory(8, 512)
    assert TINY.train_memory(8, 7, answer_tokens=7) == TINY.train_memory(8, 7)
