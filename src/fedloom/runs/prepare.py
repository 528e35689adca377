"""Builds the job of a run: the only place where data, model, policies, groups and server are put together.

In this order, so that a mistake in the settings is found before anything expensive is loaded: check the fields of the run, load and
divide the data, load the base model, check what only data and model can tell (labels, ranks, depths), then make the server, with
an edge for each group if the run has a hierarchy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fedloom.core import schema
from fedloom.core.codec import Summed
from fedloom.core.coordinator import Coordinator
from fedloom.core.errors import Refused
from fedloom.core.model_shape import Shape
from fedloom.core.partial_depth import require_all_layers
from fedloom.core.policies import (
    aggregator_layers,
    require_enough_answers,
    require_fresh_answers,
    require_trusted_client,
)
from fedloom.core.rate_by_rank import rate_bounds
from fedloom.core.seeds import derive, rng, simulated_secret
from fedloom.core.server import Server
from fedloom.core.types import Budget, ClientId, Model, Profile
from fedloom.data.examples import Split
from fedloom.data.partition import Shard, hold_out
from fedloom.data.private_histogram import noised, topics
from fedloom.hierarchy.grouping import Member
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.regrouping import Compared
from fedloom.plan.depth import check_blocks
from fedloom.privacy.private import client_level
from fedloom.privacy.record_draws import for_records
from fedloom.runs import manifest
from fedloom.runs.execute import execute, record
from fedloom.runs.job import Job
from fedloom.runs.private_run import SIMULATED_SERVER, check_private, check_private_start, server_privacy
from fedloom.runs.record_budget import check_records
from fedloom.runs.resume import UnfinishedRun, unfinished_run, version_to_reach
from fedloom.runs.run import Run
from fedloom.runs.start_adapter import first_version, load_start, start_folder
from fedloom.simulate.devices import Devices, FasterLinks
from fedloom.train.base_model import Base, check_rank_fits_model, load_base, most_tokens
from fedloom.train.chat_template import DATE, writes_date
from fedloom.train.device import choose_threads, find_device
from fedloom.train.engine import linear_kernel
from fedloom.train.engine.activation_files import open_activation_files
from fedloom.train.engine.frozen_layers import ActivationCache
from fedloom.train.settings import PLAIN, largest_step
from fedloom.train.text_checks import check_texts
from fedloom.train.text_features import embeddings
from fedloom.train.tokenised import LONGEST_BY_DEFAULT, EncodedTexts, answer_choices, encode_texts, longest_of
from fedloom.train.trainer import engine_notes
from fedloom.train.workers.worker import Workers


class PreparedRun(Job):
    """A job that can be carried out: `prepare(run).execute(folder)`."""

    __slots__ = ()
    execute = execute
    record = record


def prepare(run: Run, resume: str | Path | None = None, more: int | None = None, workers: int | str = 1) -> PreparedRun:
    """Load, divide and check everything, for a new run or to continue the one in the folder `resume`.

    Raises Refused with field, value and remedy; nothing is written.

    Args:
        resume: folder of an unfinished run, or with `more` of a finished one.
        more: how many versions to add to the finished run (None: the run is not finished, or a new one).
        workers: as `execute` will be given: they share the cores, where the run leaves the number of threads open.
    """
    if more is not None and resume is None:
        raise Refused("more", more, "name the folder of the finished run: resume=FOLDER")
    resume = None if resume is None else Path(resume)
    schema.check_fields(run)
    require_fresh_answers(run.aggregator, run.schedule)
    require_enough_answers(run.aggregator, run.schedule)
    check_private(run)
    until = version_to_reach(resume, more) if resume and more is not None else None
    secret = simulated_secret(run.seed, SIMULATED_SERVER)
    sealed = secret if client_level(run.privacy) else b""
    unfinished = unfinished_run(resume, run, until=until, secret=sealed) if resume else None
    split = run.data.load(run.seed)
    parts = run.partition.split(split.train, run.seed)
    shards = hold_out(parts, split.train, run.held_out, partial(simulated_secret, run.seed))
    if run.threads is None and not unfinished:
        run = replace(run, threads=choose_threads(Workers.parse(workers).processes))
    job = assemble(run, split, shards, unfinished, secret=secret)
    if unfinished:
        unfinished.check_unchanged(job.describe())
    return job


def assemble(
    run: Run,
    split: Split,
    shards: Sequence[Shard],
    unfinished: UnfinishedRun | None,
    regions: int = 0,
    secret: bytes = b"",
) -> PreparedRun:
    """Build the job over data that are divided already.

    Without `shards` the clients are not known yet, and their data lie elsewhere: sites of a deployment, or this many `regions` where
    the run has a hierarchy. `secret` is that of the noise that a server with `privacy` adds.
    """
    start_folder(run)  # a mistake is found before the model is loaded
    top = run.plan.rank.largest
    if unfinished:
        run = unfinished.run_as_begun(run)
        check_private(run)  # of more versions correlated noise promises less
    threads = (
        run.threads or 1
    )  # `prepare` has chosen it for a simulation; sites differ, so a deployment that leaves it open has 1
    run = with_type_chosen(replace(run, device=str(find_device(run.device)), threads=threads))
    torch.set_num_threads(threads)
    engine = unfinished.engine_as_begun(run.engine or PLAIN) if unfinished else run.engine or PLAIN
    labels, names, seed = label_count(run, split), split.train.names, derive(run.seed, "model")
    base = load_base(run.model, labels, run.lora, top, seed, run.device, engine, names)
    split = split.with_names(base.label_names or names)
    check_aggregator(run, base, None if run.hierarchy or not shards else len(shards))
    if shards and not run.hierarchy:
        require_trusted_client(run.aggregator, [shard.client for shard in shards])
    limit = run.training.max_length or min(LONGEST_BY_DEFAULT, most_tokens(base, LONGEST_BY_DEFAULT))
    train, test = (encode_texts(part, base.tokenizer, limit, run.date) for part in (split.train, split.test))
    choices = answer_choices(train if train.ids else test)
    train, test = (replace(texts, choices=choices) for texts in (train, test))
    base.notes += check_texts(base, (train, test), limit)
    run = settled(run, base, longest_of((train, test), limit) if shards else limit)
    start = load_start(run, base, split.train.names)
    model = first_version(run, base, start)
    check_depth(run, base, model)
    check_sum_steps(run, model)
    check_private_start(run, run.aggregator.start(model, Budget(1, 1), 0).rules)
    private = server_privacy(run.privacy, run.limits, secret)
    base.notes += engine_notes(base, engine, run.plan.depth.bounds if run.plan.depth else None)
    if for_records(run.privacy):
        check_records(run, base, [len(shard.train) for shard in shards])
    hidden = client_level(run.privacy)  # how much a client holds is not told in a run that is private to clients
    sizes, devices = {shard.client: 1 if hidden else len(shard.train) for shard in shards}, devices_of(run)
    profiles = {profile.client: profile for profile in devices.profiles(sizes, run.seed)} if shards else {}
    flat = Server(
        model,
        run.aggregator,
        run.schedule,
        run.plan,
        shape=base.shape(),
        limits=private.limits,
        seed=run.seed,
        transfer=run.transfer,
        canary=run.canary,
        largest_step=largest_step(run.training.learning_rate, run.lora.scaling, run.plan.rates),
        mechanism=private.mechanism,
        participation=private.participation,
    )
    canaries = draw_canaries(run, len(split.test))
    return PreparedRun(
        run=run,
        split=split,
        shards=tuple(shards),
        profiles=profiles,
        devices=devices,
        base=base,
        train_texts=train,
        test_texts=test,
        tested=draw_test_examples(len(split.test), run.test_limit, run.seed, canaries),
        cache=ActivationCache(files=open_activation_files(base, engine, manifest.computing_environment())),
        canaries=canaries,
        server=add_edges(run, flat, base, train, shards, len(split.train.names), profiles, regions),
        stays=run.availability.of(sorted(sizes), run.seed) if run.availability else None,
        resumed_from=unfinished,
        start=start,
        secret=secret if private.mechanism else b"",
    )


# Whether the settings fit the data and the model --------------------------------------------------------------------------


def label_count(run: Run, split: Split) -> int | None:
    """Return how many labels the model chooses from (None: it writes answers). Raises Refused for a needless `generation`."""
    if split.train.answers is not None:
        return None
    if run.generation:
        raise Refused("generation", run.generation, "the data have labels and no answers to write; leave it out")
    return len(split.train.names)


def with_type_chosen(run: Run) -> Run:
    """Return the run with `engine.bfloat16` as this processor has it, where it is open; off where single records are protected."""
    if run.engine is None or run.engine.bfloat16 is not None:
        return run
    half = linear_kernel.has_bfloat16(run.device) and for_records(run.privacy) is None
    return replace(run, engine=replace(run.engine, bfloat16=half))


def settled(run: Run, base: Base, max_length: int) -> Run:
    """Return the run with what it left open: this `max_length`, and the date where the model's prompts have one."""
    training = run.training if run.training.max_length else replace(run.training, max_length=max_length)
    dated = base.labels is None and writes_date(base.tokenizer)
    return replace(run, training=training, date=run.date or (DATE if dated else None))


