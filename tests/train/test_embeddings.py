"""Embeddings of texts by the frozen base, and the groups that are made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from fedloom import ByClient, Hierarchy, NearIID, Refused, Rows, prepare
from fedloom.hierarchy.tree import Tree
from fedloom.train.base_model import load_base
from fedloom.train.settings import PLAIN, Engine, LoRA
from fedloom.train.text_features import EMBEDDED_ROWS, embeddings
from fedloom.train.tokenised import encode_texts
from tests.support.families import FAMILIES
from tests.support.tiny_runs import answered, base_of, examples, tiny_run, trainer_of, writer_of


@pytest.mark.parametrize(("engine", "layer"), [(PLAIN, -1), (Engine(), -2)])
def test_a_row_is_the_mean_of_the_states_of_an_example_alone(encoder: Path, engine: Engine, layer: int) -> None:
    """Of the last layer; of the one below where the last is read at its first token only."""
    base = load_base(str(encoder), 2, LoRA(), 4, 3, engine=engine)
    texts = encode_texts(examples(2 * EMBEDDED_ROWS + 3), base.tokenizer, 32)
    indices = [5, 0, 2 * EMBEDDED_ROWS, 7]
    rows = embeddings(base, texts, indices)
    plain = AutoModel.from_pretrained(encoder).eval()
    for row, i in zip(rows, indices, strict=True):
        inputs = texts.batch([i], base.device)
        with torch.no_grad():
            states = plain(inputs["input_ids"], output_hidden_states=True).hidden_states[layer]
        assert torch.allclose(row, states[0].mean(0), atol=1e-5)
    assert torch.allclose(embeddings(base, texts, range(2 * EMBEDDED_ROWS + 3))[indices], rows, atol=1e-5), (
        "by any batches"
    )


def test_models_that_write_have_embeddings_too(decoder: Path) -> None:
    base = writer_of(decoder)
    rows = embeddings(base, answered(base, 6), range(6))
    assert rows.isfinite().all()
    assert len(rows) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["T5", "BART", "XLNet"])
def test_other_kinds_of_models_have_embeddings_that_padding_does_not_change(name: str, tmp_path: Path) -> None:
    base = base_of(FAMILIES[name].save(tmp_path))
    texts = trainer_of(base, 12).texts
    rows = embeddings(base, texts, range(12))
    for i in range(12):
        assert torch.allclose(rows[i], embeddings(base, texts, [i])[0], atol=1e-4)


def test_groups_by_topics_mix_what_labels_do_not_tell(encoder: Path) -> None:
    """Two kinds of text with labels that say nothing of them, each client with one: a group has both."""
    pools = ("red", "dog")
    rows = [
        {"text": f"{pools[k // 4 % 2]} " * (3 + k % 3), "label": ("a", "b")[k % 2], "whose": f"c{k // 4}"}
        for k in range(32)
    ]
    run = tiny_run(encoder, data=Rows(rows, client="whose", test_share=0.25), partition=ByClient())
    job = prepare(replace(run, hierarchy=Hierarchy(NearIID(4, waiting=0.0), topics=2), held_out=0.0))
    assert isinstance(job.server, Tree)
    groups = job.describe()["groups"]
    for members in groups.values():
        assert {int(client[1:]) % 2 for client in members} == {0, 1}


def test_a_negative_number_of_topics_is_refused() -> None:
    with pytest.raises(Refused, match=r"hierarchy\.topics"):
        Hierarchy(topics=-1)
