"""One throw-away environment for each peer, with the same torch, numpy, transformers and peft in all of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
SAME = ("torch", "numpy", "transformers", "peft", "tokenizers", "safetensors", "huggingface_hub", "accelerate")
"""What decides on the numbers or on the time of a step, pinned by the project's constraints."""

PEERS: Mapping[str, str] = {
    "pfl": "pfl[pytorch]==0.6.0",
    "flower": "flwr[simulation]==1.41.0",
    "appfl": "appfl==1.12.0",
}
OURS = ("fedloom", "fedloom_two", "fedloom_full", "plain")
"""Systems that run in the environment of this process."""


class Missing(Exception):
    """Why a peer cannot be measured here, in one sentence."""


def environment(system: str) -> str:
    """The environment that a system or one of its variants runs in."""
    return system.partition("_")[0]


def version(system: str) -> str:
    """The version that is measured."""
    if system in OURS:
        return metadata.version("peft" if system == "plain" else "fedloom")
    return PEERS[environment(system)].rpartition("==")[2]


def python(system: str, cache: Path) -> str:
    """The interpreter to run a system with; its environment is made if it is not there. Raises Missing."""
    if system in OURS:
        return sys.executable
    peer = environment(system)
    folder, wanted = cache / peer, PEERS[peer]
    interpreter, ready = folder / "bin" / "python", folder / "ready"
    if not ready.is_file() or ready.read_text() != wanted:
        print(f"making the environment of {peer} in {folder} (minutes, and up to 2 GB)", flush=True)
        _install(folder, wanted)
        ready.write_text(wanted)
    return str(interpreter)


def _install(folder: Path, peer: str) -> None:
    """torch first: a bare `pip install` of a peer would take its own. Then the peer, and last what it must not change."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if line.partition("==")[0] in SAME]
    (folder.parent / "constraints.txt").write_text("\n".join(pins) + "\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    install = [*pip, "install", "-q", "-c", str(folder.parent / "constraints.txt")]
    _carry_out([sys.executable, "-m", "venv", str(folder)])
    for wanted in (["torch"], ["torch", peer], ["torch", "numpy", "transformers", "peft"]):
        _carry_out([*install, *wanted])
    # it comes with APPFL, is built for CUDA only and would break `import transformers`
    _carry_out([*pip, "uninstall", "-q", "-y", "torchvision"])


def _carry_out(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()[-200:]]
        raise Missing(f"`{' '.join(command[-2:])}` failed ({errors[0]})")
