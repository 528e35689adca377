"""A run made ready and carried out: the only place that wires parts together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from fedloom import fitting, folder, kinds, manifest
from fedloom.about import groups, told
from fedloom.aggregate.wrap import need_fresh_answers
from fedloom.availability import Stays
from fedloom.clientscores import client_scores
from fedloom.data.examples import Split
from fedloom.data.partition import Shard, hold_out
from fedloom.errors import Refused
from fedloom.lora import Adapter, level, whole
from fedloom.membership import devices, led
from fedloom.metrics import Metrics
from fedloom.places import Places
from fedloom.presence import Presence
from fedloom.replay import UPDATES, Archive
from fedloom.report.html import write as write_report
from fedloom.resume import LOGS, NAME, SECONDS, Begun, Keeper, Progress, begun, claimed, given, log, restore
from fedloom.run import Run
from fedloom.samples import sample_lines
from fedloom.seeds import derive
from fedloom.server import Server
from fedloom.simulate import Evaluator, Observer, Simulation
from fedloom.trace import Trace
from fedloom.train.base import Base, check_length, initial, load
from fedloom.train.depth import Cache
from fedloom.train.evaluate import score
from fedloom.train.export import save
from fedloom.train.settings import PLAIN
from fedloom.train.texts import Encoded, encode
from fedloom.train.trainer import PeftTrainer
from fedloom.train.workers import Workers
from fedloom.tree import Tree, owners, places
from fedloom.types import ClientId, Command, Event, Model, Profile


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out: the run folder, the scores of all versions in order, the final adapter."""

    folder: Path
    scores: tuple[Mapping[str, float], ...]
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Recording:
    """What a driver needs to carry out a job: how versions are scored, who is told each step, who writes checkpoints."""

    job: Job
    keeper: Keeper
    metrics: Metrics
    progress: Progress
    evaluate: Evaluator
    observe: Observer

    def going_on(self, *driver: object) -> None:
        """Checkpoints hold these values of the driver too; what the last one held is put back into all of them."""
        self.keeper.owners = (*owners(self.job.server), *driver, self.metrics, self.progress)
        restore(self.job.begun.values if self.job.begun else {}, self.keeper.owners)


