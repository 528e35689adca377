"""A dataclass with adapters in it as bytes: flat buffers of numbers behind one JSON text. No pickle, no code, checked before use.

The container is a safetensors file with at most two one-dimensional tensors (float32, float16). A dataclass stands in the text by
its fields, a function by its name, and the reader knows only those that it is given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedloom.core import schema
from fedloom.core.codec import LOWEST, Block, half
from fedloom.core.lora import Adapter, Factor
from fedloom.core.schema import Malformed

FORMAT = 1

Form: TypeAlias = Literal["f32", "f16", "eye", "void"]
Told: TypeAlias = tuple[Form, int, bool, tuple[int, ...]]
"""Of one tensor: the buffer that holds it, the exponent of float16, whether its columns come first, its shape. "eye" is an
identity, which takes no numbers, "void" a tensor in whose place the receiver puts what it has: zeros of no memory (all strides 0).
"""
TABLES = tuple[dict[str, tuple[Told, Told]], dict[str, Told]]
"""Of an adapter: `down` and `up` of each layer, and its dense tensors."""


def sealed(name: str, thing: object) -> bytes:
    """A dataclass as bytes under this name; the same one gives the same bytes."""
    parts: dict[Form, list[Tensor]] = {"f32": [], "f16": []}
    text = json.dumps([FORMAT, _told(thing, parts)], separators=(",", ":"))
    flat: dict[str, Tensor] = {form: torch.cat(every) for form, every in parts.items() if every}
    return safetensors.torch.save(flat, {name: text})


def _told(value: Any, parts: Mapping[Form, list[Tensor]]) -> object:
    """As JSON; the numbers of adapters go to `parts`."""
    if isinstance(value, Adapter):
        factors = {name: [_tensor(one.down, parts), _tensor(one.up, parts)] for name, one in value.factors.items()}
        return {"adapter": [factors, {name: _tensor(tensor, parts) for name, tensor in value.dense.items()}]}
    if is_dataclass(value) and not isinstance(value, type):
        told = {field.name: _told(getattr(value, field.name), parts) for field in fields(value)}
        return {"type": type(value).__name__, **told}
    if isinstance(value, tuple):
        return [_told(item, parts) for item in value]
    return value.__name__ if callable(value) else value


def _tensor(tensor: Tensor, parts: Mapping[Form, list[Tensor]]) -> list[object]:
    """In float16 where nothing is lost, which is what a codec made fit for it; else as it is."""
    if tensor.dtype != torch.float32:
        raise TypeError(f"a tensor of {tensor.dtype} has no place in a message")
    plain = tensor.detach().cpu()
    if is_void(plain):
        return ["void", 0, False, [*plain.shape]]
    if plain.ndim == 2 and len(plain) > 1 and plain.shape[0] == plain.shape[1] and plain.equal(torch.eye(len(plain))):
        return ["eye", 0, False, [*plain.shape]]
    turned = plain.ndim == 2 and plain.stride(0) < plain.stride(1)  # products round by the order in memory
    row = (plain.T if turned else plain).reshape(-1)
    block = half(row)
    form: Form = "f16" if block.numbers.dtype == torch.float16 and block.values(row).equal(row) else "f32"
    parts[form].append(block.numbers if form == "f16" else row)
    return [form, block.exponent if form == "f16" else 0, turned, [*plain.shape]]


def opened(data: bytes, limit: int, name: str, kind: Any, known: Mapping[str, Any]) -> Any:
    """A thing of this kind, made of `known` ones, its fields as they are declared and their numbers finite.

    Raises Malformed with the reason, whatever the bytes are. Memory: a few times that of the bytes.
    """
    if len(data) > limit:
        raise Malformed(f"{len(data)} bytes, above the limit of {limit}")
    text = header(data).get(name)
    if text is None:
        raise Malformed(f"no {name} in the file")
    numbers = _Numbers(buffers(data))
    reader = schema.Reader(known, numbers.adapter)
    try:
        told = json.loads(text)
        if not isinstance(told, list) or len(told) != 2 or told[0] != FORMAT:
            raise Malformed(f"another format than {FORMAT}, by another version of fedloom")
        thing = reader.read(kind, told[1])
        schema.check(thing)
    except Malformed:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, RuntimeError) as error:
        raise Malformed(f"{str(error)[:200] or type(error).__name__}") from error
    numbers.end()
    return thing


class _Numbers:
    """The buffers of a message, cut into tensors one after the other."""

    def __init__(self, flat: Mapping[str, Tensor]) -> None:
        self.left = dict(flat)
        self.room = sum(map(len, flat.values()))

    def adapter(self, told: Mapping[str, Any]) -> Adapter:
        """The adapter that is told of here. Raises Malformed."""
        if told.keys() != {"adapter"}:
            raise Malformed(f"{str(told)[:60]} is no adapter")
        layers, dense = schema.Reader({}).read(TABLES, told["adapter"])
        factors = {name: Factor(self._taken(*down), self._taken(*up)) for name, (down, up) in layers.items()}
        return Adapter(factors, {name: self._taken(*one) for name, one in dense.items()})

    def end(self) -> None:
        """Raise Malformed if some numbers belong to nothing."""
        if any(map(len, self.left.values())):
            raise Malformed("the buffers hold more than the text speaks of")

    def _taken(self, form: Form, exponent: int, turned: bool, shape: tuple[int, ...]) -> Tensor:
        if len(shape) > 8 or any(size < 1 for size in shape):
            raise Malformed(f"{str(shape)[:60]} is no shape")
        if not LOWEST <= exponent <= -LOWEST or (exponent and form != "f16") or (turned and len(shape) != 2):
            raise Malformed(f"a tensor in {form} with exponent {str(exponent)[:20]}")
        count = math.prod(shape)
        if form == "eye":
            self.room -= count  # no more of them than numbers that were sent: the memory is bounded by the message
            if self.room < 0 or len(shape) != 2 or shape[0] != shape[1]:
                raise Malformed("an identity that is too large, or not square")
            return torch.eye(shape[0])
        if form == "void":
            return torch.zeros(()).expand(shape)
        buffer = self.left.get(form, torch.zeros(0))
        if len(buffer) < count:
            raise Malformed(f"buffer {form} is too short")
        row, self.left[form] = buffer[:count], buffer[count:]
        flat = Block(row, exponent).values(row)
        return flat.reshape(shape[::-1]).T if turned else flat.reshape(shape)


def is_void(tensor: Tensor) -> bool:
    """Whether it is a place without numbers (`form`)."""
    return tensor.ndim > 0 and not any(tensor.stride())


LARGEST = 2**23
"""Bytes of a header: more than the manifest of any model has, and few enough for any machine to read."""
BufferForm: TypeAlias = Literal["f32", "f16", "i8"]
BUFFERS: dict[BufferForm, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "i8": torch.int8}


class Unasked(Malformed):
    """An answer to a task that nobody waits for (any more)."""


def header(data: bytes) -> dict[str, str]:
    """The texts in a safetensors file that holds no other buffers than ours, by name. Raises Malformed."""
    size = int.from_bytes(data[:8], "little")
    if size > LARGEST:
        raise Malformed(f"not a safetensors file, or a header of {size} bytes, above the limit of {LARGEST}")
    try:
        told = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not a safetensors file: {type(error).__name__} in its header") from error
    texts = told.get("__metadata__") if isinstance(told, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise Malformed("no manifest in the file")
    if odd := sorted(told.keys() - {"__metadata__", *BUFFERS}):
        raise Malformed(f"{odd[0]!r:.60} is no buffer of an answer")
    return texts


def buffers(data: bytes) -> dict[str, Tensor]:
    """The flat buffers of such a file. Raises Malformed."""
    try:
        flat = safetensors.torch.load(data)
    except SafetensorError as error:
        raise Malformed(f"not a safetensors file: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # types and shapes that torch does not have
        raise Malformed(f"not a safetensors file: {type(error).__name__}") from error
    for name, tensor in flat.items():
        if name not in BUFFERS or tensor.dtype != BUFFERS[name] or tensor.ndim != 1:
            raise Malformed(f"{name!r} is a {tensor.ndim}-dimensional buffer of {tensor.dtype}")
    return flat
