"""Consent: nothing is done under terms that the site's owner has not accepted, whatever differs in them; and what the owner sees."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedloom.cli import site as site_commands
from fedloom.cli.main import app
from fedloom.cli.site import TermsPrompt
from fedloom.core.errors import Refused
from fedloom.core.rate_by_rank import RateByRank
from fedloom.core.schema import Malformed
from fedloom.deploy.messages.messages import (
    JoinRequest,
    Refusal,
    RunTerms,
    decode_reply,
    decode_request,
    encode_request,
)
from fedloom.deploy.site.consent import MOST_OFFERED, Consents, terms_hash, terms_lines
from fedloom.deploy.site.limits import SiteLimits
from fedloom.deploy.site.settings import Site, read_site
from fedloom.deploy.site.worker import SiteWorker
from fedloom.privacy.private import Private
from fedloom.train.settings import Engine, LoRA, Training, linear
from tests.support.sites import terms_of
from tests.support.storms import tries

TERMS = replace(terms_of(), weights="0" * 12, steps=20, held_out=0.2, versions=12)
TERMS = replace(TERMS, training=replace(TERMS.training, learning_rate=1e-3))
OTHERS: dict[str, Any] = {
    "run": "other", "run_hash": "f" * 12, "model": "other", "rank": 5, "lora": LoRA(scaling=3.0),
    "training": Training(clip=2.0, decay=linear), "engine": Engine(), "threads": 2, "seed": 4, "labels": ("a", "b"),
    "weights": "1" * 12, "held_out": 0.3, "first_adapter": "0" * 64, "date": "2026-01-01", "depth": 3, "steps": 21,
    "versions": 13, "evaluations": 2, "folds": True, "controls": True, "privacy": "noise",
    "records": Private(1.0, 1.0, 10, unit="record"), "least_sum": 5, "sum_threshold": 0.7, "rates": RateByRank(0.5, 4),
}  # fmt: skip
"""Another value of each field."""


def site_in(folder: Path, more: str = "") -> Site:
    """A site that reads nothing: it is refused, or its terms are shown, before anything is loaded."""
    text = 'name = "ward"\nserver = "s:1"\n[model]\npath = "tiny"\n[table]\npath = "rows.jsonl"\n'
    (folder / "site.toml").write_text(text + more, encoding="utf-8")
    return read_site(folder / "site.toml")


def told(worker: SiteWorker, terms: RunTerms) -> Refusal:
    reply = decode_reply(worker.answer(encode_request(JoinRequest(terms, 1))), 10**6, {})
    assert isinstance(reply, Refusal)
    return reply


def test_nothing_is_loaded_before_the_terms_are_accepted(tmp_path: Path) -> None:
    worker = SiteWorker(site_in(tmp_path))
    refusal = told(worker, TERMS)
    assert refusal.reason == f"its owner has not accepted the terms {terms_hash(TERMS)[:12]} yet"
    assert refusal.deciding
    worker.consents.accept(terms_hash(TERMS)[:12], "a test")
    last = told(worker, TERMS)
    assert last.reason.startswith("table.path: the data of this site do not fit the run"), "it goes on to its data"
    assert not last.deciding
    other = told(worker, replace(TERMS, training=replace(TERMS.training, clip=0.5)))
    assert other.deciding
    assert "what was accepted for this run differs in training.clip" in other.reason


def test_terms_that_no_limit_allows_are_not_even_offered(tmp_path: Path) -> None:
    worker = SiteWorker(site_in(tmp_path))
    refusal = told(worker, replace(TERMS, training=replace(TERMS.training, clip=1e-16)))
    assert "its owner can allow it: [limits] least_clip = 1e-16" in refusal.reason
    assert not refusal.deciding
    assert not worker.consents.documents()


def test_a_server_is_not_told_where_the_files_of_a_site_are(tmp_path: Path) -> None:
    """Neither before terms are accepted, nor where the model of accepted ones cannot be loaded."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "no"}\n{"text": "b", "label": "yes"}\n')
    worker, terms = SiteWorker(site_in(tmp_path)), replace(TERMS, model="tiny", labels=("no", "yes"))
    told(worker, terms)
    worker.consents.accept(terms_hash(terms), "a test")
    for asked in (replace(terms, model="large"), terms):
        reason = told(worker, asked).reason
        assert "'tiny'" in reason
        assert str(tmp_path) not in reason


