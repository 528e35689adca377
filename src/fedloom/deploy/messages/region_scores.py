"""What a region says to an exam: the marks of each of its sites, as that site gave them, or why there are none."""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.core.lora import server_rank
from fedloom.core.schema import Malformed
from fedloom.core.types import ClientId
from fedloom.core.validate_answer import MAX_MEMBERS
from fedloom.deploy.messages.checks import MAX_NAME, check_name, check_range
from fedloom.deploy.messages.container import unpack_message, pack_message
from fedloom.deploy.messages.messages import WORD, EvaluateRequest, EvaluateResult, Refusal, check_marks, check_refusal


@dataclass(frozen=True, slots=True)
class SiteResult:
    """A site of the region, the rank that it was asked at, and its marks, or (None) the reason why there are none."""

    client: ClientId
    rank: int
    result: EvaluateResult | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RegionEvaluateResult:
    """All sites that the region `client` knows."""

    client: ClientId
    sites: tuple[SiteResult, ...]



def encode_sheet(sheet: RegionEvaluateResult) -> bytes:
    """The reply as bytes."""
    return pack_message(WORD, sheet)


def decode_sheet(data: bytes, limit: int, exam: EvaluateRequest) -> RegionEvaluateResult | Refusal:
    """What the region said to this exam. Raises Malformed, whatever the bytes are."""
    word: RegionEvaluateResult | Refusal = unpack_message(data, limit, WORD, RegionEvaluateResult | Refusal)
    if word.client != exam.client:
        raise Malformed(f"{word.client!r:.60} answers the exam of {exam.client!r}")
    if isinstance(word, Refusal):
        check_refusal(word)
        return word
    check_range("sites", len(word.sites), 1, MAX_MEMBERS)
    if len({seat.client for seat in word.sites}) < len(word.sites):
        raise Malformed("a site is told of twice")
    for seat in word.sites:
        _check_seat(seat, exam)
    return word


def _check_seat(seat: SiteResult, exam: EvaluateRequest) -> None:
    """Raise Malformed for what no site can have come to."""
    check_name("client", seat.client)
    check_range("rank", seat.rank, 1, server_rank(exam.start.train))
    check_range("reason", len(seat.reason), *((1, 10 * MAX_NAME) if seat.result is None else (0, 0)))
    if seat.result is None:
        return
    if seat.result.client != seat.client:
        raise Malformed(f"{seat.client!r:.60} has the marks of {seat.result.client!r:.60}")
    check_marks(seat.result, exam)
