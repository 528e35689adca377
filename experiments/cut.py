"""Models of one family in several sizes: all-MiniLM-L6 with its upper layers left out, made when first asked for.

What remains was not trained to end where it does now; it is a smaller model of the same kind, not the best one of its size.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fedloom.train.demo_model import minilm

MODELS = Path(__file__).parents[1] / "models"
WHOLE = 6


def cut(layers: int) -> str:
    """The folder of the model with the first `layers` of its 6."""
    place = MODELS / f"minilm-{layers}"
    if layers == WHOLE:
        return str(minilm())
    if not (place / "config.json").is_file():
        from transformers import AutoModel

        model = AutoModel.from_pretrained(minilm())
        model.encoder.layer = model.encoder.layer[:layers]
        model.config.num_hidden_layers = layers
        shutil.copytree(minilm(), place, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "*.py", "__*"))
        model.save_pretrained(place)
    return str(place)
