"""The site's and the server's side of a sum: real keys, messages as bytes, and what either refuses of the other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedloom.aggregate.shared.parts import integer_parts
from fedloom.core.codec import Summed
from fedloom.core.errors import Refused
from fedloom.core.events import OpenSum, SlotBlock, SumFailed, SumOpened
from fedloom.core.lora import Adapter, Factor, cut_adapter, map_tensors, named_tensors
from fedloom.core.types import Budget, ClientState, Result, Task, TaskStart
from fedloom.deploy.messages.messages import (
    Ready,
    RunTerms,
    SumRequest,
    TaskRequest,
    decode_reply,
    decode_request,
    encode_request,
)
from fedloom.deploy.server.sum_exchange import SumExchange
from fedloom.deploy.site.request_record import RecordEntry, RequestRecord
from fedloom.deploy.site.settings import read_site
from fedloom.deploy.site.sum_member import SumMember
from fedloom.deploy.site.worker import SiteWorker
from fedloom.privacy.secure_sum.messages import RoundTerms
from fedloom.simulate.simulation import HeldPart, open_sum
from tests.support.sites import HASH, terms_of

NAMES = tuple(f"site{number}" for number in range(8))
KEYS = {name: ec.generate_private_key(ec.SECP256R1()) for name in (*NAMES, "stranger")}
RANKS = (2, 2, 2, 2, 4, 4, 4, 4)
CODEC = Summed(16, 0.5, 8)
BLOCKS = (SlotBlock(0, 2, (1, 2, 3, 4, 5, 6, 7, 8)), SlotBlock(2, 4, (5, 6, 7, 8)))
ASKED = OpenSum(1, BLOCKS, 3, 0.5001, CODEC)
TERMS = terms_of(least_sum=3, sum_threshold=0.5001)
WHOLE = Adapter({"a": Factor(torch.randn(4, 5), torch.zeros(6, 4))}, {"head": torch.randn(2, 3)})
TASKS = {
    number: Task(number, name, 0, TaskStart(cut_adapter(WHOLE, rank), "b", codec=CODEC), Budget(rank, 3), 0.0)
    for number, (name, rank) in enumerate(zip(NAMES, RANKS, strict=True), 1)
}


def result(number: int) -> Result:
    draw = torch.Generator().manual_seed(number)
    moved = map_tensors(lambda one: one + 0.2 * torch.randn(one.shape, generator=draw), TASKS[number].start.train)
    return Result(moved, 10, 0, 3, {})


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    for name in NAMES:
        public = KEYS[name].public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


def hold(member: SumMember, task: Task, run: RunTerms = TERMS) -> bytes | None:
    """Let a member hold the result of a task."""
    return member.hold(TaskRequest(run, 1, task, 0), task, result(task.id))


class Sites:
    """All members, each with the answer to its task; and the record of each."""

    def __init__(self, peers: Path, folder: Path) -> None:
        self.folder, self.peers = folder, peers
        self.members = {name: SumMember(name, KEYS[name], peers) for name in NAMES}
        self.records = {name: RequestRecord(folder / f"{name}.jsonl") for name in NAMES}
        self.held(TERMS)

    def answer(self, request: SumRequest) -> bytes:
        """The reply to a request that went over the wire."""
        arrived = decode_request(encode_request(request), 10**7)
        assert isinstance(arrived, SumRequest)
        entry = RecordEntry("sum answered", run_hash=HASH, task=arrived.task)
        return self.members[request.client].answer(arrived, self.records[request.client], entry)

    def begun(self, incarnation: int = 1, asked: OpenSum = ASKED, run: RunTerms = TERMS) -> SumExchange:
        return SumExchange.begin(0.0, incarnation, asked, TASKS, run)

    def held(self, run: RunTerms) -> RunTerms:
        """Train all tasks by other terms, which are returned."""
        for task in TASKS.values():
            hold(self.members[task.client], task, run)
        return run

    def play(
        self, exchange: SumExchange, lost: Mapping[int, Collection[str]] | None = None, steps: int = 9
    ) -> SumOpened | SumFailed | None:
        """Play so many steps; in each some do not answer."""
        ended = None
        for step in range(steps):
            for client in [*exchange.waiting]:
                if client not in (lost or {}).get(step, ()):
                    request = exchange.request(TERMS, 1, client)
                    exchange.receive(request, self.answer(request))
            if ended := exchange.advance(float(100 * step + 100), 60.0):
                break
        return ended


@pytest.fixture
def sites(peers: Path, tmp_path: Path) -> Sites:
    return Sites(peers, tmp_path)


def expected(tasks: Collection[int]) -> SumOpened:
    """What a simulation adds up over these members."""
    blocks = tuple(replace(one, tasks=tuple(number for number in one.tasks if number in tasks)) for one in BLOCKS)
    held = {n: HeldPart("", integer_parts(TASKS[n].start, result(n).adapter), ClientState()) for n in tasks}
    return open_sum(replace(ASKED, blocks=blocks), held)


def same(one: object, other: SumOpened) -> bool:
    assert isinstance(one, SumOpened)
    sums, wanted = named_tensors(one.sums), named_tensors(other.sums)
    assert one.blocks == other.blocks
    return sums.keys() == wanted.keys() and all(bool((sums[name] == wanted[name]).all()) for name in sums)


def test_a_deployment_opens_what_a_simulation_adds_up(sites: Sites) -> None:
    assert same(sites.play(sites.begun()), expected(TASKS))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_who_is_lost_before_its_values_came_is_not_in_the_sum(sites: Sites, step: int) -> None:
    assert same(sites.play(sites.begun(), {step: NAMES[:1]}), expected(TASKS.keys() - {1}))


@pytest.mark.parametrize("step", [3, 4])
def test_who_is_lost_after_its_values_came_is_in_the_sum(sites: Sites, step: int) -> None:
    assert same(sites.play(sites.begun(), {step: NAMES[:2]}), expected(TASKS))


def test_a_block_with_too_few_is_left_out_and_without_the_first_there_is_no_sum(
    sites: Sites, peers: Path, tmp_path: Path
) -> None:
    few = replace(ASKED, blocks=(BLOCKS[0], replace(BLOCKS[1], tasks=(5, 6, 7))))
    opened = sites.play(sites.begun(asked=few), {2: NAMES[6:7]})
    assert isinstance(opened, SumOpened)
    assert [block.tasks for block in opened.blocks] == [(1, 2, 3, 4, 5, 6, 8)]
    assert opened.sums.factors["a"].rank == 2
    (tmp_path / "again").mkdir()
    failed = Sites(peers, tmp_path / "again").play(sites.begun(), {2: NAMES[:2]})
    assert failed == SumFailed(1, "4 members are left, the sum needs 5")


def test_with_too_few_of_a_rank_all_of_it_are_left_out(sites: Sites) -> None:
    """Else a server would lose all of a rank but one, and have sent the others a model that learns nothing."""
    assert same(sites.play(sites.begun(), {0: NAMES[:1], 2: NAMES[1:2]}), expected((5, 6, 7, 8)))


def test_a_member_whose_reply_cannot_be_used_is_out(sites: Sites) -> None:
    exchange = sites.begun()
    for client in NAMES[:7]:
        request = exchange.request(TERMS, 1, client)
        reply = sites.answer(request)
        exchange.receive(request, b"{}" if client == "site0" else reply)
        exchange.receive(request, b"whatever comes twice is not looked at")
    other = exchange.request(TERMS, 1, "site7")
    exchange.receive(other, sites.answer(replace(other, client="site6", task=7, steps=other.steps)))
    assert not exchange.waiting
    assert exchange.advance(0.0, 60.0) is None
    assert {*exchange.waiting} == {*NAMES[1:7]}


def test_a_step_waits_for_everybody_until_its_time_is_over(sites: Sites) -> None:
    exchange = sites.begun()
    for client in NAMES[1:]:
        request = exchange.request(TERMS, 1, client)
        exchange.receive(request, sites.answer(request))
    assert exchange.advance(59.0, 60.0) is None
    assert {*exchange.waiting} == {"site0"}
    assert exchange.advance(60.0, 60.0) is None
    assert {*exchange.waiting} == {*NAMES[1:]}


# What a site refuses ---------------------------------------------------------------------------------------------------


def test_values_go_into_one_round_also_after_a_restart(sites: Sites, peers: Path) -> None:
    """A second sum over others would tell the difference: the values of one site."""
    exchange = sites.begun()
    first = exchange.request(TERMS, 1, "site0")
    assert sites.answer(first) == sites.answer(first), "a request that comes twice gets the same keys"
    again = sites.begun(2).request(TERMS, 1, "site0")
    with pytest.raises(Refused, match="another round"):
        sites.answer(again)
    sites.members["site0"] = SumMember("site0", KEYS["site0"], peers)
    sites.records["site0"] = RequestRecord(sites.folder / "site0.jsonl")
    with pytest.raises(Refused, match="not here"):
        sites.answer(first)
    hold(sites.members["site0"], TASKS[1])  # trained once more
    with pytest.raises(Refused, match="in a sum before"):
        sites.answer(first)


def test_a_sum_of_a_part_and_then_of_the_rest_is_refused(sites: Sites) -> None:
    whole = sites.begun().request(TERMS, 1, "site4")
    assert len(whole.steps) == 2
    sites.answer(replace(whole, steps=whole.steps[1:]))
    with pytest.raises(Refused, match="another round"):
        sites.answer(whole)


@pytest.mark.parametrize(("first", "last"), [(1, 3), (0, 5), (2, 2)])
def test_blocks_that_overlap_or_are_not_there_are_refused(sites: Sites, first: int, last: int) -> None:
    request = sites.begun().request(TERMS, 1, "site4")
    wrong = replace(request.steps[1], first=first, last=last)
    with pytest.raises(Refused, match="overlap"):
        sites.answer(replace(request, steps=(request.steps[0], wrong)))


def test_members_whose_keys_the_owner_has_not_accepted_are_refused(sites: Sites) -> None:
    request = sites.begun().request(TERMS, 1, "site0")
    terms = request.steps[0].message
    assert isinstance(terms, RoundTerms)
    strange = replace(terms, members=(*terms.members, "stranger"), starts=(*terms.starts, terms.starts[0]))
    with pytest.raises(Refused, match="no key of these members"):
        sites.answer(replace(request, steps=(replace(request.steps[0], message=strange),)))


def test_keys_that_the_server_made_for_a_member_are_refused(sites: Sites) -> None:
    sites.members["site1"].key = KEYS["stranger"]
    exchange = sites.begun()
    assert sites.play(exchange, steps=1) is None
    with pytest.raises(Refused, match="without the signature"):
        sites.answer(exchange.request(TERMS, 1, "site0"))


@pytest.mark.parametrize(
    ("changed", "words"), [((1,), "another start"), ((2, 3), "fewer than 3 members got the start")]
)
def test_a_server_that_sends_the_others_a_model_that_learns_nothing_is_refused(
    sites: Sites, changed: Collection[int], words: str
) -> None:
    dead = replace(TASKS[2].start, train=map_tensors(torch.zeros_like, TASKS[2].start.train))
    tasks = {number: replace(task, start=dead) if number in changed else task for number, task in TASKS.items()}
    lying = SumExchange.begin(0.0, 1, ASKED, tasks, TERMS)
    with pytest.raises(Refused, match=words):
        sites.answer(lying.request(TERMS, 1, "site0"))


def test_a_server_that_asks_the_others_for_other_directions_is_refused(sites: Sites) -> None:
    """One member would be asked for directions 2 and 3, the others, in the same round, for two in which nothing is learnt."""
    request = sites.begun(asked=replace(ASKED, blocks=(SlotBlock(2, 4, (5, 6, 7, 8)),))).request(TERMS, 1, "site4")
    moved = replace(request.steps[0], first=0, last=2)
    with pytest.raises(Refused, match="other directions"):
        sites.answer(replace(request, steps=(moved,)))


def test_terms_by_which_the_others_learn_nothing_are_another_round(sites: Sites) -> None:
    slow = replace(TERMS, training=replace(TERMS.training, learning_rate=1e-4))
    hold(sites.members["site0"], TASKS[1], slow)
    request = sites.begun().request(TERMS, 1, "site0")
    with pytest.raises(Refused, match="other terms"):
        sites.answer(replace(request, terms=slow))
    with pytest.raises(Refused, match="not here"):
        sites.answer(request)


def test_numbers_so_coarse_that_a_few_steps_are_none_are_refused(sites: Sites) -> None:
    coarse = replace(TASKS[1], start=replace(TASKS[1].start, codec=replace(CODEC, bound=400.0)))
    hold(sites.members["site0"], coarse)
    with pytest.raises(Refused, match=r"a step of the optimiser moves one by 0\.01"):
        sites.answer(sites.begun().request(TERMS, 1, "site0"))


def test_a_share_that_agrees_below_that_of_the_terms_is_refused(sites: Sites) -> None:
    """With little more than half of eleven, one member on the server's side is enough to have both secrets of another one opened."""
    with pytest.raises(Refused, match=r"0\.5001 of the members are to agree, the run's terms say 0\.6"):
        sites.answer(sites.begun(run=sites.held(terms_of(least_sum=3))).request(terms_of(least_sum=3), 1, "site0"))


