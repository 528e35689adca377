"""The report: one file that says the same of the same run, survives what a run left behind, and trusts no text."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedloom.core.errors import Refused
from fedloom.core.files import LOCKED, lock
from fedloom.report import facts, tables
from fedloom.report.page import write_report
from fedloom.report.run_log import read_run_log
from tests.support.report_pages import page_text, section_text

Fake = Callable[..., Path]

EMPTY_TAGS = {"meta", "link", "br"}
HOSTILE = "<script>alert('x')</script>"


class Outline(HTMLParser):
    """The tags of a page; it fails where one is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY_TAGS:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def outline(page: Path) -> Outline:
    found = Outline()
    found.feed(page.read_text(encoding="utf-8"))
    found.close()
    assert found.open == []
    return found


def say(page: Path) -> str:
    return " ".join(" ".join(outline(page).words).split())


def test_a_run_becomes_one_small_page_with_its_answer_first(finished_page: Path) -> None:
    page = finished_page
    found, words = outline(page), say(page)
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]
    assert page.stat().st_size < 1_500_000
    assert found.seen.count("svg") == found.seen.count("figure") == 2 * 8  # each for wide and for narrow pages
    assert words.index("After 12 rounds") < words.index("Test accuracy")
    assert "the largest client rank is 8." in words
    assert "num_labels=6" in words
    assert "schedule.per_round" in words


def test_every_colour_of_a_picture_follows_the_page(finished_page: Path) -> None:
    """In light and in dark: each is a variable that the style sheet has for both."""
    text = finished_page.read_text(encoding="utf-8")
    sheet, body = text.split("</style>", 1)
    used = set(re.findall(r"var\(--([\w-]+),#[0-9a-f]{6}\)", body))
    assert {"ink", "muted", "series-1", "kind-1"} <= used
    assert re.findall(r'[:"]\s*#[0-9a-f]{3,8}\b', body) == []
    light, dark = sheet.split("@media (prefers-color-scheme: dark)")
    assert {*used} <= {*re.findall(r"--([\w-]+):", light)}
    assert {*used} <= {*re.findall(r"--([\w-]+):", dark.split("* {")[0])}


def test_a_narrow_page_has_the_panels_of_a_picture_below_each_other(finished_page: Path) -> None:
    text = finished_page.read_text(encoding="utf-8")
    for kind, most in (("broad", 650), ("narrow", 290)):
        views = re.findall(rf'<figure class="{kind}">\s*<svg viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
        assert len(views) == 8
        assert all(float(width) < most for width, _ in views)
    alone = [
        re.findall(r'aria-label="([^"]*)"', part) for part in re.split(r'<figure class="(?:broad|narrow)">', text)[1:]
    ]
    assert alone[::2] == alone[1::2]  # the same words


def test_the_page_loads_and_runs_nothing(finished_page: Path) -> None:
    found, text = outline(finished_page), finished_page.read_text(encoding="utf-8")
    assert {"script", "img", "iframe", "object"}.isdisjoint(found.seen)
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert {url for url in re.findall(r"https?://[^\s\"'<>]+", text) if "www.w3.org" not in url} == set()
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_every_picture_is_named_for_those_who_cannot_see_it(finished_page: Path) -> None:
    text = finished_page.read_text(encoding="utf-8")
    assert len(re.findall(r'<svg [^>]*role="img" aria-label="[^"]{20,}"', text)) == text.count("<svg")


def test_the_same_run_gives_the_same_pictures(finished_page: Path) -> None:
    titles = ("Accuracy", "Rank and energy", "Activity")
    second = page_text(read_run_log(finished_page.parents[1] / "run"), draw=titles, narrow=True)
    for title in titles:
        assert section_text(second, title) == section_text(finished_page.read_text(encoding="utf-8"), title) != ""


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(finished_page: Path, tmp_path: Path) -> None:
    second = write_report([finished_page.parents[1] / "run"], tmp_path / "b.html")
    assert second.read_bytes() == finished_page.read_bytes()


def test_texts_of_users_stay_texts(fake: Fake, tmp_path: Path) -> None:
    ids = [HOSTILE, "_hidden", "$x^2", 'a"b', "\x1b[31mred", "名前", "</svg>", "&amp;"]
    run = fake(name=HOSTILE, clients=ids, labels=[HOSTILE, "_y", "$\\frac{1}"])
    text = page_text(
        read_run_log(run), draw=("Activity", "Rank heterogeneity", "Data")
    )  # the pictures with texts of users
    page = tmp_path / "report.html"
    page.write_text(text, encoding="utf-8")
    assert "script" not in outline(page).seen
    assert HOSTILE in say(page)
    assert "\x1b" not in text


def test_a_run_stopped_before_its_first_round_says_so(fake: Fake, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(
        page_text(read_run_log(fake(rounds=0, status="interrupted")), draw=("Activity", "Rank heterogeneity"))
    )
    words = say(page)
    assert "This run was interrupted: what follows is incomplete. Reason: stopped by the user (Ctrl-C)" in words
    assert "The run ended before its first round; no accuracy was measured." in words
    assert "PeftModel" not in words


@pytest.mark.parametrize("keep", [0, 1, *(pytest.param(k, marks=pytest.mark.slow) for k in (9, 40))])
def test_any_beginning_of_a_run_has_a_report(fake: Fake, tmp_path: Path, keep: int) -> None:
    run = fake(status="running")
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:keep]) + lines[keep][:17])
    assert "--resume" in say(write_report([run], tmp_path / "report.html"))
    log = read_run_log(run)
    assert sum(map(len, (log.versions, log.scores, log.tasks, log.clients))) == keep