def test_a_run_that_does_not_name_its_weights_is_refused(tmp_path: Path) -> None:
    refusal = told(SiteWorker(site_in(tmp_path)), replace(TERMS, weights=""))
    assert "its owner can allow it: [model] any_weights = true" in refusal.reason


def test_any_other_value_is_another_document() -> None:
    assert OTHERS.keys() == {one.name for one in fields(RunTerms)}
    hashes = [terms_hash(TERMS), *(terms_hash(replace(TERMS, **{name: value})) for name, value in OTHERS.items())]
    assert len({*hashes}) == len(hashes)
    for name, value in OTHERS.items():
        terms = replace(TERMS, **{name: value})
        arrived = decode_request(encode_request(JoinRequest(terms, 3)), 10**6).terms
        assert terms_hash(arrived) == terms_hash(terms), "the same at both ends"


def test_a_change_of_an_accepted_run_is_told_field_by_field(tmp_path: Path) -> None:
    consents = Consents(tmp_path)
    consents.why_not(TERMS)
    assert consents.changes(TERMS) == []
    consents.accept(terms_hash(TERMS), "a test")
    changed = replace(TERMS, training=replace(TERMS.training, clip=0.5), labels=("colour", "animal"))
    assert consents.changes(changed) == [
        "training.clip: 1.0 -> 0.5",
        "labels: ['colour', 'pet'] -> ['colour', 'animal']",
    ]
    assert consents.changes(replace(changed, run_hash="f" * 12)) == [], "another run"
    assert consents.why_not(changed)
    assert not consents.why_not(TERMS), "what was accepted stays so"


def test_acceptance_survives_and_is_pinned_with_its_time(tmp_path: Path) -> None:
    Consents(tmp_path).why_not(TERMS)
    Consents(tmp_path).accept(terms_hash(TERMS), "the owner")
    assert not Consents(tmp_path).why_not(TERMS)
    [one] = Consents(tmp_path).documents()
    assert (one.terms, one.by, one.hash) == (TERMS, "the owner", terms_hash(TERMS))
    assert re.match(r"\d{4}-\d\d-\d\dT", one.accepted)
    assert (tmp_path / "terms").stat().st_mode & 0o777 == 0o700
    given = tmp_path / "given"
    assert not Consents(given, (terms_hash(TERMS),)).why_not(TERMS), "a hash in site.toml"
    assert Consents(given, (terms_hash(TERMS),)).why_not(replace(TERMS, seed=9))
    assert Consents(given).why_not(TERMS), "and only as long as it stands there"


def test_only_what_was_offered_can_be_accepted(tmp_path: Path) -> None:
    consents = Consents(tmp_path)
    for name in ("", "0" * 64, "../../etc"):
        with pytest.raises(Refused, match="no server has offered such a document"):
            consents.accept(name, "a test")
    consents.why_not(TERMS)
    with pytest.raises(Refused, match="no server has offered such a document"):
        consents.accept(terms_hash(TERMS)[:11], "a test")
    path = tmp_path / "terms" / f"{terms_hash(TERMS)}.bin"
    path.write_bytes(encode_request(JoinRequest(replace(TERMS, seed=9), 0)))
    assert consents.documents() == [], "a document that was exchanged is none"


def test_a_server_cannot_fill_the_disk_with_documents(tmp_path: Path) -> None:
    consents = Consents(tmp_path)
    consents.why_not(TERMS)
    consents.accept(terms_hash(TERMS), "a test")
    for seed in range(MOST_OFFERED + 5):
        consents.why_not(replace(TERMS, seed=100 + seed))
    documents = consents.documents()
    assert len(documents) == MOST_OFFERED + 1
    assert sum(bool(one.accepted) for one in documents) == 1


def test_nor_with_documents_that_grow_where_they_are_kept(tmp_path: Path) -> None:
    """A message may have characters as they are; a document has an escape for each, and must still be read again."""
    large = replace(TERMS, labels=tuple(f"{number}" + "\N{GRINNING FACE}" * 990 for number in range(1000)))
    with pytest.raises(Malformed, match="above the limit"):
        Consents(tmp_path).why_not(large)
    assert not [*tmp_path.rglob("*.bin")]


@tries(200)
@given(st.text(min_size=1, max_size=300), st.text(max_size=500), st.lists(st.text(min_size=1, max_size=50), min_size=1))
def test_the_terms_fit_a_terminal_and_do_nothing_to_it(run: str, privacy: str, labels: list[str]) -> None:
    terms = replace(TERMS, run=run, privacy=privacy, labels=tuple(labels))
    lines = terms_lines(terms, SiteLimits(), ["a" * 200])
    assert max(map(len, lines)) <= 80
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e]", "".join(lines))


