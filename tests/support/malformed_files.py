"""Malformed answers as bytes, kind by kind."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import safetensors.torch
import torch
from torch import Tensor

from fedloom.core.events import UpdateArrived
from fedloom.deploy.messages import answer as wire
from tests.support.malformed_results import (
    INFINITE,
    NAN,
    Bend,
    Draw,
    Kind,
    Thrown,
    duplicate,
    entry,
    foreign,
    stale,
    unknown_task,
)
from tests.support.scene import Scene

BYTES_LIMIT = 20_000
Flat: TypeAlias = dict[str, Tensor]
Manifest: TypeAlias = dict[str, Any]


# A good file, bent in one place --------------------------------------------------------------------------------------


def raw(flat: Mapping[str, Tensor], manifest: object) -> bytes:
    """A file like those of `wire.encode`, with any manifest."""
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    return safetensors.torch.save(dict(flat), {wire.HEADER: text})


def parts(data: bytes) -> tuple[Manifest, Flat]:
    """Manifest and buffers of a good file."""
    manifest: Manifest = json.loads(json.loads(_header(data))["__metadata__"][wire.HEADER])
    return manifest, safetensors.torch.load(data)


def in_bytes(bend: Callable[[Draw, bytes], bytes]) -> Kind:
    """The bytes of a good file, bent."""

    def make(draw: Draw, scene: Scene) -> Thrown:
        task = scene.some(draw)
        return bend(draw, wire.encode_result(task, scene.good(task)))

    return make


def in_parts(build: Callable[[Draw, Manifest, Flat], bytes]) -> Kind:
    """A file built from the parts of a good one."""
    return in_bytes(lambda draw, data: build(draw, *parts(data)))


def in_manifest(bend: Bend[Manifest]) -> Kind:
    """A good file whose manifest is bent."""
    return in_parts(lambda draw, manifest, flat: raw(flat, bend(draw, manifest)))


def in_file(bend: Callable[[Draw, Flat], None]) -> Kind:
    """A good file whose buffers are bent in place."""

    def build(draw: Draw, manifest: Manifest, flat: Flat) -> bytes:
        bend(draw, flat)
        return raw(flat, manifest)

    return in_parts(build)


def in_entry(bend: Callable[[Draw, list[Any]], None]) -> Kind:
    """A good file in whose manifest what is said of one tensor is bent in place."""

    def change(draw: Draw, manifest: Manifest) -> Manifest:
        bend(draw, draw.choice(manifest["tensors"]))
        return manifest

    return in_manifest(change)


def in_floats(bend: Bend[Tensor]) -> Kind:
    """A good file with a buffer of floating point numbers bent."""

    def change(draw: Draw, flat: dict[str, Any]) -> None:
        name = draw.choice([name for name in sorted(flat) if flat[name].is_floating_point()])
        flat[name] = bend(draw, flat[name])

    return in_file(change)


def sent(kind: Kind) -> Kind:
    """The same lie as bytes."""

    def make(draw: Draw, scene: Scene) -> Thrown:
        told = kind(draw, scene)
        assert isinstance(told, UpdateArrived)
        every = (*scene.open, *scene.answered, *scene.closed)
        task = next(task for task in every if scene.good(task).adapter is told.result.adapter)
        manifest, flat = parts(wire.encode_result(task, told.result))
        return raw(flat, {**manifest, "task": told.task, "client": told.client})

    return make


# Bent bytes ----------------------------------------------------------------------------------------------------------


def _length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _header(data: bytes) -> bytes:
    return data[8 : 8 + _length(data)]


def _headed(data: bytes, header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data[8 + _length(data) :]


def truncated(draw: Draw, data: bytes) -> bytes:
    """Cut anywhere, before the last byte, after the header, or within or after its length."""
    return data[: draw.choice([draw.randrange(len(data)), len(data) - 1, 8, 8 + _length(data), draw.randrange(9)])]


def other_length(draw: Draw, data: bytes) -> bytes:
    """A bit of the header's length flipped."""
    return (_length(data) ^ (1 << draw.randrange(64))).to_bytes(8, "little") + data[8:]


def no_utf8(draw: Draw, data: bytes) -> bytes:
    """The top bit of a byte of the header flipped: no UTF-8 any more, since the header is plain ASCII."""
    bent, at = bytearray(data), 8 + draw.randrange(_length(data))
    bent[at] ^= 0x80
    return bytes(bent)


def no_json(draw: Draw, data: bytes) -> bytes:
    """A bit of a bracket, quotation mark, colon or comma of the header flipped."""
    bent = bytearray(data)
    at = draw.choice([8 + i for i, byte in enumerate(_header(data)) if byte in b'{}[]":,'])
    bent[at] ^= 1 << draw.randrange(8)
    return bytes(bent)


