"""The commands of docs/deployment.md, carried out as they stand there: prepare, three terminals; keys, three terminals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch

from fedloom.core.errors import Refused
from fedloom.deploy.flower.supervisor import program
from fedloom.report.run_log import read_run_log
from fedloom.runs.replay import replay
from tests.support.federation import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="as the processes of a deployment")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
MRPC = ROOT.parent / "shared" / "data" / "mrpc"
PORT = 8080


def blocks(first: str) -> list[str]:
    """The shell commands under a first line `# first`, block by block."""
    found = re.findall(r"```sh\n# ([^\n]*)\n(.*?)```", PAGE, re.DOTALL)
    return [text for title, text in found if title == first]


def place(folder: Path) -> dict[str, str]:
    """A folder with the run file of the page and its data, or other data where MRPC is not at hand; the environment there."""
    run, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    if MRPC.is_dir():
        (folder / "mrpc").symlink_to(MRPC)
    else:
        run = re.sub(r"Table\(.*\),", "Tickets(clients=2, tangled=0.1, alpha=3.0),", run)
    (folder / "mrpc.py").write_text(run)
    given = environment()
    return given | {"PATH": os.pathsep.join([str(Path(program("fedloom")).parent), given["PATH"]])}


@contextmanager
def terminals(folder: Path, given: dict[str, str], titles: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One for each command; they end with SIGTERM, the sites' last."""
    open_, texts = [], [text for title in titles for text in blocks(title)]
    try:
        for number, text in enumerate(texts):
            with (folder / f"terminal-{number}").open("wb") as out:
                command = ["bash", "-c", f"exec {text.strip()}"]
                open_.append(subprocess.Popen(command, cwd=folder, env=given, stdout=out, stderr=out))
        yield open_
    finally:
        for one in open_:
            one.send_signal(signal.SIGTERM)
        for one in open_:
            one.wait(60)


def test_the_page_has_three_terminals_with_one_command_each() -> None:
    for kind in ("try", "secured"):
        texts = [*blocks(f"{kind}: the server"), *blocks(f"{kind}: a site")]
        assert len(texts) == 3
        assert all(text.count("\n") == 1 and text.startswith("fedloom ") for text in texts)


@pytest.mark.slow
@pytest.mark.federation
def test_the_page_works(tmp_path: Path) -> None:
    """An adapter comes out of sites of ranks 4 and 8, and the trace replays; first without keys, then with them."""
    try:
        from fedloom.train.demo_model import minilm

        minilm()
    except Refused as missing:
        pytest.skip(str(missing))
    with socket.socket() as door:
        if door.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"somebody listens at port {PORT}, which the page names")
    given = place(tmp_path)
    for first, kind, server in (("prepare", "try", "tried"), ("keys", "secured", "server")):
        [script] = blocks(first)
        subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=given, check=True)
        with terminals(tmp_path, given, [f"{kind}: the server", f"{kind}: a site"]) as started:
            assert started[0].wait(600) == 0, (tmp_path / "terminal-0").read_text()
        run = tmp_path / server / "run"
        assert replay(run).difference == ""
        assert {(task["client"], task["rank"]) for task in read_run_log(run).tasks} == {("c00", 4), ("c01", 8)}
        assert safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors")
        assert "Finished 12 versions made" in (tmp_path / "terminal-0").read_text()
