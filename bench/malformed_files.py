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

from bench.malformed_results import (
    INFINITE,
    NAN,
    Bend,
    Draw,
    Kind,
    Thrown,
    duplicate,
    entry,
    foreign,
    huge,
    in_adapter,
    other_dtype,
    other_rank,
    other_shape,
    stale,
    unknown_task,
)
from bench.scene import Scene
from fedloom import wire
from fedloom.types import Task, UpdateArrived

BYTES_LIMIT = 20_000
Flat: TypeAlias = dict[str, Tensor]
Manifest: TypeAlias = dict[str, Any]


# A good file, bent in one place --------------------------------------------------------------------------------------


def raw(flat: Mapping[str, Tensor], manifest: object) -> bytes:
    """A file like those of `wire.encode`, with any manifest."""
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    return safetensors.torch.save(dict(flat), {wire.HEADER: text})


def manifest_of(task: Task, flat: Flat) -> Manifest:
    """A good manifest."""
    numbers = {"examples": 10, "tokens": 100, "steps": 4, "metrics": {"loss": 0.5}, "tensors": len(flat)}
    return {"format": wire.FORMAT, "task": task.id, "client": task.client, **numbers}


def in_bytes(bend: Callable[[Draw, bytes], bytes]) -> Kind:
    """The bytes of a good file, bent."""

    def make(draw: Draw, scene: Scene) -> Thrown:
        task = scene.some(draw)
        return bend(draw, wire.encode(task.client, task.id, scene.good(task)))

    return make


def in_parts(build: Callable[[Draw, Task, Flat], bytes]) -> Kind:
    """A file built from the tensors of a good answer."""

    def make(draw: Draw, scene: Scene) -> Thrown:
        task = scene.some(draw)
        return build(draw, task, wire.tensors(scene.good(task).adapter))

    return make


def in_manifest(bend: Bend[Manifest]) -> Kind:
    """A good file whose manifest is bent."""
    return in_parts(lambda draw, task, flat: raw(flat, bend(draw, manifest_of(task, flat))))


def in_file(bend: Callable[[Draw, Flat], None]) -> Kind:
    """A good file whose tensors are bent in place; the manifest knows their number."""

    def build(draw: Draw, task: Task, flat: Flat) -> bytes:
        bend(draw, flat)
        return raw(flat, manifest_of(task, flat))

    return in_parts(build)


def in_one(bend: Bend[Tensor]) -> Kind:
    """A good file with one tensor bent."""

    def change(draw: Draw, flat: dict[str, Any]) -> None:
        name = draw.choice(sorted(flat))
        flat[name] = bend(draw, flat[name])

    return in_file(change)


def sent(kind: Kind) -> Kind:
    """The same lie as bytes."""

    def make(draw: Draw, scene: Scene) -> Thrown:
        told = kind(draw, scene)
        assert isinstance(told, UpdateArrived)
        flat = wire.tensors(told.result.adapter)
        about = {"task": told.task, "client": told.client, "examples": told.result.examples}
        return raw(flat, {**manifest_of(scene.open[0], flat), **about})

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
    """The header calls one tensor something else of the same size."""
    odd = draw.choice([b'"I32"', b'"U32"', b'"F16"', b'"XXX"'])
    return _headed(data, _header(data).replace(b'"F32"', odd, 1))


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


# Bent tensors --------------------------------------------------------------------------------------------------------


def oversize(draw: Draw, flat: Flat) -> None:
    """More bytes than the server takes."""
    flat["dense:ballast"] = torch.zeros(BYTES_LIMIT // 4 + draw.randrange(9999))


def unpaired(draw: Draw, flat: Flat) -> None:
    """One side of a layer is missing, or a tensor has a name of no kind."""
    name = draw.choice(["query.down", "query.up", "value.down", "value.up"])
    taken = flat.pop(name)
    if draw.random() < 0.5:
        flat[draw.choice([f"{name}s", "query", "", ".down.", "Dense:x", "head"])] = taken


def other_layer(draw: Draw, flat: Flat) -> None:
    """A layer too many, or under another name, or half of each."""
    new = draw.choice(["key", "query.0", "", "é"])
    for side in ("down", "up"):
        flat[f"{new}.{side}"] = flat[f"query.{side}"].clone() if draw.random() < 0.5 else flat.pop(f"query.{side}")


def extra_dense(draw: Draw, flat: Flat) -> None:
    """A dense tensor that nobody asked for."""
    flat[draw.choice(["dense:pooler", "dense:", "dense:x.down"])] = torch.ones(3)
    if draw.random() < 0.5:
        del flat["dense:head"]


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
    "metrics": [None, [], 0.5, {"loss": "low"}, {"loss": None}, {f"m{i}": 0.0 for i in range(101)}, {"loss": [0.5]}],
}
MISNUMBERED: Mapping[str, tuple[int, ...]] = {
    "examples": (0, -1, 10**30),
    "format": (0, 2, -1),
    "steps": (0, -4, 5, 10**30),
    "task": (0, -1, 10**6, 10**30),
    "tensors": (0, -1, 4, 6, 10**30),
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


def bare(draw: Draw, task: Task, flat: Flat) -> bytes:
    """Tensors without a manifest, or with it under another name."""
    elsewhere = {"Fedloom": json.dumps(manifest_of(task, flat))}
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
    "file: half a layer": in_file(unpaired),
    "file: unknown layer": in_file(other_layer),
    "file: dense extra": in_file(extra_dense),
    "file: NaN, infinity": in_one(entry(NAN, INFINITE, -INFINITE)),
    "file: huge norm": in_one(huge),
    "file: wrong shape": in_one(other_shape),
    "file: wrong dtype": in_one(other_dtype),
    "file: wrong rank": sent(in_adapter(other_rank)),
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
    "manifest: elsewhere": in_parts(bare),
}
"""Each kind makes a file from random numbers and a scene."""