def renamed_dtype(draw: Draw, data: bytes) -> bytes:
    """The header calls one buffer something else, mostly of the same size."""
    before, key, after = _header(data).partition(b'"dtype":"')
    old, _, rest = after.partition(b'"')
    odd = draw.choice({b"F32": [b"I32", b"U32", b"F16"], b"F16": [b"I16", b"BF16", b"F32"]}.get(old, [b"U8", b"BOOL"]))
    return _headed(data, before + key + draw.choice([odd, b"XXX"]) + b'"' + rest)


def other_offsets(draw: Draw, data: bytes) -> bytes:
    """Tensors that overlap, leave a gap, or lie outside the file."""
    before, key, after = _header(data).partition(b'"data_offsets":[')
    old, _, rest = after.partition(b"]")
    odd = draw.choice([b"0,0", b"0,4", b"99999999,99999999", b"-4,0", b"4,0", b"0", b"0,1e3"]).ljust(len(old))
    return _headed(data, before + key + odd + b"]" + rest)


def no_file(draw: Draw, data: bytes) -> bytes:
    """Nothing, noise, a pickle, or something like a header."""
    buffer = io.BytesIO()
    torch.save({"query.down": torch.zeros(2)}, buffer)
    noise = draw.randbytes(draw.randrange(300))
    return draw.choice([b"", noise, buffer.getvalue(), pickle.dumps({"client": "c1"}), b"{}", b"\xff" * 64, b"\0" * 8])


# Bent buffers --------------------------------------------------------------------------------------------------------


