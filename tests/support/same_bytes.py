"""The same run in two processes with different PYTHONHASHSEED, and whether they write the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.tiny_models import settle, tiny_encoder, tiny_run

COMPARED = (
    "trace.jsonl",
    "metrics.jsonl",
    "adapter/adapter_model.safetensors",
    "adapter/README.md",
)
"""Files of a run folder that are the same wherever it is."""
PLACED = ("adapter/adapter_config.json", "adapter/base/config.json")
"""Files that are the same but for where the folder is."""


@dataclass(frozen=True, slots=True)
class Twins:
    """One seed in two processes that hash differently, into folders of different names."""

    outs: tuple[Path, Path]
    children: tuple[subprocess.Popen[bytes], ...]

    def same_bytes(self) -> bool:
        """Wait for both and compare what they wrote."""
        if any(child.wait() for child in self.children):
            raise RuntimeError("a child process failed; its error stands above")
        one, other = self.outs
        same = {name: _read(one, name) == _read(other, name) for name in (*COMPARED, *PLACED)}
        for name, equal in same.items():
            print(f"  {name:34s} {'same' if equal else 'DIFFERENT'}", flush=True)
        return all(same.values())


def _read(out: Path, name: str) -> bytes:
    """What a file of a run folder says, but for where that folder is: PEFT wants to know whole paths."""
    return (out / name).read_bytes().replace(str(out.resolve()).encode(), b"OUT")


def start_twins(folder: Path) -> Twins:
    """They run while we do something else."""
    model, outs = tiny_encoder(folder / "model"), (folder / "one", folder / "another" / "place")
    children = (
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.same_bytes", str(model), str(out)],
            env={**os.environ, "PYTHONHASHSEED": hashing},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.DEVNULL,
        )
        for hashing, out in zip(("1", "4242"), outs, strict=True)
    )
    return Twins(outs, tuple(children))


def carry_out(model: Path, out: Path) -> None:
    """What a child process does."""
    from fedloom.runs.prepare import prepare

    settle()
    prepare(tiny_run(model, seed=11)).execute(out)


if __name__ == "__main__":
    carry_out(*map(Path, sys.argv[1:]))
