"""TensorBoard: figures as event files, which `tensorboard --logdir runs` shows; nothing leaves the machine."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.core.errors import Refused
from fedloom.core.files import clear_for_libraries, sub_folder
from fedloom.runs.trackers.tracker import Tracker, settings_texts

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVENTS = "tensorboard"
"""In a run folder: the folder of the event files."""


class TensorBoard(Tracker):
    """Writes event files, into the run folder or into a folder of its name in `place`."""

    def __init__(self, place: str = "") -> None:
        if find_spec("tensorboard") is None:
            raise Refused("to", "tensorboard", "install it first: pip install tensorboard")
        self.place = Path(place) if place else None
        self.events: SummaryWriter | None = None

    def begin(self, folder: Path, manifest: Mapping[str, Any], version: int) -> None:
        """Open an event file; figures of versions after this one that an earlier file has are no longer shown."""
        from torch.utils.tensorboard import SummaryWriter

        if self.place is None:
            events = sub_folder(folder / EVENTS)
            clear_for_libraries(events)
        else:
            events = self.place / folder.resolve().name
        self.events = SummaryWriter(str(events), purge_step=version + 1 if version else None)
        rows = (f"| {name} | {text} |" for name, text in settings_texts(manifest).items())
        self.events.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), 0)

    def write(self, version: int, figures: Mapping[str, float]) -> None:
        """Append a point to the curve of each figure."""
        assert self.events is not None
        for name, value in figures.items():
            self.events.add_scalar(name, value, version)
        self.events.flush()  # a server may be killed and go on from its last version

    def end(self, status: str) -> None:
        """Close the event file."""
        assert self.events is not None
        self.events.add_text("status", status, 0)
        self.events.close()
