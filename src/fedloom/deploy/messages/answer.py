"""The answer to a task as bytes: flat buffers of numbers behind a JSON manifest. No pickle, no code, checked before use.

The file is a safetensors file with at most three one-dimensional tensors (float32, float16, int8): the rows that changed, in the
order of `transfer.layout`, one after the other. Names and shapes are not sent: the receiver has the task, which says what is
asked, and a digest tells whether both mean the same layers. A region puts a report beside its answer, for plans that learn and
groups that change.

The server reads answers from sites that it does not trust. The size is checked first, then each field of the manifest by its type
and range, then that the buffers hold exactly the numbers that the manifest speaks of; whatever is wrong raises `Malformed`. What
an attacker can do is to send wrong numbers in the right form: those are judged by `core.validate_answer` before they are merged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import safetensors.torch
import torch
from torch import Tensor

from fedloom.core.codec import LOWEST, Block, HalfChange
from fedloom.core.lora import Adapter, named_tensors
from fedloom.core.schema import Decoder, Encoder, Malformed
from fedloom.core.transfer import PackedAnswer, Rows, layout, pack_answer, tensor_rows, unpack_answer
from fedloom.core.types import ClientId, GroupStatistics, Profile, Result, Task, TaskStart
from fedloom.core.validate_answer import MAX_LOSS
from fedloom.deploy.messages.checks import MAX_INTEGER, MAX_NAME, check_range, check_ranges
from fedloom.deploy.messages.container import BUFFERS, BufferForm, NotOutstanding, read_buffers, read_header
from fedloom.hierarchy.edge import trained_part

FORMAT = 3
HEADER, REPORT = "fedloom", "fedloom-report"
"""Names of the manifest, and of what a region reports beside its answer, in the header of the file."""
METRICS = ("loss", "first_loss", "seconds_train", "rounding", "rounding_change", "members", "rounds", "cut")
"""Figures that a site or region tells of a task. No other names are taken: they would be written into the trace of every answer."""

Entry: TypeAlias = tuple[BufferForm, int, tuple[int, ...] | None]
"""One tensor: the buffer that holds it, the exponent of float16, and which rows were sent (None: all)."""


@dataclass(frozen=True, slots=True)
class AnswerManifest:
    """Header of an answer, without the tensors.

    Fields:
        format: the number of this format.
        task: the task that is answered.
        client: who answers.
        examples: how many were trained on.
        tokens: how many went through the model.
        steps: optimiser steps.
        metrics: figures of the training, by name.
        rank: of the adapter.
        layout: names the layers and shapes that the numbers belong to (`layout_digest`).
        tensors: where the numbers of each tensor lie, in the order of `transfer.layout`.
        layers: places of the layers that were trained among those of the task, in order of name (None: all).
    """

    format: int
    task: int
    client: ClientId
    examples: int
    tokens: int
    steps: int
    metrics: Mapping[str, float]
    rank: int
    layout: str
    tensors: tuple[Entry, ...]
    layers: tuple[int, ...] | None = None

    def ranges(self) -> Iterator[tuple[str, float, float, float]]:
        """Return the numbers with their minimum and maximum. What the task allows is not known here."""
        yield "format", self.format, FORMAT, FORMAT
        yield "task", self.task, 1, MAX_INTEGER
        yield "characters of the client", len(self.client), 1, MAX_NAME
        yield "rank", self.rank, 0, MAX_INTEGER
        yield "layers", 1 if self.layers is None else len(self.layers), 1, MAX_INTEGER
        for _, exponent, _ in self.tensors:
            yield "exponent in tensors", exponent, LOWEST, -LOWEST


@dataclass(frozen=True, slots=True)
class RegionReport:
    """Report of a region, which it sends with its answer.

    Fields:
        statistics: what the root's plan is to learn.
        members: whom the region leads now.
    """

    statistics: GroupStatistics
    members: tuple[Profile, ...]


def encode_result(
    task: Task, result: Result, residual: Adapter | None = None, report: RegionReport | None = None
) -> bytes:
    """Encode an answer as bytes. The same answer gives the same bytes.

    Args:
        task: the task that is answered.
        result: the answer; that of an edge may hold some layers only.
        residual: what packing lost of earlier answers.
        report: what a region reports beside it.
    """
    asked, task = sorted(task.start.train.factors), trained_part(task, result)
    held = task.start.train.factors
    parcel = pack_answer(task.start, result, residual)
    parts: dict[BufferForm, list[Tensor]] = {form: [] for form in BUFFERS}
    entries = list[Entry]()
    for which, block in parcel.blocks:
        form = next(form for form, dtype in BUFFERS.items() if block is None or block.numbers.dtype == dtype)
        entries.append((form, block.exponent if block else 0, None if which is None else tuple(which)))
        if block is not None:
            parts[form].append(block.numbers.reshape(-1))
            parts["f32"] += [] if block.scales is None else [block.scales]
    manifest = AnswerManifest(
        format=FORMAT,
        task=task.id,
        client=task.client,
        examples=result.examples,
        tokens=result.tokens,
        steps=result.steps,
        metrics=dict(result.metrics),
        rank=parcel.rank,
        layout=layout_digest(parcel.rank, layout(task.start, parcel.rank)),
        tensors=tuple(entries),
        layers=None if len(held) == len(asked) else tuple(place for place, name in enumerate(asked) if name in held),
    )
    flat: dict[str, Tensor] = {form: torch.cat(every) for form, every in parts.items() if every}
    texts = {HEADER: Encoder().encode(manifest)}
    return safetensors.torch.save(flat, texts | ({} if report is None else {REPORT: encode_report(report)}))


def decode_result(data: bytes, limit: int, tasks: Mapping[int, Task]) -> tuple[ClientId, int, Result]:
    """Decode bytes to (client, task, result); `tasks` are those that may be answered.

    Raises Malformed with the reason, whatever the bytes are, and NotOutstanding for another task. Which layers were trained is not
    judged here.
    """
    if len(data) > limit:
        raise Malformed(f"{len(data)} bytes, above the limit of {limit}")
    manifest, flat = _read_manifest(data)
    task = tasks.get(manifest.task)
    if task is None:
        raise NotOutstanding(f"task {manifest.task} is not outstanding")
    task = _trained_task(task, manifest.layers)
    adapter, control = unpack_answer(task.start, _parcel(task.start, manifest, flat))
    numbers = (manifest.examples, manifest.tokens, manifest.steps, manifest.metrics)
    return manifest.client, manifest.task, Result(adapter, *numbers, control)


def decode_report(data: bytes) -> RegionReport | None:
    """Return the report of a region that came with its answer, None if there is none. Raises Malformed, whatever the bytes are."""
    text = read_header(data).get(REPORT)
    return None if text is None else parse_report(text)


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raise Malformed for a name that is not in `METRICS`, or a number that no training has."""
    for name, value in metrics.items():
        if name not in METRICS:
            raise Malformed(f"{name!r:.60} is none of the metrics {', '.join(METRICS)}")
        check_range(f"metrics: {name}", value, -MAX_LOSS, MAX_LOSS)