@dataclass(frozen=True, slots=True)
class Job:
    """The parts of a run: data divided, model loaded, server at version 0. Nothing has been written yet."""

    run: Run
    split: Split
    shards: tuple[Shard, ...]
    profiles: Mapping[ClientId, Profile]
    base: Base
    train_texts: Encoded
    test_texts: Encoded
    tested: tuple[int, ...]
    server: Server | Tree
    kept: Cache = field(default_factory=Cache)
    stays: Stays | None = None
    begun: Begun | None = None

    def execute(
        self,
        out: Path | None = None,
        observers: Sequence[Observer] = (),
        workers: int | str = 1,
        report: bool = True,
        checkpoint_seconds: float = SECONDS,
        keep_updates: bool = False,
    ) -> Outcome:
        """Simulate to the end and fill the run folder: a new one at `out`, or the one of the run that goes on.

        `workers` is who trains, which the numbers do not depend on: 1 this process, 2 or more local processes over one copy of the
        base, "ray" or "ray:ADDRESS" actors. A script that asks for processes needs the usual `if __name__ == "__main__":`.
        Without `report` its pictures, a second or two, are left to `fedloom report`.

        A checkpoint is written every `checkpoint_seconds` (0: after each event). With `keep_updates` the answers themselves are kept
        beside the trace, so that `fedloom replay` can repeat the server's part.

        Ctrl-C leaves a folder that says "interrupted" and can be reported on; any other failure one that says "failed". Both, and
        one that was killed, can go on: `prepare(run, resume=folder).execute()`.
        """
        asked = Workers.of(workers)
        drive = partial(self._simulate, asked)
        return self.record(drive, out, observers, {"workers": str(asked)}, report, checkpoint_seconds, keep_updates)

    def record(
        self,
        drive: Callable[[Recording], str],
        out: Path | None = None,
        observers: Sequence[Observer] = (),
        about: Mapping[str, object] | None = None,
        report: bool = True,
        checkpoint_seconds: float = SECONDS,
        keep_updates: bool = False,
    ) -> Outcome:
        """Fill the run folder with what happens while `drive` carries the run out, which returns the reason of its end.

        `about` are more lines of the manifest, the rest is as for `execute`.
        """
        torch.set_num_threads(self.run.threads)
        out = self._place(out)
        with claimed(out):
            said = {**self.about(), **(about or {})}
            folder.write_json(out / "manifest.json", {**said, "status": "running", "status_reason": ""})
            status, reason, progress = "failed", "the process ended without a word", Progress()
            keeper = Keeper(out, given=given(self.run), seconds=checkpoint_seconds)
            try:
                with ExitStack() as opened:
                    watching = [*observers, *self._archive(out, keep_updates)]
                    reason = drive(self._recording(opened, keeper, watching, progress))
                status = "finished"
            except KeyboardInterrupt:
                status, reason = "interrupted", "stopped by Ctrl-C"
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise
            finally:
                clients = {client: manifest.plain(profile) for client, profile in self.profiles.items()}
                now = {**groups(self.server), "clients": clients, "status": status, "status_reason": reason}
                self._close(out, {**said, **now}, report)
        model = self.server.state.model
        return Outcome(out, tuple(progress.scores), whole(model.adapter, model.fold))

    def evaluate(self, model: Model) -> dict[str, float]:
        """Figures on the test examples."""
        room = self.run.engine.cache if self.run.engine else 0
        scores = score(self.base, model.adapter, self.test_texts, self.tested, model.fold, self.kept, room)
        return {**scores.figures(), "examples": len(self.tested)}

    def about(self) -> dict[str, object]:
        """The manifest, without the status."""
        return told(self)

    def _place(self, out: Path | None) -> Path:
        """The folder to write: that of the run that goes on, or a new one."""
        if self.begun is None:
            return folder.create(out or folder.free(Path("runs"), self.run.name))
        if out not in (None, self.begun.folder):
            raise Refused("--out", str(out), f"a run goes on in its own folder, {self.begun.folder}")
        return self.begun.folder

    def _archive(self, out: Path, asked: bool) -> list[Observer]:
        """Who keeps the answers, if that is asked for now or was when the run was begun."""
        if not asked and not (out / UPDATES).is_dir():
            return []
        return [Archive.of(out / UPDATES, self.server)]

    def _recording(
        self, opened: ExitStack, keeper: Keeper, observers: Sequence[Observer], progress: Progress
    ) -> Recording:
        """The logs of the run, opened until the end of the block, and who writes them."""

        def evaluate(model: Model) -> Mapping[str, float]:
            progress.scores.append(self.evaluate(model))
            return progress.scores[-1]

        def observe(now: float, event: Event, commands: list[Command]) -> None:
            for observer in everyone:
                observer(now, event, commands)

        sizes = self.begun.sizes if self.begun else dict.fromkeys(LOGS, 0)
        keeper.logs = [opened.enter_context(log(keeper.folder / name, size)) for name, size in sizes.items()]
        edges = tuple(self.server.branches.edges) if isinstance(self.server, Tree) else ()
        metrics = Metrics(keeper.logs[1], Places(places(self.server)), edges)
        everyone: list[Observer] = [Trace(keeper.logs[0]), metrics, *observers]
        return Recording(self, keeper, metrics, progress, evaluate, observe)

    def _simulate(self, workers: Workers, recording: Recording) -> str:
        shards = {shard.client: shard.train for shard in self.shards}
        inner = PeftTrainer(self.base, self.train_texts, shards, self.run.training, self.run.engine or PLAIN)
        with workers.carrying_out(inner) as trainer:
            presence = Presence(self.stays, self.run.faults, self.run.seed)
            simulation = Simulation(
                self.server,
                trainer,
                devices(self.run),
                self.profiles,
                recording.evaluate,
                recording.observe,
                seed=self.run.seed,
                presence=presence,
                settled=recording.keeper,
            )
            recording.keeper.drain = simulation.drain
            recording.going_on(simulation, presence)
            reason = simulation.run()
            self.check_failures(reason)
            for line in (*client_scores(self, simulation.locals), *sample_lines(self)):
                recording.metrics.write(line)
        return reason

    def check_failures(self, reason: str) -> None:
        """Raise Refused if the run ended because so many tasks failed."""
        if self.server.state.failures >= self.run.limits.failures:
            remedy = f"the run was given up: {reason}. Mend that, or allow for more"
            raise Refused("limits.failures", self.run.limits.failures, remedy)

    def _close(self, out: Path, about: Mapping[str, object], report: bool) -> None:
        """The adapter of the last version, the final manifest, the report: also for a run that was cut short.

        The manifest says "finished" when all else is there, and until then the run can go on.
        """
        if self.server.state.version > 0:
            model = self.server.state.model
            save(self.base, level(whole(model.adapter, model.fold)), self.split.train.names, out / "adapter")
        folder.write_json(out / "manifest.json", about)
        if about["status"] == "finished":
            (out / NAME).unlink(missing_ok=True)
        if report:
            write_report([out], out / "report.html")


