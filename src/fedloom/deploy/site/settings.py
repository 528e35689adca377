"""Settings of a site, `site.toml`: what it is, what it allows, and whether a request may be obeyed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from fnmatch import fnmatchcase
from logging import getLogger
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from fedloom.core.errors import Refused
from fedloom.core.types import ClientId
from fedloom.data.database import is_postgres
from fedloom.data.examples import Examples, Source
from fedloom.data.instructions import Instructions
from fedloom.data.partition import Shard, hold_out
from fedloom.data.table import Table
from fedloom.deploy.messages.messages import EvaluateRequest, JoinRequest, Request, RunEnded, RunTerms, TaskRequest
from fedloom.deploy.site.limits import SiteLimits, beyond_terms, refusals, region_limits, requested
from fedloom.deploy.site.site_privacy import SitePrivacy, tells_scores
from fedloom.runs.toml_run import read_toml

LOG = getLogger("fedloom.worker")


def _resolve_path(path: Path, info: ValidationInfo) -> Path:
    """Paths are told from the folder of the file that they stand in."""
    return Path((info.context or {}).get("folder", ".")) / path.expanduser()


def _model_path(path: str, info: ValidationInfo) -> str:
    """A folder there, or what a hub calls a model, of which the cache of this machine has a copy."""
    here = _resolve_path(Path(path), info)
    return str(here) if here.exists() else path


Place: TypeAlias = Annotated[Path, AfterValidator(_resolve_path)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelCopy(_Section):
    """The site's own copy of the base model.

    Fields:
        path: its folder, or a name under which the cache of this machine has it.
        name: what the server calls it (default: the last part of `path` has to agree).
        device: where it is computed ("auto": a GPU if there is one, else the CPU).
        any_weights: whether the site takes part in a run that does not say by which weights its base model is known.
    """

    path: Annotated[str, AfterValidator(_model_path)]
    name: str | None = None
    device: str = "auto"
    any_weights: bool = False

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
    """Labelled texts, the columns as in `fedloom.Table`. `labels` are their values in the order of the run's labels, or give each
    value its name in the run. Without them the values are the run's names.
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


class AcceptedTerms(_Section):
    """Terms that the site's owner has accepted, for machines without a person; others are accepted by `fedloom site accept`.

    Fields:
        accepted: hashes of their documents, 64 hex digits each (`fedloom site terms`).
    """

    accepted: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = ()


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
        peers: folder with the public keys of other sites, NAME.pub each, with which answers may be summed (default None: with none).
        model: its copy of the base model.
        region: whether it is a region, which has no data but sites of its own, and is started by `fedloom region`.
        table: labelled texts.
        instructions: requests with reference answers.
        limits: what a server may ask for; those of a region are only what its file names.
        terms: terms of runs that its owner has accepted.
        privacy: clipping, noise and budget that the site keeps whatever a server asks for (default None: what the run says).
        speed: speed and memory of the machine, as they are reported to the server.
    """

    name: str = Field(min_length=1, max_length=200)
    server: str = Field(min_length=1)
    ca: Place | None = None
    key: Place | None = None
    folder: Annotated[Place, Field(validate_default=True)] = Path("state")
    peers: Place | None = None
    model: ModelCopy
    region: bool = False
    table: LabelledFile | None = None
    instructions: AnsweredFile | None = None
    limits: SiteLimits = SiteLimits()
    terms: AcceptedTerms = AcceptedTerms()
    privacy: SitePrivacy | None = None
    speed: Speed = Speed()

    @model_validator(mode="after")
    def _one_file(self) -> Site:
        files = (self.table is not None) + (self.instructions is not None)
        if self.region and files:
            raise ValueError("a region has no data of its own: leave out the section, or `region`")
        if not self.region and files != 1:
            raise ValueError("give either a section [table] or a section [instructions]")
        return self

    @model_validator(mode="after")
    def _limits_of_region(self) -> Site:
        if self.region:
            object.__setattr__(self, "limits", region_limits(self.limits))  # frozen for all others
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


def site_shard(site: Site, examples: Examples, terms: RunTerms, secret: bytes) -> Shard:
    """Divide the examples into what is trained on and what is held out, by the site's secret: the same in all runs of one share.

    Nothing is held out where the run or the site does not want it, or noise forbids to tell scores, nor of a single example.
    """
    share = terms.held_out if site.limits.scores and tells_scores(site.privacy, terms.records) else 0.0
    (shard,) = hold_out({site.name: tuple(range(len(examples)))}, examples, share, lambda _: secret)
    return shard


def read_site(path: Path) -> Site:
    """Read the settings of a site. Raises Refused with the field, its value and what it should be."""
    fields = read_toml(path, "--config", "; docs/site.md shows one")
    try:
        return Site.model_validate(fields, context={"folder": path.parent})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or str(path)
        value = "" if isinstance(first["input"], dict) else first["input"]
        remedy = first["msg"].removeprefix("Value error, ")
        raise Refused(field, value, f"{remedy[:1].lower()}{remedy[1:]}; docs/site.md lists all fields") from error


def time_of_day() -> float:
    """Return the time of this machine's clock, in hours from 0 to 24."""
    now = datetime.now()
    return now.hour + now.minute / 60


def why_refused(site: Site, request: Request, hour: float) -> str | None:
    """Return why the site does not do what is asked, in a sentence; None if it does. `hour` is the time of day there, 0 to 24."""
    return next(_reasons(site, request, hour), None)


def _reasons(site: Site, request: Request, hour: float) -> Iterator[str]:
    terms, limits = request.terms, site.limits
    if not any(fnmatchcase(terms.run, name) for name in limits.runs):
        yield f"this site takes part in runs named {' or '.join(limits.runs)}, not in {terms.run!r} (limits.runs)"
    if not site.model.is_of(terms.model):
        yield f"the run trains {terms.model!r}, this site has {site.model.name or Path(site.model.path).name!r}"
    if not (terms.weights or site.model.any_weights or site.region):
        yield "the run does not say which weights its model has (its owner can allow it: [model] any_weights = true)"
    if site.table and terms.labels is None:
        yield "the run writes text, the data of this site have labels"
    if site.instructions and terms.labels is not None:
        yield f"the run chooses among {len(terms.labels)} labels, the data of this site have answers"
    if not limits.awake(hour):
        yield f"this site works at {limits.hours}, and it is {int(hour):02}:{int(hour % 1 * 60):02} there (limits.hours)"
    if not isinstance(request, JoinRequest | RunEnded):
        yield from _why_foreign(site, request.task.client if isinstance(request, TaskRequest) else request.client)
    if isinstance(request, EvaluateRequest) and not limits.scores:
        yield "this site tells no scores (limits.scores)"
    if not site.region:
        yield from _why_not_private(site, request)
    yield from refusals(limits, requested(request))
    if not site.region:  # which gets the steps of all its rounds at once
        yield from beyond_terms(request)


def _why_not_private(site: Site, request: Request) -> Iterator[str]:
    """Yield why the site's rows cannot be protected as its owner or the run says."""
    try:
        scores = tells_scores(site.privacy, request.terms.records)
    except Refused as error:
        yield error.remedy
        return
    if not scores and isinstance(request, EvaluateRequest):
        yield "this site tells no scores: noise protects its rows, and exact counts of them would leave beside it"


def _why_foreign(site: Site, client: ClientId) -> Iterator[str]:
    if client != site.name:
        yield f"this site is {site.name!r}, the task is for {client!r}"
