"""Settings of a site, `site.toml`: what it is, what it allows, and whether a request may be obeyed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from logging import getLogger
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from fedloom.core.errors import Refused
from fedloom.core.lora import server_rank
from fedloom.core.types import Budget, ClientId, Task, TaskStart
from fedloom.data.database import is_postgres
from fedloom.data.examples import Examples, Source
from fedloom.data.instructions import Instructions
from fedloom.data.partition import Shard, hold_out
from fedloom.data.table import Table
from fedloom.deploy.messages.messages import EvaluateRequest, Request, RunTerms, TaskRequest

LOG = getLogger("fedloom.worker")
HOURS = r"([01]?\d|2[0-4]):([0-5]\d)-([01]?\d|2[0-4]):([0-5]\d)"


def _resolve_path(path: Path, info: ValidationInfo) -> Path:
    """Paths are told from the folder of the file that they stand in."""
    return Path((info.context or {}).get("folder", ".")) / path.expanduser()


def _model_path(path: str, info: ValidationInfo) -> str:
    """A folder there, or what a hub calls a model, of which the cache of this machine has a copy."""
    here = _resolve_path(Path(path), info)
    return str(here) if here.exists() else path


Place: TypeAlias = Annotated[Path, AfterValidator(_resolve_path)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelCopy(_Section):
    """The site's own copy of the base model.

    Fields:
        path: its folder, or a name under which the cache of this machine has it.
        name: what the server calls it (default: the last part of `path` has to agree).
        device: where it is computed.
    """

    path: Annotated[str, AfterValidator(_model_path)]
    name: str | None = None
    device: str = "cpu"

    def is_of(self, called: str) -> bool:
        """Whether the server's model is this one, by name."""
        return called == self.name if self.name else Path(called).name == Path(self.path).name


def _data_path(path: str, info: ValidationInfo) -> str:
    """A file or folder there, or the address of a database."""
    return path if is_postgres(path) else str(_resolve_path(Path(path), info))


class _DataFile(_Section):
    """A file or database of the site, and how it is to be read: the fields of `fedloom.Table`."""

    path: Annotated[str, AfterValidator(_data_path)]
    separator: str | None = None
    encoding: str | None = None
    quoted: bool | None = None
    sheet_name: str | None = None
    query: str | None = None
    missing: Literal["refuse", "drop"] = "refuse"


class LabelledFile(_DataFile):
    """Labelled texts, the columns as in `fedloom.Table`. `labels` are their values in the order of the run's labels, or for each
    value the name that it has there; without them the values are the run's names.
    """

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | dict[str, str] | None = None

    def examples(self, labels: tuple[str, ...] | None) -> Examples:
        """Return all rows, under the run's labels. Raises Refused."""
        if labels is None:
            raise Refused("data.path", str(self.path), "the run writes text, and these data have labels")
        values = self.labels or labels
        names = values if isinstance(values, dict) else dict(zip(values, labels, strict=False))
        if {*names.values()} != {*labels} or (isinstance(values, tuple) and len(values) != len(labels)):
            remedy = (
                f"the labels of the run are {', '.join(labels)}: give the data's values in that order, or name each"
            )
            raise Refused("table.labels", ", ".join(values), remedy)
        named = {value: name for one in labels for value, name in names.items() if name == one}
        how: dict[str, Any] = self.model_dump(exclude={"path", "labels"})
        # nothing is set aside where test rows are given; they are not looked at here
        return _training_rows(Table(self.path, self.path, labels=named, **how), "table")


class AnsweredFile(_DataFile):
    """Requests with reference answers, the columns as in `fedloom.Instructions`."""

    instruction: str = "instruction"
    context: str | None = None
    answer: str = "answer"
    messages: str | None = None
    roles: dict[str, str] | None = None

    def examples(self, labels: tuple[str, ...] | None) -> Examples:
        """Return all rows that have an answer. Raises Refused."""
        if labels is not None:
            raise Refused("data.path", str(self.path), "the run chooses labels, and these data have answers")
        how: dict[str, Any] = self.model_dump(exclude={"path"})
        return _training_rows(Instructions(self.path, self.path, **how), "instructions")


