"""The driver of a deployment under storms: whatever gets lost, comes twice or dies, an answer counts once and the run ends."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, given
from rich.console import Console

from fedloom import CA2FL, Averaged, DeltaInt8, FedBuff, FedFa, FedIT, Half, Immediate, ProductDelta, Rounds, Scaffold
from fedloom.cli.status import status_view
from fedloom.core.canary import Canary
from fedloom.core.files import write_json
from fedloom.core.fingerprint import fingerprint
from fedloom.core.limits import Limits
from fedloom.core.server import Server
from fedloom.core.types import Budget, Profile, Task
from fedloom.deploy.link import RawReply
from fedloom.deploy.messages import answer as wire
from fedloom.deploy.messages.messages import (
    EvaluateRequest,
    EvaluateResult,
    JoinRequest,
    Refusal,
    TaskRequest,
    Welcome,
    decode_request,
    encode_reply,
)
from fedloom.deploy.server.driver import Deployment
from fedloom.deploy.server.key_facts import KeyFacts
from fedloom.deploy.server.nodes import MAX_FAILURES
from fedloom.deploy.server.reply_events import REGION
from fedloom.deploy.server.status import REFUSALS_FILE, PrometheusFigures, Status, read_status
from fedloom.deploy.start import evaluate_sites
from fedloom.runs.replay import replay
from fedloom.schedule.fedasync import FedAsync
from tests.support import toys
from tests.support.deployed_processes import QUICK, STORM, TERMS, Killed, Life, turns
from tests.support.simulated_link import Net, Site, Trouble
from tests.support.storms import tries

METHODS = [
    (ProductDelta(), Rounds(3), None),
    (FedIT(), FedFa(3), Half()),
    (Averaged(ProductDelta()), Immediate(), DeltaInt8()),
    (CA2FL(FedIT(), 4), FedBuff(2), None),
    (Scaffold(FedIT(), clients=4), Rounds(2, over_selection=1.5), Half()),
]


def accepted(trace: list[dict[str, Any]]) -> list[int]:
    """The tasks whose answers counted, in order."""
    arrived = [line for line in trace if line["event"]["type"] == "UpdateArrived"]
    return [line["event"]["task"] for line in arrived if not any(c["type"] == "Reject" for c in line["commands"])]


def sites(count: int = 4) -> dict[int, Site]:
    return {100 + k: Site(profile, 1.0 + 2.0 * k) for k, profile in enumerate(toys.profiles(count).values())}


@pytest.mark.parametrize(("method", "schedule", "codec"), METHODS[:2], ids=lambda one: type(one).__name__)
@given(storm=STORM)
@tries(10, phases=(Phase.reuse, Phase.generate))  # a storm does not shrink
def test_an_answer_counts_once_and_none_is_lost(
    method: Any, schedule: Any, codec: Any, storm: dict[str, Any], tmp_path_factory: Any
) -> None:
    weathered(method, schedule, codec, tmp_path_factory.mktemp("storm"), **storm)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "schedule", "codec"), METHODS, ids=lambda one: type(one).__name__)
@given(storm=STORM)
@tries(20, phases=(Phase.reuse, Phase.generate))
def test_nor_in_more_storms_with_whatever_a_client_keeps(
    method: Any, schedule: Any, codec: Any, storm: dict[str, Any], tmp_path_factory: Any
) -> None:
    weathered(method, schedule, codec, tmp_path_factory.mktemp("storm"), **storm)


def weathered(method: Any, schedule: Any, codec: Any, folder: Path, trouble: Trouble, deadly: float, seed: int) -> None:
    """Whatever happens on the wire and to the server: the run ends, no task counts twice, each is trained once where its
    answer counted, a site keeps what it learnt exactly of the tasks that counted, and the trace replays to the byte.
    """
    net = Net(sites(), trouble, seed)

    def make() -> Server:
        start = toys.adapter(2)
        return toys.server(schedule, method, start=start, limits=Limits(versions=12), transfer=codec)

    life = Life(folder, net, make, deadly=deadly)
    assert life.whole() == "12 versions made"
    (folder / "manifest.json").write_text('{"status": "finished"}')
    counted = accepted(life.trace())
    assert len(counted) == len(set(counted))
    whose = {line["event"]["task"]: line["event"]["client"] for line in life.trace() if "task" in line["event"]}
    for site in net.sites.values():
        own = site.profile.client
        mine = [task for task in counted if whose[task] == own]
        assert mine == sorted(mine)
        assert [task for task in site.kept if task in mine] == site.kept  # kept of nothing that did not count
        assert set(mine[:-1]) <= set(site.kept)  # and of all that did, but the last, of which no later task has told
        assert all(sum(n for (task, _), n in site.trained.items() if task == number) == 1 for number in mine)
    assert replay(folder, make()).difference == ""


def test_time_goes_on_after_a_restart_and_what_the_server_missed_does_not_count(tmp_path: Path) -> None:
    net = Net(sites(), seed=3)
    life = Life(tmp_path, net, lambda: toys.server(limits=Limits(versions=6), start=toys.adapter(2)), deadly=0.0)
    turn, turns = Deployment.turn, 0

    def some(self: Deployment) -> Any:
        nonlocal turns
        turns += 1
        if turns == 80:
            raise Killed
        return turn(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Deployment, "turn", some)
        with pytest.raises(Killed):
            life.live()
    before = life.trace()[-1]["time"]
    net.forget()
    net.pause(1000.0)
    assert life.live() == "6 versions made"
    times = [line["time"] for line in life.trace()]
    assert times == sorted(times)
    assert 0 < max(b - a for a, b in pairwise(times)) < 30 < before + 1000


def deployment(net: Net, **more: Any) -> Deployment:
    server = toys.server(**({"limits": Limits(versions=50), "start": toys.adapter(2)} | more.pop("server", {})))
    given: dict[str, Any] = {"timeouts": QUICK, "clock": net.clock} | more
    return Deployment(server, net, TERMS, {}, **given)


def test_a_run_begins_when_enough_clients_are_there_with_all_of_them(tmp_path: Path) -> None:
    net = Net(sites())
    net.back = {101: 20.0}
    running = deployment(net, min_clients=4)
    turns(running, net, 15)
    assert len(running.clients) == 3
    assert running.server.state.next_task == 1
    turns(running, net, 20)
    assert len(running.server.state.dispatched) == 4


def test_a_name_belongs_to_its_key_and_to_one_node() -> None:
    mine = sites(2)
    mine[200] = Site(Profile("c0", 5))
    net = Net(mine, named=False)
    running = deployment(net)
    turns(running, net, 5)
    assert sorted(running.clients) == ["c0", "c1"]
    first, second = (running.nodes.node_of("c0"), 300 - running.nodes.node_of("c0"))
    assert running.nodes.reachable[first].why == ""
    assert "another" in running.nodes.reachable[second].why
    net = Net({7: Site(Profile("c0", 5))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Net, "nodes", lambda self: {7: "c9"})
        running = deployment(net)
        turns(running, net, 5)
    assert not running.clients
    assert "key" in running.nodes.reachable[7].why


@pytest.mark.parametrize("is_region", [True, False])
def test_a_key_is_that_of_a_site_or_of_a_region(is_region: bool) -> None:
    tier = "site" if is_region else REGION
    net = Net({7: Site(Profile("c0", 5, tier=tier))})
    running = deployment(net, facts_of=lambda name: KeyFacts(region=is_region))
    turns(running, net, 5)
    assert not running.clients
    assert f"its key is that of a {'region' if is_region else 'site'}" in running.nodes.reachable[7].why
    free = Net({7: Site(Profile("c0", 5, tier=tier))}, named=False)
    running = deployment(free, facts_of=lambda name: KeyFacts(region=is_region))
    turns(running, free, 5)
    assert running.clients.keys() == {"c0"}, "without keys anybody may be anybody"


def test_who_joins_counts_for_what_it_said_first_and_for_no_more_than_three_times_the_median(tmp_path: Path) -> None:
    net = Net({k: Site(Profile(f"c{k}", 10 if k else 10**12, claimed=False)) for k in range(4)})
    running = deployment(net, min_clients=4, facts_of=lambda name: KeyFacts(examples=500 if name == "c3" else None))
    turns(running, net, 8)
    clients = Status(tmp_path, running, Limits(versions=50)).snapshot()["clients"]
    assert [clients[f"c{k}"]["examples"] for k in range(4)] == [10**12, 10, 10, 500]
    assert [clients[f"c{k}"]["counted"] for k in range(4)] == [30, 10, 10, 500], "the operator's number has no limit"
    assert running.clients["c0"].claimed
    assert not running.clients["c3"].claimed
    net.sites[1].profile = replace(net.sites[1].profile, examples=10**9)
    running.nodes.reachable[1].client = None
    turns(running, net, 8)
    assert running.server.state.registered["c1"] == 10


def test_a_site_whose_answer_is_refused_is_left_alone_so_that_it_cannot_end_the_run(tmp_path: Path) -> None:
    net = Net(sites(3))
    running, spoilt = deployment(net, server={"limits": Limits(versions=50, failures=5)}), list[int]()
    train = net.sites[100].trainer

    class Bad:
        def train(self, work: Any) -> Any:
            spoilt.append(1)
            return [(replace(result, examples=0), local) for result, local in train.train(work)]

    net.sites[100].trainer = Bad()  # type: ignore[assignment]
    turns(running, net, 30)
    assert spoilt
    assert running.server.state.version > 3
    assert "was refused: examples is 0" in running.nodes.reachable[100].why


@pytest.mark.parametrize("lasting", [False, True])
def test_a_site_that_refuses_is_left_alone_at_once_if_the_reason_lasts(lasting: bool) -> None:
    net = Net(sites(2))
    answer = net.sites[100].answer
    refused = list[int]()

    def refuses(body: bytes) -> bytes:
        ask = decode_request(body, 2**30)
        if isinstance(ask, JoinRequest):
            return answer(body)
        refused.append(ask.task.id)
        return encode_reply(Refusal("c0", ask.task.id, "rank 8 is above the site's 4", lasting))

    net.sites[100].answer = refuses  # type: ignore[method-assign]
    running = deployment(net, server={"schedule": FedFa(2)})
    turns(running, net, 30)
    assert len(refused) == len(set(refused))
    assert running.traffic.refused in (len(refused) - 1, len(refused))
    assert len(refused) <= 30 / QUICK.pause + 1 if lasting else len(refused) >= MAX_FAILURES
    assert running.server.state.version > 3
    assert "above" in running.nodes.reachable[100].why


def test_a_site_that_is_silent_for_too_long_is_lost_and_counts_again_when_it_answers() -> None:
    net = Net(sites(3))
    net.sites[102].seconds = 100.0
    running = deployment(net, server={"schedule": FedBuff(2), "limits": Limits(versions=500)})
    turns(running, net, 90)
    assert "c2" not in running.clients
    assert running.server.state.version > 10
    turns(running, net, 200)
    assert running.traffic.late >= 1
    assert running.server.state.dispatched["c2"] >= 2


def test_a_client_that_is_away_for_a_short_time_keeps_its_task() -> None:
    net = Net(sites(2))
    running = deployment(net, server={"schedule": FedFa(2)})
    turns(running, net, 2)
    task = next(task.id for task in running.tasks.values() if task.client == "c1")
    net.back[101], net.free[101] = net.time + 10, net.time + 10
    turns(running, net, 14)
    assert "c1" in running.clients
    assert running.server.state.dispatched["c1"] <= 4
    assert net.sites[101].trained.keys() >= {key for key in net.sites[101].trained if key[0] == task}
    assert sum(n for (number, _), n in net.sites[101].trained.items() if number == task) == 1


def test_garbage_from_a_site_hurts_nobody_else() -> None:
    net = Net(sites(2))
    answer, random = net.sites[100].answer, Random(0)
    net.sites[100].answer = lambda body: random.randbytes(50) if random.random() < 0.5 else answer(body)  # type: ignore[method-assign]
    running = deployment(net, server={"schedule": FedFa(2)})
    turns(running, net, 60)
    assert running.server.state.version > 10
    assert running.accepted.keys() == {"c0", "c1"}


@pytest.mark.parametrize("how", ["garbage", "refuses", "joins", "repeats"])
def test_a_site_that_fails_each_task_at_once_cannot_end_the_run(how: str) -> None:
    """Others train for long: the failures in a row that end a run are then all its own."""
    net = Net(sites(2))
    answer, given, first = net.sites[100].answer, list[int](), list[bytes]()
    net.sites[100].seconds, net.sites[101].seconds = 0.01, 60.0

    def fails(body: bytes) -> bytes:
        ask = decode_request(body, 2**30)
        if isinstance(ask, JoinRequest):
            return answer(body)
        given.append(ask.task.id)
        refusal, profile = Refusal("c0", ask.task.id, "not now", False), Profile("c0", 5, flops=1e9 + len(given))
        first.append(first[0] if first else answer(body))
        replies = {
            "garbage": b"?",
            "repeats": first[0],
            "refuses": encode_reply(refusal),
            "joins": encode_reply(Welcome(profile, 1)),
        }
        return replies[how]

    net.sites[100].answer = fails  # type: ignore[method-assign]
    patience = replace(QUICK, task=None, pause=60.0)
    running = deployment(net, timeouts=patience, server={"schedule": FedFa(1), "limits": Limits(failures=50)})
    turns(running, net, 300)
    assert running.server.state.version >= 2
    assert MAX_FAILURES <= len(given) <= MAX_FAILURES + 300 / patience.pause
    assert len(given) == len(set(given)), "a task is not sent again and again"


def test_before_it_begins_it_says_who_is_ready_and_who_is_connected_only(tmp_path: Path) -> None:
    net = Net(sites(2))
    running = deployment(net, min_clients=3)
    status = Status(tmp_path, running, running.server.limits)
    assert status.waits() == "for 3 more of 3 sites; none is connected"
    turns(running, net, 3)
    assert (status.state(), status.snapshot()["connected"]) == ("waiting", ["c0", "c1"])
    del running.clients["c1"]
    node = next(one for one in running.nodes.reachable.values() if one.client == "c1")
    node.client, node.name = None, "c1"
    assert status.waits() == "for 2 more of 3 sites; ready: c0; connected, loading model and data: c1"
    node.why = "the owner is out"
    assert status.waits() == "for 2 more of 3 sites; ready: c0; connected, but not ready: c1 (the owner is out)"


def test_what_it_waits_for_is_said_in_words(tmp_path: Path) -> None:
    net = Net(sites(2))
    running = deployment(net, min_clients=3)
    status = Status(tmp_path, running, running.server.limits, majority=0.6)
    running.observe, running.evaluate = status, lambda model: {"accuracy": 0.7}
    assert status.snapshot()["scores"] == {}
    turns(running, net, 3)
    assert status.waits() == "for 1 more of 3 sites; ready: c0, c1"
    running.min_clients = 2
    net.sites[102] = Site(Profile("c2", 5))  # type: ignore[index]
    turns(running, net, 6)
    assert "answers of" in status.waits()
    status.write()
    told = read_status(tmp_path)
    assert told["version"] == running.server.state.version
    assert told["scores"] == {"accuracy": 0.7, "base_accuracy": 0.6}, "the majority stands beside every score"
    assert set(told["clients"]) == {"c0", "c1", "c2"}
    console = Console(width=120, file=StringIO())
    console.print(status_view(told, age=100.0))
    console.print(status_view(told, age=100.0, alive=False))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "c2" in text
    assert "written nothing for 100 s" in text
    assert "not running; continue with" in text
    assert text.count("stopped") == 1
    write_json(tmp_path / REFUSALS_FILE, {"c1": 4})
    status.ended = "50 versions made"
    status.write()
    ended = read_status(tmp_path)
    assert ended["calls_refused"] == {"c1": 4}
    assert (ended["state"], ended["waits"]) == ("finished", "")
    console.print(status_view(ended, age=100.0, alive=False))
    text = console.file.getvalue().removeprefix(text)  # type: ignore[attr-defined]
    assert "finished: 50 versions made" in text
    assert "Calls refused: c1 4" in text
    assert "not running" not in text
    figures = {one.name: one for one in PrometheusFigures(status).collect()}
    assert figures["fedloom_version"].samples[0].value == told["version"]
    assert figures["fedloom_answers_accepted"].samples[0].value == status.observation.accepted > 0


def test_an_answer_that_fails_the_canary_is_told_in_the_status(tmp_path: Path) -> None:
    """Scored in the step that asks for it: no turn, and no checkpoint, comes between a merge and what becomes of it."""
    net, scores = Net(sites(3)), iter([0.5, 0.1])
    given = {"limits": Limits(versions=50), "canary": Canary(10, 0.02), "schedule": FedAsync(max_in_flight=3)}
    running = deployment(net, min_clients=3, server=given, check=lambda model: (next(scores, 0.6),))
    outstanding = list[bool]()
    running.save = lambda: outstanding.append(running.server.state.canary.trial is not None)  # type: ignore[attr-defined]
    status = running.observe = Status(tmp_path, running, Limits(versions=50))
    turns(running, net, 12)
    assert running.server.state.version > 0
    assert outstanding
    assert not any(outstanding)
    status.write()
    told = read_status(tmp_path)
    ((client, reason),) = told["set_aside"].items()
    assert reason.startswith(
        "1 answer set aside; the last time the canary score of a version with it is 0.1000, after 0.5000"
    )
    console = Console(width=200, file=StringIO())
    console.print(status_view(told, age=1.0))
    assert f"{client}: 1 answer set aside" in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_was_lost_without_a_word_is_sent_again_ever_more_seldom() -> None:
    net = Net(sites(2))
    lost, send = list[float](), net.send

    def silent(node: int, body: bytes, largest: int) -> str:
        if node == 101 and isinstance(decode_request(body, 2**30), TaskRequest) and len(lost) < 3:
            lost.append(net.time)
            return f"lost{len(lost)}"
        return send(node, body, largest)

    net.send = silent  # type: ignore[method-assign]
    patience = replace(QUICK, task=None, doubt=5.0)
    running = deployment(net, timeouts=patience, server={"schedule": FedFa(2), "limits": Limits(versions=500)})
    turns(running, net, 60)
    first, second, third = lost
    assert 5 <= second - first <= 6
    assert 10 <= third - second <= 11
    assert net.sites[101].trained
    assert all(count == 1 for count in net.sites[101].trained.values())


def test_a_site_that_cannot_read_a_task_fails_it() -> None:
    net = Net(sites(2))
    answer = net.sites[100].answer

    def small(body: bytes) -> bytes:
        reads = isinstance(decode_request(body, 2**30), JoinRequest)
        return answer(body) if reads else encode_reply(Refusal("c0", None, "the message is above 1 MB", True))

    net.sites[100].answer = small  # type: ignore[method-assign]
    running = deployment(net, server={"schedule": FedFa(2)})
    turns(running, net, 12)
    assert "above 1 MB" in running.server.state.last_failure or running.server.state.version > 0
    assert 2 <= running.traffic.refused <= 3  # once a pause
    assert not [task for task in running.tasks.values() if task.client == "c0"]


def test_nobody_speaks_for_the_task_of_another() -> None:
    """A site that answers, or refuses, each task of its own as if it were the other's does the other no harm."""
    for refuses in (True, False):
        net = Net(sites(2))
        honest, own = net.sites[101].answer, net.sites[100].answer
        seen: list[TaskRequest] = []

        def watched(body: bytes, honest: Any = honest, seen: list[TaskRequest] = seen) -> bytes:
            ask = decode_request(body, 2**30)
            seen += [ask] if isinstance(ask, TaskRequest) else []
            return honest(body)

        def false(body: bytes, own: Any = own, seen: list[TaskRequest] = seen, refuses: bool = refuses) -> bytes:
            if isinstance(decode_request(body, 2**30), JoinRequest) or not seen:
                return own(body)
            other = seen[-1].task
            return encode_reply(Refusal("c1", other.id, "no", True)) if refuses else returned_bytes(other)

        net.sites[101].answer, net.sites[100].answer = watched, false  # type: ignore[method-assign]
        running = deployment(net, server={"schedule": FedFa(2)})
        turns(running, net, 40)
        assert "c1" in running.clients
        assert not refuses or running.traffic.late == 0  # no honest answer came to a task that another had ended
        assert net.sites[101].trained.keys() == {(one.task.id, fingerprint(one.task.start.train)) for one in seen}
        assert running.accepted["c1"] >= seen[-2].task.id
        assert running.server.state.version > 3