def check_aggregator(run: Run, base: Base, clients: int | None) -> None:
    """Raise Refused for a rank that the model is too small for, or another number of clients than there are (None: not known yet)."""
    for layer in aggregator_layers(run.aggregator):
        check_rank_fits_model(base, "aggregator.rank", getattr(layer, "rank", None) or run.plan.rank.largest)
        expected = getattr(layer, "clients", clients)
        if clients is not None and expected != clients:
            raise Refused("aggregator.clients", expected, f"give clients={clients}, the size of the federation")


def check_depth(run: Run, base: Base, model: Model) -> None:
    """Raise Refused for a depth that the model does not have, or a method that cannot have clients of different depth."""
    if run.plan.depth is not None:
        check_blocks(run.plan.depth, base.shape(), type(base.model.get_base_model()).__name__)
        require_all_layers(run.aggregator, run.aggregator.start(model, Budget(1, 1), 0).rules)


def check_sum_steps(run: Run, model: Model) -> None:
    """Raise Refused where members' changes are rounded so coarsely before they are summed that one optimiser step is lost.

    Members may do fewer steps than others. Were theirs rounded to nothing, the sum would be the change of those who do many.
    """
    if run.hierarchy is None or run.hierarchy.secure is None:
        return
    secure, training, scaling = run.hierarchy.secure, run.training, run.lora.scaling
    rate = training.learning_rate * run.aggregator.start(model, Budget(1, 1), 0).rules.up_rate
    least, most = rate_bounds(run.plan.rates, run.plan.rank.largest)
    bound = secure.bound or max(rate * scaling, rate, training.learning_rate) * most * run.plan.local_steps
    if Summed(secure.bits, bound, 1).step > min(training.learning_rate, rate * scaling) * least:
        remedy = "a number of so few bits does not tell a step of the optimiser; more bits, or a smaller bound"
        raise Refused("hierarchy.secure.bits", secure.bits, remedy)


