"""Limits of a site, `[limits]` in `site.toml`: all that a server may vary, how far it may go, and why a request goes too far.

Every field of the terms of a run and of a task is judged here, or is listed as harmless with the reason in
`tests/deploy/site/test_limits.py`. The defaults follow from what was measured (docs/leakage.md); docs/site.md says what each limit
stops and what it does not. They are no proof: against a server that does not follow the protocol only noise at the site, or a sum
that hides single answers, is one.

A request is judged in three places: by itself, before anything is loaded (`requested`); with the rows of the site (`needed_rows`);
and with what was done before (`used`). Each gives values of `Asked`, and `refusals` compares them with the limits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedloom.core.codec import Summed
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, named_tensors, server_rank
from fedloom.core.types import Budget, Task, TaskStart
from fedloom.deploy.messages.container import is_placeholder
from fedloom.deploy.messages.messages import EvaluateRequest, Request, RunTerms, TaskRequest, start_of
from fedloom.deploy.site.request_record import SiteUsage
from fedloom.runs.toml_run import toml_text
from fedloom.train.settings import trial_steps

CLOCK = r"(?:[01]?\d|2[0-3]):[0-5]\d"
HOURS = rf"({CLOCK}|24:00)-({CLOCK}|24:00)"
DAY = 24.0
MEGABYTE = 1e6
Value: TypeAlias = float | bool | str


class SiteLimits(BaseModel):
    """Limits of what a server may ask of the site. A name that begins with `least_` is a smallest value, any other number a largest.

    Fields:
        rank: rank of a task (default 8: at 16 the words of a single row stand out).
        depth: trained layers, from the top (default None: all; fewer protect nothing).
        steps: local steps of a task (default 10 000).
        least_steps: smallest number of local steps (default 2: one step is nearest to a bare gradient).
        least_rows: smallest number of rows that a task is trained on, steps times batch (default 100).
        least_scored: smallest number of rows in an evaluation, and by which it differs from an earlier one (default 50).
        evaluations: evaluations of a run (default 1).
        least_sum: smallest number of sites over which answers are summed before anybody sees one (default 1: the server may see
            each). With 3 or more the site takes part only in sums, and needs `peers`.
        scores: whether counts of right predictions may be sent (default true; false: nothing is held out).
        losses: whether losses may be sent: sums of them with an evaluation, means with an answer (default false).
        least_batch: smallest number of rows in a step (default 8).
        batch: largest number of rows in a step (default 256: what a machine can hold).
        epochs: passes over the rows in one task (default 1).
        total_epochs: passes over the rows in a run (default 20: two for each of the usual ten versions).
        learning_rate: largest learning rate, of `up` too (default 1e-3; at 1e-2 a planted text was recognised with AUC 0.81).
        least_learning_rate: smallest learning rate, of `up` too (default 1e-6: below, nothing moves, and steps add up one gradient).
        least_clip: smallest norm to which a gradient is clipped (default 0.1: below, AdamW passes gradients through).
        clip: largest norm to which a gradient is clipped (default 10).
        least_scaling: smallest scaling of an adapter (default 0.1; as least_clip).
        scaling: largest scaling of an adapter (default 64: 32 is usual at rank 1).
        least_values: smallest root mean square of a tensor that a task begins with, unless it is zero or a bias (default 1e-5; as
            least_clip).
        values: largest root mean square of a tensor that a task begins with (default 1000).
        dropout: largest dropout of an adapter's inputs (default 0.5: more singles inputs out).
        weight_decay: largest weight decay (default 0.1).
        proximal: largest pull to what was sent, FedProx's mu (default 1: a larger one makes the gradient of the rows readable).
        pruning: largest strength of a penalty on ranks (default 0.1; as proximal).
        length: largest number of tokens of a row (default 1024).
        least_length: smallest number to which a row may be cut (default 16: of shorter ones every word can be recovered).
        held_out: largest share of the rows that is held out (default 0.5).
        layers: last parts of the names of layers that may be trained (default None: all linear layers).
        folds: whether a task may change the base model too (default false: it then decides what the layers see).
        controls: whether a task may bring numbers that are added to gradients, SCAFFOLD's (default false; as proximal).
        tasks_a_day: tasks of a day, by the date in UTC (default 1000).
        seconds: seconds of a task (default 3600).
        megabytes: size of a message (MB; default 512).
        megabytes_a_day: sizes of all answers of a day (MB; default 10 000).
        cache_megabytes: memory for activations that are kept (MB; default 4000).
        threads: threads of torch (default 16).
        labels: names that a model may choose from (default 1000).
        runs: names of runs that it takes part in (`*` stands for anything; default: all).
        hours: times of day at which it works, by the machine's clock, as "22:00-6:00" (default None: always).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int = Field(default=8, ge=1, le=2**20)
    depth: int | None = Field(default=None, ge=1, le=2**20)
    steps: int = Field(default=10_000, ge=1, le=10**9)
    least_steps: int = Field(default=2, ge=1, le=10**9)
    least_rows: int = Field(default=100, ge=1, le=10**12)
    least_scored: int = Field(default=50, ge=1, le=10**12)
    evaluations: int = Field(default=1, ge=0, le=10**6)
    least_sum: int = Field(default=1, ge=1, le=1000)
    scores: bool = True
    losses: bool = False
    least_batch: int = Field(default=8, ge=1, le=10**9)
    batch: int = Field(default=256, ge=1, le=10**9)
    epochs: float = Field(default=1.0, gt=0)
    total_epochs: float = Field(default=20.0, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    least_learning_rate: float = Field(default=1e-6, ge=0)
    least_clip: float = Field(default=0.1, ge=0)
    clip: float = Field(default=10.0, gt=0)
    least_scaling: float = Field(default=0.1, ge=0)
    scaling: float = Field(default=64.0, gt=0)
    least_values: float = Field(default=1e-5, ge=0)
    values: float = Field(default=1e3, gt=0)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0)
    proximal: float = Field(default=1.0, ge=0)
    pruning: float = Field(default=0.1, ge=0)
    length: int = Field(default=1024, ge=4, le=10**9)
    least_length: int = Field(default=16, ge=4, le=10**9)
    held_out: float = Field(default=0.5, ge=0, lt=1)
    layers: tuple[str, ...] | None = Field(default=None, min_length=1)
    folds: bool = False
    controls: bool = False
    tasks_a_day: int = Field(default=1000, ge=1, le=10**9)
    seconds: float = Field(default=3600.0, gt=0, le=1e8)
    megabytes: float = Field(default=512.0, gt=0, le=1e6)
    megabytes_a_day: float = Field(default=10_000.0, gt=0, le=1e12)
    cache_megabytes: float = Field(default=4000.0, ge=0, le=1e9)
    threads: int = Field(default=16, ge=1, le=1024)
    labels: int = Field(default=1000, ge=1, le=10**6)
    runs: tuple[str, ...] = Field(default=("*",), min_length=1)
    hours: str | None = Field(default=None, pattern=f"^{HOURS}$")

    @property
    def bytes(self) -> int:
        """Largest size of a message in bytes."""
        return int(self.megabytes * MEGABYTE)

    def most(self, rows: int | None = None, batch: int = 1) -> Budget:
        """Return the largest budget of a task over so many rows (None: they do not count), in batches of that size."""
        steps = self.steps if rows is None else max(1, min(self.steps, int(self.epochs * rows / batch)))
        return Budget(self.rank, steps, self.depth)

    def awake(self, hour: float) -> bool:
        """Return whether the site works at this time of day, 0 to 24; a window may reach over midnight."""
        found = re.fullmatch(HOURS, self.hours or "0:00-24:00")
        assert found is not None
        first, last = (int(h) + int(m) / 60 for h, m in (clock.split(":") for clock in found.groups()))
        return first <= hour < last if first < last else hour >= first or hour < last


