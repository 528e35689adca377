"""Round trips through Flower with a worker that gives back what it gets, as `fedloom serve` and `join` set it up: TLS, keys, gate.

    python -m bench.deploy [--quick] [--sites N] [--idle SECONDS]

A round trip is from the ServerApp's `send` to the reply in its hands, random bytes (Flower stores equal pieces once) down and the
same up. `plain` is a site as it is by default: an idle SuperNode of Flower asks for work every 3 s and looks for a reply every
0.5 s, and both constants are Flower's. `hasty` is one that was joined with `--idle 0.2`. Messages a second: all sites at once, each
with one small message under way, all of them as by default but one (`--idle`: otherwise). CPU seconds are of all processes, server
and sites, for one round trip; cores in use are told by process, because in earnest the sites' are elsewhere. All on one machine, over
loopback, the sites' processes after the server's (nice). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedloom.deploy.flower import keys
from fedloom.deploy.flower.serve import serve_deployment
from fedloom.deploy.flower.server_processes import ServerSetup
from fedloom.deploy.flower.supervisor import free_port

IDLE = "0.2"
MANY = 8
"""Above it the machine has enough to do with small messages."""
QUICK = {"0": 4, "1": 2, "8": 2, "64": 2}
FULL = {"0": 15, "1": 10, "8": 10, "64": 5}


def measured(folder: Path, sites: int, counts: dict[str, int], seconds: float, idle: str) -> dict[str, Any]:
    """A deployment in `folder` from its start to its end; what its ServerApp wrote down."""
    server, port = folder / "server", free_port()
    ca = keys.new(server, ["localhost"])
    names = ["plain", "hasty", *(f"more-{number}" for number in range(sites - 2))]
    commands, joined = list[list[str]](), list[subprocess.Popen[bytes]]()
    for name in names:
        private, public = keys.site(name, folder / "keys")
        keys.add(public, name, server)
        (folder / name).mkdir()
        pause = {"plain": "-", "hasty": IDLE}.get(name, idle)
        words = [f"localhost:{port}", str(folder / name), str(ca), str(private), pause]
        commands.append(["nice", "-n", "19", sys.executable, "-m", "bench.echo", *words])

    def heard(line: str) -> None:
        """One site after the other: in earnest each has a machine of its own to start on."""
        print(f"  {line}", flush=True)
        if commands and ("listens at" in line or "has joined" in line):
            with (folder / f"{len(joined)}.out").open("wb") as out:
                joined.append(subprocess.Popen(commands.pop(0), stdout=out, stderr=out))

    try:
        facts = {"sites": sites, "counts": counts, "seconds": seconds}
        serve_deployment(ServerSetup(server, "127.0.0.1", port, app="bench.echo:app"), facts, False, heard)
        figures: dict[str, Any] = json.loads((server / "figures.json").read_text())
        return figures
    finally:
        for child in joined:
            child.terminate()
        for child in joined:
            child.wait()


def show(figures: dict[str, Any]) -> None:
    """The table."""
    print(f"\n{'MB':>6s}  {'plain, seconds':34s}{'hasty, seconds':34s}CPU seconds (hasty)")
    for size in figures["plain"]:
        shown = [
            f"{f['median']:6.2f} ({f['least']:.2f} - {f['most']:.2f})"
            for f in (figures["plain"][size], figures["hasty"][size])
        ]
        print(f"{size:>6s}  {shown[0]:34s}{shown[1]:34s}{figures['hasty'][size]['cpu']:.2f}")
    crowd = figures["crowd"]
    cores = ", ".join(f"{name} {used:.2f}" for name, used in crowd["cores"].items())
    print(f"{crowd['rate']:.2f} messages a second with {crowd['sites']} sites; cores in use: {cores}")
    print(f"SuperLink after the largest: {figures['superlink_mb']:.0f} MB")
    print("with all sites, MB: " + ", ".join(f"{name} {size:.0f}" for name, size in crowd["mb"].items()) + "\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three sites and few repeats, two minutes")
    parser.add_argument("--sites", type=int, help="so many sites (some 350 MB each here), and small messages alone")
    parser.add_argument("--idle", default="-", help="the other sites ask for work so often (seconds)")
    given = parser.parse_args()
    here = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([here, f"{here}/src", os.environ.get("PYTHONPATH", "")])
    sites, counts, seconds = (3, QUICK, 15.0) if given.quick else (8, FULL, 60.0)
    sites = given.sites or sites
    if sites > MANY:
        counts, seconds = {"0": QUICK["0"]}, 60.0
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(Path(folder), sites, counts, seconds, given.idle)
    show(figures)
    median = {name: {size: round(f["median"], 3) for size, f in figures[name].items()} for name in ("plain", "hasty")}
    used = {size: round(f["cpu"], 3) for size, f in figures["hasty"].items()}
    crowd = {
        "messages_per_second": round(figures["crowd"]["rate"], 2),
        "sites": sites,
        "cores": {name: round(used, 3) for name, used in figures["crowd"]["cores"].items()},
        "mb": {name: round(size) for name, size in figures["crowd"]["mb"].items()},
    }
    told = {"round_trip_seconds": median["plain"], "hasty_round_trip_seconds": median["hasty"], **crowd}
    print(json.dumps({**told, "cpu_seconds": used, "superlink_mb": round(figures["superlink_mb"])}))


if __name__ == "__main__":
    main()
