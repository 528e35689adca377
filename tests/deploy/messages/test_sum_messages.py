"""Messages of masked sums: they arrive as they were sent, and damaged ones are refused."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from fedloom.core.schema import Malformed
from fedloom.deploy.messages.messages import SumRequest, decode_request, encode_request
from fedloom.deploy.messages.sum_messages import BlockStep, SumReply, decode_sum_reply, encode_sum_reply
from fedloom.privacy.secure_sum.messages import MaskedValues, RoundTerms
from tests.support.masked_sums import STEPS, play, reply_of, round_terms, whole_numbers
from tests.support.sites import terms_of

TERMS = round_terms(4)
VALUES = whole_numbers(TERMS)
ME = TERMS.members[0]


def request(*steps: BlockStep) -> SumRequest:
    return SumRequest(terms_of(least_sum=3), 2, ME, 7, steps)


@pytest.mark.parametrize("step", STEPS[:-1])
def test_every_message_of_a_round_arrives_as_it_was_sent(step: str) -> None:
    _, members, sent = play(TERMS, VALUES, step)
    asked = request(BlockStep(0, 2, TERMS), BlockStep(2, 4, sent[ME]))
    assert decode_request(encode_request(asked), 10**6) == asked
    reply = reply_of(members[ME], step, sent[ME], VALUES)
    whole = SumReply(ME, 7, (reply, members[ME].offer(), reply))
    assert decode_sum_reply(encode_sum_reply(whole), 10**6) == whole
    assert encode_sum_reply(whole) == encode_sum_reply(whole)


def test_terms_that_protect_nobody_do_not_arrive() -> None:
    text = encode_request(request(BlockStep(0, 2, TERMS)))
    for old, new in ((rb"\"least\":3", rb"\"least\":1"), (rb"\"threshold\":0.6", rb"\"threshold\":0.5")):
        assert old in text
        with pytest.raises(Malformed):
            decode_request(text.replace(old, new), 10**6)


def test_masked_values_are_as_many_bytes_as_the_text_says() -> None:
    masked = MaskedValues(TERMS.digest, ME, bytes(range(200)))
    data = encode_sum_reply(SumReply(ME, 7, (masked, replace(masked, words=b"12"))))
    assert [one.words for one in decode_sum_reply(data, 10**6).messages] == [masked.words, b"12"]
    for old, new in (
        (rb"size\":200", rb"size\":199"),
        (rb"size\":2}", rb"size\":9}"),
        (rb"size\":200", rb"size\":-20"),
    ):
        assert old in data
        with pytest.raises(Malformed):
            decode_sum_reply(data.replace(old, new), 10**6)
    with pytest.raises(Malformed, match="above the limit"):
        decode_sum_reply(data, len(data) - 1)


def test_damaged_replies_are_refused_or_another_reply() -> None:
    """Whatever a byte becomes: nothing but Malformed is raised."""
    _, members, sent = play(TERMS, VALUES, "mask")
    data, draw = encode_sum_reply(SumReply(ME, 7, (members[ME].mask(sent[ME], VALUES[ME]),))), Random(3)
    for _ in range(300):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            decode_sum_reply(bytes(damaged[: draw.choice((None, draw.randrange(len(data))))]), 10**6)
        except Malformed:
            continue


def test_a_request_names_who_is_asked_and_has_blocks() -> None:
    for wrong in (
        replace(request(BlockStep(0, 2, TERMS)), client=""),
        request(),
        replace(request(BlockStep(0, 2, TERMS)), task=0),
    ):
        with pytest.raises(Malformed):
            decode_request(encode_request(wrong), 10**6)
    assert isinstance(request(BlockStep(0, 2, TERMS)).steps[0].message, RoundTerms)
