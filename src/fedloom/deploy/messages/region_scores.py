"""What a region says to an exam: the marks of each of its sites, as that site gave them, or why there are none."""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.core.lora import server_rank
from fedloom.core.schema import Malformed
from fedloom.core.types import ClientId
from fedloom.core.validate_answer import MAX_MEMBERS
from fedloom.deploy.messages.checks import LONGEST, check_name, in_range
from fedloom.deploy.messages.container import opened, sealed
from fedloom.deploy.messages.messages import WORD, Exam, Marks, Refusal, check_marks, check_refusal


@dataclass(frozen=True, slots=True)
class Seat:
    """A site of the region, the rank that it was asked at, and its marks, or (None) the reason why there are none."""

    client: ClientId
    rank: int
    marks: Marks | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Sheet:
    """All sites that the region `client` knows."""

    client: ClientId
    seats: tuple[Seat, ...]


KNOWN = {one.__name__: one for one in (Sheet, Seat, Marks, Refusal)}


def encode_sheet(sheet: Sheet) -> bytes:
    """The reply as bytes."""
    return sealed(WORD, sheet)


def decode_sheet(data: bytes, limit: int, exam: Exam) -> Sheet | Refusal:
    """What the region said to this exam. Raises Malformed, whatever the bytes are."""
    word: Sheet | Refusal = opened(data, limit, WORD, Sheet | Refusal, KNOWN)
    if word.client != exam.client:
        raise Malformed(f"{word.client!r:.60} answers the exam of {exam.client!r}")
    if isinstance(word, Refusal):
        check_refusal(word)
        return word
    in_range("sites", len(word.seats), 1, MAX_MEMBERS)
    if len({seat.client for seat in word.seats}) < len(word.seats):
        raise Malformed("a site is told of twice")
    for seat in word.seats:
        _check_seat(seat, exam)
    return word


def _check_seat(seat: Seat, exam: Exam) -> None:
    """Raise Malformed for what no site can have come to."""
    check_name("client", seat.client)
    in_range("rank", seat.rank, 1, server_rank(exam.start.train))
    in_range("reason", len(seat.reason), *((1, 10 * LONGEST) if seat.marks is None else (0, 0)))
    if seat.marks is None:
        return
    if seat.marks.client != seat.client:
        raise Malformed(f"{seat.client!r:.60} has the marks of {seat.marks.client!r:.60}")
    check_marks(seat.marks, exam)
