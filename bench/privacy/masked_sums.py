"""What a member of a masked sum of ten sends, over the plain float16 factors of rank 8, both sides trained and one.

All messages of the member are counted as they are encoded: keys, sealed shares, masked values, agreement, opened shares. The numbers
are those of a rank-8 adapter on all linear layers of Llama-3.2-1B; the plain message is both factors in float16 in both cases. Values
have 16 bits, so a masked number of ten members has 20.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedloom.deploy.messages.sum_messages import SumReply, encode_sum_reply
from tests.support.masked_sums import STEPS, play, reply_of, round_terms

MEMBERS, RANK, LAYERS = 10, 8, 16
OUTPUTS = (2048, 512, 512, 2048, 8192, 8192, 2048)
"""Outputs of the linear layers of a block: q, k, v, o, gate, up, down."""
INPUTS = (2048, 2048, 2048, 2048, 2048, 2048, 8192)
UP, DOWN = (RANK * LAYERS * sum(sizes) for sizes in (OUTPUTS, INPUTS))


def figures(quick: bool) -> Mapping[str, object]:
    """Bytes of a member over those of plain factors."""
    plain = 2 * (UP + DOWN)
    both, one = sent_bytes(UP + DOWN) / plain, sent_bytes(UP) / plain
    return {"masked_bytes_ratio": round(both, 4), "masked_bytes_ratio_one_side": round(one, 4)}


def sent_bytes(numbers: int) -> int:
    """Bytes that one member of ten sends for a sum of so many numbers, in all steps."""
    terms = round_terms(MEMBERS, length=numbers)
    name, values = terms.members[0], torch.zeros(numbers, dtype=torch.int64)
    short = round_terms(MEMBERS)
    small = dict.fromkeys(short.members, torch.zeros(short.length, dtype=torch.int64))
    _, members, sent = play(terms, {}, "mask")
    masked = encode_sum_reply(SumReply(name, 1, (members[name].mask(sent[name], values),)))
    sizes = [len(masked)]
    for step in (step for step in STEPS[:-1] if step != "mask"):  # whose replies are as long for any number of values
        played = play(short, small, step)
        reply = reply_of(played.members[name], step, played.sent[name], small)
        sizes.append(len(encode_sum_reply(SumReply(name, 1, (reply,)))))
    sizes.append(len(encode_sum_reply(SumReply(name, 1, (members[name].offer(),)))))
    print(f"   {numbers:,} numbers: {sum(sizes):,} bytes, of them {sum(sizes[1:]):,} beside the masked values")
    return sum(sizes)