def draw_canaries(run: Run, size: int) -> tuple[int, ...]:
    """Return the positions of the canary examples among `size` test examples, drawn from the seed. Raises Refused if they are all."""
    if run.canary is None:
        return ()
    if run.canary.examples >= size:
        remedy = f"there are {size} test examples, and some must be left to score with; give fewer, or more test data"
        raise Refused("canary.examples", run.canary.examples, remedy)
    return tuple(sorted(rng(run.seed, "canary").sample(range(size), run.canary.examples)))


def draw_test_examples(size: int, limit: int | None, seed: int, taken: Collection[int] = ()) -> tuple[int, ...]:
    """Return at most `limit` of `size` positions that are not `taken`, drawn from the seed, in ascending order."""
    free = [position for position in range(size) if position not in taken]
    if limit is None or limit >= len(free):
        return tuple(free)
    return tuple(sorted(rng(seed, "test").sample(free, limit)))


# Groups and edges ---------------------------------------------------------------------------------------------------------


def devices_of(run: Run) -> Devices:
    """Return the run's devices, with faster links where their edges are nearer than the server."""
    speedup = run.hierarchy.inner_speedup if run.hierarchy else 1.0
    return run.world if speedup == 1.0 else FasterLinks(run.world, speedup)


def add_edges(
    run: Run,
    flat: Server,
    base: Base,
    texts: EncodedTexts,
    shards: Sequence[Shard],
    names: int,
    profiles: Mapping[ClientId, Profile],
    regions: int = 0,
) -> Coordinator:
    """Return the server of the run: `flat`, or with a hierarchy a tree over its clients, or the root over so many regions.

    The clients' examples are among `texts`, of `names` labels. Raises Refused where the grouping cannot divide the clients.
    """
    if run.hierarchy is None:
        return flat
    if not shards:
        return run.hierarchy.over_regions(flat, regions)
    steps, top = run.plan.local_steps, run.plan.rank.largest
    tokens = steps * run.training.batch_size * run.training.token_limit
    members, counts = [], label_counts(run.hierarchy, base, texts, shards, names, run.seed)
    for shard in shards:
        seconds = comparison_seconds(flat.shape, profiles[shard.client], top, tokens)
        members.append(Member(shard.client, len(shard.train), seconds, counts[shard.client]))
    groups = run.hierarchy.grouped(members, run.seed)
    by_edge = {edge: tuple(profiles[client] for client in clients) for edge, clients in groups.items()}
    return run.hierarchy.over(flat, by_edge, Compared(tuple(members), top, steps, tokens))


def label_counts(
    hierarchy: Hierarchy, base: Base, texts: EncodedTexts, shards: Sequence[Shard], names: int, seed: int
) -> dict[ClientId, tuple[float, ...]]:
    """Return what each client says of its training examples: how many of each label, or of each topic.

    Topics are clusters of pooled embeddings, for data without labels. With `epsilon` the counts are noised before they leave the
    client (differential privacy).
    """
    if hierarchy.topics:
        pooled = {shard.client: embeddings(base, texts, shard.train) for shard in shards}
        counts = topics(pooled, hierarchy.topics, seed)
    else:
        labels = {shard.client: Counter(texts.labels[i] for i in shard.train) for shard in shards}
        counts = {client: tuple(float(count[k]) for k in range(names)) for client, count in labels.items()}
    if not hierarchy.epsilon:
        return counts
    return {client: noised(count, hierarchy.epsilon, seed, client) for client, count in counts.items()}


def comparison_seconds(shape: Shape, profile: Profile, rank: int, tokens: int) -> float:
    """Return the seconds by which clients are compared: a task at this rank, full batches of longest texts, float32 both ways."""
    links = 8.0 * shape.payload(rank) * (1.0 / profile.down_bps + 1.0 / profile.up_bps)
    return shape.train_flops(tokens, rank) / profile.flops + links
