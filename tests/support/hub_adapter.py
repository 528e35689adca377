"""The adapter of a classifier whose base model has a name of the hub, saved, and loaded as its card says: in a process of its own.

    python -m tests.support.hub_adapter NAME FOLDER

The hub's library reads where its cache is when it is imported, so a test cannot set that in its own process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tests.support.tiny_runs import examples, lively, logits


def save_and_load(name: str, folder: Path) -> None:
    """Raises AssertionError where others get other logits or other names of the labels."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    from fedloom.train.base_model import initial_adapter, load_base
    from fedloom.train.export import save_adapter
    from fedloom.train.settings import LoRA
    from fedloom.train.tokenised import encode_texts

    labels, some = ["a", "b", "it's c"], list(examples(6).texts)
    base = load_base(name, len(labels), LoRA(dropout=0.0), 4, seed=3)
    adapter = lively(initial_adapter(base, 4))
    save_adapter(base, adapter, labels, folder)
    wanted = logits(base, adapter, encode_texts(examples(6), base.tokenizer, 32))
    os.chdir(folder.parent)
    code = (folder / "README.md").read_text(encoding="utf-8").partition("```python")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    inputs = AutoTokenizer.from_pretrained(folder)(some, padding=True, return_tensors="pt")
    for model in (names["model"], AutoModelForSequenceClassification.from_pretrained(folder)):
        with torch.no_grad():
            assert torch.allclose(model.eval()(**inputs).logits, wanted, atol=1e-5)
        assert model.config.id2label == dict(enumerate(labels))
    chosen = pipeline("text-classification", str(folder))(some)
    assert [one["label"] for one in chosen] == [labels[number] for number in wanted.argmax(1)]


if __name__ == "__main__":
    save_and_load(sys.argv[1], Path(sys.argv[2]))