def test_members_who_are_told_of_other_starts_do_not_take_part_in_one_round(sites: Sites) -> None:
    """A lie to one member alone is another round to it: the others' keys are for other terms."""
    terms = sites.begun().request(TERMS, 1, "site0").steps[0].message
    assert isinstance(terms, RoundTerms)
    assert replace(terms, starts=(*terms.starts[:1], *["0" * 64] * 7)).digest != terms.digest


@pytest.mark.parametrize(("own", "terms"), [(5, 3), (1, 5)])
def test_the_owner_s_least_number_and_that_of_the_terms_hold(sites: Sites, own: int, terms: int) -> None:
    run = sites.held(replace(TERMS, least_sum=terms))
    for name, least, words in (("site0", 3, "owner wants more"), ("site1", 5, "fewer than 5 members got the start")):
        sites.members[name].least = own
        exchange = sites.begun(asked=replace(ASKED, blocks=BLOCKS[:1], least=least), run=run)
        with pytest.raises(Refused, match=words):
            sites.answer(exchange.request(run, 1, name))


def test_a_site_without_keys_takes_no_part(sites: Sites) -> None:
    sites.members["site0"].peers = None
    with pytest.raises(Refused, match="peers"):
        sites.answer(sites.begun().request(TERMS, 1, "site0"))


