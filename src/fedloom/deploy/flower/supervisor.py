"""Processes that belong together: started, kept alive, stopped as a group, and none left when their parent is killed."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fedloom.core.errors import Refused, Terminated
from fedloom.core.files import atomic_write, lock, open_regular, private_folder

PR_SET_PDEATHSIG = 1
GRACE = 12.0
"""Seconds to end by itself after SIGTERM; Flower's processes take up to five to tell each other."""
LARGEST_LOG = 2**24
KEPT_LOG = 2**20
LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to keep running.

    Fields:
        name: its name, which is also its log's.
        command: program and arguments.
        environment: its environment variables.
        sockets: numbers of open sockets that it inherits.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    sockets: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds before a restart: `first`, doubled up to `most`; from the start again for what has run for `steady` seconds."""

    first: float = 1.0
    most: float = 8.0
    steady: float = 60.0


@dataclass(slots=True)
class ProcessGroup:
    """Processes that live and die together: where one ends, the others are stopped and all are started anew."""

    parts: Sequence[ProcessSpec]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    started: float = 0.0
    delay: float = 0.0
    due: float = 0.0


class Supervisor:
    """Keeps units running; `look` must be called about once a second, from the thread that made the first call.

    `say` gets every end and restart. Logs are files named after the parts. As the children are asked for by the kernel to end
    with this process (Linux), nothing is left even when it is killed.
    """

    def __init__(
        self,
        units: Sequence[Sequence[ProcessSpec]],
        logs: Path,
        say: Callable[[str], None],
        wait: Backoff | None = None,
    ) -> None:
        self._units = [ProcessGroup(parts) for parts in units]
        self._logs, self._say, self._wait = logs, say, wait or Backoff()
        self._born = dict[str, int]()
        private_folder(logs)

    def look(self) -> None:
        """Start what is due, notice what ended."""
        for unit in self._units:
            now = time.monotonic()
            ended = [
                (part, child.poll())
                for part, child in zip(unit.parts, unit.running, strict=False)
                if child.poll() is not None
            ]
            if ended:
                self._stop(unit)
                unit.delay = self._wait.first if now - unit.started > self._wait.steady else unit.delay
                unit.due = time.monotonic() + unit.delay
                for part, code in ended:
                    words = self._last_words(part) if code and code > 0 else ""
                    self._say(f"{part.name} {_ending(code)}; restarting in {unit.delay:.0f} s{words}")
                unit.delay = min(2 * unit.delay, self._wait.most)
            if not unit.running and now >= unit.due:
                self._start(unit)
        for log in self._logs.glob("*.log"):
            _shorten(log)

    def pid(self, name: str) -> int | None:
        """Return the process id of a part, while it runs."""
        for unit in self._units:
            for part, child in zip(unit.parts, unit.running, strict=False):
                if part.name == name and child.poll() is None:
                    return child.pid
        return None

    def stop(self) -> None:
        """End everything, what was started last first."""
        for unit in reversed(self._units):
            self._stop(unit)

    def _start(self, unit: ProcessGroup) -> None:
        unit.started, unit.delay = time.monotonic(), unit.delay or self._wait.first
        unit.running = [self._child(part) for part in unit.parts]

    def _child(self, part: ProcessSpec) -> subprocess.Popen[bytes]:
        with open_regular(self._logs / f"{part.name}.log", "ab") as log:
            self._born[part.name] = log.tell()
            return subprocess.Popen(
                part.command,
                env=dict(part.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=tuple(part.sockets),
                start_new_session=True,  # Ctrl-C is for the supervisor, which ends the others in order
                preexec_fn=partial(die_with_parent, os.getpid()),
            )

    def _stop(self, unit: ProcessGroup) -> None:
        for child in unit.running:
            if child.poll() is None:
                child.terminate()
        until = time.monotonic() + GRACE
        for child in unit.running:
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            with suppress(ProcessLookupError, PermissionError):  # its own children
                os.killpg(child.pid, signal.SIGKILL)
        unit.running = []

    def _last_words(self, part: ProcessSpec) -> str:
        """Return what Flower said on leaving, if it did, or else its last error."""
        lines = LogFollower(self._logs / f"{part.name}.log", self._born.get(part.name, 0)).lines()
        for number in range(len(lines) - 1, -1, -1):
            if "Exit Code: " in lines[number]:
                words = [line for line in lines[number : number + 4] if line]
                return ": " + " ".join(words).partition("Exit Code: ")[2]
        errors = [line for line in lines if "ERROR" in line or "Error: " in line]
        return f": {errors[-1]}" if errors else ""


def die_with_parent(parent: int) -> None:
    """Ask the kernel (Linux) to end this process as soon as its parent is gone."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def program(name: str) -> str:
    """Return the path of a command that was installed with this Python."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def process_environment(home: Path) -> dict[str, str]:
    """Return our environment, with every call outside switched off and Flower's files in `home`."""
    scripts = sysconfig.get_path("scripts")
    return {
        **os.environ,
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]),
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "localhost,127.0.0.1,::1"])),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",  # what they print is read as UTF-8, wherever this process prints to
        "PYTHONIOENCODING": "utf-8",
    }


