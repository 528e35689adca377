"""A sum that is being opened in a deployment: the masked rounds of all its blocks in lock step, over the sites that hold them.

The rounds are `privacy.secure_sum`'s; here are who is asked what, who has replied, and when a step is over. A member that refuses,
replies what cannot be used, is lost or takes too long is out of the sum from that step on. A block whose round is dropped is left
out, and without the first block there is no sum. Nothing of this is saved: after a restart the sum has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import getLogger

from fedloom.aggregate.shared.parts import add_part, block_part, empty_sums, flat_part, part_from_flat
from fedloom.core.errors import Refused
from fedloom.core.events import OpenSum, SlotBlock, SumFailed, SumOpened
from fedloom.core.schema import Malformed
from fedloom.core.types import ClientId, Task
from fedloom.deploy.messages.container import read_header
from fedloom.deploy.messages.messages import RunTerms, SumRequest
from fedloom.deploy.messages.sum_messages import SUM_REPLY, BlockStep, decode_sum_reply
from fedloom.deploy.messages.sum_rules import summed_digest
from fedloom.deploy.server.reply_events import MAX_REPLY, SITE_REPLY
from fedloom.privacy.secure_sum.group import GroupRound
from fedloom.privacy.secure_sum.messages import RoundTerms, ToMember

LOG = getLogger("fedloom.deploy.server")


def anybody(member: ClientId, body: bytes, signature: str) -> bool:
    """Accept a signature without looking at it: here the transport tells who sends, and the members look at it themselves."""
    return True


@dataclass(slots=True)
class SumExchange:
    """Exchange of messages of one sum.

    Fields:
        asked: what is to be summed.
        tasks: the members' tasks, by number.
        rounds: a round for each block that is not dropped.
        waiting: who has not replied in this step, and what each is sent.
        began: when the step began (s of the run).
        reason: why the first block was dropped ("": it was not).
    """

    asked: OpenSum
    tasks: Mapping[int, Task]
    rounds: list[tuple[SlotBlock, GroupRound]]
    waiting: dict[ClientId, tuple[BlockStep, ...]] = field(default_factory=dict)
    began: float = 0.0
    reason: str = ""

    @classmethod
    def begin(
        cls, now: float, incarnation: int, asked: OpenSum, tasks: Mapping[int, Task], run: RunTerms
    ) -> SumExchange:
        """Begin with the first step.

        Args:
            now: seconds of the run.
            incarnation: number of the server's start; in one, no two sums have the same first task.
            asked: what is to be summed.
            tasks: tasks of the members, by number.
            run: terms of the run.
        """
        exchange = cls(asked, {number: tasks[number] for block in asked.blocks for number in block.tasks}, [])
        for block in asked.blocks:
            given = {tasks[number].client: tasks[number].start for number in sorted(block.tasks)}
            members, start = tuple(sorted(given)), given[tasks[block.tasks[0]].client]
            length = len(flat_part(start, block_part(empty_sums(start), block.first, block.last)))
            name, bits = f"{run.run_hash}/{incarnation}/{asked.task}/{block.first}", asked.codec.bits
            digests = tuple(summed_digest(run, given[member], block.first, block.last) for member in members)
            terms = RoundTerms(name, members, length, bits, asked.least, asked.threshold, digests)
            exchange.rounds.append((block, GroupRound(terms, anybody)))
        exchange._ask(now, lambda group: dict.fromkeys(group.terms.members, group.terms))
        return exchange

    @property
    def largest_reply(self) -> int:
        """Bytes of a reply, at most: all blocks masked, in words of 32 bits."""
        return SITE_REPLY + 4 * sum(group.terms.length for _, group in self.rounds)

    def request(self, terms: RunTerms, incarnation: int, client: ClientId) -> SumRequest:
        """Return what is asked of a client that is waited for."""
        number = next(number for number, task in self.tasks.items() if task.client == client)
        return SumRequest(terms, incarnation, client, number, self.waiting[client])

    def drop(self, client: ClientId) -> None:
        """Wait for this client no longer: it is out of the sum unless its values are in it already."""
        self.waiting.pop(client, None)

    def receive(self, request: SumRequest, body: bytes) -> None:
        """Take the reply to a request. One that cannot be used puts its client out of the sum; one to another step does nothing."""
        client = request.client
        if self.waiting.get(client) != request.steps:
            return
        del self.waiting[client]
        groups = {group.terms.digest: group for _, group in self.rounds}
        try:
            if SUM_REPLY not in read_header(body):
                raise Malformed("it refuses")
            reply = decode_sum_reply(body, MAX_REPLY)
            if len({one.round for one in reply.messages}) != len(request.steps):
                raise Malformed("it replies about other blocks than it was asked about")
            for message in reply.messages:
                if message.member != client or message.round not in groups:
                    raise Malformed("it replies for another member, or about another round")
                groups[message.round].receive(message)
        except (Malformed, Refused) as error:
            LOG.error("%s is out of sum %d: %s", client, self.asked.task, error)

    def advance(self, now: float, seconds: float) -> SumOpened | SumFailed | None:
        """End the step when all are there or its seconds are over, and begin the next; after the last, return how the sum ended."""
        if self.waiting and now < self.began + seconds:
            return None
        self._ask(now, lambda group: group.advance())
        if self.reason:
            return SumFailed(self.asked.task, self.reason)
        return None if self.waiting else self._opened()

    def _ask(self, now: float, messages_of: Callable[[GroupRound], Mapping[ClientId, ToMember | RoundTerms]]) -> None:
        """Begin a step: each member is sent what the rounds of its blocks have for it. A round that is dropped is left out."""
        self.began, steps, rounds = now, dict[ClientId, list[BlockStep]](), self.rounds
        self.rounds = []
        for block, group in rounds:
            try:
                messages = messages_of(group)
            except Refused as error:
                LOG.warning("directions %d to %d are not summed: %s", block.first, block.last - 1, error)
                self.reason = self.reason or ("" if block.first else error.remedy)
                continue
            self.rounds.append((block, group))
            for client, message in messages.items():
                steps.setdefault(client, []).append(BlockStep(block.first, block.last, message))
        self.waiting = {client: tuple(every) for client, every in steps.items()}

    def _opened(self) -> SumOpened:
        """Return the sums of all blocks that were opened."""
        blocks, last = list[SlotBlock](), self.rounds[-1][0]
        start = self.tasks[last.tasks[0]].start
        sums = block_part(empty_sums(start), 0, last.last)
        for block, group in self.rounds:
            like = block_part(sums, block.first, block.last)
            add_part(sums, part_from_flat(start, like, group.total), block.first)
            inside = tuple(number for number in block.tasks if self.tasks[number].client in group.survivors)
            blocks.append(SlotBlock(block.first, block.last, inside))
        return SumOpened(self.asked.task, tuple(blocks), sums)
