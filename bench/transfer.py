"""Answers as bytes in each codec, against the same adapter as float32 safetensors: size, time, what the product loses.

    python -m bench.transfer [--quick]

Synthetic adapters on the query and value projections of every layer: `down` uniform as at a LoRA's start, `up` small, all entries
then moved by 2 % of their size; and real ones, from two rounds of the demo's federation on MiniLM. A message is the whole of
what goes over the wire, manifest included. Times are CPU milliseconds of the process on one thread, interleaved, median (minimum
- maximum); what encoding decides (which rows changed, scales) is in them. Errors are Frobenius norms of what the products B A lost,
relative to the products and to what had been changed in them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch

from fedloom.core.codec import Codec, DeltaInt8, Exact, Half, HalfChange
from fedloom.core.lora import Adapter, Factor, map_tensors, named_tensors
from fedloom.core.transfer import encode_answer, encode_start
from fedloom.core.types import Budget, ClientState, Result, Task, TaskStart
from fedloom.deploy.messages import answer as wire
from tests.support.tiny_models import hush, settle

CODECS: tuple[Codec, ...] = (Exact(), Half(), HalfChange(), DeltaInt8())
DRIFT = 0.02
SAFETENSORS = "safetensors float32"


@dataclass(frozen=True, slots=True)
class Shape:
    """Layers of (d, d), two adapted projections each, at one rank."""

    name: str
    layers: int
    d: int
    rank: int


QUICK = (Shape("RoBERTa-large", 24, 1024, 8), Shape("RoBERTa-large", 24, 1024, 64), Shape("Llama-7B", 32, 4096, 8))
FULL = (*QUICK, Shape("Llama-7B", 32, 4096, 64))


def start_of(shape: Shape) -> Adapter:
    """As LoRA leaves it after some training: A of 1/sqrt(d), B of 0.003."""
    draw, factors = torch.Generator().manual_seed(0), {}
    for layer in range(shape.layers):
        for name in ("query", "value"):
            down = (torch.rand(shape.rank, shape.d, generator=draw) * 2 - 1) / shape.d**0.5
            up = torch.randn(shape.d, shape.rank, generator=draw) * 0.003
            factors[f"encoder.layer.{layer}.attention.self.{name}"] = Factor(down, up)
    return Adapter(factors)


def moved(adapter: Adapter) -> Adapter:
    """Every tensor after a step of 2 % of the size of its entries."""
    draw = torch.Generator().manual_seed(1)
    return map_tensors(lambda t: t + DRIFT * t.std() * torch.randn(t.shape, generator=draw), adapter)


def cpu(call: Callable[[], object]) -> float:
    """CPU milliseconds."""
    begun = time.process_time()
    call()
    return 1e3 * (time.process_time() - begun)


def spread(values: Sequence[float]) -> str:
    """Median (minimum - maximum)."""
    return f"{median(values):7.1f} ({min(values):.1f} - {max(values):.1f})"


def synthetic(shape: Shape, repeats: int) -> list[dict[str, Any]]:
    """Every codec on one shape, in turn."""
    base, ways = start_of(shape), dict[str, tuple[Callable[[], bytes], Callable[[bytes], object], dict[str, float]]]()
    exact = moved(base)
    flat = named_tensors(exact)
    ways[SAFETENSORS] = (lambda: safetensors.torch.save(flat), safetensors.torch.load, {})
    for codec in CODECS:
        task = Task(1, "c", 0, encode_start(TaskStart(base, "0"), codec), Budget(shape.rank, 1), 0.0)
        result = Result(moved(task.start.train), 10, 100, 1)
        told, _ = encode_answer(task, ClientState(), result, ClientState())
        ways[type(codec).__name__] = (*way(task, result), dict(told.metrics))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    messages = {name: encode() for name, (encode, _, _) in ways.items()}
    for _ in range(repeats):
        for name, (encode, decode, _) in ways.items():
            times[name].append((cpu(encode), cpu(lambda decode=decode, name=name: decode(messages[name]))))  # type: ignore[misc]
    numbers = sum(tensor.numel() for tensor in flat.values())
    print(f"\n{shape.name}, rank {shape.rank}: {numbers / 1e6:.2f} M numbers")
    return [row(shape, name, len(messages[name]), times[name], ways[name][2]) for name in ways]


def way(task: Task, result: Result) -> tuple[Callable[[], bytes], Callable[[bytes], object]]:
    """Encoder and decoder of one answer."""
    return lambda: wire.encode_result(task, result), lambda data: wire.decode_result(data, 10**9, {task.id: task})


def row(
    shape: Shape, name: str, size: int, times: Sequence[tuple[float, float]], errors: dict[str, float]
) -> dict[str, Any]:
    """Print a line of the table, and return its figures."""
    encode, decode = ([pair[i] for pair in times] for i in (0, 1))
    lost = f"{errors['rounding']:.1e} of the product, {errors['rounding_change']:.1e} of its change" if errors else ""
    print(f"  {name:20s} {size / 1e6:7.3f} MB   encode {spread(encode):24s} decode {spread(decode):24s} {lost}")
    figures = {"shape": shape.name, "rank": shape.rank, "codec": name, "bytes": size}
    return {**figures, "encode_ms": round(median(encode), 2), "decode_ms": round(median(decode), 2), **errors}


def real(codec: Codec) -> dict[str, Any]:
    """Two rounds of the demo's federation: what its answers lost, by round, and the bytes up."""
    from fedloom.cli.demo import demo_run
    from fedloom.report.run_log import read_run_log
    from fedloom.runs.prepare import prepare

    hush()
    run = demo_run()
    run = replace(
        run, transfer=codec, limits=replace(run.limits, versions=2, evaluate_every=2), test_limit=8, threads=1
    )
    with tempfile.TemporaryDirectory() as folder:
        versions = read_run_log(prepare(run).execute(Path(folder) / "run").folder).versions
    figures = {name: [line[name] for line in versions] for name in ("rounding", "rounding_change")}
    told = "; ".join(
        f"round {number}: {lost:.1e} of the product, {change:.1e} of its change"
        for number, (lost, change) in enumerate(zip(*figures.values(), strict=True), 1)
    )
    print(f"  {type(codec).__name__:20s} {versions[-1]['bytes_up'] / 1e6:7.3f} MB up   {told}", flush=True)
    return {"codec": type(codec).__name__, "bytes_up": versions[-1]["bytes_up"], **figures}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="five repeats, without Llama-7B at rank 64")
    given = parser.parse_args()
    settle()
    shapes, repeats = (QUICK, 5) if given.quick else (FULL, 15)
    rows = [row for shape in shapes for row in synthetic(shape, repeats)]
    print("\ndemo on MiniLM, ranks 2, 4, 8, head included")
    print(json.dumps({"synthetic": rows, "real": [real(codec) for codec in CODECS[1:]]}))


if __name__ == "__main__":
    main()
