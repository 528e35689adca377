"""A dataclass with adapters in it as bytes: flat buffers of numbers behind one JSON text. No pickle, no code, checked before use.

Every request and reply between a server, its regions and its sites has this form, but for the answer to a task (`answer`), which
is smaller since the receiver has the task. The file is a safetensors file with at most two one-dimensional tensors (float32,
float16). Its header holds the text: [format, value], as `fedloom.core.schema` writes it, an adapter as entries that say where its
numbers lie.

Who reads it trusts nothing in it. The size is checked before anything is parsed; fields are read as their classes declare them,
functions and codecs only by the names that the receiver hands in, numbers must be finite, shapes can ask for no more memory than
was sent, and numbers that belong to nothing are refused. A forged file can therefore do no more than a wrong one: it raises
`Malformed`. That the values make sense (ranges, ranks, sides) is judged by `checks`, and that an answer fits its task by the
core.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import cache, partial
from types import FunctionType
from typing import Any, Literal, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedloom.core.codec import LOWEST, Block, pack_half
from fedloom.core.lora import Adapter, Factor
from fedloom.core.schema import Decoder, Encoder, Malformed, function_name

FORMAT = 2

TensorForm: TypeAlias = Literal["f32", "f16", "eye", "void"]
TensorEntry: TypeAlias = tuple[TensorForm, int, bool, tuple[int, ...]]
"""One tensor: the buffer that holds it, the exponent of float16, whether its columns come first, its shape. "eye" is an identity,
which takes no numbers, "void" a tensor in whose place the receiver puts what it has: zeros of no memory (all strides 0).
"""
ADAPTER_ENTRIES = tuple[dict[str, tuple[TensorEntry, TensorEntry]], dict[str, TensorEntry]]
"""An adapter: `down` and `up` of each layer, and its dense tensors."""


def pack_message(name: str, value: object) -> bytes:
    """Encode a dataclass as bytes under this name. The same value gives the same bytes."""
    parts: dict[TensorForm, list[Tensor]] = {"f32": [], "f16": []}
    encoder = Encoder({Adapter: partial(_adapter_entries, parts), FunctionType: function_name})
    text = f"[{FORMAT},{encoder.encode(value)}]"
    flat: dict[str, Tensor] = {form: torch.cat(every) for form, every in parts.items() if every}
    return safetensors.torch.save(flat, {name: text})


def _adapter_entries(parts: Mapping[TensorForm, list[Tensor]], adapter: Adapter) -> str:
    """Encode an adapter by the places of its tensors, whose numbers go to `parts`."""
    factors = {name: [_entry(one.down, parts), _entry(one.up, parts)] for name, one in adapter.factors.items()}
    entries = [factors, {name: _entry(tensor, parts) for name, tensor in adapter.dense.items()}]
    return json.dumps({"adapter": entries}, separators=(",", ":"))


def _entry(tensor: Tensor, parts: Mapping[TensorForm, list[Tensor]]) -> list[object]:
    """The entry of a tensor: in float16 where nothing is lost, which is what a codec made fit for it, else as it is."""
    if tensor.dtype != torch.float32:
        raise TypeError(f"a tensor of {tensor.dtype} has no place in a message")
    numbers = tensor.detach().cpu()
    if is_placeholder(numbers):
        return ["void", 0, False, [*numbers.shape]]
    if (
        numbers.ndim == 2
        and len(numbers) > 1
        and numbers.shape[0] == numbers.shape[1]
        and numbers.equal(torch.eye(len(numbers)))
    ):
        return ["eye", 0, False, [*numbers.shape]]
    turned = numbers.ndim == 2 and numbers.stride(0) < numbers.stride(1)  # products round by the order in memory
    row = (numbers.T if turned else numbers).reshape(-1)
    block = pack_half(row)
    form: TensorForm = "f16" if block.numbers.dtype == torch.float16 and block.values(row).equal(row) else "f32"
    parts[form].append(block.numbers if form == "f16" else row)
    return [form, block.exponent if form == "f16" else 0, turned, [*numbers.shape]]


def unpack_message(data: bytes, limit: int, name: str, kind: Any, known: Iterable[Any] = ()) -> Any:
    """Decode a value of this type from bytes, with `known` the functions that may stand in it by name.

    Raises Malformed with the reason, whatever the bytes are. Memory: a few times that of the bytes.
    """
    if len(data) > limit:
        raise Malformed(f"{len(data)} bytes, above the limit of {limit}")
    text = read_header(data).get(name)
    if text is None:
        raise Malformed(f"no {name} in the file")
    numbers = _Numbers(read_buffers(data))
    _, value = _decoder(tuple(known)).decode(tuple[_Format, kind], text, numbers)
    numbers.end()
    return value


class _Format:
    """Stands for the number of the format in the type of a text."""


def _read_format(data: object, numbers: object) -> None:
    if data != FORMAT or type(data) is not int:
        raise Malformed(f"another format than {FORMAT}, by another version of fedloom")


@cache
def _decoder(known: tuple[Any, ...]) -> Decoder:
    special = {_Format: _read_format, Adapter: lambda data, numbers: numbers.adapter(data)}
    return Decoder(known, special, finite=True)


class _Numbers:
    """The buffers of a message, cut into tensors one after the other."""

    def __init__(self, flat: Mapping[str, Tensor]) -> None:
        self.left = dict(flat)
        self.room = sum(map(len, flat.values()))

    def adapter(self, data: Any) -> Adapter:
        """The adapter of these entries. Raises Malformed."""
        if not isinstance(data, dict) or data.keys() != {"adapter"}:
            raise Malformed("expected an adapter")
        layers, dense = _decoder(()).read(ADAPTER_ENTRIES, data["adapter"])
        factors = {name: Factor(self._taken(*down), self._taken(*up)) for name, (down, up) in layers.items()}
        return Adapter(factors, {name: self._taken(*one) for name, one in dense.items()})

    def end(self) -> None:
        """Raise Malformed if some numbers belong to nothing."""
        if any(map(len, self.left.values())):
            raise Malformed("the buffers hold more than the text speaks of")

    def _taken(self, form: TensorForm, exponent: int, turned: bool, shape: tuple[int, ...]) -> Tensor:
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


def is_placeholder(tensor: Tensor) -> bool:
    """Whether a tensor is a place without numbers ("void")."""
    return tensor.ndim > 0 and not any(tensor.stride())


MAX_HEADER = 2**23
"""Bytes of a header: more than the manifest of any model has, and few enough for any machine to read."""
BufferForm: TypeAlias = Literal["f32", "f16", "i8"]
BUFFERS: dict[BufferForm, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "i8": torch.int8}


class NotOutstanding(Malformed):
    """An answer to a task that is not outstanding (any more)."""


def read_header(data: bytes) -> dict[str, str]:
    """The texts in a safetensors file that holds no other buffers than ours, by name. Raises Malformed."""
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER:
        raise Malformed(f"not a safetensors file, or a header of {size} bytes, above the limit of {MAX_HEADER}")
    try:
        entries = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not a safetensors file: {type(error).__name__} in its header") from error
    texts = entries.get("__metadata__") if isinstance(entries, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise Malformed("no manifest in the file")
    if odd := sorted(entries.keys() - {"__metadata__", *BUFFERS}):
        raise Malformed(f"{odd[0]!r:.60} is no buffer of an answer")
    return texts


def read_buffers(data: bytes) -> dict[str, Tensor]:
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
