"""Activations of frozen layers in a folder (`Engine.cache_dir`): runs that share model and texts compute them once.

A file holds the activations of the texts that are computed together, on a CPU of one text (see `frozen_layers`). Its name is a
sha256 of all that they depend on: the frozen weights below the block, the model's settings, how and where it is computed, and the
texts' tokens. So another model, number type, kernel, token limit or chat template finds other files. What is found is what would
be computed, to the byte: neither who came first nor the order matters, and a run is the same without the folder.

Several processes may use it at once. A file appears whole, under its final name; one that is damaged counts as missing. When the
folder is full, a process writes nothing more and says so. Names tell nothing of a text, but activations tell much of it: only the
owner can enter the folder, and it needs the care that the texts need.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from logging import getLogger
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.files import DRAFT, private_folder
from fedloom.train import peft_weights
from fedloom.train.base_model import Base
from fedloom.train.settings import Engine
from fedloom.train.tokenised import EncodedTexts

SHARE = 8
"""A process may write an eighth of what is free before it looks again: so eight of them stay within the size together."""

DIGEST = 32
"""Bytes of the sha256 at the beginning of a file."""

TRAINED = ("lora_", "modules_to_save", "original_module")
"""What names of adapters and of heads trained whole contain. They are drawn from a run's seed, and lie above or add nothing."""

NAMES = ("_name_or_path", "id2label", "label2id")
"""Settings of a model that change nothing of what it computes."""

LOG = getLogger("fedloom.train")


@dataclass(slots=True)
class ActivationFiles:
    """Activations of one model in a folder.

    Fields:
        folder: where the files lie.
        size: bytes that the folder may hold.
        below: by block, a hash of all that its input depends on beside the texts.
        quota: bytes that may be written before the folder is looked at again (None: nothing more is written).
    """

    folder: Path
    size: int
    below: tuple[str, ...]
    quota: int | None = 0

    def read(self, block: int, texts: EncodedTexts, chunk: Sequence[int]) -> list[Tensor] | None:
        """Return the inputs of a block, (tokens, hidden size) for each of these texts; None where they are missing or damaged."""
        try:
            data = self._path(block, texts, chunk).read_bytes()
        except OSError:
            return None
        if sha256(data[DIGEST:]).digest() != data[:DIGEST]:
            return None
        rows = safetensors.torch.load(data[DIGEST:])
        return [rows[str(number)] for number in range(len(chunk))]

    def nearest_below(self, block: int, texts: EncodedTexts, chunk: Sequence[int]) -> int:
        """Return the nearest lower block of which there is a file of these texts; 0 where there is none."""
        return next((k for k in range(block - 1, 0, -1) if self._path(k, texts, chunk).exists()), 0)

    def write(self, block: int, texts: EncodedTexts, chunk: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Keep the inputs of a block for these texts, if there is room for them."""
        data = safetensors.torch.save({str(number): row.contiguous() for number, row in enumerate(rows)})
        if not self._allows(DIGEST + len(data)):
            return
        path, draft = self._path(block, texts, chunk), None
        try:
            private_folder(path.parent)
            with NamedTemporaryFile(dir=path.parent, suffix=DRAFT, delete=False) as file:
                draft = Path(file.name)
                file.write(sha256(data).digest() + data)
            draft.replace(path)
        except (OSError, Refused) as error:
            if draft:
                draft.unlink(missing_ok=True)
            self._stop(str(error))

    def _path(self, block: int, texts: EncodedTexts, chunk: Sequence[int]) -> Path:
        columns = [texts.ids, *(texts.extras[name] for name in sorted(texts.extras))]
        tokens = [[column[i] for column in columns] for i in chunk]
        key = repr((self.below[block], sorted(texts.extras), texts.pad, texts.pad_left, tokens))
        name = sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name[2:]

    def _allows(self, size: int) -> bool:
        """Whether so many bytes may be written."""
        if self.quota is not None and size > self.quota:
            self.quota = (self.size - _bytes_in(self.folder)) // SHARE
            if size > self.quota:
                self._stop(f"it holds the {self.size:,} bytes of engine.cache_dir_bytes; give more, or remove it")
        if self.quota is None:
            return False
        self.quota -= size
        return True

    def _stop(self, why: str) -> None:
        self.quota = None
        LOG.warning("engine.cache_dir: what %s lacks is computed and not kept: %s", self.folder, why)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.glob("*/*"):
        with suppress(FileNotFoundError):  # a draft of another process, which by now has its final name
            total += path.stat().st_size
    return total


def open_activation_files(base: Base, engine: Engine, machine: Mapping[str, object]) -> ActivationFiles | None:
    """Open the folder of `engine.cache_dir`; None where none is wanted, or the model's blocks are not known.

    It is made when the first file is written. Call this before the model is given a fold. `machine` is what the last digits depend on
    beside the model: libraries and processor. Raises Refused where no folder can be made there.
    """
    found = peft_weights.transformer_blocks(base.model)
    if engine.cache_dir is None or found is None:
        return None
    folder = Path(engine.cache_dir).expanduser() / "activations"
    above = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not above.is_dir():
        raise Refused("engine.cache_dir", engine.cache_dir, f"{above} is a file; give a folder")
    return ActivationFiles(folder, engine.cache_dir_bytes, _hashes_below(base, found[0], machine))


def _hashes_below(base: Base, path: str, machine: Mapping[str, object]) -> tuple[str, ...]:
    """Return by block a hash of what its input depends on: weights below, the model's settings, how and where it is computed."""
    model: Any = base.model.get_base_model()
    config = {name: value for name, value in model.config.to_dict().items() if name not in NAMES}
    place = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else base.device.type
    about = [type(model).__name__, config, model.config._attn_implementation, base.computation]
    settings = [*about, place, torch.get_num_threads(), dict(machine)]
    digest = sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    weights = [*model.named_parameters(), *model.named_buffers()]
    frozen = [(name, weight) for name, weight in weights if not any(part in name for part in TRAINED)]
    _add_weights(digest, (one for one in frozen if not one[0].startswith(f"{path}.")))
    below = list[str]()
    for number in range(len(model.get_submodule(path))):
        below.append(digest.hexdigest())
        _add_weights(digest, (one for one in frozen if one[0].startswith(f"{path}.{number}.")))
    return tuple(below)


def _add_weights(digest: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    for name, weight in weights:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
