"""Regions with real workers in one process: each is a thread with a net of its own, and is asked through its socket.

Server and regions, which are processes of their own elsewhere, do something one at a time here: who waits lets the others.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.core.types import Profile
from fedloom.deploy import start
from fedloom.deploy.site.worker_socket import ask_worker
from fedloom.runs.run import Run
from tests.support.deployment_runs import folder_of
from tests.support.simulated_link import Net
from tests.support.sites import site_at

ONE = threading.Lock()


class Killed(BaseException):
    """As by kill -9: nothing of the process gets to say a word."""


class Over(BaseException):
    """The test has ended."""


def adapter_at(folder: Path) -> dict[str, Any]:
    import safetensors.torch

    found: dict[str, Any] = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
    return found


@contextmanager
def freed() -> Iterator[None]:
    """Inside, the others may."""
    ONE.release()
    try:
        yield
    finally:
        ONE.acquire()


@dataclass
class Above:
    """A region as a site of the net above. `said` are its answers by what was asked."""

    socket: Path
    profile: Profile
    seconds: float = 1.0
    said: dict[bytes, bytes] = field(default_factory=dict)

    def answer(self, body: bytes) -> bytes:
        until = time.monotonic() + 60
        while True:
            try:
                with freed():
                    self.said[body] = ask_worker(self.socket, body, 5.0)
                    return self.said[body]
            except OSError:  # it is not there (any more)
                assert time.monotonic() < until
                with freed():
                    time.sleep(0.05)


class Country:
    """Two regions of as many sites each, and the server above. `dies` may end a region's process, at any message that it sends."""

    def __init__(self, tmp_path: Path, encoder: Path, run: Run, sites: Net) -> None:
        self.tmp_path, self.encoder, self.run, self.stop = tmp_path, encoder, run, threading.Event()
        half = len(sites.sites) // 2
        self.below = [Net({k: sites.sites[k] for k in range(n * half, (n + 1) * half)}) for n in (0, 1)]
        self.folders = [self._region(n, half) for n in (0, 1)]
        sockets = [tmp_path / f"site{n}" / "state" / "worker.sock" for n in (0, 1)]
        self.above = Net({n: Above(sockets[n], Profile(f"region{n}", 1)) for n in (0, 1)}, named=False)  # type: ignore[misc]
        self.starts = [0, 0]
        self.dies: Callable[[int, int], bool] = lambda region, sent: False
        self.folder = folder_of(tmp_path, run, clients=2, patience={"pause": 1.0})

    def serve(self) -> str:
        """As `fedloom serve`, to the end."""

        def slowly(seconds: float) -> None:
            self.above.pause(seconds)
            with freed():
                time.sleep(0.01)

        with ONE:
            return start.run_deployment(self.above, self.folder, slowly, self.above.clock)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, the regions are there."""
        threads = [threading.Thread(target=self._lead, args=(n,)) for n in (0, 1)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()

    def steps(self, number: int) -> list[dict[str, Any]]:
        """The trace of a region."""
        return [json.loads(line) for line in (self.folders[number] / "run" / "trace.jsonl").read_text().splitlines()]

    def reports(self) -> list[dict[str, Any]]:
        """What arrived at the server above from regions, and was not refused."""
        lines = [json.loads(line) for line in (self.folder / "run" / "trace.jsonl").read_text().splitlines()]
        told = [one["event"] for one in lines if not any(command["type"] == "Reject" for command in one["commands"])]
        return [event for event in told if event["type"] == "EdgeReported"]

    def _region(self, number: int, size: int) -> Path:
        site_at(self.tmp_path / f"site{number}", self.encoder)
        path = self.tmp_path / f"site{number}" / "site.toml"
        text = path.read_text().replace("ward", f"region{number}").partition("[table]")[0]
        path.write_text("region = true\n" + text.replace("/at/the/server/tiny", self.run.model))
        return folder_of(self.tmp_path, self.run, f"region{number}", clients=size, above=str(path))

    def _lead(self, number: int) -> None:
        own, sent = self.below[number], 0
        send = own.send

        def mortal(node: int, body: bytes, largest: int) -> str:
            nonlocal sent
            sent += 1
            if self.dies(number, sent):
                raise Killed
            return send(node, body, largest)

        def pause(seconds: float) -> None:
            own.pause(seconds)
            with freed():
                time.sleep(0.001)
            if self.stop.is_set():
                raise Over

        own.send = mortal  # type: ignore[method-assign]
        killed = True
        while True:
            self.starts[number] += killed  # one whose run has ended is there for the next, as with a service manager
            try:
                with ONE:
                    start.run_deployment(own, self.folders[number], pause, own.clock)
                killed = False
            except Killed:
                killed = True
                own.forget()
            except Over:
                return
