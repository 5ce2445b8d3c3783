"""SQL to either kind of database, past the code that is tested."""

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

OLDER = Path(__file__).parent / "older_databases"


def run(url: str, script: str) -> None:
    """Run statements, and commit them."""
    if file := url.partition("sqlite:///")[2]:
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.executescript(script)
        return
    import psycopg  # here: it needs cluster/requirements.txt

    with psycopg.connect(url) as connection:
        connection.execute(script)


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    """The rows of a query."""
    if file := url.partition("sqlite:///")[2]:
        with contextlib.closing(sqlite3.connect(file)) as connection:
            return connection.execute(query).fetchall()
    import psycopg

    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()


def older(url: str) -> str:
    """The dump of a database of this kind that an earlier version has written, before there were revisions."""
    return (OLDER / f"{url.partition(':')[0]}.sql").read_text()
