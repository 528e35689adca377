"""The exam over regions: each site of each region has its line, as it gave it; what a region cannot say is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import IID, FixedRank, Hierarchy, Limits, Plan, Rounds
from fedloom.aggregate.fedit import FedIT
from fedloom.core.lora import Adapter, server_rank
from fedloom.core.schema import Malformed
from fedloom.core.types import Profile
from fedloom.deploy.messages.messages import (
    EvaluateRequest,
    EvaluateResult,
    Refusal,
    RegionEvaluateResult,
    SiteResult,
    decode_evaluation,
    decode_request,
    encode_reply,
)
from fedloom.deploy.server.driver import Deployment
from fedloom.deploy.server.evaluation import result_metrics
from fedloom.deploy.server.reply_events import REGION
from fedloom.deploy.start import evaluate_sites
from fedloom.report.run_log import read_run_log
from fedloom.runs.prepare import prepare
from tests.support import toys
from tests.support.deployed_processes import QUICK, TERMS, turns
from tests.support.deployment_runs import net_of, run_of
from tests.support.simulated_link import Net, Site
from tests.support.simulated_regions import Country, Killed, adapter_at
from tests.support.sites import task_of, terms_of, trainer_of

LIMIT = 2**30
PATIENT = {"patience": {"pause": 1.0, "doubt": 20.0}}


@dataclass
class Heard:
    """The exams that a site of the net was asked to sit, in front of whatever it does about them."""

    site: Any
    exams: list[bytes] = field(default_factory=list)

    def __call__(self, body: bytes) -> bytes:
        if isinstance(decode_request(body, LIMIT), EvaluateRequest):
            self.exams.append(body)
        answer: bytes = self.site.worker.answer(body)
        return answer

    def marks(self) -> EvaluateResult | Refusal:
        """What the site says to the last of them, asked once more."""
        exam = decode_request(self.exams[-1], LIMIT)
        assert isinstance(exam, EvaluateRequest)
        return decode_evaluation(self.site.worker.answer(self.exams[-1]), LIMIT, exam)


def country(tmp_path: Path, encoder: Path, limits: dict[int, dict[str, Any]]) -> tuple[Country, dict[str, Heard]]:
    """Two regions of two sites, with these limits, and who hears what they are asked."""
    run = run_of(encoder, name="exam", partition=IID(4), plan=Plan(FixedRank(4), 2), held_out=0.25,
                 schedule=Rounds(2), limits=Limits(versions=2), hierarchy=Hierarchy(rounds=2))  # fmt: skip
    net, heard = net_of(tmp_path, prepare(replace(run, hierarchy=None)), encoder), dict[str, Heard]()
    for number, site in net.sites.items():
        worker: Any = site.worker  # type: ignore[attr-defined]
        allowed = worker.site.limits.model_copy(update=limits.get(number, {}))
        worker.site = worker.site.model_copy(update={"limits": allowed})
        heard[worker.site.name] = Heard(site)
        site.answer = heard[worker.site.name]  # type: ignore[method-assign]
    here = Country(tmp_path, encoder, run, net)
    order = json.loads((here.folder / "deployment.json").read_text())
    (here.folder / "deployment.json").write_text(json.dumps(order | PATIENT))
    return here, heard


def only_exams(net: Net, then: Any) -> None:
    """What becomes of an exam that is sent over this net."""
    send = net.send

    def sent(node: int, body: bytes, largest: int) -> str:
        said = then(node) if isinstance(decode_request(body, LIMIT), EvaluateRequest) else None
        return said or send(node, body, largest)

    net.send = sent  # type: ignore[method-assign]


def products(adapter: Adapter) -> torch.Tensor:
    return torch.cat([(one.up @ one.down).flatten() for _, one in sorted(adapter.factors.items())])


def published(folder: Path) -> torch.Tensor:
    found = adapter_at(folder)
    names = sorted(name for name in found if "lora_A" in name)
    return torch.cat([(found[name.replace("lora_A", "lora_B")] @ found[name]).flatten() for name in names])


@pytest.mark.slow
def test_each_site_of_each_region_is_scored_as_it_scores_itself(encoder: Path, tmp_path: Path) -> None:
    """The last version, at each site's own rank (c01 allows 2); a region is killed in the exam, and asked again."""
    here, heard = country(tmp_path, encoder, {1: {"rank": 2}})
    deaths = list[int]()

    def dies(node: int) -> None:
        deaths.append(node)
        if len(deaths) == 1:
            raise Killed

    only_exams(here.below[0], dies)
    with here.open():
        assert here.serve() == "2 versions made"
    assert here.starts == [2, 1]
    log = read_run_log(here.folder / "run")
    assert log.unscored == ()
    homes = {"c00": "region0", "c01": "region0", "c02": "region1", "c03": "region1"}
    assert {str(line["client"]): line["edge"] for line in log.clients} == homes
    wanted = published(here.folder / "run")
    for line in log.clients:
        site = heard[str(line["client"])]
        exam, marks = decode_request(site.exams[-1], LIMIT), site.marks()
        assert isinstance(exam, EvaluateRequest)
        assert isinstance(marks, EvaluateResult)
        rank = 2 if line["client"] == "c01" else 4
        told = {"kind": "client", "client": marks.client, "tier": "site", "rank": rank, "edge": homes[marks.client]}
        assert line == {**told, **result_metrics(marks, False)}
        assert server_rank(exam.start.train) == rank
        if rank == 4:
            assert float(torch.cosine_similarity(products(exam.start.train), wanted, dim=0)) > 0.9999
    page = (here.folder / "run" / "report.html").read_text()
    assert all(region in page for region in homes.values())
    assert "gave no score" not in page


