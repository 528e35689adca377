"""Held-out evaluation by the clients of a deployment: who is asked, what came back, and the lines of it in `metrics.jsonl`.

The requests are sent by the driver (`Deployment.begin_evaluation`), with the same loop, retries and timeouts as tasks. A root and a
region do the same here: a region is asked by the root, asks its own sites, and replies with what each of them said.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from logging import getLogger

from fedloom.core.schema import Malformed
from fedloom.core.types import ClientId, Profile
from fedloom.deploy.messages.messages import (
    EvaluateReply,
    EvaluateRequest,
    EvaluateResult,
    Refusal,
    RegionEvaluateResult,
    SiteResult,
    decode_evaluation,
)
from fedloom.deploy.server.reply_events import MAX_REPLY
from fedloom.train.settings import LARGEST_LOSS

LOG = getLogger("fedloom.deploy.server")


@dataclass(slots=True)
class Evaluation:
    """State of one evaluation of the last model. It is over when each client that was asked has a result or a reason for none.

    Fields:
        ranks: rank of the model for each client that ever joined.
        requests: the request to each client that is asked.
        regions: those of them that are regions.
        began: when (s of the run).
        results: usable replies.
        reasons: why a client has no result.
    """

    ranks: Mapping[ClientId, int]
    requests: Mapping[ClientId, EvaluateRequest]
    regions: frozenset[ClientId]
    began: float
    results: dict[ClientId, EvaluateReply] = field(default_factory=dict)
    reasons: dict[ClientId, str] = field(default_factory=dict)

    def awaited(self) -> dict[ClientId, EvaluateRequest]:
        """Return the requests without result or reason, in order of the clients' names."""
        waiting = sorted(self.requests.keys() - self.results.keys() - self.reasons.keys())
        return {client: self.requests[client] for client in waiting}

    def awaits(self, request: EvaluateRequest | None) -> bool:
        """Whether this is a request of this evaluation that has neither result nor reason yet."""
        if request is None or self.requests.get(request.client) is not request:
            return False
        return request.client not in self.results and request.client not in self.reasons

    def expire(self, now: float, clients: Container[ClientId]) -> None:
        """Wait no longer for who is not among `clients` any more, or has said nothing in the time that it has."""
        for client, request in self.awaited().items():
            seconds = request.seconds * (2 if client in self.regions else 1)
            if client not in clients:
                self.reasons[client] = "it disconnected"
            elif now > self.began + seconds:
                self.reasons[client] = f"no answer within {seconds:g} s"

    def receive(self, request: EvaluateRequest, body: bytes) -> bool:
        """Take the reply to a request of this evaluation; returns whether the client declined."""
        client = request.client
        try:
            reply = decode_evaluation(body, MAX_REPLY, request, client in self.regions)
        except Malformed as error:
            LOG.error("the evaluate reply of %s cannot be used: %s", client, error)
            self.reasons[client] = f"its answer could not be used: {error}"
            return False
        if isinstance(reply, RegionEvaluateResult) and (odd := self._of_others(reply)):
            LOG.error("the evaluate reply of %s cannot be used: it tells of %s", client, odd)
            self.reasons[client] = f"its answer could not be used: it tells of {odd!r}, who is none of its sites"
            return False
        if not isinstance(reply, Refusal):
            self.results[client] = reply
            return False
        LOG.warning("%s declines the final evaluation: %s", client, reply.reason)
        self.reasons[client] = f"it declined: {reply.reason}"
        return True

    def _of_others(self, reply: RegionEvaluateResult) -> str | None:
        """Return a site that a region tells of and that is a client here, or another region's; None: there is none."""
        results = self.results.values()
        taken = {site.client for other in results if isinstance(other, RegionEvaluateResult) for site in other.sites}
        return min({site.client for site in reply.sites} & (taken | self.ranks.keys()), default=None)

    def site_result(self, client: ClientId) -> SiteResult:
        """Return the result of a site, or why it has none."""
        result = self.results.get(client)
        if isinstance(result, EvaluateResult):
            return SiteResult(client, self.ranks[client], result)
        reason = " ".join(self.reasons.get(client, "it disconnected before the end").split())[:1000]
        return SiteResult(client, self.ranks[client], None, reason or "it gave no reason")


def evaluation_lines(
    evaluation: Evaluation, profiles: Mapping[ClientId, Profile], writes: bool
) -> Iterator[dict[str, object]]:
    """Return the line of each client in `metrics.jsonl`, as after a simulation, or the reason why it has no scores.

    A region has no examples: in its place stand its sites, each with the region as its `edge`. `writes`: the model writes text.
    """
    for client in sorted(evaluation.ranks):
        result = evaluation.results.get(client)
        if isinstance(result, RegionEvaluateResult):
            yield from (_line(site, "site", writes, {"edge": client}) for site in result.sites)
        else:
            yield _line(evaluation.site_result(client), profiles[client].tier, writes, {})


def _line(site: SiteResult, tier: str, writes: bool, more: Mapping[str, object]) -> dict[str, object]:
    line = {"client": site.client, "tier": tier, "rank": site.rank, **more}
    if site.result is None:
        return {"kind": "unscored", **line, "reason": site.reason}
    return {"kind": "client", **line, **result_metrics(site.result, writes)}


def result_metrics(result: EvaluateResult, writes: bool) -> dict[str, float]:
    """Return the metrics that follow from counts and sums, named as in `Scores.metrics`, with those of the baseline.

    Where the site tells no losses, there is neither loss nor perplexity.
    """
    metrics = {"held_out": result.examples, "accuracy": result.correct / result.predictions}
    baseline = {"base_accuracy": result.base_correct / result.predictions}
    tokens = {"tokens": result.predictions} if writes else {}
    if result.loss is None or result.base_loss is None:
        return {**metrics, **tokens, **baseline}
    metrics["loss"] = result.loss / result.predictions
    if not writes:
        return {**metrics, **baseline}
    losses = (metrics["loss"], result.base_loss / result.predictions)
    perplexity, base_perplexity = (math.exp(min(mean, LARGEST_LOSS)) for mean in losses)
    return {**metrics, "perplexity": perplexity, **tokens, **baseline, "base_perplexity": base_perplexity}
