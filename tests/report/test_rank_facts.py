"""The section on rank heterogeneity: its numbers are those of the log, its sentences no surer than the log allows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.report import facts, figures_clients, rank_facts, tables
from fedloom.report.line_table import LineTable
from fedloom.report.run_log import RunLog, read_run_log
from fedloom.report.tables import tier_table
from tests.support.report_pages import page_text

Fake = Callable[..., Path]
HEAD = 1000


def task(
    client: str, rank: int, version: int = 1, kept: float | None = 1.0, fold: int = 0, **more: Any
) -> dict[str, Any]:
    """A merged task of 100 bytes of adapter a direction each way, with the same head for all."""
    down, up = 100 * rank + HEAD + fold, 100 * rank + HEAD
    line = {"kind": "task", "id": 1, "client": client, "version": version, "rank": rank, "sent": 0.0, "arrived": 1.0}
    line |= {"status": "merged", "kept": kept, "bytes_down": down, "bytes_down_dense": HEAD, "bytes_down_fold": fold}
    return line | {"bytes_up": up, "bytes_up_dense": HEAD} | more


def client(name: str, rank: int, accuracy: float, base: float = 0.25) -> dict[str, Any]:
    tier = {"p": "phone", "l": "laptop"}[name[0]]
    line = {"kind": "client", "client": name, "tier": tier, "rank": rank, "held_out": 20}
    return line | {"accuracy": accuracy, "base_accuracy": base}


def log(tmp_path: Path, tasks: Sequence[Any] = (), clients: Sequence[Any] = (), versions: Sequence[Any] = ()) -> RunLog:
    """A run of phones p0, p1, ... and laptops l0, l1, ..."""
    (tmp_path / "manifest.json").write_text("{}")
    names = {line["client"] for line in (*tasks, *clients)}
    speed = {"p": ("phone", 1e9), "l": ("laptop", 1e10)}
    known = {name: {"tier": speed[name[0]][0], "flops": speed[name[0]][1]} for name in sorted(names)}
    manifest = {**read_run_log(tmp_path).manifest, "status": "finished", "name": "toy", "clients": known}
    return RunLog(tmp_path, manifest, LineTable.of(versions), (), LineTable.of(tasks), tuple(clients))


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def section(run: RunLog, *, drawn: bool = False) -> str:
    text = plain(page_text(run, draw=("Rank heterogeneity",) if drawn else ()))
    return text[text.index("<h2>Rank heterogeneity</h2>") : text.index("</section>", text.index("Rank heterogeneity"))]


def test_each_rank_is_told_with_its_tier_and_what_it_received_last(tmp_path: Path) -> None:
    tasks = [
        task("p0", 2, 0, None),
        task("p0", 2, 1, 0.5),
        task("p1", 2, 2, 0.625),
        task("p0", 2, 2, 0.625),
        task("l0", 8, 2),
    ]
    run = log(tmp_path, tasks)
    assert rank_facts.received_energy(run) == {2: [(1, 0.5), (2, 0.625)], 8: [(2, 1.0)]}
    assert plain(rank_facts.received_sentence(run)) == (
        "In its last task a client of rank 2 (phone) received 62.5 % of the energy of the global model and one of rank 8"
        " (laptop) 100.0 %."
    )
    assert "rank 2 (phone, round 1) received 50.0 %" in plain(
        rank_facts.received_sentence(log(tmp_path, [*tasks[:2], tasks[4]]))
    )


def test_more_than_four_ranks_are_told_by_the_lowest_and_the_highest(tmp_path: Path) -> None:
    run = log(tmp_path, [task("p0", rank, 1, rank / 8) for rank in range(1, 9)])
    told = plain(rank_facts.received_sentence(run))
    assert "rank 1 (phone) received 12.5 %" in told
    assert "one of rank 8 (phone) 100.0 %" in told
    assert "rank 4" not in told
    assert [group.name for group in rank_facts.rank_groups(run)] == [f"phone, rank {rank}" for rank in range(1, 9)]
    assert len(figures_clients._some_ranks(list(range(1, 65)))) == figures_clients.LINES


def test_a_fold_gives_every_rank_the_whole_model_and_is_counted_apart(tmp_path: Path) -> None:
    run = log(tmp_path, [task("p0", 2, fold=600), task("l0", 8, fold=600)])
    assert rank_facts.received_sentence(run).startswith(
        "A client of any rank receives the whole of the global model, in part as a fold"
    )
    assert rank_facts.mean_task_bytes(run.tasks[:1], "down") == {"adapter": 200, "fold": 600, "head": HEAD}
    assert rank_facts.mean_task_bytes(run.tasks[:1], "up") == {"adapter": 200, "fold": 0, "head": HEAD}
    assert plain(rank_facts.traffic_sentence(run)) == (
        "A task at rank 2 moves 3 kB down and up together, 28.6 % less than the 4.20 kB at rank 8. Of all traffic 55.6 % is"
        " the head, the same at every rank, and 16.7 % is folds."
    )
    assert tier_table(run).head[-1] == "of it fold"
    assert plain(tier_table(run).rows[0][-1]) == "600 B"


def test_a_frozen_side_counts_what_was_sent_and_not_what_there_is(tmp_path: Path) -> None:
    """The parameter counts of the manifest have no say."""
    frozen = {"bytes_down": HEAD + 100, "bytes_up": HEAD + 50}
    run = log(tmp_path, [task("p0", 2, **frozen), task("l0", 2, bytes_up=0, bytes_up_dense=0, status="cancelled")])
    run = RunLog(
        run.folder,
        {**run.manifest, "model": {"dense_parameters": 1, "lora_parameters_by_rank": {"2": 9999}}},
        tasks=run.tasks,
    )
    rows = {row[0]: dict(zip(tier_table(run).head[8:], row[8:], strict=True)) for row in tier_table(run).rows}
    assert plain(rows["phone"]["Up"]) == "1.05 kB"
    assert plain(tier_table(run).rows[0][tier_table(run).head.index("Up") + 1]) == "1 kB", "of it head"
    assert rank_facts.mean_task_bytes(run.tasks, "up") == {"adapter": 50, "fold": 0, "head": HEAD}


def test_where_no_answer_came_the_ways_down_are_compared(tmp_path: Path) -> None:
    run = log(tmp_path, [task("p0", 2, bytes_up=0, bytes_up_dense=0, status="lost"), task("l0", 8)])
    assert plain(rank_facts.traffic_sentence(run)).startswith(
        "A task at rank 2 moves 1.20 kB down, 33.3 % less than the 1.80 kB at rank 8."
    )


def test_clients_of_low_rank_are_said_to_be_served_worse_only_where_that_is_clear(tmp_path: Path) -> None:
    high = [client(f"l{i}", 8, 0.8 + 0.02 * (i % 2)) for i in range(6)]

    def told(low: Sequence[float]) -> str:
        return plain(
            rank_facts.accuracy_by_rank_sentence(
                log(tmp_path, [], [*(client(f"p{i}", 2, a) for i, a in enumerate(low)), *high])
            )
        )

    spread = rank_facts.standard_error([0.6, 0.64] * 3)
    doubt = math.hypot(spread, rank_facts.standard_error([0.8, 0.82] * 3))
    assert told([0.6, 0.64] * 3) == (
        "On their held-out examples 6 clients of rank 2 reach 62.0 % on average, 6 clients of rank 8 81.0 %:"
        f" 19.0 ± {100 * doubt:.1f} points lower (standard error). That is more than two standard errors: clients of low"
        " rank are served worse. The first are 37.0 points above what always answering their commonest label would give,"
        " the second 56.0 points above it."
    )
    assert "no more than a hint that low ranks are served worse" in told([0.6, 0.64, 0.6])
    assert "less than two standard errors and may be chance" in told([0.2, 1.0, 0.9, 0.8, 0.9])
    assert "A single client tells nothing about its rank" in told([0.6])
    assert "0.0 ± " in told([0.8, 0.82] * 3)
    assert "points apart" in told([0.8, 0.82] * 3)
    assert "are served better" in told([0.95, 0.97] * 3)
    assert "The first are 24.0 points below what always answering" in told([0.0, 0.02])


def test_halves_are_compared_where_there_are_many_ranks(tmp_path: Path) -> None:
    run = log(tmp_path, [], [client(f"p{rank}", rank, rank / 10) for rank in range(1, 8)])
    assert plain(rank_facts.accuracy_by_rank_sentence(run)).startswith(
        "On their held-out examples 3 clients of ranks 1 to 3 reach 20.0 % on average, 3 clients of ranks 5 to 7 60.0 %"
    )


def test_one_rank_is_said_to_be_the_only_one(tmp_path: Path) -> None:
    run = log(tmp_path, [task("p0", 4), task("l0", 4)], [client("p0", 4, 0.5), client("l0", 4, 0.75)])
    told = section(run)
    assert "There is only one rank: every client trains at rank 4." in told
    assert "A client of rank 4 receives the whole of the global model: nothing was cut off in the last tasks." in told
    assert "On held-out examples 2 clients of rank 4 reach 62.5 % on average" in told
    assert "less than the" not in told
    assert "standard error)" not in told


def test_a_server_whose_product_is_zero_says_so(tmp_path: Path) -> None:
    version = {"kind": "version", "version": 1, "time": 1.0, "energy": [0.0, 0.0], "discarded": 0.0}
    run = log(tmp_path, [task("p0", 2, 1, None), task("l0", 8, 1, None)], versions=[version])
    assert (
        rank_facts.received_sentence(run)
        == "The server's own product is zero all the time: there was no energy to send."
    )
    assert not facts.versions_with_energy(run)
    assert "Left, how much" not in section(run)
    assert ("Effective rank", "–", "the server's product is zero") in tables.key_figures(run)


def test_what_was_not_recorded_is_not_claimed(tmp_path: Path) -> None:
    """Run folders of older versions, and broken ones."""
    old = {name: value for name, value in task("p0", 2).items() if name[-5:] not in ("kept", "dense", "_fold")}
    old.pop("kept", None)
    run = log(tmp_path, [old, {**old, "client": "l0", "rank": 8, "bytes_down": 2000}])
    assert rank_facts.received_sentence(run) == ""
    assert plain(rank_facts.traffic_sentence(run)).endswith("How much of it is the head was not recorded.")
    assert rank_facts.mean_task_bytes(run.tasks, "down") == {"all": 1600}
    assert "all (not divided)" in section(run, drawn=True)
    nothing = {name: value for name, value in old.items() if "bytes" not in name}
    assert rank_facts.traffic_sentence(log(tmp_path, [nothing])) == ""
    assert section(log(tmp_path, [nothing]))
    assert rank_facts.accuracy_by_rank_sentence(log(tmp_path, [], [client("p0", 2, math.nan)])) == ""
    assert section(log(tmp_path, [], [client("p0", 2, math.nan), client("l0", 8, 0.5, math.nan)]), drawn=True)


@pytest.mark.parametrize(
    ("transfer", "told"),
    [
        (None, "float32, four bytes each."),
        (
            {"type": "Exact"},
            "float32, four bytes each; rounding took from an answer 0.020 % of its products, 0.300 % of",
        ),
        ({"type": "Half"}, "float16, two bytes each; rounding took from an answer 0.020 % of its products, 0.300 % of"),
        (
            {"type": "HalfChange"},
            "float16, two bytes each, and as differences up; rounding took from an answer 0.020 %",
        ),
        ({"type": "DeltaInt8"}, "float16 down, two bytes each, and as differences in int8 up, one byte each; rounding"),
    ],
)
def test_how_numbers_travelled_and_what_rounding_took(tmp_path: Path, transfer: Any, told: str) -> None:
    rounds = [{"version": k, "rounding": 1e-4 * k, "rounding_change": c} for k, c in ((1, 1e-3), (3, 5e-3))]
    if transfer is None:
        rounds = [{"version": 1, "rounding": None, "rounding_change": None}]
    run = log(tmp_path, [task("p0", 2)], versions=rounds)
    run = replace(run, manifest={**run.manifest, "run": {"transfer": transfer}})
    assert plain(rank_facts.rounding_sentence(run)).startswith(f"Numbers travel as {told}")
    assert told in section(run)


@pytest.mark.parametrize("run", [{}, {"transfer": {"type": "Mine"}}])
def test_nothing_is_said_of_numbers_that_travelled_unknown(tmp_path: Path, run: Any) -> None:
    here = log(tmp_path, [task("p0", 2)])
    assert rank_facts.rounding_sentence(replace(here, manifest={**here.manifest, "run": run})) == ""


def test_without_clients_or_tasks_the_rest_is_still_shown(tmp_path: Path) -> None:
    assert section(log(tmp_path, [task("p0", 2)])).count('<figure class="broad">') == 1
    assert section(log(tmp_path, [], [client("p0", 2, 0.5)])).count('<figure class="broad">') == 1
    assert "Rank heterogeneity" not in page_text(log(tmp_path))


def test_too_many_ranks_to_tell_apart_are_shown_by_tier(tmp_path: Path) -> None:
    run = log(tmp_path, [task(name, rank) for name in ("p0", "l0") for rank in range(1, 6)])
    assert [group.name for group in rank_facts.rank_groups(run)] == ["phone, ranks 1 to 5", "laptop, ranks 1 to 5"]
    section(run, drawn=True)


@pytest.mark.parametrize("clients", [1, 40, pytest.param(300, marks=pytest.mark.slow)])
def test_fleets_of_any_size_have_the_section(fake: Fake, clients: int) -> None:
    told = section(read_run_log(fake(clients=clients)), drawn=clients != 40)
    assert told.count('<figure class="broad">') == 2
    assert "Of all traffic" in told


@pytest.mark.slow
def test_of_very_many_clients_some_are_drawn_and_the_mean_is_of_all(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = read_run_log(fake(clients=60))
    whole = section(run, drawn=True)
    monkeypatch.setattr(figures_clients, "SHOWN_SCORES", 45)
    sample = section(run, drawn=True)
    means = re.compile(r"ranks? [\d to]+: mean [\d.]+ %(?: ± [\d.]+)?")
    assert means.findall(sample) == means.findall(whole) != []
    shown = re.search(r"(\d+) of 60 clients, by rank", sample)
    assert shown is not None
    assert 45 <= int(shown[1]) < 45 + len(rank_facts.rank_groups(run)), "at least one of each group"
    assert "60 clients, by rank" in whole
    assert len(sample) < len(whole)
