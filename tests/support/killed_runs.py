"""Runs of a tiny model in child processes that are killed and resumed; each must end in the bytes of the same run left alone.

Started as `python killed_runs.py FOLDER KILLS SEED`. Children are forked from a process that has imported everything, so that a
kill costs no start of Python; each prepares its run anew, from the files alone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from fedloom import (
    FFA,
    Averaged,
    Constant,
    DeltaInt8,
    FedBuff,
    FedFa,
    FedIT,
    FedSA,
    FLoRA,
    Hierarchy,
    Limits,
    Link,
    Momentum,
    Private,
    RandomGroups,
    Rounds,
    prepare,
)
from fedloom.privacy.ledger import LEDGER, Ledger, LedgerEntry
from fedloom.runs import trace
from tests.support.same_bytes import COMPARED
from tests.support.tiny_models import settle, tiny_encoder, tiny_run

RUNS: tuple[dict[str, Any], ...] = (
    {"schedule": FedFa(window=3, max_in_flight=4), "limits": Limits(versions=12)},
    {"schedule": Rounds(cohort_size=3, over_selection=1.5), "aggregator": FLoRA(), "limits": Limits(versions=4)},
    {"schedule": FedBuff(buffer_size=2, max_in_flight=4), "transfer": DeltaInt8(), "aggregator": FedSA()},
    {"schedule": FedBuff(buffer_size=3, max_in_flight=5, waiting=True), "aggregator": Averaged(Momentum(FedIT()))},
    {
        "schedule": FedFa(window=2, max_in_flight=2),
        "hierarchy": Hierarchy(RandomGroups(groups=2), link=Link(1e6, 1e6)),
        "limits": Limits(versions=6),
    },
    {
        "schedule": FedBuff(buffer_size=2, max_in_flight=3, discount=Constant()),
        "aggregator": FFA(),
        "privacy": Private(clip=0.5, multiplier=2.0, most_answers=4, noise="banded", apart=2),
        "limits": Limits(versions=6),
    },
)
DEADLY = ("checkpoint", "before the rename", "trace", "metrics", "adapter", "ledger")
"""Places in which a child kills itself."""


def begin(folder: Path, out: Path, number: int, place: str = "") -> int:
    """A child that carries out the run, or goes on with it; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        if place:
            set_trap(place)
        run = tiny_run(folder / "model", seed=number, **RUNS[number % len(RUNS)])
        begun = (out / "manifest.json").exists()
        if not begun:
            shutil.rmtree(out, ignore_errors=True)
        job = prepare(run, resume=out if begun else None)
        job.execute(out, report=False, checkpoint_seconds=0.0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def set_trap(place: str) -> None:
    """Replace a function of the place so that this process dies in the middle of writing, at a random visit."""
    from fedloom.runs import execute
    from fedloom.runs.metrics import Metrics

    library: Any = safetensors.torch
    save_file = library.save_file

    def half_a_file(parts: Any, path: Path, *_: object) -> None:
        save_file(parts, path, *_)
        os.truncate(path, path.stat().st_size // 2)

    def half_a_line(self: Any, *step: Any) -> None:
        text = trace.encode_step(*step)
        self.file.write(text[: len(text) // 2])
        self.file.flush()

    def half_an_entry(self: Ledger, entry: LedgerEntry) -> None:
        os.write(self.file.fileno(), b'{"type":"LedgerEntry","about":{"version":')

    def half_a_metric(self: Any, values: Any) -> None:
        self.file.write('{"kind":')
        self.file.flush()

    traps: dict[str, tuple[Any, str, Callable[..., None], int]] = {
        "checkpoint": (library, "save_file", half_a_file, 12),
        "before the rename": (os, "fsync", lambda *_: None, 12),
        "trace": (trace.Trace, "__call__", half_a_line, 12),
        "metrics": (Metrics, "write", half_a_metric, 12),
        "ledger": (Ledger, "write", half_an_entry, 6),
        "adapter": (execute, "save_adapter", lambda *_: None, 1),
    }
    owner, name, write_half, visits = traps[place]
    setattr(owner, name, dies_at(random.randint(1, visits), getattr(owner, name), write_half))


def dies_at(visit: int, write: Callable[..., Any], write_half: Callable[..., None]) -> Callable[..., Any]:
    """`write`, which at this visit writes half of it and kills the process."""
    visits = 0

    def trapped(*values: Any) -> Any:
        nonlocal visits
        visits += 1
        if visits == visit:
            write_half(*values)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*values)

    return trapped


def ended(child: int) -> bool:
    """Wait for a child: whether it came to its end and not to ours."""
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a child failed; its error stands above")
    return os.WIFEXITED(status)


def over(out: Path) -> bool:
    """Whether the kill came when all was done, and only the process had not ended."""
    manifest = out / "manifest.json"
    return manifest.exists() and json.loads(manifest.read_bytes())["status"] == "finished"


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill until it is enough, then let the last run end; each run is compared with the same one left alone."""
    settle()
    tiny_encoder(folder / "model")
    random.seed(seed)
    number, done = 0, 0
    while done < kills:
        alone, out = folder / f"alone-{number}", folder / f"killed-{number}"
        start = time.monotonic()
        assert ended(begin(folder, alone, number))
        length, killed = time.monotonic() - start, 0
        while True:
            place = random.choice(DEADLY) if done % 3 == 2 else ""
            child = begin(folder, out, number, place)
            if not place and done < kills:
                time.sleep(random.uniform(0.05, 0.7) * length)
                os.kill(child, signal.SIGKILL)
            if ended(child):
                break
            killed, done = killed + 1, done + 1
            if over(out):
                break
        for name in (*COMPARED, *([LEDGER] if (alone / LEDGER).exists() else [])):
            if (alone / name).read_bytes() != (out / name).read_bytes():
                sys.exit(f"run {number}: {name} is not the same after {killed} kills")
        sys.stdout.write(f"run {number}: the same bytes after {killed} kills; alone it took {length:.2f} s\n")
        number += 1
    sys.stdout.write(f"{done} kills\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