@pytest.mark.slow
def test_who_gave_no_marks_is_told_with_the_reason(encoder: Path, tmp_path: Path) -> None:
    """c00 declines, c01 says nothing, and what region1 says cannot be used."""
    here, _ = country(tmp_path, encoder, {0: {"scores": False}})
    only_exams(here.below[0], lambda node: "into the void" if node == 1 else None)
    spoilt: Any = here.above.sites[1]
    whole = spoilt.answer
    spoilt.answer = lambda body: whole(body).replace(
        b'\\"SiteResult\\",\\"client\\":\\"c02', b'\\"SiteResult\\",\\"client\\":\\"c03'
    )
    with here.open():
        assert here.serve() == "2 versions made"
    log = read_run_log(here.folder / "run")
    assert log.clients == ()
    reasons = {str(line["client"]): (line.get("edge"), str(line["reason"])) for line in log.unscored}
    assert reasons.keys() == {"c00", "c01", "region1"}
    assert reasons["c00"] == ("region0", "it declined: this site tells no scores (limits.scores)")
    assert reasons["c01"] == ("region0", "no answer within 20 s")
    assert reasons["region1"] == (None, "its answer could not be used: a site is listed twice")
    assert "3 of 3 clients gave no score" in (here.folder / "run" / "report.html").read_text()


GOOD = RegionEvaluateResult(
    "ward",
    (SiteResult("c00", 2, EvaluateResult("c00", 10, 10, 7, 3.5, 5)), SiteResult("c01", 4, None, "it declined: no")),
)
FIRST, SECOND = GOOD.sites
MARKS = EvaluateResult("c00", 10, 10, 7, 3.5, 5)
WRONG = [
    replace(GOOD, client="clinic"), replace(GOOD, sites=()), replace(GOOD, sites=(FIRST, FIRST)),
    *(replace(GOOD, sites=(replace(FIRST, **one), SECOND)) for one in (
        {"client": "c02"}, {"rank": 0}, {"rank": 5}, {"rank": 2.0}, {"reason": "none"}, {"result": None}, {"result": FIRST},
        {"result": replace(MARKS, correct=11)}, {"result": replace(MARKS, loss=float("nan"))},
        {"result": replace(MARKS, predictions=9)}, {"result": replace(MARKS, base_loss=1.0)},
        {"client": "", "result": replace(MARKS, client="")},
    )),
    *(replace(GOOD, sites=(FIRST, replace(SECOND, **one))) for one in (
        {"client": "x" * 201}, {"reason": ""}, {"reason": "x" * 2001}, {"client": ""},
    )),
    replace(GOOD, sites=tuple(replace(SECOND, client=f"c{k}") for k in range(10_001))),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda sheet: str(sheet)[:80])
def test_what_no_region_can_say_is_refused(encoder: Path, wrong: Any) -> None:
    exam = exam_of(encoder)
    assert decode_evaluation(encode_reply(GOOD), LIMIT, exam, True) == GOOD
    with pytest.raises(Malformed):
        decode_evaluation(encode_reply(wrong), LIMIT, exam, True)


def test_a_sheet_that_was_cut_is_refused_and_so_are_a_site_s_own_marks(encoder: Path) -> None:
    exam, data = exam_of(encoder), encode_reply(GOOD)
    for length in range(0, len(data), 5):
        with pytest.raises(Malformed):
            decode_evaluation(data[:length], LIMIT, exam, True)
    with pytest.raises(Malformed, match="above the limit"):
        decode_evaluation(data, len(data) - 1, exam, True)
    with pytest.raises(Malformed):
        decode_evaluation(encode_reply(replace(MARKS, client="ward")), LIMIT, exam, True)
    with pytest.raises(Malformed):
        decode_evaluation(data, LIMIT, exam)
    no = Refusal("ward", None, "this site tells no scores", True)
    assert decode_evaluation(encode_reply(no), LIMIT, exam, True) == no


def test_a_region_is_waited_for_twice_as_long_as_a_site(encoder: Path) -> None:
    """It waits for its sites as long as the exam says, and then has to be heard."""
    region, site = Profile("c1", 30, 1e4, 1e5, 1e5, tier=REGION), Profile("c7", 10, 1e4, 1e5, 1e5, tier="site")
    net = Net({0: Site(region), 1: Site(site)})
    server = Hierarchy().over_regions(toys.server(Rounds(2), start=toys.adapter(2)), 2)
    given = {"timeouts": QUICK, "clock": net.clock, "facts_of": net.facts_of}
    running = Deployment(server, net, TERMS, {}, over_regions=True, **given)  # type: ignore[arg-type]
    turns(running, net, 4)
    assert running.clients.keys() == {"c1", "c7"}
    only_exams(net, lambda node: f"into the void {node}")
    start = exam_of(encoder).start
    evaluation = evaluate_sites(running, dict.fromkeys(running.clients, 2), lambda rank: start, 10.0, net.pause)
    assert evaluation.reasons == {"c7": "no answer within 10 s", "c1": "no answer within 20 s"}


def exam_of(encoder: Path) -> EvaluateRequest:
    return EvaluateRequest(
        terms_of(held_out=0.25), 1, "ward", task_of(FedIT(), trainer_of(encoder, terms_of()), None, 1).start, 0
    )