LOOSEST = SiteLimits(
    rank=2**20, steps=10**9, least_steps=1, least_rows=1, least_scored=1, evaluations=10**6, losses=True, least_batch=1,
    batch=10**9, epochs=1e12, total_epochs=1e12, learning_rate=1e12, least_learning_rate=0.0, least_clip=0.0, clip=1e30,
    least_scaling=0.0, scaling=1e30, least_values=0.0, values=1e30, dropout=1 - 1e-9, weight_decay=1e30, proximal=1e30,
    pruning=1e30, length=10**9, least_length=4, held_out=1 - 1e-9, folds=True, controls=True, tasks_a_day=10**9,
    seconds=1e8, megabytes_a_day=1e12, cache_megabytes=1e9, threads=1024, labels=10**6,
)  # fmt: skip
"""All that can be allowed: for a region, which has no data, and for tests of other things than limits."""


def region_limits(given: SiteLimits) -> SiteLimits:
    """Return the limits of a region: those that its settings name, and no other, since its sites have their own."""
    return LOOSEST.model_copy(update={name: getattr(given, name) for name in given.model_fields_set})


class Asked(NamedTuple):
    """A value that a request asks for.

    Fields:
        limit: the limit that it is compared with.
        value: the value; for a limit that is a switch, whether it is needed.
        words: what it is, in words, to be followed by what the site allows.
    """

    limit: str
    value: Value
    words: str


