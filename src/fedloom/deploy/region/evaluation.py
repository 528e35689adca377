"""An exam that a region was asked to sit: it has no examples, so its sites sit it, each at the rank at which it would get a task."""

from __future__ import annotations

from collections.abc import Callable

from fedloom.core.lora import server_rank
from fedloom.core.seeds import derive
from fedloom.core.transfer import encode_start
from fedloom.core.types import Budget, ClientId
from fedloom.deploy.messages.messages import EvaluateRequest, EvaluateResult
from fedloom.deploy.messages.region_scores import SiteResult, RegionEvaluateResult
from fedloom.deploy.region.region_edge import RegionServer
from fedloom.deploy.server.driver import Deployment
from fedloom.deploy.server.evaluation import Examiner
from fedloom.hierarchy.edge import initial_model


def sat_below(exam: EvaluateRequest, led: RegionServer, running: Deployment, pause: Callable[[float], None]) -> RegionEvaluateResult:
    """What each site that ever joined says, when all have; they are waited for as long as the exam says.

    What arrives of tasks meanwhile is the driver's, as ever.
    """
    ranks = ranks_below(exam, led, running)
    server = led.edge.server
    model, seed = initial_model(server.aggregator, exam.start), derive(server.seed, "final")
    starts = {
        rank: encode_start(server.aggregator.start(model, Budget(rank, 1), seed), server.transfer)
        for rank in {*ranks.values()}
    }
    exams = {
        client: EvaluateRequest(
            exam.terms,
            running.incarnation,
            client,
            starts[ranks[client]],
            running.accepted.get(client, 0),
            exam.seconds,
        )
        for client in sorted(running.clients)
    }
    examiner = Examiner(running, exams, lambda reply: running.arrived(running.elapsed, reply))
    examiner.ask(pause)
    return RegionEvaluateResult(exam.client, tuple(_seat(client, ranks[client], examiner) for client in sorted(ranks)))


def ranks_below(exam: EvaluateRequest, led: RegionServer, running: Deployment) -> dict[ClientId, int]:
    """The rank at which each site would be given its next task, at most that of the exam."""
    fleet, most, pruned = led.fleet(), server_rank(exam.start.train), led.state.pruned
    asked = {
        client: led.edge.server.budget_rule(profile, fleet).at_most(profile.most).rank
        for client, profile in running.profiles.items()
    }
    return {client: min(rank, pruned.get(client, rank), most) for client, rank in asked.items()}


def _seat(client: ClientId, rank: int, examiner: Examiner) -> SiteResult:
    marks = examiner.marks.get(client)
    if isinstance(marks, EvaluateResult):
        return SiteResult(client, rank, marks)
    reason = examiner.without.get(client, "it was gone before the end")
    return SiteResult(client, rank, None, " ".join(reason.split())[:1000] or "it gave no reason")
