"""An answer as bytes: flat buffers of numbers behind a JSON manifest. No pickle, no code, checked before use.

The container is a safetensors file with at most three one-dimensional tensors (float32, float16, int8): the rows that changed, in
the order of `transfer.layout`, one after the other. Names and shapes are not sent: the receiver has the task, which says what is
asked, and a digest tells whether both mean the same layers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, TypeAlias

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError
from torch import Tensor

from fedloom.core import schema
from fedloom.core.codec import LOWEST, Block
from fedloom.core.lora import Adapter
from fedloom.core.schema import Malformed, Reader, reachable
from fedloom.core.transfer import Parcel, Rows, layout, pack, rows_of, unpack
from fedloom.core.types import ClientId, Profile, Result, Start, Task, GroupStatistics
from fedloom.deploy.messages.container import BUFFERS, BufferForm, Unasked, buffers, header
from fedloom.hierarchy.edge_model import narrowed
from fedloom.runs import trace

FORMAT = 2
HEADER, TOLD = "fedloom", "fedloom-told"
"""Of the manifest, and of what an edge tells beside its answer."""

Exponent: TypeAlias = Annotated[StrictInt, Field(ge=LOWEST, le=-LOWEST)]
Entry: TypeAlias = tuple[BufferForm, Exponent, list[StrictInt] | None]
"""Of one tensor: the buffer that holds it, the exponent of float16, and which rows were sent (None: all)."""


class Manifest(BaseModel):
    """What goes beside the numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: StrictInt = Field(ge=FORMAT, le=FORMAT)
    task: StrictInt = Field(ge=1)
    client: str = Field(min_length=1, max_length=200)
    examples: StrictInt
    tokens: StrictInt
    steps: StrictInt
    metrics: dict[str, float] = Field(max_length=100)
    rank: StrictInt = Field(ge=0)
    layout: str
    tensors: list[Entry]
    layers: list[StrictInt] | None = Field(default=None, min_length=1)


def encode(task: Task, result: Result, residual: Adapter | None = None, telling: Telling | None = None) -> bytes:
    """The answer as bytes; the same answer gives the same bytes. `residual` is what earlier answers lost (`transfer.owed`).

    An edge's answer may hold some layers only, which are told by their places among those of the task, in order of name.
    """
    asked, task = sorted(task.start.train.factors), narrowed(task, result)
    held = task.start.train.factors
    parcel = pack(task.start, result, residual)
    parts: dict[BufferForm, list[Tensor]] = {form: [] for form in BUFFERS}
    entries = list[Entry]()
    for which, block in parcel.blocks:
        form = next(form for form, dtype in BUFFERS.items() if block is None or block.numbers.dtype == dtype)
        entries.append((form, block.exponent if block else 0, None if which is None else list(which)))
        if block is not None:
            parts[form].append(block.numbers.reshape(-1))
            parts["f32"] += [] if block.scales is None else [block.scales]
    manifest = Manifest(
        format=FORMAT,
        task=task.id,
        client=task.client,
        examples=result.examples,
        tokens=result.tokens,
        steps=result.steps,
        metrics=dict(result.metrics),
        rank=parcel.rank,
        layout=digest(parcel.rank, layout(task.start, parcel.rank)),
        tensors=entries,
        layers=None if len(held) == len(asked) else [place for place, name in enumerate(asked) if name in held],
    )
    flat: dict[str, Tensor] = {form: torch.cat(every) for form, every in parts.items() if every}
    texts = {HEADER: manifest.model_dump_json(exclude={"layers"} if manifest.layers is None else None)}
    return safetensors.torch.save(flat, texts | ({} if telling is None else {TOLD: written(telling)}))


def decode(data: bytes, limit: int, tasks: Mapping[int, Task]) -> tuple[ClientId, int, Result]:
    """(client, task, result) of such bytes; `tasks` are those that may be answered. Raises Malformed with the reason, whatever
    the bytes are. Which layers it holds is not judged here.
    """
    if len(data) > limit:
        raise Malformed(f"{len(data)} bytes, above the limit of {limit}")
    manifest, flat = _read(data)
    task = tasks.get(manifest.task)
    if task is None:
        raise Unasked(f"task {manifest.task} is not outstanding")
    task = _held(task, manifest.layers)
    adapter, control = unpack(task.start, _parcel(task.start, manifest, flat))
    numbers = (manifest.examples, manifest.tokens, manifest.steps, manifest.metrics)
    return manifest.client, manifest.task, Result(adapter, *numbers, control)