def refusals(limits: SiteLimits, asked: Iterable[Asked]) -> Iterator[str]:
    """Yield a sentence for each value above or below its limit: both values, and the line of `site.toml` that would allow it."""
    return (_sentence(limits, one) for one in asked if not is_allowed(one.limit, getattr(limits, one.limit), one.value))


def require_allowed(limits: SiteLimits, asked: Iterable[Asked]) -> None:
    """Raise Refused for the first value above or below its limit, with what `refusals` says of it."""
    for one in asked:
        if not is_allowed(one.limit, getattr(limits, one.limit), one.value):
            raise Refused(f"limits.{one.limit}", getattr(limits, one.limit), _sentence(limits, one))


def _sentence(limits: SiteLimits, asked: Asked) -> str:
    allowed = getattr(limits, asked.limit)
    line = line_allowing(asked.limit, allowed, asked.value)
    return f"{asked.words}, {_allowed_words(asked.limit, allowed)} (its owner can allow it: [limits] {line})"


def is_allowed(limit: str, allowed: object, value: Value) -> bool:
    """Return whether a limit with this value allows what is asked. A number that is none (NaN) is never allowed."""
    if allowed is None:
        return True
    if isinstance(allowed, bool):
        return allowed or not value
    if isinstance(allowed, tuple):
        return value in allowed
    assert isinstance(allowed, int | float)
    assert isinstance(value, int | float)
    return value >= allowed if limit.startswith("least_") else value <= allowed


def line_allowing(limit: str, allowed: object, value: Value) -> str:
    """Return the line of `[limits]` that allows a value, as `rank = 16`."""
    return f"{limit} = {toml_text([*allowed, value]) if isinstance(allowed, tuple) else toml_value(value)}"


def toml_value(value: Value) -> str:
    """Return a number, a switch or a text as TOML has it."""
    return toml_text(value) if isinstance(value, bool | str) else repr(value)


def _allowed_words(limit: str, allowed: object) -> str:
    if isinstance(allowed, bool):
        return "this site allows none"
    if isinstance(allowed, tuple):
        return f"this site allows {' and '.join(allowed)}"
    return f"this site allows {'at least ' if limit.startswith('least_') else ''}{allowed:g}"


# What is asked --------------------------------------------------------------------------------------------------------


def requested(request: Request) -> Iterator[Asked]:
    """Yield what a request asks for by itself, whatever the rows of the site are."""
    yield from _terms_asked(request.terms)
    if isinstance(request, TaskRequest):
        yield from _task_asked(request.task, request.terms)
        yield from _start_asked(request.task.start, request.terms)
    if isinstance(request, EvaluateRequest):
        yield from _start_asked(request.start, request.terms)


def _terms_asked(terms: RunTerms) -> Iterator[Asked]:
    training, engine = terms.training, terms.engine
    yield Asked("least_steps", terms.steps, f"the tasks of the run have {_count(terms.steps, 'step')}")
    yield Asked("batch", training.batch_size, f"the run trains on batches of {training.batch_size}")
    yield Asked("least_batch", training.batch_size, f"the run trains on batches of {training.batch_size}")
    for limit in ("learning_rate", "least_learning_rate"):
        yield Asked(limit, training.learning_rate, f"the run has a learning rate of {training.learning_rate:g}")
    for norm in (training.clip, *([terms.records.clip] if terms.records else [])):
        yield Asked("clip", norm, f"the run cuts gradients to a norm of {norm:g}")
        yield Asked("least_clip", norm, f"the run cuts gradients to a norm of {norm:g}")
    yield Asked("weight_decay", training.weight_decay, f"the run has a weight decay of {training.weight_decay:g}")
    yield Asked("proximal", training.proximal, f"the run has a proximal term of {training.proximal:g}")
    if training.max_length is not None:
        yield Asked("length", training.max_length, f"the run reads texts of {training.max_length} tokens")
        yield Asked("least_length", training.max_length, f"the run cuts texts to {training.max_length} tokens")
    yield from _scaling_asked(terms.lora.scaling, "the run")
    yield Asked("dropout", terms.lora.dropout, f"the run has a dropout of {terms.lora.dropout:g}")
    names = terms.lora.target_modules
    yield from layers_asked(names if isinstance(names, tuple) else ())
    yield Asked("held_out", terms.held_out, f"the run holds {terms.held_out:g} of the rows out")
    yield Asked("evaluations", terms.evaluations, f"the run is scored {_count(terms.evaluations, 'time')} at a site")
    yield Asked("least_sum", terms.least_sum or 1, _sum_words(terms.least_sum))
    yield Asked("folds", terms.folds, "the run changes the base model too")
    yield Asked("controls", terms.controls, "the run adds numbers of the server to gradients")
    size = engine.cache / MEGABYTE
    yield Asked("cache_megabytes", size, f"the run keeps activations of {size:g} MB")
    yield Asked("threads", terms.threads, f"the run computes with {_count(terms.threads, 'thread')}")
    yield Asked("labels", len(terms.labels or ()), f"the run has {len(terms.labels or ())} labels")


