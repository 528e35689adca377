"""Values in one file: a safetensors file with a JSON text and the numbers of all tensors, each memory once. No pickle.

What is one object stays one object: adapters that a window, the tasks under way and their base models share are written once and
shared again. A tensor is told as torch has it, by its memory, offset, shape and strides, since products round by these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedloom.core.files import atomic_write
from fedloom.core.schema import Malformed, Reader, reachable_classes

FORMAT = 1
HEADER = "fedloom"
Given = Mapping[str, object]
"""Objects that writer and reader both have, by a name that is written instead."""


def write_checkpoint(
    path: Path, values: Mapping[str, object], about: Mapping[str, int | float] | None = None, **given: object
) -> int:
    """Replace the file at `path` by these values, at once or not at all; returns its bytes. Memory: a copy of the tensors.

    Raises TypeError for an object that is no dataclass, table, row, tensor or scalar.
    """
    packer = _Packer({id(thing): name for name, thing in given.items() if thing is not None})
    told = {name: packer.told(value) for name, value in values.items()}
    text = json.dumps({"about": about or {}, "objects": packer.objects, "values": told}, separators=(",", ":"))
    parts = {"numbers": packer.numbers(), "text": torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)}
    with atomic_write(path) as draft:
        safetensors.torch.save_file(parts, draft, {HEADER: json.dumps([FORMAT, _digest(parts)])})
        return draft.stat().st_size


@dataclass(frozen=True, slots=True)
class StoredValues:
    """A file that is whole: what is told `about` it, and the rest not yet read."""

    about: Mapping[str, Any]
    objects: list[Mapping[str, Any]]
    values: Mapping[str, Any]
    numbers: Tensor

    def read(self, hints: Mapping[str, Any], **given: object) -> dict[str, Any]:
        """The values of these names and kinds, in memory of their own. Raises Malformed."""
        if self.values.keys() != hints.keys():
            differ = ", ".join(sorted(self.values.keys() ^ hints.keys()))
            raise Malformed(f"it was written by another version of fedloom ({differ})")
        unpacker = _Unpacker(self, reachable_classes(*hints.values()), given)
        return {name: unpacker.reader.read(hint, self.values[name]) for name, hint in hints.items()}


def read_checkpoint(path: Path) -> StoredValues:
    """The file, checked against its digest. Raises Malformed if it is damaged or newer than this program."""
    try:
        with safe_open(path, "pt") as file:
            format_, digest = json.loads((file.metadata() or {}).get(HEADER, "[0, 0]"))
            if type(format_) is int and format_ > FORMAT:
                raise Malformed(f"a newer fedloom wrote it (format {format_}, this one reads {FORMAT})")
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        if format_ != FORMAT or parts.keys() != {"numbers", "text"} or _digest(parts) != digest:
            raise Malformed("it is damaged")
        text = json.loads(bytes(parts["text"].numpy()))
    except Malformed:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise Malformed(f"it is damaged ({type(error).__name__})") from error
    return StoredValues(text["about"], text["objects"], text["values"], parts["numbers"])


def _digest(parts: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name} {parts[name].dtype} {len(parts[name])}".encode())
        digest.update(parts[name].numpy().data)
    return digest.hexdigest()


@dataclass(slots=True)
class _Packer:
    """Objects in an order in which each stands after those that it is made of; `seen` also keeps them alive, and their ids."""

    given: Mapping[int, str]
    objects: list[Mapping[str, object]] = field(default_factory=list)
    seen: dict[int, tuple[int, object]] = field(default_factory=dict)
    memories: dict[int, tuple[int, torch.UntypedStorage]] = field(default_factory=dict)

    def told(self, value: object) -> object:
        """As JSON; objects by reference."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if id(value) in self.given:
            return {"given": self.given[id(value)]}
        if isinstance(value, Mapping):
            if not all(isinstance(key, str | int) for key in value):
                raise TypeError("keys of a checkpoint are text or whole numbers")
            return {str(key): self.told(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.told(item) for item in value]
        if id(value) not in self.seen:
            self.objects.append(self._parts(value))
            self.seen[id(value)] = len(self.objects) - 1, value
        return {"is": self.seen[id(value)][0]}

    def numbers(self) -> Tensor:
        """All memories, one after the other."""
        flat = torch.empty(sum(memory.nbytes() for _, memory in self.memories.values()), dtype=torch.uint8)
        end = 0
        for _, memory in self.memories.values():
            flat[end : end + memory.nbytes()] = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)
            end += memory.nbytes()
        return flat

    def _parts(self, value: object) -> dict[str, object]:
        kind = type(value).__name__
        if isinstance(value, Tensor):
            memory = value.untyped_storage()
            number, _ = self.memories.setdefault(memory._cdata, (len(self.memories), memory))
            found: dict[str, object] = {"memory": number, "bytes": memory.nbytes(), "device": str(value.device)}
            found |= {"dtype": str(value.dtype).removeprefix("torch."), "offset": value.storage_offset()}
            return {"type": "Tensor", **found, "shape": list(value.shape), "stride": list(value.stride())}
        if not is_dataclass(value) or isinstance(value, type):
            raise TypeError(f"{kind} has no place in a checkpoint")
        return {"type": kind, **{field.name: self.told(getattr(value, field.name)) for field in fields(value)}}


class _Unpacker:
    def __init__(self, stored: StoredValues, known: Mapping[str, type], given: Given) -> None:
        self.given, self.numbers = given, stored.numbers
        self.made, self.memories, self.end = list[object](), list[Tensor](), 0
        self.reader = Reader(known, self._referred)
        for told in stored.objects:
            self.made.append(self._tensor(told) if told.get("type") == "Tensor" else self.reader.thing(told))

    def _referred(self, told: Mapping[str, Any]) -> object:
        number, name = told.get("is"), told.get("given")
        if type(number) is int and 0 <= number < len(self.made):
            return self.made[number]
        if isinstance(name, str) and name in self.given:
            return self.given[name]
        raise Malformed(f"{str(told)[:60]} refers to nothing")

    def _tensor(self, told: Mapping[str, Any]) -> Tensor:
        if told["memory"] == len(self.memories):
            memory = self.numbers[self.end : self.end + told["bytes"]].to(told["device"], copy=True)
            self.end += told["bytes"]
            self.memories.append(memory)
        flat: Tensor = self.memories[told["memory"]].view(getattr(torch, told["dtype"]))
        return flat.as_strided(told["shape"], told["stride"], told["offset"])