def free_port() -> int:
    """Return a free port of loopback."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def is_listening(host: str, port: int) -> bool:
    """Whether connections are accepted there."""
    try:
        socket.create_connection((host, port), 1.0).close()
    except OSError:
        return False
    return True


@dataclass(slots=True)
class LogFollower:
    """Follows a log: reads what was written since it was read last."""

    path: Path
    position: int = 0

    def lines(self) -> list[str]:
        """Return the whole lines that are new."""
        if not self.path.exists():
            return []
        with open_regular(self.path) as file:
            if file.seek(0, os.SEEK_END) < self.position:
                self.position = 0  # it was shortened
            file.seek(self.position)
            whole = [line for line in file.read(LARGEST_LOG).splitlines(keepends=True) if line.endswith(b"\n")]
        self.position += sum(map(len, whole))
        return [line.decode("utf-8", "replace").strip() for line in whole]

    def skip(self) -> LogFollower:
        """Begin at the end."""
        self.position = self.path.stat().st_size if self.path.exists() else 0
        return self


def last_text(path: Path, size: int = 4096) -> str:
    """Return the last bytes of a file as text; "" if there is none."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


@contextmanager
def hold_folder(note: Path, folder: Path) -> Iterator[None]:
    """Hold a folder against a second supervisor.

    Raises:
        Refused: there is one.
    """
    private_folder(note.parent)
    with open_regular(note, "ab") as file:
        if not lock(file):
            raise Refused("folder", str(folder), "another process uses it; stop that one first")
        yield


def is_held(note: Path) -> bool:
    """Whether a supervisor holds the folder whose note this is."""
    try:
        with open_regular(note) as file:
            return not lock(file, shared=True)
    except FileNotFoundError:
        return False


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], None]]:
    """SIGTERM, which systemd and containers send, ends as Ctrl-C does: in order.

    What is yielded has to be called now and then, too: Python drops what a signal raises where it comes in a finaliser.
    """
    requested: type[KeyboardInterrupt] | None = None

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal requested
        requested = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        raise requested

    def look() -> None:
        if requested:
            raise requested

    ours = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in ours}
    try:
        yield look
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_secret(path: Path) -> Path:
    """A new random secret in a file that only its owner reads."""
    private_folder(path.parent)
    with atomic_write(path) as draft:
        draft.write_bytes(secrets.token_bytes(32))
    return path


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed ({signal.Signals(-code).name})"
    return f"ended with code {code}"


def _shorten(log: Path) -> None:
    """Keep the end of a log that has grown large, in place: the process that writes it appends."""
    if log.lstat().st_size > LARGEST_LOG:
        end = last_text(log, KEPT_LOG)
        with open_regular(log, "ab") as file:
            file.truncate(0)
            file.write(end.encode())
