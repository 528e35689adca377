"""Messages of masked sums between a server and its sites: what `privacy.secure_sum` sends, for all blocks of a sum at once.

A request travels as any other (`messages.SumRequest`). A reply is small but for masked values: they stand behind the text, as bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import safetensors.torch
import torch

from fedloom.core.schema import Decoder, Encoder, Malformed
from fedloom.core.types import ClientId
from fedloom.deploy.messages.container import FORMAT, read_buffers, read_header
from fedloom.privacy.secure_sum.messages import (
    Agreement,
    Agreements,
    KeyList,
    KeyOffer,
    MaskedValues,
    OpenedShares,
    RoundTerms,
    SealedShares,
    ShareDelivery,
    Survivors,
)

SUM_REPLY = "fedloom-sum"
"""Name under which the text of a reply stands in its container."""
MOST_BLOCKS = 64
"""Blocks of directions in one sum."""


@dataclass(frozen=True, slots=True)
class BlockStep:
    """What a member of a sum is sent about one block of directions.

    Fields:
        first: index of the first direction of the block.
        last: index after the last one.
        message: the terms of its round, or what the group sends in a later step.
    """

    first: int
    last: int
    message: RoundTerms | KeyList | ShareDelivery | Survivors | Agreements


@dataclass(frozen=True, slots=True)
class MaskedSize:
    """Stands for `MaskedValues` in the text of a reply: whose they are, and how many bytes."""

    round: str
    member: ClientId
    size: int


StepReply: TypeAlias = KeyOffer | SealedShares | MaskedValues | Agreement | OpenedShares


@dataclass(frozen=True, slots=True)
class SumReply:
    """Reply to a `SumRequest`: what a member sends about each block that it was asked about, in their order.

    Fields:
        client: who replies.
        task: its task, whose answer is summed.
        messages: one for each block.
    """

    client: ClientId
    task: int
    messages: tuple[StepReply, ...]


@dataclass(frozen=True, slots=True)
class SumText:
    """A reply without the bytes of masked values."""

    client: ClientId
    task: int
    messages: tuple[KeyOffer | SealedShares | MaskedSize | Agreement | OpenedShares, ...]


def encode_sum_reply(reply: SumReply) -> bytes:
    """Encode a reply; the same reply gives the same bytes."""
    masked = [one.words for one in reply.messages if isinstance(one, MaskedValues)]
    messages = tuple(
        MaskedSize(one.round, one.member, len(one.words)) if isinstance(one, MaskedValues) else one
        for one in reply.messages
    )
    text = f"[{FORMAT},{Encoder().encode(SumText(reply.client, reply.task, messages))}]"
    numbers = torch.frombuffer(bytearray(b"".join(masked)), dtype=torch.int8) if masked else None
    return safetensors.torch.save({} if numbers is None else {"i8": numbers}, {SUM_REPLY: text})


def decode_sum_reply(data: bytes, limit: int) -> SumReply:
    """Decode a reply. Raises Malformed, whatever the bytes are."""
    if len(data) > limit:
        raise Malformed(f"{len(data)} bytes, above the limit of {limit}")
    text = read_header(data).get(SUM_REPLY)
    if text is None:
        raise Malformed("no reply of a member of a sum")
    version, found = Decoder(finite=True).decode(tuple[int, SumText], text)
    if version != FORMAT:
        raise Malformed(f"another format than {FORMAT}, by another version of fedloom")
    buffers = read_buffers(data)
    words = buffers.pop("i8", torch.zeros(0, dtype=torch.int8)).numpy().tobytes()
    sizes = [one.size for one in found.messages if isinstance(one, MaskedSize)]
    if buffers or any(size < 0 for size in sizes) or sum(sizes) != len(words) or len(found.messages) > MOST_BLOCKS:
        raise Malformed("the text of a reply speaks of other masked values than there are")
    return SumReply(found.client, found.task, tuple(_with_words(found.messages, words)))


def _with_words(messages: Sequence[object], words: bytes) -> list[StepReply]:
    """Return the messages with masked values in the places of their sizes."""
    replies, place = list[StepReply](), 0
    for one in messages:
        if isinstance(one, MaskedSize):
            replies.append(MaskedValues(one.round, one.member, words[place : place + one.size]))
            place += one.size
        else:
            replies.append(one)  # type: ignore[arg-type]
    return replies