def layout_digest(rank: int, asked: list[tuple[str, Tensor]]) -> str:
    """Twelve hex digits that name these layers and shapes."""
    text = json.dumps([rank, *((name, *tensor.shape) for name, tensor in asked)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read_manifest(data: bytes) -> tuple[AnswerManifest, dict[str, Tensor]]:
    text = read_header(data).get(HEADER)
    if text is None:
        raise Malformed("no manifest in the file")
    try:
        manifest: AnswerManifest = _DECODER.decode(AnswerManifest, text)
        check_ranges(manifest.ranges())
        check_metrics(manifest.metrics)
    except Malformed as error:
        raise Malformed(f"manifest: {error}") from error
    return manifest, read_buffers(data)


def _trained_task(task: Task, places: Sequence[int] | None) -> Task:
    """The task with these of its layers alone. Raises Malformed."""
    if places is None:
        return task
    train, names = task.start.train, sorted(task.start.train.factors)
    if not all(0 <= place < len(names) for place in places) or any(a >= b for a, b in pairwise(places)):
        raise Malformed("no such layers")
    held = {names[place] for place in places}
    kept = Adapter({name: factor for name, factor in train.factors.items() if name in held}, train.dense)
    return replace(task, start=replace(task.start, train=kept))


def _parcel(start: TaskStart, manifest: AnswerManifest, flat: Mapping[str, Tensor]) -> PackedAnswer:
    """The buffers cut into the blocks of which the manifest speaks, each as large as the task says."""
    asked = layout(start, manifest.rank)
    if manifest.layout != layout_digest(manifest.rank, asked) or len(manifest.tensors) != len(asked):
        raise Malformed(f"the layers at rank {manifest.rank} are not those of the task")
    left = {form: flat.get(form, torch.zeros(0, dtype=dtype)) for form, dtype in BUFFERS.items()}

    def take(form: BufferForm, count: int) -> Tensor:
        if len(left[form]) < count:
            raise Malformed(f"buffer {form} is too short")
        taken, left[form] = left[form][:count], left[form][count:]
        return taken

    blocks: list[tuple[Rows, Block | None]] = []
    of_change = len(named_tensors(start.train)) if isinstance(start.codec, HalfChange) else 0
    for number, ((name, base), (form, exponent, given)) in enumerate(zip(asked, manifest.tensors, strict=True)):
        height, width = tensor_rows(name, base).shape
        which = range(height) if given is None else given
        if not all(0 <= row < height for row in which) or any(a >= b for a, b in pairwise(which)):
            raise Malformed(f"{name}: no such rows")
        if exponent and form != "f16":
            raise Malformed(f"{name}: {form} has no exponent")
        numbers = take(form, len(which) * width).reshape(len(which), width)
        is_change = form == "f16" and number < of_change  # control variates have no base
        block = Block(numbers, exponent, take("f32", len(which)) if form == "i8" else None, is_change)
        blocks.append((None if given is None else given, block if len(which) else None))
    if any(map(len, left.values())):
        raise Malformed("the buffers hold more than the manifest speaks of")
    return PackedAnswer(manifest.rank, tuple(blocks))


MAX_REPORT = 2**20
"""Characters: some 1,000 members."""
_DECODER = Decoder(finite=True)


def encode_report(report: RegionReport) -> str:
    """Encode a region's report as JSON."""
    return Encoder().encode(report)


def parse_report(text: str) -> RegionReport:
    """The report that a text holds. Raises Malformed, whatever the text is."""
    if len(text) > MAX_REPORT:
        raise Malformed(f"a region's report of {len(text)} characters, above the limit of {MAX_REPORT}")
    try:
        report: RegionReport = _DECODER.decode(RegionReport, text)
    except Malformed as error:
        raise Malformed(f"a region's report: {error}") from error
    return report