def _task_asked(task: Task, terms: RunTerms) -> Iterator[Asked]:
    budget, rules = task.budget, task.start.rules
    yield Asked("rank", budget.rank, f"the task has rank {budget.rank}")
    yield Asked(
        "depth", math.inf if budget.depth is None else budget.depth, f"the task trains {budget.depth or 'all'} layers"
    )
    yield Asked("steps", budget.steps, f"the task has {_count(budget.steps, 'step')}")
    steps = answer_steps(task)
    yield Asked("least_steps", steps, f"the answer to the task is trained in {_count(steps, 'step')}")
    rate = terms.training.learning_rate * budget.rate_multiple
    for side, own in (("up", rate * rules.up_rate), ("down", rate)):
        for limit in ("learning_rate", "least_learning_rate"):
            yield Asked(limit, own, f"the task has a learning rate of {own:g} for `{side}`")
    if rules.pruning is not None:
        yield Asked("pruning", rules.pruning.strength, f"the task penalises ranks by {rules.pruning.strength:g}")


def _start_asked(start: TaskStart, terms: RunTerms) -> Iterator[Asked]:
    rank = server_rank(start.train)
    yield Asked("rank", rank, f"the task has rank {rank}")
    yield from layers_asked(start.train.factors)
    if start.scaling is not None:
        yield from _scaling_asked(start.scaling, "the task")
    yield Asked("folds", start.fold is not None, "the task changes the base model too")
    yield Asked("controls", start.control is not None, "the task adds numbers of the server to gradients")
    for size in _sizes(start.train, biases=False)[:1]:
        yield Asked("least_values", size, f"the task begins with numbers of size {size:g}")
    for adapter in (start.train, start.fold, start.control):
        for size in _sizes(adapter)[-1:]:
            yield Asked("values", size, f"the task begins with numbers of size {size:g}")


def _sizes(adapter: Adapter | None, biases: bool = True) -> list[float]:
    """Return the sizes of the tensors in order; zero is left out: it tells nothing, and is where LoRA begins.

    A bias may be left out: it is added, so no gradient becomes small by it, and that of two labels is small by chance.
    """
    tensors = named_tensors(adapter) if adapter else {}
    kept = (tensor for name, tensor in tensors.items() if biases or not name.endswith("bias"))
    return sorted(size for tensor in kept if (size := _root_mean_square(tensor)))


def _root_mean_square(tensor: Tensor) -> float:
    """Return the size of a typical number; 0 for a tensor whose numbers were not sent."""
    if not tensor.numel() or is_placeholder(tensor):
        return 0.0
    return float(tensor.float().norm()) / math.sqrt(tensor.numel())


def _scaling_asked(scaling: float, whose: str) -> Iterator[Asked]:
    for limit in ("scaling", "least_scaling"):
        yield Asked(limit, scaling, f"{whose} has a scaling of {scaling:g}")


