"""The audit of a run that has happened, from its folder, or of one that is planned, made small.

Of a run that has happened its data are divided again as its manifest says, so that rows that a client trained on can be told from
those that it held out. Answers of single clients can be looked at where the run has them (`--keep-updates`); else the published model
alone is audited. A planned run is made small: a few versions, and of each client's rows a coin decides which are trained on. The
noise of a private run is made again with canaries, in either case.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedloom.audit.exchanges import AuditScene, SeenRun
from fedloom.audit.findings import ADVERSARIES, ATTACKS, AuditReport, NoiseCheck, Unmeasured
from fedloom.audit.labels import label_outcomes
from fedloom.audit.membership import membership_outcomes, row_guesses, shadow_outcomes
from fedloom.audit.noise_check import check_client_noise, check_record_noise
from fedloom.audit.token_span import word_outcomes
from fedloom.core.coordinator import Coordinator
from fedloom.core.errors import UNREADABLE, Refused, refuse_damaged
from fedloom.core.schema import Decoder, Malformed, jsonable, with_current_names
from fedloom.core.seeds import rng, simulated_secret
from fedloom.core.types import ClientId, Model
from fedloom.data.partition import Shard
from fedloom.privacy.accounting import epsilon_of
from fedloom.privacy.ledger import LEDGER, largest_epsilon, read_ledger
from fedloom.privacy.private import Private
from fedloom.privacy.record_draws import RecordDraws, for_records
from fedloom.privacy.secret_noise import SecretNoise
from fedloom.report.facts import is_deployed
from fedloom.report.run_log import RunLog, read_run_log
from fedloom.runs.archive import START, UPDATES
from fedloom.runs.job import Job
from fedloom.runs.prepare import prepare
from fedloom.runs.privacy_plan import DELTA, promised_events, smallest_rows
from fedloom.runs.replay import declared_names, replay
from fedloom.runs.run import Run
from fedloom.train.peft_folder import read_peft_folder
from fedloom.train.settings import PLAIN, constant, cosine, linear
from fedloom.train.trainer import PeftTrainer

VERSIONS, TEST_LIMIT = 3, 64
"""Of a planned run that is made small: versions, and test examples that score it, at most."""
ROOMS = ("aggregate", "schedule", "plan", "hierarchy", "data", "simulate")
"""Rooms whose classes and functions a manifest may name as settings of a run."""
AT_HOME = "the rows lie at the sites, and without them no attack on them can be judged; audit the run file on data of the same kind"
SIMULATED_NOISE = (
    "Simulated noise: no privacy. It follows from the seed of the simulation, and shows what secret noise would do."
)
TRUSTED_SERVER = (
    "The noise is the server's: it protects from readers and members, and the server sees answers as they are."
)
NO_LEDGER = f"There is no {LEDGER} in the run folder: the epsilon is what a client of this run may spend at most."
NOT_KEPT = "No answer of a single client was kept (`fedloom run FILE --keep-updates` does that): only the published model is audited."
SUMS_ALONE = (
    "The server of this run sees sums of groups, and no answer of a single client: no attack on such answers was tried."
)


def audit_folder(folder: Path, run: Run | None = None) -> AuditReport:
    """Audit a run that has happened. Raises Refused where its folder holds no model, or does not lead to its data.

    Args:
        folder: the run folder.
        run: its settings, where the manifest does not hold all of them (None: they are read from there).
    """
    log = read_run_log(folder)
    if is_deployed(log):
        return _deployed_report(log)
    job = prepare(run or recorded_run(log))
    for name, what in (("base_weights", "another base model"), ("run_hash", "other settings")):
        recorded, current = log.manifest.get(name), job.describe()[name]
        if recorded and current and recorded != current:
            raise Refused("run folder", str(folder), f"it was made with {what}; audit it with those that made it")
    if not (folder / "adapter" / "adapter_model.safetensors").is_file():
        raise Refused(
            "run folder", str(folder), "it holds no adapter: the run made no version, or this is no run folder"
        )
    last = Model(read_peft_folder(job.base, folder / "adapter", "run folder").adapter)
    merged = {str(line["client"]) for line in log.tasks if line.get("status") == "merged"}
    scene = _scene(job, _recorded_exchanges(folder, job), merged, last)
    notes = [] if scene.seen.latest or _sums_alone(job.run) else [NOT_KEPT]
    epsilon = _ledger_epsilon(folder, _delta(job.run.privacy))
    if job.run.privacy is not None and epsilon is None:
        epsilon, notes = promised_epsilon(job), [*notes, NO_LEDGER]
    report = AuditReport(job.run.name, False, len(scene.took_part), len(log.versions), (), epsilon, notes=notes)
    return _attacked(report, scene, job)


def audit_plan(run: Run) -> AuditReport:
    """Make a planned run small, carry it out in a folder that is removed, and audit it."""
    whole = prepare(small_run(run))
    job = replace(whole, shards=tuple(with_coins(shard, run.seed) for shard in whole.shards))
    seen = SeenRun(job.server.state.first)
    with TemporaryDirectory(prefix="fedloom-audit-") as place:
        job.execute(Path(place) / "run", [seen], report=False)
    scene, versions = _scene(job, seen, seen.merged, seen.last), job.server.state.version
    small = f"The run was made small for this audit: {versions} versions, and about half of each client's rows."
    planned = replace(whole, run=run)
    epsilon = promised_epsilon(planned)
    report = AuditReport(run.name, True, len(scene.took_part), versions, (), epsilon, notes=[small])
    return _attacked(report, scene, planned)


def small_run(run: Run) -> Run:
    """Return the run with few versions, without what is only for people to read, and with all rows to draw from."""
    limits = replace(run.limits, versions=min(VERSIONS, run.limits.versions), evaluate_every=0)
    tested = min(TEST_LIMIT, run.test_limit or TEST_LIMIT)
    return replace(run, limits=limits, held_out=0.0, test_limit=tested)


def with_coins(shard: Shard, seed: int) -> Shard:
    """Return a client's rows, each trained on if a fair coin of its own says so, the others left out; at least one is trained on."""
    coins = rng(seed, "audit coins", shard.client)
    trained = [row for row in shard.train if coins.random() < 0.5] or list(shard.train[:1])
    return replace(shard, train=tuple(trained), held_out=tuple(sorted({*shard.train} - {*trained})))