def prepare(run: Run, resume: Path | None = None) -> Job:
    """Load, divide and check everything, for a new run or to go on with the unfinished one in the folder `resume`.

    Raises Refused with field, value and remedy; nothing is written.
    """
    kinds.check(run)
    need_fresh_answers(run.aggregator, run.schedule)
    before = begun(resume, run) if resume else None
    split = run.data.load(run.seed)
    shards = hold_out(run.partition.split(split.train, run.seed), split.train, run.held_out, run.seed)
    job = made_ready(run, split, shards, before)
    if before:
        before.check(job.about())
    return job


def made_ready(run: Run, split: Split, shards: Sequence[Shard], before: Begun | None) -> Job:
    """The job over data that are divided already; without shards its clients are not known yet, and their data lie elsewhere."""
    torch.set_num_threads(run.threads)
    top = run.plan.rank.largest
    engine = before.engine(run.engine or PLAIN) if before else run.engine or PLAIN
    base = load(run.model, fitting.labels(run, split), run.lora, top, derive(run.seed, "model"), run.device, engine)
    fitting.check_aggregator(run, base, None if run.hierarchy or not shards else len(shards))
    train, test = (encode(part, base.tokenizer, run.training.max_length) for part in (split.train, split.test))
    check_length(base, run.training.max_length, max(len(ids) for ids in train.ids + test.ids))
    fitting.check_depth(run, base, run.aggregator.init(initial(base, top)))
    sizes = {shard.client: len(shard.train) for shard in shards}
    profiles = {profile.client: profile for profile in devices(run).profiles(sizes, run.seed)} if shards else {}
    return Job(
        run=run,
        split=split,
        shards=tuple(shards),
        profiles=profiles,
        base=base,
        train_texts=train,
        test_texts=test,
        tested=fitting.tested(len(split.test), run.test_limit, run.seed),
        server=led(run, _server(run, base, top), base, train, shards, len(split.train.names), profiles),
        stays=run.availability.of(sorted(sizes), run.seed) if run.availability else None,
        begun=before,
    )


def _server(run: Run, base: Base, rank: int) -> Server:
    """At version 0, without a hierarchy."""
    return Server(
        run.aggregator.init(initial(base, rank)),
        run.aggregator,
        run.schedule,
        run.plan,
        shape=base.shape(),
        limits=run.limits,
        seed=run.seed,
        transfer=run.transfer,
    )