def beside(data: bytes) -> Telling | None:
    """What an edge tells beside its answer; None: nothing. Raises Malformed, whatever the bytes are."""
    text = header(data).get(TOLD)
    return None if text is None else read(text)


def digest(rank: int, asked: list[tuple[str, Tensor]]) -> str:
    """Twelve hex digits that name these layers and shapes."""
    text = json.dumps([rank, *((name, *tensor.shape) for name, tensor in asked)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(data: bytes) -> tuple[Manifest, dict[str, Tensor]]:
    text = header(data).get(HEADER)
    if text is None:
        raise Malformed("no manifest in the file")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise Malformed(f"manifest field {'.'.join(map(str, first['loc'])) or '?'}: {first['msg']}") from error
    return manifest, buffers(data)


def _held(task: Task, places: list[int] | None) -> Task:
    """The task with these of its layers alone. Raises Malformed."""
    if places is None:
        return task
    train, names = task.start.train, sorted(task.start.train.factors)
    if not all(0 <= place < len(names) for place in places) or any(a >= b for a, b in pairwise(places)):
        raise Malformed("no such layers")
    held = {names[place] for place in places}
    kept = Adapter({name: factor for name, factor in train.factors.items() if name in held}, train.dense)
    return replace(task, start=replace(task.start, train=kept))


def _parcel(start: Start, manifest: Manifest, flat: Mapping[str, Tensor]) -> Parcel:
    """The buffers cut into the blocks of which the manifest speaks, each as large as the task says."""
    asked = layout(start, manifest.rank)
    if manifest.layout != digest(manifest.rank, asked) or len(manifest.tensors) != len(asked):
        raise Malformed(f"the layers at rank {manifest.rank} are not those of the task")
    left = {form: flat.get(form, torch.zeros(0, dtype=dtype)) for form, dtype in BUFFERS.items()}

    def take(form: BufferForm, count: int) -> Tensor:
        if len(left[form]) < count:
            raise Malformed(f"buffer {form} is too short")
        taken, left[form] = left[form][:count], left[form][count:]
        return taken

    blocks: list[tuple[Rows, Block | None]] = []
    for (name, base), (form, exponent, given) in zip(asked, manifest.tensors, strict=True):
        height, width = rows_of(name, base).shape
        which = range(height) if given is None else given
        if not all(0 <= row < height for row in which) or any(a >= b for a, b in pairwise(which)):
            raise Malformed(f"{name}: no such rows")
        if exponent and form != "f16":
            raise Malformed(f"{name}: {form} has no exponent")
        numbers = take(form, len(which) * width).reshape(len(which), width)
        block = Block(numbers, exponent, take("f32", len(which)) if form == "i8" else None)
        blocks.append((None if given is None else tuple(given), block if len(which) else None))
    if any(map(len, left.values())):
        raise Malformed("the buffers hold more than the manifest speaks of")
    return Parcel(manifest.rank, tuple(blocks))


LONGEST = 2**22
"""Characters: some 10,000 members."""


@dataclass(frozen=True, slots=True)
class Telling:
    """What the root's plan is to learn, and who the edge leads now."""

    told: GroupStatistics
    members: tuple[Profile, ...]


def written(telling: Telling) -> str:
    """As JSON."""
    return trace.written(telling)


def read(text: str) -> Telling:
    """What such a text tells. Raises Malformed, whatever the text is."""
    if len(text) > LONGEST:
        raise Malformed(f"what the edge tells has {len(text)} characters, above the limit of {LONGEST}")
    try:
        telling: Telling = Reader(reachable(Telling)).read(Telling, json.loads(text))
        schema.check(telling)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Malformed(f"what the edge tells: {str(error)[:200] or type(error).__name__}") from error
    return telling
