"""The round trip of an adapter: trained, exported, and loaded by peft and transformers as a user without fedloom does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedloom.core.lora import Adapter, Factor
from tests.support.tiny_models import hush, tiny_run

BAR = 1e-5
"""The largest difference of a logit that is rounding."""


def roundtrip_errors(model: Path, folder: Path, ranks: Sequence[int]) -> dict[str, float]:
    """Export a run on this model at each rank and merged; the largest difference of a logit to the adapter in memory."""
    from fedloom.runs.prepare import prepare
    from fedloom.train.export import save_adapter, save_merged, truncate_adapter

    hush()
    job = prepare(tiny_run(model))
    trained, names = job.execute(folder / "run").adapter, job.split.train.names
    untrained = _logits(job, job.run.aggregator.init(_without_product(trained)).adapter)
    errors = {}
    for rank in ranks:
        expected = _logits(job, truncate_adapter(trained, rank))
        exported = save_adapter(job.base, truncate_adapter(trained, rank), names, folder / f"r{rank}")
        errors[f"rank {rank}"] = float((expected - _loaded(job, exported)).abs().max())
    expected = _logits(job, trained)
    if float((expected - untrained).abs().max()) < 0.01:
        raise RuntimeError("the adapter does next to nothing, so this round trip would prove nothing")
    exported = save_merged(job.base, trained, names, folder / "merged")
    errors["merged"] = float((expected - _merged(job, exported)).abs().max())
    return errors


def _without_product(adapter: Adapter) -> Adapter:
    """The same head on an adapter whose product is zero."""
    return Adapter({n: Factor(f.down, torch.zeros_like(f.up)) for n, f in adapter.factors.items()}, adapter.dense)


@torch.no_grad()
def _predict(model: Any, job: Any) -> Tensor:
    inputs = job.test_texts.batch(range(len(job.split.test)), torch.device("cpu"))
    inputs.pop("labels")
    logits: Tensor = model.eval()(**inputs).logits
    return logits


def _logits(job: Any, adapter: Adapter) -> Tensor:
    job.base.put(adapter)
    return _predict(job.base.model, job)


def _loaded(job: Any, folder: Path) -> Tensor:
    """Load a PEFT folder by its README, without fedloom."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    pad_id = job.base.tokenizer.pad_token_id
    plain = AutoModelForSequenceClassification.from_pretrained(job.run.model, num_labels=2, pad_token_id=pad_id)
    return _predict(PeftModel.from_pretrained(plain, str(folder)), job)


def _merged(job: Any, folder: Path) -> Tensor:
    from transformers import AutoModelForSequenceClassification

    return _predict(AutoModelForSequenceClassification.from_pretrained(str(folder)), job)
