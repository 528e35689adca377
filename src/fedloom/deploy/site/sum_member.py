"""A site's part in sums that nobody can look into: it holds what a task changed as whole numbers, and takes part in masked rounds.

The numbers, keys and shares of a round live in memory alone and are gone with the process: a round that a restart interrupts is
over for this site, and is not begun again. That values of a task were asked for stands in the record before the first reply, so
they go into one sum, whatever the server asks for later. The seeds of keys and masks come from the operating system; nothing that
is released depends on them.

Who the other members are is not the server's to say: their public keys lie in the folder `peers` of `site.toml`, NAME.pub each,
where the owner has put them after comparing them with their owners.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.aggregate.shared.parts import block_part, flat_part, is_summed, part_or_reason
from fedloom.core.codec import Summed
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, server_rank
from fedloom.core.types import ClientId, Result, Task
from fedloom.deploy.messages.messages import (
    Ready,
    RunTerms,
    SumRequest,
    TaskRequest,
    encode_reply,
)
from fedloom.deploy.messages.sum_messages import BlockStep, StepReply, SumReply, encode_sum_reply
from fedloom.deploy.messages.sum_rules import summed_digest, why_coarse
from fedloom.deploy.site.request_record import RecordEntry, RequestRecord
from fedloom.deploy.site.site_key import is_signed_by, read_site_key, sign
from fedloom.privacy.secure_sum.member import Identity, MemberRound
from fedloom.privacy.secure_sum.messages import Agreements, KeyList, RoundTerms, ShareDelivery, Survivors

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

LOG = getLogger("fedloom.worker")
LEAST = 3
"""Members of a sum at least, whatever the limits say."""


@dataclass(slots=True)
class SumMember:
    """The member that a site is in sums.

    Fields:
        name: name of the site.
        key: its private key (None: it has none, and takes part in no sum).
        peers: folder with the public keys of the others (None: there is none).
        least: members of a sum at least, as the owner wants it.
        task: the last task whose answer is only summed, with the terms of its run (None: none).
        part: what it changed, as whole numbers.
        rounds: rounds that were begun for it, by digest of their terms, with their first and last direction.
    """

    name: ClientId
    key: EllipticCurvePrivateKey | None
    peers: Path | None
    least: int = LEAST
    task: tuple[RunTerms, Task] | None = None
    part: Adapter | None = None
    rounds: dict[str, tuple[MemberRound, BlockStep]] = field(default_factory=dict)

    def hold(self, request: TaskRequest, task: Task, result: Result) -> bytes | None:
        """Hold what a task changed until it is summed, and return the reply; None for a task whose answer is sent as it is.

        `task` is that of the request, with all its sides. What was held before is let go. Raises Refused for an answer that a
        server would refuse.
        """
        if not is_summed(task):
            return None
        part = part_or_reason(task, result)
        if isinstance(part, str):
            LOG.error("task %d cannot be summed: %s", task.id, part)
            raise Refused("sums", task.id, "its answer is not fit to be summed; its owner finds the reason in the log")
        self.task, self.part, self.rounds = (request.terms, task), part, {}
        return encode_reply(Ready(self.name, task.id))

    def lacks(self, request: TaskRequest) -> bool:
        """Return whether the answer to a task is only summed, and its numbers are not here (any more)."""
        return is_summed(request.task) and not self._holds(request.terms, request.task.id)

    def answer(self, request: SumRequest, record: RequestRecord, entry: RecordEntry) -> bytes:
        """Return the reply to a request; that it asks for the numbers of a task stands in the record before.

        Raises:
            Refused: no honest server asks so, or the numbers were asked for in another sum. Nothing is sent.
        """
        if self._begins(request):
            if (request.terms.run_hash, request.task) in record.counts.summed:
                raise Refused("sums", request.task, "its numbers were asked for in a sum before; two could tell them")
            record.append(replace(entry, kind="sum asked"))
        return encode_sum_reply(self._reply(request))

    def _holds(self, terms: RunTerms, number: int) -> bool:
        return self.task is not None and (self.task[0], self.task[1].id) == (terms, number)

    def _begins(self, request: SumRequest) -> bool:
        """Return whether a request asks for numbers for the first time, so that it has to be written down before it is answered.

        Raises:
            Refused: it cannot be answered: the numbers are not here, were asked for in another round, or keys are missing.
        """
        if not self._holds(request.terms, request.task):
            raise Refused("sums", request.task, "the numbers of this task are not here (any more); the round is over")
        opening = [one for one in request.steps if isinstance(one.message, RoundTerms)]
        known = [one for one in opening if one.message.digest in self.rounds]  # type: ignore[union-attr]
        if opening and (len(opening) < len(request.steps) or (self.rounds and len(known) < len(opening))):
            raise Refused(
                "sums", request.task, "values of this task were asked for in another round; two could tell them"
            )
        return bool(opening) and not known

    def _reply(self, request: SumRequest) -> SumReply:
        """Return what the site sends about each block. Raises Refused for what no honest server asks; the rounds are over then."""
        if self._begins(request):
            self._begin(request)
        return SumReply(self.name, request.task, tuple(self._step(one) for one in request.steps))

    def _begin(self, request: SumRequest) -> None:
        """Begin a round for each block. Blocks must not overlap: a direction in two sums would be in two different ones."""
        members = {peer for one in request.steps for peer in getattr(one.message, "members", ())}
        identity, end = self._identity(members), 0
        assert self.part is not None
        assert self.task is not None
        run, task = self.task
        assert isinstance(task.start.codec, Summed)
        if reason := why_coarse(run, task.start, task.start.codec):
            raise Refused("sums", request.task, reason)
        for one in request.steps:
            if not end <= one.first < one.last <= server_rank(self.part):
                raise Refused("sums", request.task, "blocks of directions that overlap, or that this task has not")
            end = one.last
        rounds = dict[str, tuple[MemberRound, BlockStep]]()
        for one in request.steps:
            assert isinstance(one.message, RoundTerms)
            least = max(LEAST, self.least, request.terms.least_sum)
            member = MemberRound(one.message, identity, secrets.token_bytes(32), least)
            self._require_alike(one.message, one)
            rounds[one.message.digest] = member, one
        self.rounds = rounds

    def _require_alike(self, terms: RoundTerms, block: BlockStep) -> None:
        """Raise Refused unless enough members are asked for the very directions of the very start that came here, by the same terms.

        The sum would be this site's change, were the others sent a model that learns nothing, or asked for directions that do not.
        """
        assert self.task is not None
        run, task = self.task
        if terms.start_of(self.name) != summed_digest(run, task.start, block.first, block.last):
            remedy = "it is about another start, other directions or other terms than came here"
            raise Refused("sums", task.id, remedy)
        if self.name not in terms.sharing_starts(terms.members):
            remedy = (
                f"fewer than {terms.least} members got the start that came here; the others' sum could be taken off"
            )
            raise Refused("sums", task.id, remedy)
        if terms.threshold < run.sum_threshold:
            words = f"{terms.threshold:.4g} of the members are to agree, the run's terms say {run.sum_threshold:.4g}"
            raise Refused("sums", task.id, words)

    def _identity(self, members: Collection[ClientId]) -> Identity:
        """Return who the site is and whom it knows. Raises Refused for members whose keys its owner has not put there."""
        if self.key is None or self.peers is None:
            remedy = (
                "sums take a key of this site (`fedloom keys site`) and a folder with the keys of the others, `peers`"
            )
            raise Refused("peers", None, remedy)
        keys = read_peers(self.peers) | {self.name: self.key.public_key()}
        if strangers := sorted(set(members) - keys.keys()):
            remedy = "no key of these members lies in the folder `peers`; the owner puts it there, or takes no part"
            raise Refused("peers", ", ".join(strangers)[:200], remedy)
        key = self.key
        return Identity(
            self.name,
            lambda body: sign(key, body),
            lambda member, body, signature: member in keys and is_signed_by([keys[member]], body, signature),
        )

    def _step(self, step: BlockStep) -> StepReply:
        message = step.message
        digest = message.digest if isinstance(message, RoundTerms) else message.round
        if digest not in self.rounds:
            raise Refused("sums", "a round that was not begun here", "it is over; values are sent in one round only")
        member, block = self.rounds[digest]
        match message:
            case RoundTerms():
                return member.offer()
            case KeyList():
                return member.share(message)
            case ShareDelivery():
                assert self.part is not None
                assert self.task is not None
                numbers = flat_part(self.task[1].start, block_part(self.part, block.first, block.last))
                return member.mask(message, numbers)
            case Survivors():
                return member.agree(message)
            case Agreements():
                return member.open(message)


def read_peers(folder: Path) -> dict[ClientId, EllipticCurvePublicKey]:
    """Return the keys in a folder, NAME.pub each, by name. Raises Refused."""
    return {path.stem: read_site_key(path) for path in sorted(folder.glob("*.pub"))}
