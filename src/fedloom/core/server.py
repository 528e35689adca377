"""The server: a pure state machine that turns events into commands. No clock, no network, no threads, no global randomness.

Who calls it. A driver: the virtual clock of `simulate`, or `deploy.server` on real machines. It calls `handle(now, event)`, carries
out the commands in their order, and calls again no later than `wake()`. The server never calls anybody and never waits. A tree of
servers stands behind the same interface (`Coordinator`), so that no driver knows whether there is a hierarchy.

State. All that changes is in `State`, all that a policy may use in `Fleet`, a read-only view of it. Policies are values without
state: the schedule says when, the budget rule how much, the aggregator how. So a checkpoint is `State` and nothing else, and a run is
replayed from its trace by handing the same events to a new server.

From a reply to the next version, in this file:

1. `_apply` checks that the task is outstanding at this client, that the form, counts, magnitudes and unchanged sides of the
   answer are as the task demands (`validate_answer.why_invalid`), and that it moved no further than others and an optimiser do
   (`change_norms`). What fails is refused with a `Reject`, and the state stays as it was. The root of a hierarchy checks reports
   first (`hierarchy.root_server`); an edge without a task refuses every answer
   (`hierarchy.edge`). On real machines, bytes that are no answer are refused before the server sees them (`deploy.server.driver`).
2. An accepted answer becomes an `Update` in `State.arrived`, with the model that its task was cut from, and with the examples that
   its client registered (`registration`), whatever it says; its client is idle again. Where starts are rounded, the answer becomes
   the exact start plus what the client changed (`transfer.lift_answer`), so that no rounding is taken for a change. The answer of an
   edge that adds products stays: its factors were turned, and rounding would be added to other directions than it was taken of.
3. `_decide` asks the schedule for a `Merge`. Here the staleness weight comes in: a schedule multiplies an answer's weight, or its
   step, by a discount of `schedule.shared.staleness.staleness`, the number of versions made since the task was sent. The aggregator
   sees weights only.
4. `_merge` gives the merge to the aggregator, layer by layer where clients train to different depths (`partial_depth`). The model
   that comes back is the next version: it is published, and evaluated if it is due. With a `Canary` it is scored first, and
   answers that make it worse are set aside (`canary`). With a `Mechanism` the aggregator sees a noisy sum, and no answer; a `Release`
   comes before the version, and clients rest that have taken part as often as they may (`participation`).
5. 3 and 4 repeat while a merge is due. Then the run ends, if it has reached a limit, or the schedule's choice of idle clients gets
   tasks (`_dispatch`): the budget, the part of the model for that budget, and the encoding that the transfer codec makes of it.

What may fail. A bad answer never raises: it is a `Reject`. A client that fails or is lost counts as a failure, and too many in a row
stop the run (`Limits.failures`). `handle` raises ValueError when time runs backwards, which is the driver's mistake; a policy that
cannot work raises `Refused` when it is constructed, not in the middle of a run.

What is promised (tests/laws hold every method to it):

1. Merging one client's answer with weight 1 reproduces its model up to rank; if all clients return the same model, the merge is that
   model; the order of the answers does not matter.
2. At equal ranks and a shared `down` the merge is the plain mean of products.
3. An adapter that is sent has the rank and depth of its budget, is finite, and every direction of it can learn.
4. An adapter is the same function on every client: the scaling does not depend on the rank.
5. Where nobody learns anything, each direction keeps its energy, over many rounds.
6. A reply counts once, for the task that it answers; every dispatched task ends merged, dropped or outstanding; a lost client blocks
   nobody.
7. `wake` only tells the next due time, which is never in the past; asking changes nothing. Task ids are never reused.
8. What a client did not train is not counted as its contribution.
9. On a CPU, two runs of one seed and one number of threads give the same bytes, for any number of workers: every random draw has a
   stream of its own (`seeds`).
10. A run that is killed anywhere and resumed gives the same bytes as one that is not.
11. The distance that one answer moves the model, with C equally fast clients that always move theirs by d, is what the schedule's
    formula says: for FedFa-Param with window K it is d / (C + (K - 1) / 2) (tests/laws/test_drift.py).
12. What rounding takes of a start is no change: with any codec, a client's answer that changed nothing is merged as the exact start,
    to the bit (tests/laws/test_lifted_answers.py).

A method that breaks one of 1 to 5 or 8 by design says so in `exempt`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedloom.core.canary import Canary, Trial, Verdict, clearly_better, judge, why_set_aside, without_sites
from fedloom.core.change_norms import QUORUM, WINDOW, ChangeNorms, Frame, NormLimits, answer_kind, remember
from fedloom.core.codec import Codec
from fedloom.core.events import (
    CanaryScored,
    Cancel,
    CheckCanary,
    ClientJoined,
    ClientLost,
    Command,
    Dispatch,
    EdgeReported,
    Evaluate,
    Event,
    Publish,
    Reject,
    ReleasesCounted,
    SetAside,
    Stop,
    TaskFailed,
    UpdateArrived,
)
from fedloom.core.limits import Limits
from fedloom.core.lora import server_rank
from fedloom.core.model_shape import Shape
from fedloom.core.partial_depth import exact_start, merge_by_layer
from fedloom.core.participation import Mechanism, Participation, count_merged, count_releases, place_client
from fedloom.core.policies import (
    Aggregator,
    BudgetRule,
    Fleet,
    Merge,
    Schedule,
    require_enough_answers,
    require_fresh_answers,
)
from fedloom.core.registration import counted_examples, register
from fedloom.core.seeds import derive
from fedloom.core.server_state import State
from fedloom.core.transfer import encode_start, lift_answer
from fedloom.core.types import Budget, ClientId, GroupHistory, Model, Task, TaskStart, Update
from fedloom.core.validate_answer import why_invalid


class Server:
    """Server over one level of clients: asks the schedule when, the budget rule how much, the aggregator how."""

    def __init__(  # noqa: PLR0913  # they are the settings of a run that it follows
        self,
        model: Model,
        aggregator: Aggregator,
        schedule: Schedule,
        budget_rule: BudgetRule,
        *,
        shape: Shape,
        limits: Limits,
        seed: int = 0,
        transfer: Codec | None = None,
        canary: Canary | None = None,
        largest_step: float | None = None,
        mechanism: Mechanism | None = None,
        participation: Participation | None = None,
    ) -> None:
        require_fresh_answers(aggregator, schedule)
        require_enough_answers(aggregator, schedule)
        self.state = State(model, model)
        self.aggregator, self.schedule, self.budget_rule = aggregator, schedule, budget_rule
        self.shape, self.limits, self.seed, self.transfer, self.canary = shape, limits, seed, transfer, canary
        self.mechanism, self.participation = mechanism, participation
        self.norm_limits = NormLimits(limits.norm_ratio, limits.step_ratio, largest_step)

    def handle(self, now: float, event: Event) -> list[Command]:
        """Return what to do about `event`, in the order in which it is to be done.

        Raises ValueError if time runs backwards: that is the driver's mistake, while a bad answer of a client is a `Reject`.
        """
        state = self.state
        self.advance(now)
        if state.stopped:
            return []
        if isinstance(event, ReleasesCounted) and self.participation is not None:
            aside, tasks = count_releases(self.participation, state, event)
            return self._decide([*aside, *map(self._cancel, tasks)])
        rejected = self._apply(event)
        if rejected:
            return [rejected]
        if isinstance(event, CanaryScored):  # it is about an earlier event, and what follows from that goes on
            return self._decide(self._judge(event))
        state.latest = event.client if isinstance(event, UpdateArrived) else None
        if isinstance(event, ClientJoined):
            # no decision yet: others may join at the same time, and the first cohort is to be drawn from all of them (see `wake`)
            state.has_new_clients = True
            return []
        state.has_new_clients = False
        return self._decide(self._judge_first(event) if isinstance(event, UpdateArrived) else [])

    def advance(self, now: float) -> None:
        """Set the clock to the time of an event. Raises ValueError if time runs backwards."""
        if not now >= self.state.now:
            raise ValueError(
                f"event at {now} s after {self.state.now} s: a driver must deliver events in order of time"
            )
        self.state.now = now

    def wake(self) -> float | None:
        """Return the latest time at which to call `handle` again, with `TimerFired` if nothing else happens. Never in the past.

        After clients have joined the wake time is now. Joining itself decides nothing, so that a hundred clients that join together
        are all there when the first cohort is drawn.
        """
        state = self.state
        if state.stopped:
            return None
        if state.has_new_clients:
            return state.now
        times = [self.schedule.wake(self.fleet()), self.limits.seconds]
        due = [max(time, state.now) for time in times if time is not None]
        return min(due) if due else None

    def fleet(self) -> Fleet:
        """Return the read-only view that policies get; O(1)."""
        return self.state.fleet(self.shape, self.seed)

    def start(self, budget: Budget, seed: int) -> TaskStart:
        """Return what a client with this budget would receive now, to the bit."""
        start = exact_start(self.aggregator, self.state.model, budget, seed, self.shape, self.state.outer)
        return encode_start(start, self.transfer)

    def stop(self, reason: str) -> list[Command]:
        """End the run now: no outstanding task counts any more."""
        state = self.state
        commands: list[Command] = [self._cancel(number) for number in tuple(state.busy)]
        if state.last_evaluated < state.version:
            commands.append(self._evaluate())
        state.stopped = True
        return [*commands, Stop(reason)]

    @property
    def max_in_flight(self) -> int:
        """The largest number of clients that may be at work at once."""
        return self.schedule.max_in_flight

    @property
    def edges(self) -> tuple[ClientId, ...]:
        """Empty: clients connect to this server directly."""
        return ()

    def parts_to_save(self) -> tuple[State]:
        """Return the state."""
        return (self.state,)

    def manifest_sections(self) -> dict[str, Any]:
        """Return nothing: there are no groups."""
        return {}

    # For a root over edges: it wraps a server, and changes nothing in its state but through these ---------------------------

    def number_tasks_from(self, first: int) -> None:
        """Give the next task this number; each server of a tree has a block of its own."""
        self.state.next_task = first

    def set_group(self, edge: ClientId, history: GroupHistory) -> None:
        """Write down what is known of the group of this edge, for plans that learn."""
        self.state.groups[edge] = history

    def narrow_task(self, task: Task) -> None:
        """Replace the outstanding task of this number by the part of it that was trained."""
        self.state.busy[task.id] = task

    def add_failures(self, count: int) -> None:
        """Count tasks that failed below an edge among the failures that end the run."""
        self.state.failures += count

    def _apply(self, event: Event) -> Reject | None:
        """Write the event into the state, or refuse it and leave the state as it was."""
        state = self.state
        match event:
            case ClientJoined(joined):
                profile = register(state.registered, joined)
                if profile.client in state.working:  # it is back with a new profile, and its task is still outstanding
                    state.working[profile.client] = (profile, state.working[profile.client][1])
                else:
                    place_client(self.participation, state, profile)
            case ClientLost(client):
                if client in state.working:
                    self._release(state.working[client][1])
                    state.failures, state.last_failure = state.failures + 1, f"client {client!r} was lost"
                state.resting.pop(client, None)
                if client in state.idle:
                    state.idle.take(client)
            # a reply to a task that was cancelled, answered already, or sent to somebody else counts for nothing (law 6)
            case UpdateArrived(client, number) | TaskFailed(client, number) if (
                client not in state.working or state.working[client][1] != number
            ):
                return Reject(client, number, f"task {number} is not outstanding at client {client!r}")
            case UpdateArrived(client, number):
                reason, norms = self._judged(state.busy[number], event)
                if reason is not None:
                    return Reject(client, number, reason)  # the task stays outstanding: a better answer may come
                self._accept(event, norms)
            case TaskFailed(_, number, reason):
                self._release(number)
                state.failures, state.last_failure = state.failures + 1, reason
        return None

    def why_refused(self, task: Task, event: UpdateArrived) -> str | None:
        """Return why this answer to `task` is not taken: its form, its numbers, or how far it moved; None if it is."""
        return self._judged(task, event)[0]

    def _judged(self, task: Task, event: UpdateArrived) -> tuple[str | None, ChangeNorms | None]:
        """Return why an answer is not taken (None: it is), and how far it moved (None: it has no form, or nothing is limited)."""
        if reason := why_invalid(task, event.result, clipped=self.mechanism is not None):
            return reason, None
        mine, others = self.norm_limits.measured(task, event.result), self._others(task)
        return self.norm_limits.why_too_far(task, mine, others, self._frame(event)) if mine else None, mine

    def _accept(self, event: UpdateArrived, norms: ChangeNorms | None) -> None:
        """Take a valid answer: its client is idle again, and counts for the examples that it registered."""
        state, task = self.state, self.state.busy[event.task]
        counted = counted_examples(state.registered, state.working[task.client][0])
        if isinstance(event, EdgeReported):  # it may say that fewer of its members took part
            counted = min(counted, event.result.examples)
        result = event.result if counted == event.result.examples else replace(event.result, examples=counted)
        if norms:
            remember(self._recent(task), task.client, norms)
        update = Update(task, result, state.bases[task.id])
        state.arrived.append(update if self._frame(event) == "rotated" else self._lifted(update))
        self._release(task.id)
        state.failures = 0
        if task.start.rules.pruning and (rank := server_rank(result.adapter)) < task.budget.rank:
            state.pruned[task.client] = rank
        state.reported_examples[task.client] = counted

    def _lifted(self, update: Update) -> Update:
        """Return the answer without what rounding took of its start: the exact start is made again, from what it was made of."""
        if self.transfer is None or not self.transfer.halved or update.base is None:
            return update
        task, seed = update.task, derive(self.seed, "start", update.task.id)
        exact = exact_start(self.aggregator, update.base, task.budget, seed, self.shape, self.state.outer)
        return lift_answer(update, exact.train)

    def _judge_first(self, event: UpdateArrived) -> list[Command]:
        """Judge the first answers once there are others to compare with: one that moved too far is set aside, if it still waits."""
        state, recent = self.state, self._recent(self.state.arrived[-1].task)
        if len(recent) != QUORUM + 1:
            return []
        aside, begin = list[SetAside](), max(state.retained, state.canary.trial.seen if state.canary.trial else 0)
        for update in state.arrived[begin:]:
            mine = recent.get(update.task.client)
            if mine is None or mine.task != update.task.id:
                continue
            if reason := self.norm_limits.why_unlike(mine, self._others(update.task), self._frame(event)):
                aside.append(SetAside(update.task.client, mine.task, reason))
        for one in aside:
            del recent[one.client]
        state.drop_arrived({one.task for one in aside})
        return [*aside]

    def _recent(self, task: Task) -> dict[ClientId, ChangeNorms]:
        """Return how far the latest answers moved to tasks that train the same sides as this one."""
        return self.state.recent_changes.setdefault(answer_kind(task.start), {})

    def _others(self, task: Task) -> list[ChangeNorms]:
        """Return how far others moved lately: if all answers are refused for long, what was usual before counts no more."""
        since = task.id - 2 * max(WINDOW, self.max_in_flight)
        return [one for client, one in self._recent(task).items() if client != task.client and one.task > since]

    def _frame(self, event: UpdateArrived) -> Frame:
        if not isinstance(event, EdgeReported):
            return "own"
        return "rotated" if self.aggregator.space == "product" else "merged"

    def _release(self, number: int) -> Task:
        """Close a task; its client is idle again."""
        task = self.state.busy.pop(number)
        del self.state.bases[number]
        self.state.work_seconds[task.client] = (
            self.state.work_seconds.get(task.client, 0.0) + self.state.now - task.sent
        )
        place_client(self.participation, self.state, self.state.working.pop(task.client)[0])
        return task

    def _decide(self, commands: list[Command]) -> list[Command]:
        """Merge while the schedule finds something to merge, then stop or start clients; `commands` come before.

        While a canary score is outstanding nothing is merged. In the step that asks for it nobody is started either: the score may
        come at once, and then clients start from the version that it lets through.
        """
        state = self.state
        if state.last_evaluated < 0 and self.limits.evaluate_every:
            commands.append(self._evaluate())
        if self.canary and state.canary.version < 0 and not state.canary.trial:
            commands.append(self._check(Trial(state.model)))
        fleet = self.fleet()
        # more than one merge may be due: a schedule that merges one answer at a time retains the others, and is called again
        while not state.canary.trial and state.version < self.limits.versions and (merge := self.schedule.merge(fleet)):
            commands += self._merge(merge)
            fleet = self.fleet()
        if commands and isinstance(commands[-1], CheckCanary):
            return commands
        if reason := self._stop_reason():
            return commands + self.stop(reason)
        return commands + [self._dispatch(client, fleet) for client in self.schedule.start(fleet)]

    def _merge(self, merge: Merge) -> list[Command]:
        """Publish the next version, or have it scored first."""
        state, version = self.state, self.state.version + 1
        if self.aggregator.space == "product" and not self.limits.scores(version):
            merge = replace(merge, measured=False)
        if self.mechanism is not None:
            model, release = self.mechanism.release(self.aggregator, state, merge)
            return [release, *self._publish(Trial(model, merge, len(state.arrived)))]
        trial = Trial(merge_by_layer(self.aggregator, state.model, merge), merge, len(state.arrived))
        if self.canary and (version % self.canary.every == 0 or version == self.limits.versions):
            return [self._check(trial)]
        return self._publish(trial)

    def _publish(self, trial: Trial) -> list[Command]:
        """Publish a model as the next version; without a merge it is made of no answer."""
        state, merge = self.state, trial.merge or Merge(())
        commands: list[Command] = [self._cancel(number) for number in merge.cancel if number in state.busy]
        state.model, state.version = trial.model, state.version + 1
        # answers that the schedule does not retain are in the new version, or in none: they are never merged later
        later, state.retained = state.arrived[trial.seen :], len(merge.retain)
        state.arrived = [*merge.retain, *later]
        if self.participation is not None:
            count_merged(self.participation, state, trial.updates)
        commands.append(Publish(state.version, state.model, trial.updates))
        if self.limits.scores(state.version):
            commands.append(self._evaluate())
        return commands

    def _check(self, trial: Trial, model: Model | None = None) -> CheckCanary:
        """Ask for the scores of the model of a trial, or of this one, which is made without the site that is absent."""
        state, number = self.state, self.state.canary.checks + 1
        state.canary = replace(state.canary, checks=number, trial=trial)
        without = () if trial.absent is None else (trial.absent,)
        return CheckCanary(number, state.version + (trial.merge is not None), model or trial.model, without)

    def _judge(self, event: CanaryScored) -> list[Command]:
        """Publish the model that was scored, try it without a site, or set answers aside; scores that nobody waits for: nothing."""
        state, record, trial = self.state, self.state.canary, self.state.canary.trial
        if self.canary is None or trial is None or event.check != record.checks:
            return []
        if trial.merge is None:
            state.canary = record.passed(state.version, trial.model, event.scores)
            if record.model is None or not clearly_better(record.best, event.scores, self.canary.margin):
                return []
            state.canary = replace(record, version=state.version + 1, trial=None)
            return self._publish(Trial(record.model))
        verdict = judge(trial, event.scores, record, self.canary.margin)
        if verdict.leave_out is not None:
            left = without_sites(trial.merge, {verdict.leave_out})
            model = merge_by_layer(self.aggregator, state.model, left) if left else state.model
            return [self._check(replace(verdict.trial, absent=verdict.leave_out), model)]
        if verdict.set_aside:
            return self._set_aside(verdict)
        published = self._publish(trial)
        state.canary = record.passed(state.version, trial.model, verdict.trial.whole)
        return published

    def _set_aside(self, verdict: Verdict) -> list[Command]:
        """Take the answers of these sites out, as if they had never arrived."""
        state, trial, sites = self.state, verdict.trial, verdict.set_aside
        gone = {update.task.id: update.task.client for update in trial.updates if update.task.client in sites}
        everybody = len(sites) == len(trial.sites)
        reasons = {site: why_set_aside(site, trial, state.canary.best, alone=not everybody) for site in sites}
        state.drop_arrived(gone)
        state.canary = replace(state.canary, set_aside=state.canary.set_aside + len(gone), trial=None)
        if state.canary.set_aside > state.failures:
            state.failures, state.last_failure = state.canary.set_aside, reasons[sites[-1]]
        commands: list[Command] = [SetAside(client, number, reasons[client]) for number, client in gone.items()]
        if everybody and state.canary.version < state.version:  # versions since the last check may be the reason
            commands.append(self._check(Trial(state.model)))
        return commands

    def _evaluate(self) -> Evaluate:
        self.state.last_evaluated = self.state.version
        return Evaluate(self.state.version, self.state.model)

    def _stop_reason(self) -> str | None:
        if self.state.version >= self.limits.versions:
            return f"{self.state.version} versions made"
        if self.participation is not None and (reason := self.participation.why_nobody_starts(self.state)):
            return reason
        if self.limits.seconds is not None and self.state.now >= self.limits.seconds:
            return f"{self.limits.seconds:g} s are over"
        if self.state.failures >= self.limits.failures:
            return f"{self.state.failures} tasks failed in a row, the last one: {self.state.last_failure}"
        return None

    def _cancel(self, number: int) -> Cancel:
        return Cancel(number, self._release(number).client)

    def _dispatch(self, client: ClientId, fleet: Fleet) -> Dispatch:
        state = self.state
        budget = self.budget_rule(state.idle[client], fleet).at_most(state.idle[client].most)
        budget = replace(budget, rank=min(budget.rank, state.pruned.get(client, budget.rank)))
        # the seed follows from the task's number and nothing else: a draw depends neither on other clients nor on the workers (law 9)
        number, state.next_task = state.next_task, state.next_task + 1
        start = self.start(budget, derive(self.seed, "start", number))
        task = Task(number, client, state.version, start, budget, state.now)
        state.busy[number], state.bases[number] = task, state.model
        state.working[client] = (state.idle.take(client), number)
        state.dispatched[client] = state.dispatched.get(client, 0) + 1
        return Dispatch(task)
