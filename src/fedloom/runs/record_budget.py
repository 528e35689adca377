"""What the sites of a run with private records spend: at most, which is checked before the run, and so far, in a simulation's ledger.

A task counts when it is handed out: its answer leaves the site, whether it is merged, rejected or lost. Sites of a deployment count
for themselves (`deploy.site.site_privacy`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.core.events import Command, Dispatch, Event
from fedloom.core.types import ClientId
from fedloom.privacy.accounting import PrivacyEvent, epsilon_of, multiplier_for
from fedloom.privacy.ledger import LEDGER, Ledger, LedgerEntry
from fedloom.privacy.private import Private
from fedloom.privacy.record_draws import for_records, steps_cost
from fedloom.runs.run import Run
from fedloom.schedule.shared.weights import ByQuality
from fedloom.train.base_model import Base
from fedloom.train.trainer import require_private_records


def check_records(run: Run, base: Base, rows: Iterable[int]) -> None:
    """Raise Refused where a run says that it protects records and does not, or spends more than its budget.

    Args:
        run: the run, with `privacy` of unit "record".
        base: the base model.
        rows: how many rows each client trains on; none where they lie at sites, which count for themselves.
    """
    require_private_records(base, run.training)
    if run.held_out:
        remedy = (
            "exact scores on what clients hold out would tell of it: give 0; versions are scored on the test examples"
        )
        raise Refused("held_out", run.held_out, remedy)
    if reads_losses(run):  # a plan that does is refused by `check_private`
        remedy = "it reads losses of clients, which are not told where records are private: choose one that does not"
        raise Refused("schedule.weigh", "ByQuality", remedy)
    if run.privacy is not None and run.privacy.budget is not None and (least := min(rows, default=0)):
        _check_budget(run, run.privacy, *run.privacy.budget, least)


def _check_budget(run: Run, private: Private, epsilon: float, delta: float, rows: int) -> None:
    """Raise Refused unless the records of the smallest client, whose rate is the highest, stay within the budget in all its tasks."""
    spent = epsilon_of(largest_cost(run, private.multiplier, rows), delta)
    if spent <= epsilon:
        return
    enough = multiplier_for(epsilon, delta, lambda z: largest_cost(run, z, rows))
    remedy = f"a client of {rows:,} rows would spend epsilon {spent:.3g} of {epsilon:g}: give multiplier={enough:g}"
    raise Refused(
        "privacy.multiplier", private.multiplier, f"{remedy}, or fewer most_answers, steps or rows in a batch"
    )


def largest_cost(run: Run, multiplier: float, rows: int) -> tuple[PrivacyEvent, ...]:
    """Return what all tasks that a client of so many rows may be given tell of one of them, at this multiplier."""
    assert run.privacy is not None
    private = Private(run.privacy.clip, multiplier, run.privacy.most_answers, unit="record")
    steps = private.most_answers * max(run.plan.local_steps, learned_steps(run))
    return (steps_cost(private, rows, run.training.batch_size, steps),)


@dataclass(frozen=True, slots=True)
class TaskRecorder:
    """Observer that writes what each task costs the records of its client, before it is trained.

    Fields:
        ledger: the open ledger.
        private: how the sites train.
        rows: how many rows each client trains on.
        batch_size: rows expected in a step.
    """

    ledger: Ledger
    private: Private
    rows: Mapping[ClientId, int]
    batch_size: int

    def __call__(self, now: float, event: Event, commands: Sequence[Command]) -> None:
        """Write the tasks of clients among these commands; those of edges are their members'."""
        for command in commands:
            if isinstance(command, Dispatch) and (rows := self.rows.get(command.task.client)):
                client, steps = command.task.client, command.task.budget.steps
                cost = steps_cost(self.private, rows, self.batch_size, steps)
                self.ledger.write(LedgerEntry({"task": command.task.id, "client": client}, {client: cost}))


def task_recorders(run: Run, rows: Mapping[ClientId, int], folder: Path, opened: ExitStack) -> list[TaskRecorder]:
    """Open the ledger in this folder until the end of the block, and return what writes it; nothing where sites count themselves."""
    private = for_records(run.privacy)
    if private is None or not rows:
        return []
    ledger = opened.enter_context(Ledger.opened(folder / LEDGER))
    return [TaskRecorder(ledger, private, rows, run.training.batch_size)]


def reads_losses(run: Run) -> bool:
    """Return whether a plan or the weights of a run follow from the losses that clients report."""
    return learned_steps(run) > 0 or isinstance(getattr(run.schedule, "weigh", None), ByQuality)


def learned_steps(run: Run) -> int:
    """Return the largest number of steps that a plan over regions gives a site (0: there is no such plan)."""
    rule = getattr(run.hierarchy.plan, "rule", None) if run.hierarchy else None
    while rule is not None and not hasattr(rule, "steps"):
        rule = getattr(rule, "inner", None)
    return int(rule.steps) if rule is not None else 0