def oversize(draw: Draw, flat: Flat) -> None:
    """More bytes than the server takes."""
    flat["f32"] = torch.zeros(BYTES_LIMIT // 4 + draw.randrange(9999))


def other_size(draw: Draw, flat: Flat) -> None:
    """A buffer too short, too long, or missing."""
    name, by = draw.choice(sorted(flat)), draw.randint(1, 20)
    longer = torch.cat([flat[name], flat[name][:by]])
    flat[name] = draw.choice([flat[name][:-by].clone(), longer, flat[name][:0].clone()])
    if not len(flat[name]) and draw.random() < 0.5:
        del flat[name]


def other_buffer(draw: Draw, flat: Flat) -> None:
    """A buffer too many, or under another name, or half of each."""
    name = draw.choice(sorted(flat))
    new = draw.choice(["f64", "F32", "query.down", "", "dense:head", *({"f32", "f16", "i8"} - flat.keys())])
    flat[new] = flat[name].clone() if draw.random() < 0.5 else flat.pop(name)


def shaped(draw: Draw, flat: Flat) -> None:
    """A buffer that is not flat, or of another type under the same name."""
    name = draw.choice(sorted(flat))
    other = draw.choice([torch.float64, torch.bfloat16, torch.int32, torch.uint8, torch.bool])
    flat[name] = draw.choice([flat[name].unsqueeze(0), flat[name].unsqueeze(1), flat[name].to(other)])


def tall(draw: Draw, whole: Tensor) -> Tensor:
    """Every number, or every scale, so large that the adapter is beyond the limit."""
    size = 3e4 * 10.0 ** draw.uniform(1 if whole.dtype == torch.float16 else 4, 30)
    return torch.full(whole.shape, size).to(whole.dtype)


# Bent entries --------------------------------------------------------------------------------------------------------


def other_rows(draw: Draw, entry: list[Any]) -> None:
    """Rows that there are not, twice, out of order, or in another number than there are rows in the buffer."""
    entry[2] = draw.choice([[], [-1], [0, 0], [1, 0], [0, 99], [10**30], [0.5], ["0"], "all", True, {}, [None], [[0]]])


def other_form(draw: Draw, entry: list[Any]) -> None:
    """In another buffer, or in one that there is not."""
    entry[0] = draw.choice([form for form in ("f32", "f16", "i8", "f64", "", None, 0, ["f32"]) if form != entry[0]])


def other_exponent(draw: Draw, entry: list[Any]) -> None:
    """Beyond float32, or no whole number."""
    entry[1] = draw.choice([127, -127, 10**30, -(10**30), 0.5, "0", None, True, NAN, [0]])


def cut_short(draw: Draw, entry: list[Any]) -> None:
    """Too few or too many things said of a tensor."""
    entry[:] = draw.choice([[], entry[:-1], entry[:1], [*entry, 0], [*entry, None], [*entry, []]])


# Bent manifests ------------------------------------------------------------------------------------------------------


def without(draw: Draw, manifest: Manifest) -> object:
    """A field too few."""
    del manifest[draw.choice(sorted(manifest))]
    return manifest


def and_more(draw: Draw, manifest: Manifest) -> object:
    """A field too many."""
    return {**manifest, draw.choice(["code", "__class__", "Task", "seed"]): draw.choice([1, "import os", None])}


MISTYPED: Mapping[str, list[object]] = {
    "client": [None, [], {}, 3, "", "x" * 201, True],
    "layers": [[], {"a": "b"}, True, "1", 1.5, NAN, [1], [None]],  # None says that all layers were trained
    "layout": [None, [], 3, "", "0" * 12, {}],
    "tensors": [None, 3, {}, "f32", [], [[]], [None], [["f32", 0, None]], [["f32", 0, None]] * 99],
    "metrics": [None, [], 0.5, {"loss": "low"}, {"loss": None}, {f"m{i}": 0.0 for i in range(101)}, {"loss": [0.5]}],
}
MISNUMBERED: Mapping[str, tuple[int, ...]] = {
    "examples": (0, -1, 10**30),
    "format": (0, 1, 2, 4, -1),
    "rank": (-1, 0, 1, 3, 16, 10**30),
    "steps": (0, -4, 5, 10**30),
    "task": (0, -1, 10**6, 10**30),
    "tokens": (-1, 10**30),
}


def mistyped(draw: Draw, manifest: Manifest) -> object:
    """A field of the wrong type."""
    name = draw.choice(sorted(manifest))
    return {**manifest, name: draw.choice(MISTYPED.get(name, [None, [], {"a": "b"}, True, "1", 1.5, NAN, [1]]))}


def misnumbered(draw: Draw, manifest: Manifest) -> object:
    """A number out of range: refused by the manifest, or by the server."""
    name = draw.choice(list(MISNUMBERED))
    return {**manifest, name: draw.choice(MISNUMBERED[name])}


def not_finite(draw: Draw, manifest: Manifest) -> object:
    """A metric that is no number."""
    return {**manifest, "metrics": {"loss": draw.choice([NAN, INFINITE, -INFINITE])}}


def no_manifest(draw: Draw, manifest: Manifest) -> object:
    """No JSON object, or not one only."""
    text = json.dumps(manifest)
    odd = ["", "null", "[]", "3", text[:-1], f"{text}{text}", "[" * 9999, f"{{{text}}}", '{"format":1e999}']
    return draw.choice(odd)


def bare(draw: Draw, manifest: Manifest, flat: Flat) -> bytes:
    """Buffers without a manifest, or with it under another name."""
    elsewhere = {"Fedloom": json.dumps(manifest)}
    return safetensors.torch.save(flat, draw.choice([None, {}, {"format": "pt"}, elsewhere]))


FILES: Mapping[str, Kind] = {
    "file: truncated": in_bytes(truncated),
    "file: trailing bytes": in_bytes(lambda draw, data: data + draw.randbytes(draw.randint(1, 64))),
    "file: length flipped": in_bytes(other_length),
    "file: header no UTF-8": in_bytes(no_utf8),
    "file: header no JSON": in_bytes(no_json),
    "file: dtype renamed": in_bytes(renamed_dtype),
    "file: offsets": in_bytes(other_offsets),
    "file: of another kind": in_bytes(no_file),
    "file: oversize": in_file(oversize),
    "file: buffer short, long": in_file(other_size),
    "file: buffer unknown": in_file(other_buffer),
    "file: buffer not flat": in_file(shaped),
    "file: NaN, infinity": in_floats(entry(NAN, INFINITE, -INFINITE)),
    "file: huge norm": in_floats(tall),
    "file: stale task": sent(stale),
    "file: duplicate": sent(duplicate),
    "file: foreign client": sent(foreign),
    "file: unknown task": sent(unknown_task),
    "manifest: field missing": in_manifest(without),
    "manifest: field too many": in_manifest(and_more),
    "manifest: wrong type": in_manifest(mistyped),
    "manifest: wrong number": in_manifest(misnumbered),
    "manifest: not finite": in_manifest(not_finite),
    "manifest: no manifest": in_manifest(no_manifest),
    "manifest: rows": in_entry(other_rows),
    "manifest: buffer": in_entry(other_form),
    "manifest: exponent": in_entry(other_exponent),
    "manifest: entry": in_entry(cut_short),
    "manifest: elsewhere": in_parts(bare),
}
"""Each kind makes a file from random numbers and a scene."""


STATUS = {
    "run": "r",
    "version": 1,
    "versions": 3,
    "seconds": 1.0,
    "incarnation": 1,
    "waits": "",
    "ended": "",
    "calls_refused": {},
    "at": 0.0,
    "set_aside": {},
    "accepted": 1,
    "rejected": 0,
    "failed": 0,
    "mean_staleness": None,
    "scores": {"loss": 0.5},
    "clients": {"c": {"reached": True, "answers": 1, "task": None, "since": None, "rank": 2, "stale": None}},
    "traffic": {"bytes_down": 1, "bytes_up": 1, "resent": 0},
}
"""What `status.json` of a deployment holds."""
