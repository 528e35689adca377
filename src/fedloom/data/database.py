"""Rows of a database, by a query of whoever owns it: PostgreSQL, or a DuckDB file.

What a query may read is for the database to allow. It may come with a run file from somebody else. So it is one statement, the
connection is read-only, DuckDB opens no other file and no host, and nothing that a database says about cells is passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from fedloom.core.errors import Refused
from fedloom.core.text import first_line
from fedloom.data.raw_table import RawTable, check_column_names, table_of_columns

SECONDS_TO_CONNECT = 10
"""Seconds to wait for a database that does not answer."""

QUERY = "the query"
"""What messages show of it: it may name a person."""

Answer: TypeAlias = tuple[Sequence[str], Sequence[Sequence[object]]]


def query_database(place: str, query: str) -> RawTable:
    """Return the rows of a query, in the order of their contents: a database gives them in any order, and a run must repeat.

    Args:
        place: address of a PostgreSQL database as `postgresql://user@host/name`, or the path of a DuckDB file.
        query: a statement that returns one column for each that the run names.

    Raises:
        Refused: a database that cannot be reached or read, an address with a password, a query that fails or returns no rows.
    """
    ask = ask_postgres if is_postgres(place) else ask_duckdb
    names, rows = ask(place, query)
    check_column_names(list(names), place)
    if not rows:
        raise Refused("data.query", QUERY, f"it returns no rows of {place}")
    ordered = sorted(rows, key=lambda row: [(value is not None, str(value)) for value in row])
    columns = {name: [_plain_number(row[k]) for row in ordered] for k, name in enumerate(names)}
    return table_of_columns(columns, place)


def is_postgres(place: str) -> bool:
    """Whether this is the address of a PostgreSQL database, and no path."""
    return place.partition("://")[0] in ("postgresql", "postgres")


def ask_postgres(place: str, query: str) -> Answer:
    """Return the column names and rows of a query to PostgreSQL. Raises Refused; never says what stands in a cell."""
    address = _checked_address(place)
    try:
        import psycopg
    except ImportError as error:
        raise Refused("data.path", address, "psycopg is not installed: pip install 'fedloom[postgres]'") from error
    try:
        connection = psycopg.connect(place, connect_timeout=SECONDS_TO_CONNECT, application_name="fedloom")
    except psycopg.Error as error:
        remedy = (
            f"the database cannot be reached ({first_line(error)}); a password belongs into ~/.pgpass or PGPASSWORD"
        )
        raise Refused("data.path", address, remedy) from error
    with closing(connection):
        try:
            connection.read_only = True
            # prepared, it is one statement: after several, "commit" among them, the rest would no longer be read-only
            cursor = connection.execute(query.encode(), prepare=True)
            rows = [] if cursor.description is None else cursor.fetchall()
        except psycopg.Error as error:
            raise Refused("data.query", QUERY, _why(type(error).__name__, error.sqlstate)) from error
        return [column.name for column in cursor.description or ()], rows


def ask_duckdb(place: str, query: str) -> Answer:
    """Return the column names and rows of a query to a DuckDB file. Raises Refused; never says what stands in a cell."""
    try:
        import duckdb
    except ImportError as error:
        raise Refused("data.path", place, "duckdb is not installed: pip install 'fedloom[duckdb]'") from error
    if not Path(place).is_file():
        raise Refused("data.path", place, "there is no such file; give a DuckDB file, or postgresql://user@host/name")
    # read-only is the database alone: a query could still read and write any other file, or name a host
    alone: dict[str, str | bool | int | float | list[str]] = {"threads": 1, "enable_external_access": False}
    alone |= {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    try:
        connection = duckdb.connect(place, read_only=True, config=alone)
    except duckdb.Error as error:
        remedy = f"it is no DuckDB file that can be read ({type(error).__name__}); leave out the query to read a table"
        raise Refused("data.path", place, remedy) from error
    with closing(connection):
        try:
            cursor = connection.execute(query)
            return [column[0] for column in cursor.description or ()], cursor.fetchall()
        except duckdb.Error as error:
            raise Refused("data.query", QUERY, _why(type(error).__name__, None)) from error


def _checked_address(place: str) -> str:
    """Return the address; raise Refused where it holds a password, which would stand in every manifest and log."""
    try:
        parts = urlsplit(place)
    except ValueError as error:
        raise Refused("data.path", "an address", "it is none; write postgresql://user@host/name") from error
    if parts.password is not None or "password=" in parts.query:
        shown = f"{parts.scheme}://...@{parts.hostname or ''}{parts.path}"
        raise Refused("data.path", shown, "a password does not belong here; put it into ~/.pgpass or PGPASSWORD")
    return place


def _why(kind: str, state: str | None) -> str:
    """Say why a query failed: what databases write themselves may quote a cell."""
    code = f", SQLSTATE {state}" if state else ""
    return f"the database refuses it ({kind}{code}); try it in the database's own client"


def _plain_number(value: object) -> object:
    """Return a number of exact decimals as Python's whole or floating number."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value
