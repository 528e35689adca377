"""The last layer for the first token alone: the same logits and gradients, and only where the head allows it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedloom.core.types import ClientState
from fedloom.train.base_model import initial_adapter, load_base
from fedloom.train.engine import first_token
from fedloom.train.settings import Engine, LoRA
from tests.support.tiny_runs import base_of, lively, same, task_of, trainer_of

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
RELATIVES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")


def model_of(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SIZES, num_labels=3, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def logits(model: Any) -> Tensor:
    ids, mask = torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(0)), torch.ones(3, 7).long()
    mask[1, 4:] = 0
    found: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return found


@pytest.mark.parametrize("kind", RELATIVES)
def test_logits_and_gradients_stay(kind: str) -> None:
    plain = model_of(kind)
    fast = copy.deepcopy(plain)
    assert first_token.install_first_token(fast)
    one, other = logits(plain), logits(fast)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    one.square().sum().backward()
    other.square().sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_only_the_last_layer_computes_less() -> None:
    model, shapes = model_of("Bert"), []
    assert first_token.install_first_token(model)
    for layer in model.bert.encoder.layer:
        layer.intermediate.register_forward_hook(lambda *given: shapes.append(tuple(given[2].shape)))
    logits(model)
    assert shapes == [(3, 7, 64), (3, 1, 64)]


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "DistilBert"])
def test_models_put_together_in_another_way_stay_as_they_are(kind: str) -> None:
    own = {"vocab_size": 60, "pad_token_id": 0} if kind != "Llama" else {**SIZES, "pad_token_id": 0}
    model = getattr(transformers, f"{kind}ForSequenceClassification")(getattr(transformers, f"{kind}Config")(**own))
    kinds = [type(module) for module in model.modules()]
    assert not first_token.install_first_token(model)
    assert [type(module) for module in model.modules()] == kinds


class Averaged(nn.Module):
    """A head that reads all tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean(1)


def test_a_head_that_reads_all_tokens_keeps_them() -> None:
    model = model_of("Bert")
    model.bert.pooler = Averaged()
    before = logits(model)
    assert not first_token.install_first_token(model)
    assert torch.equal(logits(model), before)


def test_a_head_of_zeros_says_nothing() -> None:
    model = model_of("Bert")
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    assert not first_token.install_first_token(model)


def test_a_task_trains_to_the_same_adapter(encoder: Path) -> None:
    adapters = []
    for engine in (Engine("torch", first_token=False), Engine("torch")):
        base = load_base(str(encoder), 2, LoRA(dropout=0.0), 4, seed=3, engine=engine)
        for module in base.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        ((result, _),) = trainer_of(base).train([(task_of(lively(initial_adapter(base, 4))), ClientState())])
        adapters.append(result.adapter)
    for name, f in adapters[0].factors.items():
        torch.testing.assert_close(f.up, adapters[1].factors[name].up, rtol=1e-3, atol=1e-4)


def test_a_base_says_how_it_computes_and_can_be_sent_to_another_process(encoder: Path) -> None:
    base = load_base(str(encoder), 2, LoRA(), 4, seed=3, engine=Engine("torch"))
    assert base.computation == {"kernel": "torch", "first_token": True, "byte_dropout": True, "answer_tokens": False}
    again = pickle.loads(pickle.dumps(base))
    start = lively(initial_adapter(base, 4))
    ours, theirs = (trainer_of(one).train([(task_of(start), ClientState())])[0][0].adapter for one in (base, again))
    assert same(ours, theirs)
    assert base_of(encoder).computation == {
        "kernel": "torch",
        "first_token": False,
        "byte_dropout": False,
        "answer_tokens": False,
    }
