"""The span of a gradient tells tokens where it must: layers that read single tokens are found, and right tokens lie in the span."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedloom.audit.token_span import (
    down_changes,
    input_layers,
    layer_input,
    local_layers,
    new_rows,
    span_basis,
    token_ranks,
)
from fedloom.core.lora import Adapter, Factor
from fedloom.train.base_model import Base
from tests.support.tiny_models import tiny_decoder, tiny_encoder
from tests.support.tiny_runs import base_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_of(tiny_encoder(tmp_path_factory.mktemp("encoder")), target_modules="all-linear")


@pytest.mark.slow
def test_only_layers_that_read_single_tokens_are_looked_at(base: Base) -> None:
    local = {name.rpartition(".")[2] for name in local_layers(base)}
    assert local == {"query", "key", "value"}
    assert len(input_layers(base)) > len(local)


@pytest.mark.slow
def test_a_decoder_reads_single_tokens_at_its_first_block(tmp_path: Path) -> None:
    decoder = base_of(tiny_decoder(tmp_path))
    assert {name.rpartition(".")[2] for name in local_layers(decoder)} == {"q_proj", "v_proj"}


@pytest.mark.slow
def test_tokens_whose_vectors_make_the_span_come_first_and_those_of_another_span_do_not(base: Base) -> None:
    layer = local_layers(base)[0]
    text, other = [7, 12, 20, 9], [8, 13, 21, 10]
    spans = [span_basis([layer_input(base, layer, torch.tensor([ids]))[0]]) for ids in (text, other)]
    wanted = [[*enumerate(ids)] for ids in (text, other)]
    ranks = token_ranks(base, layer, spans, wanted)
    assert ranks[0][0] == ranks[1][1] == [1.0] * 4
    assert min(ranks[0][1] + ranks[1][0]) > 1


@pytest.mark.slow
def test_a_span_that_tells_nothing_ranks_every_token_in_the_middle(base: Base) -> None:
    layer = local_layers(base)[0]
    empty = torch.zeros(1, layer_input(base, layer, torch.tensor([[1]])).shape[-1])
    size = base.model.get_base_model().get_input_embeddings().weight.shape[0]
    assert token_ranks(base, layer, [empty], [[(0, 3)]]) == [[[(size + 1) / 2]]]


def factors(down: torch.Tensor, up: torch.Tensor) -> Adapter:
    return Adapter({"layer": Factor(down, up)})


def test_what_is_new_in_a_row_space_is_found_in_whatever_basis_the_factors_are() -> None:
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 12, generator=draw), torch.randn(6, 2, generator=draw)
    fresh = torch.randn(1, 12, generator=draw)
    moved = down + torch.tensor([[1.0], [0.5]]) @ fresh
    turn = torch.linalg.qr(torch.randn(2, 2, generator=draw)).Q
    start, answer = factors(down, up), factors(turn.T @ moved, up @ turn)
    (rows,) = new_rows(start, answer, ["layer"]).values()
    outside = fresh - (fresh @ torch.linalg.qr(down.T).Q) @ torch.linalg.qr(down.T).Q.T
    assert abs(float(rows[0] @ outside[0]) / float(outside.norm())) == pytest.approx(1.0, abs=1e-4)
    assert len(rows) == 1
    for nothing_new in (start, factors(down, 2 * up), factors(turn.T @ down, up @ turn)):
        assert new_rows(start, nothing_new, ["layer"]) == {}


def test_changes_of_down_are_those_of_the_directions_that_came_back() -> None:
    start = factors(torch.arange(12.0).reshape(3, 4), torch.ones(5, 3))
    answer = factors(torch.ones(2, 4), torch.ones(5, 2))
    assert down_changes(start, answer)["layer"].equal(torch.ones(2, 4) - torch.arange(8.0).reshape(2, 4))