def recorded_run(log: RunLog) -> Run:
    """Return the settings of a run from its manifest. Raises Refused where they cannot all be read back."""
    recorded = {"privacy": None, **with_current_names(log.manifest["run"])}
    try:
        run: Run = Decoder((*declared_names(ROOMS), constant, linear, cosine)).read(Run, recorded)
        if jsonable(run) != recorded:
            raise Malformed("its manifest does not say all of them")
    except UNREADABLE as error:
        remedy = f"its settings cannot be made from the manifest ({error}); name its run file: --file FILE"
        raise Refused("run folder", str(log.folder), remedy) from error
    return run


def promised_epsilon(job: Job) -> float | None:
    """Return the epsilon that one unit of a run may spend at most (None: it has no privacy)."""
    return epsilon_of(promised_events(job), _delta(job.run.privacy)) if job.run.privacy else None


# The parts of it ---------------------------------------------------------------------------------------------------------


def _delta(private: Private | None) -> float:
    return private.budget[1] if private and private.budget else DELTA


def _ledger_epsilon(folder: Path, delta: float) -> float | None:
    path = folder / LEDGER
    return largest_epsilon(read_ledger(path), delta)[1] if path.is_file() else None


def _recorded_exchanges(folder: Path, job: Job) -> SeenRun:
    """Return what was seen of a recorded run: its answers, where they were kept and are not sealed."""
    found = [SeenRun(job.server.state.first)]
    sealed = job.run.privacy is not None and job.run.privacy.unit == "client"
    if (folder / UPDATES / f"{START}.safetensors").is_file() and not sealed:

        def watch(server: Coordinator, version: int) -> SeenRun:
            found.append(SeenRun(server.state.model))
            return found[-1]

        replay(folder, watch=watch)
    return found[-1]


