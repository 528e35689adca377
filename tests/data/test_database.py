"""Rows of a database: the same as those of a file, in an order of their own, read only, and no cell in a message."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fedloom.core.errors import Refused
from fedloom.data.database import query_database
from fedloom.data.table import Table
from fedloom.deploy.site.settings import read_site
from tests.support.postgres import postgres_server, programs

NOTES = [("a cough, ten days", 1), ("nothing found; again in May", 0), ("a cough, ten days", 1), ("Übelkeit", 2)] * 2
CANARY = "Mrs-Secret"


def duckdb_file(folder: Path, rows: Sequence[tuple[str, int]]) -> str:
    import duckdb

    with duckdb.connect(str(folder / "ward.duckdb")) as database:
        database.execute("create table notes (text varchar, label decimal(10, 0))")
        database.executemany("insert into notes values (?, ?)", [list(row) for row in rows])
    return str(folder / "ward.duckdb")


def refusal(place: str, query: str) -> str:
    with pytest.raises(Refused) as caught:
        query_database(place, query)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    psycopg = pytest.importorskip("psycopg")
    if programs() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with postgres_server(port) as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPASSWORD", "secret")
        with psycopg.connect(place) as database:
            database.execute("create table notes (text text, label numeric)")
            for row in NOTES:
                database.execute("insert into notes values (%s, %s)", row)
            database.execute("create table names (name text)")
            database.execute("insert into names values (%s)", (CANARY,))
        yield place


def check_rows(place: str) -> None:
    raw = query_database(place, "select text, label from notes")
    assert [*zip(*raw.columns.values(), strict=True)] == sorted(NOTES)
    assert {type(value) for value in raw.columns["label"]} == {int}


def test_a_duckdb_file_gives_its_rows_in_an_order_of_their_own(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(NOTES, len(NOTES))
    for name, rows in (("one", NOTES), ("other", shuffled)):
        (tmp_path / name).mkdir()
        check_rows(duckdb_file(tmp_path / name, rows))


@pytest.mark.parametrize(
    "query",
    [
        "delete from notes",
        "select cast(text as int) from notes",
        "selec",
        "select 1 as a, 2 as a",
        "select missing from notes",
    ],
)
def test_what_duckdb_refuses_is_one_sentence_without_a_cell(tmp_path: Path, query: str) -> None:
    place = duckdb_file(tmp_path, [(CANARY, 0)])
    assert CANARY not in refusal(place, query)


def test_a_file_that_is_no_database_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("text,label\na,b\n")
    assert "leave out the query" in refusal(str(tmp_path / "notes.csv"), "select 1")
    assert "postgresql://" in refusal(str(tmp_path / "absent.duckdb"), "select 1")
    assert "no rows" in refusal(duckdb_file(tmp_path, NOTES), "select text from notes where false")


def test_an_address_with_a_password_is_refused_without_it() -> None:
    for place in ("postgresql://ward:hunter2@db/x", "postgresql://db/x?user=ward&password=hunter2"):
        said = refusal(place, "select 1")
        assert "hunter2" not in said
        assert "PGPASSWORD" in said


def test_a_query_reaches_no_other_file_and_loads_nothing(tmp_path: Path) -> None:
    place, other = duckdb_file(tmp_path, NOTES), tmp_path / "other.txt"
    other.write_text(CANARY)
    for query in (
        f"select content as text from read_text('{other}')",
        f"copy (select 'x') to '{other}'",
        f"copy (select 'x') to '{tmp_path / 'new.txt'}'",
        f"attach '{tmp_path / 'new.duckdb'}' as new",
        f"export database '{tmp_path / 'new'}'",
        "install httpfs",
        "load httpfs",
        "set enable_external_access = true",
    ):
        assert "the database refuses it" in refusal(place, query)
    assert other.read_text() == CANARY
    assert {path.name for path in tmp_path.iterdir()} == {"ward.duckdb", "other.txt"}


@pytest.mark.slow
def test_a_postgresql_server_gives_the_same_rows(postgres: str) -> None:
    check_rows(postgres)


@pytest.mark.slow
@pytest.mark.parametrize(
    "query",
    [
        "delete from notes",
        "select cast(name as int) from names",
        "selec",
        "drop table names",
        "commit; begin read write; delete from notes; commit; select 1 as text",
        "do $$ begin commit; delete from notes; commit; end $$",
    ],
)
def test_what_postgresql_refuses_is_one_sentence_without_a_cell(postgres: str, query: str) -> None:
    assert CANARY not in refusal(postgres, query)
    check_rows(postgres)


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_or_a_wrong_password_is_one_sentence(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cannot be reached" in refusal("postgresql://ward@127.0.0.1:1/x", "select 1")
    monkeypatch.setenv("PGPASSWORD", "wrong")
    assert "password" in refusal(postgres, "select 1")


@pytest.mark.slow
def test_a_run_and_a_site_read_a_postgresql_database_as_they_read_a_file(postgres: str, tmp_path: Path) -> None:
    lines = [f"{text},{label}" if "," not in text else f'"{text}",{label}' for text, label in sorted(NOTES)]
    (tmp_path / "notes.csv").write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    query = "select text, label from notes"
    assert Table(postgres, query=query).load(3) == Table(tmp_path / "notes.csv").load(3)
    (tmp_path / "site.toml").write_text(
        f'name = "ward"\nserver = "s:1"\n[model]\npath = "m"\n[table]\npath = "{postgres}"\nquery = "{query}"\n'
    )
    assert read_site(tmp_path / "site.toml").examples(("0", "1", "2")).texts == tuple(text for text, _ in sorted(NOTES))
