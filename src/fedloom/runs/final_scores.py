"""Final scores: how good the last model is for each client, on its own held-out examples, and what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedloom.aggregate.averaged import published_average
from fedloom.core.coordinator import Coordinator
from fedloom.core.policies import BudgetRule
from fedloom.core.seeds import derive, rng
from fedloom.core.transfer import encode_start
from fedloom.core.types import Budget, ClientId, ClientState, Profile, TaskStart
from fedloom.data.partition import Shard
from fedloom.runs.job import Job
from fedloom.train.confusion import Confusion
from fedloom.train.evaluate import (
    AnswerScores,
    Scores,
    answer_metrics,
    evaluate_held_out,
    evaluate_untrained,
    generate_answers,
)
from fedloom.train.objective import personal_adapter
from fedloom.train.settings import Generation


def client_scores(job: Job, state_of: Callable[[ClientId], ClientState]) -> list[dict[str, object]]:
    """Return a line for each client: how its model does on its held-out part. `state_of` says what stayed at one.

    Its model is the one that it would run, at its rank. Beside it stands the share of its commonest label, or, where text is written,
    what the base reached before any training. Clients of one rank are predicted together, so the base is loaded once a rank and
    not once a client; where something stays private (FedSA), each has a model of its own. The line of a client that holds nothing
    out says so.
    """
    if not job.run.held_out:
        return []
    ranks = next_ranks(job.run.plan, job.server, job.profiles)
    scored = [shard for shard in job.shards if shard.held_out]
    kept = job.kept_activations(job.cache.emptied())
    lines = [_unscored_line(job, shard, ranks[shard.client]) for shard in job.shards if not shard.held_out]
    for rank in sorted({ranks[shard.client] for shard in scored}):
        start = final_start(job, rank)
        members = [shard for shard in scored if ranks[shard.client] == rank]
        for group in [[shard] for shard in members] if start.rules.private else [members]:
            adapter = personal_adapter(start, state_of(group[0].client))
            scores = evaluate_held_out(job.base, adapter, job.train_texts, group, start.fold, kept)
            baseline = evaluate_untrained(job.base, job.train_texts, group, kept)
            lines += [_line(job, shard, rank, scores[shard.client], baseline[shard.client]) for shard in group]
    return sorted(lines, key=lambda line: str(line["client"]))


def label_lines(confusions: Mapping[int, Confusion]) -> list[dict[str, object]]:
    """Return a line for each of these versions: how well it tells the labels of the test examples apart."""
    return [{"kind": "labels", "version": version, **counted.metrics()} for version, counted in confusions.items()]


def next_ranks(rule: BudgetRule, server: Coordinator, profiles: Mapping[ClientId, Profile]) -> dict[ClientId, int]:
    """Return the rank at which each client would be given its next task."""
    fleet, pruned = server.fleet(), server.state.pruned
    planned = {client: rule(profile, fleet).at_most(profile.most).rank for client, profile in profiles.items()}
    return {client: min(rank, pruned.get(client, rank)) for client, rank in planned.items()}


def final_start(job: Job, rank: int) -> TaskStart:
    """Return the last model as a client of this rank receives it."""
    run, model = job.run, published_average(job.server.state.model)
    return encode_start(run.aggregator.start(model, Budget(rank, 1), derive(run.seed, "final")), run.transfer)


def _line(
    job: Job, shard: Shard, rank: int, scores: Scores | AnswerScores, baseline: Scores | AnswerScores
) -> dict[str, object]:
    line: dict[str, object] = {"kind": "client", "client": shard.client, "tier": job.profiles[shard.client].tier}
    untrained = {f"base_{name}": v for name, v in baseline.metrics().items() if name in ("accuracy", "perplexity")}
    return {**line, "rank": rank, "held_out": len(shard.held_out), **scores.metrics(), **untrained}


def _unscored_line(job: Job, shard: Shard, rank: int) -> dict[str, object]:
    line = {"kind": "unscored", "client": shard.client, "tier": job.profiles[shard.client].tier, "rank": rank}
    return {**line, "reason": f"none of its examples ({len(shard.train)}) is held out"}


def sample_lines(job: Job) -> list[dict[str, object]]:
    """Return a line for each of a few test examples, with the answers before and after training, then one with the figures of all.

    Empty where labels are chosen.
    """
    settings, test, model = job.run.generation or Generation(), job.split.test, job.server.state.model
    if test.answers is None or settings.examples == 0:
        return []
    count = min(settings.examples, len(job.tested))
    chosen = sorted(rng(job.run.seed, "samples").sample(job.tested, count))
    references, longest = [test.answers[i] for i in chosen], settings.max_new_tokens
    before = generate_answers(job.base, None, job.test_texts, chosen, longest)
    after = generate_answers(job.base, model.adapter, job.test_texts, chosen, longest, model.fold)
    lines: list[dict[str, object]] = [
        {
            "kind": "sample",
            "example": i,
            "request": test.texts[i],
            "context": test.pairs[i] if test.pairs else "",
            "reference": reference,
            "before": old,
            "after": new,
        }
        for i, reference, old, new in zip(chosen, references, before, after, strict=True)
    ]
    untrained = {f"base_{name}": value for name, value in answer_metrics(before, references).items()}
    return [*lines, {"kind": "generation", "examples": count, **answer_metrics(after, references), **untrained}]
