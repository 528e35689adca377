"""A task of another base model than the one that is here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedloom.aggregate.fedit import FedIT
from fedloom.core.codec import Half
from fedloom.core.lora import Adapter, Factor, cut_adapter
from fedloom.core.types import TaskStart
from fedloom.deploy.messages.checks import model_mismatch
from fedloom.deploy.messages.messages import EvaluateRequest, Refusal, TaskRequest, decode_reply, encode_request
from fedloom.deploy.region.region import Region
from tests.support import toys
from tests.support.sites import site_at, task_of, terms_of, trainer_of


def test_layers_and_dense_tensors_are_compared_by_name_and_size_whatever_the_rank() -> None:
    first = toys.adapter(4)
    name, factor = next(iter(first.factors.items()))
    one = cut_adapter(first, 1)
    wider = Adapter({name: Factor(factor.down[:, :-1], factor.up)}, first.dense)
    assert model_mismatch(first, TaskStart(one, "")) == ""
    assert model_mismatch(first, TaskStart(Adapter({name: factor}, {}), "", fold=one)) == ""
    assert "the copy here has no such layer" in model_mismatch(first, TaskStart(Adapter({f"{name}x": factor}), ""))
    assert "it is another model" in model_mismatch(first, TaskStart(wider, ""))
    assert f"has {name} of" in model_mismatch(first, TaskStart(first, "", fold=wider)), "of what is folded in, too"
    head = {key: value[:1] for key, value in first.dense.items()}
    assert "dense:" in model_mismatch(first, TaskStart(Adapter(first.factors, head), ""))


def test_a_region_refuses_a_task_and_an_exam_of_another_model_before_its_sites_see_them(
    encoder: Path, tmp_path: Path
) -> None:
    region, trainer = Region(site_at(tmp_path, encoder), tmp_path, 1), trainer_of(encoder, terms_of())
    opened: Any = SimpleNamespace(opened=True, here={"c0": None})
    task = task_of(FedIT(), trainer, Half(), 1)
    region.running, region.codec, region.first = opened, Half(), task.start.train
    name, factor = next(iter(task.start.train.factors.items()))
    strange = replace(task.start, train=Adapter({name: Factor(factor.down[:, :-1], factor.up)}, task.start.train.dense))
    for ask in (
        TaskRequest(terms_of(), 1, replace(task, start=strange), 0),
        EvaluateRequest(terms_of(), 1, "ward", strange, 0, 10.0),
    ):
        assert "it is another model" in str(region._why_refused(ask))
        told = decode_reply(region.answer(encode_request(ask)), 2**20, {})
        assert isinstance(told, Refusal)
        assert told.lasting
        assert "it is another model" in told.reason
    assert region.requests.empty()