def test_noise_in_training_is_told_with_its_promise_and_nothing_is_promised_without() -> None:
    records = Private(0.5, 1.13, 6, "record", (8.0, 1e-5))
    noisy, plain = (" ".join(" ".join(terms_lines(one, SiteLimits(), ())).split()) for one in
                    (replace(TERMS, records=records), TERMS))  # fmt: skip
    for words in (
        "1.13 x a clip of 0.5",
        "most 6 tasks, epsilon 8",
        "any one row, by an epsilon that this site adds up",
    ):
        assert words in noisy
        assert words not in plain
    assert "whether a known sentence is among them, can be inferred" in plain
    assert "known sentence" not in noisy


def test_the_owner_sees_all_that_a_limit_bounds() -> None:
    text = "\n".join(terms_lines(TERMS, SiteLimits()))
    for word in (
        terms_hash(TERMS), "0" * 12, "colour, pet", "at most 4", "all layers", "AdamW, learning rate 0.001", "0.1 to 10",
        "8 rows", "at most 20", "at most 160 (20 x 8)", "32 tokens", "0.2 of the rows", "version 12", "1 x at the end",
        "nothing is promised", "What this means:", "Rare words", "the share of each label",
    ):  # fmt: skip
        assert word.lower() in text.lower(), word
    ruled = "\n".join(terms_lines(replace(TERMS, rates=RateByRank(0.5, 4)), SiteLimits()))
    assert "rate at rank r times (4 / r) ** 0.5" in " ".join(ruled.split())
    refused = "\n".join(terms_lines(replace(TERMS, training=replace(TERMS.training, clip=1e-16)), SiteLimits()))
    assert "The limits of this site refuse it all the same:" in refused


# The commands --------------------------------------------------------------------------------------------------------


def offered(folder: Path, terms: RunTerms) -> Consents:
    consents = Consents(site_in(folder).folder)
    consents.why_not(terms)
    return consents


def test_an_owner_without_a_terminal_accepts_by_command(tmp_path: Path) -> None:
    consents, config = offered(tmp_path, TERMS), str(tmp_path / "site.toml")
    runner, name = CliRunner(), terms_hash(TERMS)
    shown = runner.invoke(app, ["site", "terms", "--config", config])
    assert shown.exit_code == 0
    assert name in shown.output
    done = runner.invoke(app, ["site", "accept", "--config", config, name[:12]])
    assert (done.exit_code, consents.why_not(TERMS)) == (0, "")
    again = runner.invoke(app, ["site", "terms", "--config", config])
    assert "No open terms." in again.output
    assert f"Accepted {name} toy" in again.output


def test_join_accepts_the_first_terms_only_and_no_change_of_accepted_ones(tmp_path: Path) -> None:
    consents = offered(tmp_path, replace(TERMS, seed=1))
    prompt = TermsPrompt(read_site(tmp_path / "site.toml"), tmp_path / "site.toml", accept=True)
    prompt.since = consents.documents()[0].offered + 1e-6
    prompt.look()
    assert consents.why_not(replace(TERMS, seed=1)), "what was offered before is not the first"
    prompt.since = 0.0
    prompt.shown = {terms_hash(replace(TERMS, seed=1))}
    consents.why_not(TERMS)
    prompt.look()
    assert not consents.why_not(TERMS)
    consents.why_not(other := replace(TERMS, seed=2, run_hash="e" * 12))
    prompt.look()
    assert consents.why_not(other), "once"
    prompt.accept = True
    consents.why_not(changed := replace(TERMS, seed=5))
    prompt.look()
    assert consents.why_not(changed), "a change of an accepted run is for the owner"


@pytest.mark.parametrize(("typed", "accepted"), [("y\n", True), ("\n", False), ("no\n", False)])
def test_a_terminal_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, accepted: bool) -> None:
    consents = offered(tmp_path, TERMS)
    pipe = tmp_path / "typed"
    pipe.write_text(typed)
    with pipe.open() as stdin:
        monkeypatch.setattr(site_commands, "is_terminal", lambda: True)
        monkeypatch.setattr("sys.stdin", stdin)
        prompt = TermsPrompt(read_site(tmp_path / "site.toml"), tmp_path / "site.toml", since=0.0)
        prompt.look()
        assert consents.why_not(TERMS)
        prompt.look()
    assert (consents.why_not(TERMS) == "") is accepted