def _training_rows(source: Source, section: str) -> Examples:
    """Load the training examples; what is noted of them, such as rows that were left out, goes to the site's log.

    Raises:
        Refused: as the source does, in the words of the settings.
    """
    try:
        split = source.load(0)
    except Refused as error:
        remedy = error.remedy.replace("--set data.", f"{section}.").replace(" in data.", f" in {section}.")
        raise Refused(error.field.replace("data.", f"{section}."), error.value, remedy) from error
    for note in split.notes:
        LOG.info(note)
    return split.train


class SiteLimits(_Section):
    """Limits of what a server may ask of the site.

    Fields:
        rank: largest rank of a task (default 64).
        depth: largest number of trained layers, from the top (default None: all).
        steps: largest number of local steps of a task (default 10 000).
        megabytes: largest message (MB; default 512).
        runs: names of runs that it takes part in (`*` stands for anything; default: all).
        hours: times of day at which it works, by the machine's clock, as "22:00-6:00" (default None: always).
        scores: whether counts of how the last model does on held-out examples may be sent (default true; false: nothing is held
            out).
    """

    rank: int = Field(default=64, ge=1)
    depth: int | None = Field(default=None, ge=1)
    steps: int = Field(default=10_000, ge=1)
    megabytes: float = Field(default=512.0, gt=0)
    runs: tuple[str, ...] = Field(default=("*",), min_length=1)
    hours: str | None = Field(default=None, pattern=f"^{HOURS}$")
    scores: bool = True

    @property
    def most(self) -> Budget:
        """The largest budget of a task."""
        return Budget(self.rank, self.steps, self.depth)

    @property
    def bytes(self) -> int:
        """Largest size of a message in bytes."""
        return int(self.megabytes * 1e6)

    def awake(self, hour: float) -> bool:
        """Whether the site works at this time of day, 0 to 24; a window may reach over midnight."""
        found = re.fullmatch(HOURS, self.hours or "0:00-24:00")
        assert found is not None
        first, last = (int(found[k]) + int(found[k + 1]) / 60 for k in (1, 3))
        return first <= hour < last if first < last else hour >= first or hour < last


class Speed(_Section):
    """Speed and memory of the machine, as they are reported to the server.

    Fields:
        flops: training speed (FLOP/s; default: measured).
        memory: memory for training (bytes; default: measured).
        up_bps: speed of the link to the server (bits/s; default 1e7).
        down_bps: speed of the link from the server (bits/s; default 1e7).
    """

    flops: float | None = Field(default=None, gt=0)
    memory: float | None = Field(default=None, gt=0)
    up_bps: float = Field(default=1e7, gt=0)
    down_bps: float = Field(default=1e7, gt=0)


class Site(_Section):
    """Settings of a site, as `site.toml` has them.

    Fields:
        name: name of the site.
        server: address of the server, host:port.
        ca: certificate of the authority that it trusts.
        key: private key of the site.
        folder: files of the site (default: `state` beside the settings).
        model: its copy of the base model.
        region: whether it is a region, which has no data but sites of its own, and is started by `fedloom region`.
        table: labelled texts.
        instructions: requests with reference answers.
        limits: what a server may ask for.
        speed: speed and memory of the machine, as they are reported to the server.
    """

    name: str = Field(min_length=1, max_length=200)
    server: str = Field(min_length=1)
    ca: Place | None = None
    key: Place | None = None
    folder: Annotated[Place, Field(validate_default=True)] = Path("state")
    model: ModelCopy
    region: bool = False
    table: LabelledFile | None = None
    instructions: AnsweredFile | None = None
    limits: SiteLimits = SiteLimits()
    speed: Speed = Speed()

    @model_validator(mode="after")
    def _one_file(self) -> Site:
        files = (self.table is not None) + (self.instructions is not None)
        if self.region and files:
            raise ValueError("a region has no data of its own: leave out the section, or `region`")
        if not self.region and files != 1:
            raise ValueError("give either a section [table] or a section [instructions]")
        return self

    @property
    def socket(self) -> Path:
        """Path of the worker's socket."""
        return self.folder / "worker.sock"

    def examples(self, labels: tuple[str, ...] | None) -> Examples:
        """Load the site's data for a run with these labels (None: it writes text). Raises Refused."""
        file = self.table or self.instructions
        assert file is not None
        return file.examples(labels)