def beyond_terms(request: Request) -> Iterator[str]:
    """Yield what goes beyond the terms that the request itself names: a server is held to what its document says."""
    if not isinstance(request, TaskRequest | EvaluateRequest):
        return
    terms, start = request.terms, start_of(request)
    if isinstance(request, EvaluateRequest) and not terms.evaluations:
        yield "the last version is to be scored here, the terms say that it is not"
    rank, depth = server_rank(start.train), 1.0
    if isinstance(request, TaskRequest):
        budget = request.task.budget
        if budget.rate != terms.rates:
            yield "the learning rate of the task follows its rank otherwise than the terms say"
        rank, depth = max(rank, budget.rank), math.inf if budget.depth is None else budget.depth
        if budget.steps > terms.steps:
            yield f"the task has {_count(budget.steps, 'step')}, the terms say at most {terms.steps}"
    if rank > terms.rank:
        yield f"the task has rank {rank}, the terms say at most {terms.rank}"
    if start.directions and start.directions[-1] >= terms.rank:  # what stays at a site has room for all up to it
        yield f"the task holds direction {start.directions[-1]}, the terms say that there are {terms.rank}, from 0"
    if terms.depth is not None and depth > terms.depth:
        yield f"the task trains {'all' if depth == math.inf else depth} layers, the terms say at most {terms.depth}"
    if start.fold is not None and not terms.folds:
        yield "the task changes the base model too, the terms say that none does"
    if isinstance(request, TaskRequest) and isinstance(start.codec, Summed) != bool(terms.least_sum):
        yield f"the terms say that {_sum_words(terms.least_sum)}, the task is of another kind"
    if start.control is not None and not terms.controls:
        yield "the task adds numbers of the server to gradients, the terms say that none does"


def _sum_words(least: int) -> str:
    return f"the run sums answers over at least {least} sites" if least else "the server sees the answer of each site"


def layers_asked(names: Iterable[str]) -> Iterator[Asked]:
    """Yield the last parts of the names of trained layers."""
    for leaf in sorted({name.rpartition(".")[2] for name in names}):
        yield Asked("layers", leaf, f"the run trains layers called {leaf}")


def needed_rows(request: Request, trained: int, held_out: int) -> Iterator[Asked]:
    """Yield what a request asks for at a site with so many rows to train on, and so many held out."""
    if isinstance(request, EvaluateRequest):
        if held_out:  # of none there is no evaluation anyway
            yield Asked("least_scored", held_out, f"an evaluation would have {_count(held_out, 'row')}")
        return
    rows = task_rows(request, trained) if isinstance(request, TaskRequest) else trained
    yield Asked("least_rows", rows, f"this site would train on {_count(rows, 'row')}")
    batch = min(request.terms.training.batch_size, trained)
    yield Asked("least_batch", batch, f"a batch here would have {_count(batch, 'row')}")
    if isinstance(request, TaskRequest):
        epochs = task_epochs(request, trained)
        yield Asked("epochs", epochs, f"the task goes {epochs:g} times over the {trained} rows")


def task_rows(request: TaskRequest, rows: int) -> int:
    """Return how many of the rows a task uses: steps times batch, or all where no further batch would fit into a pass.

    An answer tells of the rows that it was trained on, however many others the site has.
    """
    batch = request.terms.training.batch_size
    drawn = answer_steps(request.task) * batch
    return rows if drawn + batch > rows else drawn


def answer_steps(task: Task) -> int:
    """Return the steps that train what is sent: all of a task, but for those in which it chooses its directions (LoRA-A2)."""
    select, steps = task.start.rules.select, task.budget.steps
    chooses = select is not None and select < sum(factor.rank for factor in task.start.train.factors.values())
    return steps - trial_steps(steps) if chooses else steps


def task_epochs(request: TaskRequest, rows: int) -> float:
    """Return how many times a task goes over the rows, rounded up to a thousandth."""
    return math.ceil(1000 * request.task.budget.steps * request.terms.training.batch_size / rows) / 1000


def used(request: Request, usage: SiteUsage, rows: int, held_out: int) -> Iterator[Asked]:
    """Yield what has been done after this request, together with all before it.

    Held-out rows of a smaller share are among those of a larger one, so two counts differ by the rows between them.
    """
    if isinstance(request, EvaluateRequest):
        count = usage.run_evaluations + 1
        yield Asked("evaluations", count, f"it would be scored {_count(count, 'time')}")
        for between in sorted({abs(held_out - other) for other in usage.scored} - {0})[:1]:
            yield Asked(
                "least_scored", between, f"beside an earlier evaluation it would tell of {_count(between, 'row')}"
            )
    if isinstance(request, TaskRequest):
        count, epochs = usage.tasks_today + 1, usage.run_epochs + task_epochs(request, rows)
        yield Asked("tasks_a_day", count, f"it would be {_count(count, 'task')} today")
        yield Asked("total_epochs", epochs, f"the run would go {epochs:g} times over the rows")
    if not isinstance(request, TaskRequest | EvaluateRequest):
        return
    size = usage.bytes_today / MEGABYTE
    yield Asked("megabytes_a_day", size, f"answers of {size:.1f} MB were sent today")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
