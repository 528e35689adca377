"""How good the final model is for each client, on the part of its own examples that was held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedloom.aggregate.averaged import published
from fedloom.core.seeds import derive
from fedloom.core.transfer import handed
from fedloom.core.types import Budget, ClientId, Local, Start, within
from fedloom.data.partition import Shard
from fedloom.train.evaluate import AnswerScores, Scores, score
from fedloom.train.trainer import personal

if TYPE_CHECKING:
    from fedloom.runs.job import Job
from fedloom.core.seeds import rng
from fedloom.train.generate import figures, write
from fedloom.train.settings import Generation


def client_scores(job: Job, locals_: Mapping[ClientId, Local]) -> list[dict[str, object]]:
    """For each client: the model that it would run, at its rank, on its held-out part, beside its commonest label's share, or, where
    text is written, beside what the base reached before any training.

    Clients of one rank are predicted together, so the base is loaded once a rank and not once a client; where something
    stays private (FedSA), each has a model of its own.
    """
    if not job.run.held_out:
        return []
    ranks = last_ranks(job)
    before = _before(job)
    lines = []
    for rank in sorted(set(ranks.values())):
        start = last_start(job, rank)
        members = [shard for shard in job.shards if ranks[shard.client] == rank]
        for group in [[one] for one in members] if start.rules.private else [members]:
            adapter = personal(start, locals_.get(group[0].client, Local()))
            examples = [i for shard in group for i in shard.held_out]
            scores, first = score(job.base, adapter, job.train_texts, examples, start.fold), 0
            for shard in group:
                own = scores.at(range(first, first + len(shard.held_out)))
                first += len(shard.held_out)
                lines.append(_line(job, shard, rank, own, before.get(shard.client) or _commonest(job, shard)))
    return sorted(lines, key=lambda line: str(line["client"]))


def last_ranks(job: Job) -> dict[ClientId, int]:
    """The rank at which each client would be given its next task."""
    fleet, pruned = job.server.fleet(), job.server.state.pruned
    asked = {
        client: within(job.run.plan(profile, fleet), profile.most).rank for client, profile in job.profiles.items()
    }
    return {client: min(rank, pruned.get(client, rank)) for client, rank in asked.items()}


def last_start(job: Job, rank: int) -> Start:
    """The last model as a client of this rank receives it."""
    run, model = job.run, published(job.server.state.model)
    return handed(run.aggregator.start(model, Budget(rank, 1), derive(run.seed, "final")), run.transfer)


def guessed(trained: Sequence[int], held_out: Sequence[int]) -> int:
    """How many of the labels held out are the commonest one of those trained on."""
    commonest = max(sorted(set(trained)), key=trained.count)
    return held_out.count(commonest)


def _line(
    job: Job, shard: Shard, rank: int, scores: Scores | AnswerScores, before: Mapping[str, float]
) -> dict[str, object]:
    line: dict[str, object] = {"kind": "client", "client": shard.client, "tier": job.profiles[shard.client].tier}
    return {**line, "rank": rank, "held_out": len(shard.held_out), **scores.figures(), **before}


def _commonest(job: Job, shard: Shard) -> dict[str, float]:
    """What a client would reach by always answering the commonest label of its training examples."""
    trained, held_out = ([job.split.train.labels[i] for i in part] for part in (shard.train, shard.held_out))
    return {"base_accuracy": guessed(trained, held_out) / len(held_out)}


def _before(job: Job) -> dict[ClientId, dict[str, float]]:
    """What the base writes without an adapter, scored for each client; empty where labels are chosen."""
    if job.base.labels is not None:
        return {}
    scores, first, found = score(job.base, None, job.train_texts, [i for s in job.shards for i in s.held_out]), 0, {}
    for shard in job.shards:
        own = scores.at(range(first, first + len(shard.held_out))).figures()
        first += len(shard.held_out)
        found[shard.client] = {"base_accuracy": own["accuracy"], "base_perplexity": own["perplexity"]}
    return found


def sample_lines(job: Job) -> list[dict[str, object]]:
    """For each of a few test examples the answers before and after, then the figures of all; none where labels are chosen."""
    asked, test, model = job.run.generation or Generation(), job.split.test, job.server.state.model
    if test.answers is None or asked.examples == 0:
        return []
    count = min(asked.examples, len(job.tested))
    chosen = sorted(rng(job.run.seed, "samples").sample(job.tested, count))
    references, most = [test.answers[i] for i in chosen], asked.max_new_tokens
    before = write(job.base, None, job.test_texts, chosen, most)
    after = write(job.base, model.adapter, job.test_texts, chosen, most, model.fold)
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
    started = {f"base_{name}": value for name, value in figures(before, references).items()}
    return [*lines, {"kind": "generation", "examples": count, **figures(after, references), **started}]