def _sums_alone(run: Run) -> bool:
    """Whether members of groups are seen by nobody: the server sees their sums."""
    return run.hierarchy is not None and run.hierarchy.secure is not None


def _scene(job: Job, seen: SeenRun, merged: Collection[ClientId], last: Model) -> AuditScene:
    """Put the truth beside what was seen; `merged` are the clients with an answer in a version, or edges."""
    if _sums_alone(job.run):
        seen.latest.clear()  # a simulation's observer sees more than its server
        seen.heads.clear()
    trained = {shard.client: shard.train for shard in job.shards}
    took_part = sorted({*merged, *seen.latest} & trained.keys()) or sorted(trained)
    trainer = PeftTrainer(
        job.base,
        job.train_texts,
        trained,
        job.run.training,
        partial(simulated_secret, job.run.seed),
        job.run.engine or PLAIN,
        job.cache.emptied(),
        run=job.draws,
        records=for_records(job.run.privacy),
    )
    left_out = {shard.client: shard.held_out for shard in job.shards}
    return AuditScene(trainer, left_out, seen, tuple(took_part), last, job.run.seed)


def _attacked(report: AuditReport, scene: AuditScene, job: Job) -> AuditReport:
    """Return the report with what the attacks found, and the check of the noise of this job."""
    private, notes = job.run.privacy, [*report.notes]
    outcomes = [*label_outcomes(scene), *membership_outcomes(scene), *shadow_outcomes(scene), *word_outcomes(scene)]
    if _sums_alone(job.run):
        notes.append(SUMS_ALONE)
    if private is None:
        return replace(report, outcomes=outcomes, notes=notes)
    notes += [SIMULATED_NOISE, *([TRUSTED_SERVER] if private.unit == "client" else [])]
    guesses = row_guesses(scene, _delta(private)) if report.planned and private.unit == "record" else None
    return replace(
        report,
        outcomes=outcomes,
        delta=_delta(private),
        unit=private.unit,
        noise=_noise_check(job, private),
        guesses=guesses,
        notes=notes,
    )


def _noise_check(job: Job, private: Private) -> NoiseCheck:
    """Check the noise of a run by canaries, with a secret that is for this alone."""
    run, delta = job.run, _delta(private)
    secret = simulated_secret(run.seed, "audit")
    if private.unit == "client":
        return check_client_noise(private, SecretNoise(secret, ("audit",)), run.seed, delta)
    steps, draws = private.most_answers * run.plan.local_steps, RecordDraws(secret, "audit", 1)
    return check_record_noise(private, draws, smallest_rows(job), run.training.batch_size, steps, run.seed, delta)


def _deployed_report(log: RunLog) -> AuditReport:
    """Return what can be said of a run on real machines: its ledger, and its noise made again."""
    with refuse_damaged("run folder", str(log.folder)):
        settings: Any = with_current_names(log.manifest["run"]).get("privacy")
        private: Private | None = Decoder().read(Private | None, settings)
    outcomes = [Unmeasured(adversary, attack, AT_HOME) for attack in ATTACKS for adversary in ADVERSARIES]
    delta = _delta(private)
    noise = None
    if private is not None and private.unit == "client":
        seed = int(log.manifest["seed"])
        noise = check_client_noise(private, SecretNoise(simulated_secret(seed, "audit"), ("audit",)), seed, delta)
    return AuditReport(
        name=str(log.manifest["name"]),
        planned=False,
        clients=len({str(line["client"]) for line in log.tasks}),
        versions=len(log.versions),
        outcomes=outcomes,
        epsilon=_ledger_epsilon(log.folder, delta),
        delta=delta,
        unit=private.unit if private else "",
        noise=noise,
        notes=["This run was carried out at real sites, whose rows are not here: no attack on them can be judged."],
    )