def test_a_worker_takes_key_peers_and_least_number_from_its_settings(peers: Path, tmp_path: Path) -> None:
    private = KEYS["site0"].private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (tmp_path / "site0").write_bytes(private)
    head = f'name = "site0"\nserver = "s:1"\nkey = "site0"\npeers = "{peers}"\n'
    more = '[model]\npath = "tiny"\n[table]\npath = "rows.jsonl"\n[limits]\nleast_sum = 7\n'
    (tmp_path / "site.toml").write_text(head + more, encoding="utf-8")
    member = SiteWorker(read_site(tmp_path / "site.toml")).sums
    assert (member.name, member.least, member.peers) == ("site0", 7, peers)
    assert member.key is not None
    assert member.key.private_numbers() == KEYS["site0"].private_numbers()


def test_an_answer_that_a_server_would_refuse_is_not_held(sites: Sites) -> None:
    broken = replace(result(1), adapter=map_tensors(lambda one: one * torch.nan, result(1).adapter))
    with pytest.raises(Refused, match="not fit to be summed"):
        sites.members["site0"].hold(TaskRequest(TERMS, 1, TASKS[1], 0), TASKS[1], broken)
    data = hold(sites.members["site0"], TASKS[1])
    assert data is not None
    assert decode_reply(data, 10**6, TASKS) == Ready("site0", 1)
    plain = replace(TASKS[1], start=replace(TASKS[1].start, codec=None))
    assert hold(sites.members["site0"], plain) is None
