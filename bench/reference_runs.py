"""Six seeded runs that must keep their bytes when code is moved or renamed: write them before, write them after, compare.

    python -m bench.reference_runs FOLDER                 # write the runs, and their digests to FOLDER/digests.json
    python -m bench.reference_runs FOLDER --against OTHER # ... and compare with the runs in another folder

Rounds with HLoRA at mixed ranks; FedFa over ProductDelta with faults, stopped and resumed; a planned hierarchy; instructions;
SCAFFOLD; a deployment over a loopback link, replayed. Adapters, traces and metrics are compared by sha256. The last line is one JSON
object. Bytes are equal on one kind of processor only; seconds that the deployment measures are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedloom as fl
from fedloom.deploy import start
from fedloom.runs.replay import replay
from tests.support.deployment_runs import folder_of, net_of, run_of
from tests.support.tiny_models import settle, tiny_encoder, tiny_generator, tiny_run, toy_answers

COMPARED = ("trace.jsonl", "metrics.jsonl", "adapter_model.safetensors")
MEASURED = re.compile(r'"(?:seconds|seconds_\w+|seconds\.\w+|down|train|up)":[0-9.e+-]+')
"""Seconds that the deployment measures with a real clock: they are left out of its digests."""
STOPPED_AFTER = 30
"""Events of the run that is stopped and resumed."""


class Stopped(BaseException):
    """Ends a run in the middle, as a kill would."""


def main() -> None:
    """Write the runs and print one digest a file; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="bench.reference_runs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="A new folder.")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="Runs that were written before.")
    given = parser.parse_args()
    settle()
    warnings.simplefilter("ignore")
    write_runs(given.folder)
    digests = digests_of(given.folder)
    (given.folder / "digests.json").write_text(json.dumps(digests, indent=1) + "\n")
    before = json.loads((given.against / "digests.json").read_text()) if given.against else digests
    different = sorted(name for name in before.keys() | digests.keys() if before.get(name) != digests.get(name))
    for name, digest in digests.items():
        print(f"{digest[:16]}  {name}{'   DIFFERENT' if name in different else ''}")
    print(json.dumps({"runs": len(RUNS) + 1, "files": len(digests), "different": different}))


def with_torch(model: Path, **more: Any) -> fl.Run:
    """A tiny run whose kernel is not left to a measurement."""
    run: fl.Run = tiny_run(model, **({"engine": fl.Engine(kernel="torch")} | more))
    return run


def rounds(encoder: Path, generator: Path) -> fl.Run:
    """Synchronous rounds, HLoRA, ranks 2, 4 and 8."""
    return with_torch(encoder, seed=11, aggregator=fl.HLoRA())


def resumed(encoder: Path, generator: Path) -> fl.Run:
    """FedFa over ProductDelta with faults; stopped after some events, and resumed."""
    faults = fl.Faults(dropout=0.1, fail=0.1, back_after=2.0, notice=1.0, late=1.0)
    more = {"schedule": fl.FedFa(window=3, max_in_flight=4), "limits": fl.Limits(versions=25), "faults": faults}
    return with_torch(encoder, seed=5, aggregator=fl.ProductDelta(), transfer=fl.DeltaInt8(), **more)


def planned(encoder: Path, generator: Path) -> fl.Run:
    """Two groups whose rounds and depth are planned."""
    plan, link = fl.JointPlan(fl.GradientScore(rank=4)), fl.Link(1e6, 1e6)
    more = {"hierarchy": fl.Hierarchy(fl.NearIID(groups=2), plan=plan, link=link), "aggregator": fl.FedIT()}
    more |= {"training": fl.Training(learning_rate=1e-2, max_length=128)}  # plans count full texts
    return with_torch(encoder, seed=7, schedule=fl.FedFa(2, max_in_flight=2), limits=fl.Limits(versions=6), **more)


def instructions(encoder: Path, generator: Path) -> fl.Run:
    """A model that writes."""
    return with_torch(generator, seed=9, data=fl.Instructions(toy_answers(120)), limits=fl.Limits(versions=2))


def scaffold(encoder: Path, generator: Path) -> fl.Run:
    """Control variates at the clients."""
    return with_torch(encoder, seed=13, aggregator=fl.Scaffold(clients=6))


RUNS: tuple[Callable[[Path, Path], fl.Run], ...] = (rounds, resumed, planned, instructions, scaffold)


def write_runs(folder: Path) -> None:
    """The five simulations and the deployment, each in a folder of its name; the models beside them."""
    folder.mkdir(parents=True)
    here = Path.cwd()
    os.chdir(folder)  # manifests hold the models' paths: the same ones everywhere
    try:
        encoder, generator = tiny_encoder(Path("models/encoder")), tiny_generator(Path("models/generator"))
        for make in RUNS:
            run, out = make(encoder, generator), Path(make.__name__)
            if make is resumed:
                stop_in_the_middle(run, out)
                fl.prepare(run, resume=out).execute(out, report=False)
            else:
                fl.prepare(run).execute(out, report=False)
        deploy(encoder, Path("deployment").resolve())
    finally:
        os.chdir(here)


def stop_in_the_middle(run: fl.Run, out: Path) -> None:
    """Carry a run out for some events, with a checkpoint after each."""
    count = 0

    def stop(*_: object) -> None:
        nonlocal count
        count += 1
        if count == STOPPED_AFTER:
            raise Stopped

    try:
        fl.prepare(run).execute(out, [stop], report=False, checkpoint_seconds=0.0)
    except Stopped:
        return
    raise RuntimeError(f"the run ended before event {STOPPED_AFTER}")


def deploy(encoder: Path, folder: Path) -> None:
    """A deployment over real workers in this process, whose trace must replay."""
    folder.mkdir()
    limits, engine = fl.Limits(versions=12, evaluate_every=4), fl.Engine(kernel="torch")
    run = run_of(encoder, schedule=fl.FedFa(3), limits=limits, aggregator=fl.ProductDelta(), engine=engine)
    place, link = folder_of(folder, run), net_of(folder, fl.prepare(run), encoder)
    for one in link.sites.values():  # a site measures its speed unless its settings say it
        worker: Any = one.worker  # type: ignore[attr-defined]
        speed = worker.site.speed.model_copy(update={"flops": 1e9, "memory": 1e9})
        worker.site = worker.site.model_copy(update={"speed": speed})
    start.run_deployment(link, place, link.pause, link.clock)
    if difference := replay(place / "run").difference:
        raise RuntimeError(f"the deployment does not replay: {difference}")


def digests_of(folder: Path) -> dict[str, str]:
    """sha256 of each file that is compared, by its place in the folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.name in COMPARED):
        data = path.read_bytes()
        if "deployment" in path.parts and path.suffix == ".jsonl":
            data = MEASURED.sub("", data.decode()).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


if __name__ == "__main__":
    main()