def test_a_manifest_alone_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "bare", "status": "running"}')
    assert "This run was ended from outside" in say(write_report([tmp_path], tmp_path / "report.html"))


@pytest.mark.slow
def test_a_large_fleet_stays_small(fake: Fake, tmp_path: Path) -> None:
    run = fake(clients=300, rounds=20, labels=[f"intent {i}" for i in range(30)])
    page = write_report([run], tmp_path / "report.html")
    assert page.stat().st_size < 1_500_000
    assert "40 of 300 clients, evenly from slow to fast" in say(page)
    assert "21 others" in say(page)


def test_several_runs_are_compared(fake: Fake, tmp_path: Path) -> None:
    runs = [fake("a", name="slow", collapse=2.0), fake("b", name="quick", seed=1, collapse=0.2)]
    stopped = fake("c", name="stopped", rounds=0, status="interrupted")
    words = say(write_report([*runs, stopped], tmp_path / "report.html"))
    assert "Of 3 runs, quick ends highest" in words
    assert "stopped: This run was interrupted" in words
    assert "train.lr" in words
    assert "merge.rank" not in words


def test_runs_of_one_name_are_told_apart(fake: Fake) -> None:
    run = fake("a")
    assert facts.run_names([read_run_log(run), read_run_log(fake("b"))]) == ["a", "b"]
    assert facts.run_names([read_run_log(run), read_run_log(run)]) == ["a #1", "a #2"]


def test_a_run_that_nobody_carries_out_any_more_was_killed(fake: Fake, tmp_path: Path) -> None:
    run = fake(status="running")
    assert read_run_log(run).manifest["status"] == "killed"
    assert "--resume" in page_text(read_run_log(run))
    with (run / LOCKED).open("wb") as file:
        assert lock(file)
        assert read_run_log(run).manifest["status"] == "running"
    assert read_run_log(run).manifest["status"] == "killed"


def test_what_the_start_reaches_took_no_time_and_is_no_time_to_a_target(fake: Fake) -> None:
    log = read_run_log(fake())
    low = min(map(facts.accuracy, log.scores))
    assert log.scores[0]["version"] == 0
    reached = facts.first_reaching(log, low)
    assert reached is not None
    assert reached["version"] == log.scores[1]["version"]


def test_the_accuracy_that_all_reached_is_priced_for_each(fake: Fake) -> None:
    logs = [read_run_log(fake("a")), read_run_log(fake("b", seed=1, collapse=0.2))]
    target = min(map(facts.best_accuracy, logs))
    for row, log in zip(tables.runs_table(logs).rows, logs, strict=True):
        reached = facts.first_reaching(log, target)
        assert reached is not None
        assert row[-2] == f"{reached['time']:,.0f}\u00a0s"


def test_settings_are_flat_and_can_be_typed_again(fake: Fake) -> None:
    rows = dict(tables.settings_table(read_run_log(fake())).rows)
    assert rows["schedule"] == "Synchronous()"
    assert rows["schedule.deadline"] == "None"
    assert rows["train.targets"] == "('query', 'value')"
    assert rows["fleet"].startswith("(Tier(name='phone', rank=2, ")
    assert not any(key.endswith("type") for key in rows)


def test_the_terminal_shows_the_same_rows(fake: Fake) -> None:
    log = read_run_log(fake())
    shown, every = tables.summary_table([log]), tables.runs_table([log])
    assert set(shown.head) < set(every.head)
    assert shown.rows == (tuple(every.rows[0][every.head.index(name)] for name in shown.head),)


def test_what_is_no_run_is_refused(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"run folder = '.*nowhere': name a folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(Refused, match="at least one"):
        write_report([], tmp_path / "report.html")
    run = fake()
    (run / "metrics.jsonl").write_text('{"kind": "sco\n{"kind": "score"}\n')
    with pytest.raises(Refused, match=r"metrics\.jsonl:1.*delete this line"):
        read_run_log(run)
    for broken in ("[]", "{"):
        (run / "manifest.json").write_text(broken)
        with pytest.raises(Refused, match="manifest"):
            read_run_log(run)
    assert not (tmp_path / "report.html").exists()