def site_shard(site: Site, examples: Examples, terms: RunTerms) -> Shard:
    """Divide the examples into what is trained on and what is held out, by number: the same at every start, and those of a
    simulation with these rows.

    Nothing is held out where the run or the site does not want it, nor of a single example.
    """
    share = terms.held_out if site.limits.scores and len(examples) > 1 else 0.0
    (shard,) = hold_out({site.name: tuple(range(len(examples)))}, examples, share, terms.seed)
    return shard


def read_site(path: Path) -> Site:
    """Read the settings of a site. Raises Refused with the field, its value and what it should be."""
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows put a mark in front
        return Site.model_validate(fields, context={"folder": path.parent})
    except OSError as error:
        raise Refused("--config", str(path), f"it cannot be read ({error.strerror}); docs/site.md shows one") from error
    except UnicodeDecodeError as error:
        raise Refused("--config", str(path), "it is not a text in UTF-8; save it again in that encoding") from error
    except tomllib.TOMLDecodeError as error:
        windows = "; a path of Windows stands in single quotes" if "\\" in path.read_text(encoding="utf-8-sig") else ""
        raise Refused("--config", str(path), f"it is not TOML: {error}{windows}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or str(path)
        value = "" if isinstance(first["input"], dict) else first["input"]
        remedy = first["msg"].removeprefix("Value error, ")
        raise Refused(field, value, f"{remedy[:1].lower()}{remedy[1:]}; docs/site.md lists all fields") from error


def why_refused(site: Site, request: Request, hour: float) -> str | None:
    """Return why the site does not do what is asked, in a sentence; None if it does. `hour` is the time of day there, 0 to 24."""
    return next(_reasons(site, request, hour), None)


def _reasons(site: Site, request: Request, hour: float) -> Iterator[str]:
    terms, limits = request.terms, site.limits
    if not any(fnmatchcase(terms.run, name) for name in limits.runs):
        yield f"this site takes part in runs named {' or '.join(limits.runs)}, not in {terms.run!r}"
    if not site.model.is_of(terms.model):
        yield f"the run trains {terms.model!r}, this site has {site.model.name or site.model.path!r}"
    if site.table and terms.labels is None:
        yield "the run writes text, the data of this site have labels"
    if site.instructions and terms.labels is not None:
        yield f"the run chooses among {len(terms.labels)} labels, the data of this site have answers"
    if not limits.awake(hour):
        yield f"this site works at {limits.hours}, and it is {int(hour):02}:{int(hour % 1 * 60):02} there"
    if isinstance(request, TaskRequest):
        yield from _why_foreign(site, request.task.client, request.task.start)
        yield from _why_too_large(site, request.task)
    if isinstance(request, EvaluateRequest):
        yield from _why_foreign(site, request.client, request.start)
        if not limits.scores:
            yield "this site tells no scores (limits.scores)"


def _why_foreign(site: Site, client: ClientId, start: TaskStart) -> Iterator[str]:
    if client != site.name:
        yield f"this site is {site.name!r}, the task is for {client!r}"
    if (rank := server_rank(start.train)) > site.limits.rank:
        yield f"the task has rank {rank}, this site allows {site.limits.rank}"


def _why_too_large(site: Site, task: Task) -> Iterator[str]:
    limits, budget = site.limits, task.budget
    if budget.rank > limits.rank:
        yield f"the task has rank {budget.rank}, this site allows {limits.rank}"
    if limits.depth is not None and (budget.depth is None or budget.depth > limits.depth):
        yield f"the task trains {budget.depth or 'all'} layers, this site allows {limits.depth}"
    if budget.steps > limits.steps:
        yield f"the task has {budget.steps} steps, this site allows {limits.steps}"