def returned_bytes(task: Task) -> bytes:
    """An answer to this task, whoever sends it."""
    return wire.encode_result(task, toys.make_result(task.start.train))


def test_after_the_end_clients_evaluate_whatever_happens_on_the_way_and_nothing_is_saved() -> None:
    """One client leaves and comes back, the message to another is lost; a newcomer is not counted any more."""
    net = Net(sites(3))
    running = deployment(net, server={"schedule": FedFa(2), "limits": Limits(versions=2)})
    assert running.run(net.pause) == "2 versions made"
    state, saved = running.server.state, list[float]()
    running.save = lambda: saved.append(net.time)
    before = (state.version, state.failures, dict(state.dispatched), dict(running.profiles))
    result = EvaluateResult("c0", 10, 10, 7, 3.5, 5)
    for site in net.sites.values():
        site.answer = lambda body, site=site: encode_reply(  # type: ignore[method-assign, misc]
            Welcome(site.profile, 1)
            if isinstance(decode_request(body, 2**30), JoinRequest)
            else replace(result, client=site.profile.client)
        )
    send, lost = net.send, list[int]()

    def loses(node: int, body: bytes, largest: int) -> str:
        evaluates = isinstance(decode_request(body, 2**30), EvaluateRequest)
        if not evaluates or node in lost or node == 102:
            return send(node, body, largest)
        lost.append(node)
        if node == 101:
            net.back[101] = net.time + 3.0
        net._put(net.time + 1.0, RawReply(f"lost{node}", node, error="it did not get there"))
        return f"lost{node}"

    net.send = loses  # type: ignore[method-assign]
    net.sites[103] = Site(Profile("c3", 5))  # type: ignore[index]
    net.sites[103].answer = lambda body: encode_reply(Welcome(Profile("c3", 5), 1))  # type: ignore[method-assign]
    start = FedIT().start(state.model, Budget(2, 1), 0)
    evaluation = evaluate_sites(
        running, dict.fromkeys([*running.profiles, "gone"], 2), lambda rank: start, 30.0, net.pause
    )
    assert evaluation.results == {name: replace(result, client=name) for name in ("c0", "c1", "c2")}
    assert evaluation.site_result("gone").reason == "it disconnected before the end"
    assert sorted(lost) == [100, 101]
    assert before == (state.version, state.failures, dict(state.dispatched), dict(running.profiles))
    assert not saved
