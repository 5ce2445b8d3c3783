"""Opening the database: its URL, its file, the revision of its tables, and which of its errors are temporary.

The first process to start runs the missing revisions of `cluster/migrations`, under a lock. This module knows SQLite,
PostgreSQL, their drivers and alembic; it knows no table.
"""

import json
import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, StatementError

from cluster.settings import DATA
from service.strict_json import storable

# How many transactions a front runs at once in PostgreSQL, each with its own thread and connection.
CONNECTIONS = 16
DRIVERS = {
    **dict.fromkeys(("sqlite", "sqlite+pysqlite"), "sqlite"),
    **dict.fromkeys(("postgresql", "postgresql+psycopg", "postgres"), "postgresql+psycopg"),
}
FORMS = "it must be sqlite:///<path of a file> or postgresql://<user>:<password>@<host>:<port>/<name>"
# PostgreSQL's advisory lock for migrations: any number that is the same for all fronts.
MIGRATION_LOCK = 0x666C7578
# The revision of databases that were made before there were revisions.
BEFORE_REVISIONS = "1.0"
# How many characters of a string become JSON at a time.
PIECE_CHARACTERS = 1_000_000
# Errors by SQLite's primary result code, a number, or PostgreSQL's SQLSTATE, a text. Those that last, for clients:
LASTING = {
    **dict.fromkeys((sqlite3.SQLITE_FULL, "53100"), "database's disk is full"),
    sqlite3.SQLITE_NOTADB: "database's file is no SQLite database",
    sqlite3.SQLITE_CORRUPT: "database's file is damaged",
    sqlite3.SQLITE_CANTOPEN: "database's file cannot be opened, or its folder cannot be written",
    sqlite3.SQLITE_READONLY: "database's file cannot be written",
    sqlite3.SQLITE_IOERR: "database's file cannot be read or written",
}
# Those that an operator can end: a full disk, a read-only database.
REPAIRABLE = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR}
REPAIRABLE |= {"53100", "25006"}
# Those that pass: conflicts of two transactions, too many connections, a lock that is taken, a server that restarts.
PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
PASSING |= {"40001", "40P01", "53300", "55P03", "57P01", "57P02", "57P03"}
# A refused connection has no code, only text. Most reasons are temporary, but not these.
MISTAKES = re.compile(r"does not exist|authentication failed|no password supplied|pg_hba\.conf|invalid port")


class Unusable(Exception):  # noqa: N818 (a state, not an accident)
    """A database that cannot be used as it is: a sentence for the operator."""


def open_engine(url: str) -> sa.Engine:
    """An engine for a URL of SQLAlchemy's, Unusable for a wrong one; SQLite's file is made, for this user alone."""
    address = _parse(url)
    sqlite = address.drivername == "sqlite"
    if sqlite:
        _make(Path(address.database).resolve())
    # One connection for SQLite: of several that write, all but one would poll for the lock.
    engine = sa.create_engine(
        address,
        pool_size=1 if sqlite else CONNECTIONS,
        max_overflow=0,
        hide_parameters=True,  # errors are logged
        json_serializer=_to_json,
        json_deserializer=_from_json,
    )
    sa.event.listen(engine, "handle_error", _blame_data)
    if sqlite:
        sa.event.listen(engine, "connect", _share_sqlite)
    return engine


def migrate(connection: sa.Connection) -> None:
    """Bring the tables to our newest revision, all within this connection's transaction.

    A newer expansion than ours (1.1 after 1.0) is left as it is: older versions can work with it. Unusable is raised
    for other tables with our names, and for a revision that we cannot work with.
    """
    sqlite = connection.dialect.name == "sqlite"
    if sqlite:
        if (found := connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()) != "ok":
            damage = found.splitlines()[-1].rstrip(".")
            raise Unusable(f"DATABASE_URL: the {LASTING[sqlite3.SQLITE_CORRUPT]}: {damage}.")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
    config = _alembic(connection)
    script = ScriptDirectory.from_config(config)
    newest, known = script.get_current_head(), {each.revision for each in script.walk_revisions()}
    current = ",".join(MigrationContext.configure(connection).get_current_heads())
    if not current and _has_our_tables(connection):
        command.stamp(config, BEFORE_REVISIONS)
    if current and current not in known:
        _judge(current, newest)
    else:
        command.upgrade(config, "head")
    if sqlite:
        _narrow(Path(connection.engine.url.database).resolve())


def may_pass(error: DBAPIError) -> bool:
    """Whether a retry may succeed soon, by itself: a lost connection, a restart, another's lock."""
    code = _code(error)
    if code is None and isinstance(error, OperationalError):
        return not MISTAKES.search(str(error.orig))
    return code in PASSING or str(code).startswith("08") or error.connection_invalidated  # 08: a broken connection


def may_be_repaired(error: DBAPIError) -> bool:
    """Whether a retry may succeed after somebody has made room, or let the database be written again."""
    return _code(error) in REPAIRABLE


def describe(error: DBAPIError) -> str:
    """The error for clients, such as `database is away`, without any of the data or of the database's own words."""
    if said := LASTING.get(_code(error)):
        return said
    return "database is away" if may_pass(error) else "database reports an error"


def unusable(error: DBAPIError) -> Unusable:
    """The error for the operator, with the database's own words."""
    said = (str(error.orig).splitlines() or [""])[0].rpartition("failed: ")[2]
    return Unusable(f"DATABASE_URL: the {describe(error)}: {said[:200].rstrip('.')}.")


def _to_json(value: Any) -> str:  # noqa: ANN401 (JSON)
    return "".join(_json_pieces(value))


def _json_pieces(value: Any) -> Iterator[str]:  # noqa: ANN401 (JSON)
    """JSON for the tables, piece by piece.

    A string of an input may have hundreds of megabytes: encoding it at once, or copying it more than once, would hold
    the GIL for seconds.
    """
    match value:
        case dict():
            yield "{"
            for number, (key, item) in enumerate(value.items()):
                yield f"{', ' if number else ''}{json.dumps(key, ensure_ascii=False)}: "
                yield from _json_pieces(item)
            yield "}"
        case str():
            yield '"'
            for start in range(0, len(value), PIECE_CHARACTERS):
                yield json.dumps(value[start : start + PIECE_CHARACTERS], ensure_ascii=False)[1:-1]
            yield '"'
        case _:
            yield json.dumps(value, ensure_ascii=False, allow_nan=False)


def _from_json(text: str) -> Any:  # noqa: ANN401 (JSON)
    """JSON from the tables; null where it is none, which an older version may have written: other rows must be read."""
    try:
        return storable(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _code(error: DBAPIError) -> int | str | None:
    """SQLite's primary result code, or PostgreSQL's SQLSTATE; 0 or None where the driver gives none."""
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    return getattr(error.orig, "sqlstate", None)


def _parse(url: str) -> sa.URL:
    """The URL with its driver; messages repeat only its scheme, since the rest may hold the password."""
    try:
        address = sa.make_url(url)
        port = address.port
    except (ArgumentError, ValueError):
        raise Unusable(f"DATABASE_URL cannot be read; {FORMS}, what is special in it written as %XX.") from None
    if address.drivername not in DRIVERS:
        raise Unusable(f"DATABASE_URL begins with {address.drivername[:40]!r}; {FORMS}.")
    address = address.set(drivername=DRIVERS[address.drivername])
    if address.drivername == "sqlite":
        if address.host or not address.database or address.database.startswith((":memory:", "file:")):
            raise Unusable("DATABASE_URL names no file; it must be sqlite:///<path of a file>, which all fronts share.")
    elif "@" in f"{address.host}{address.database}" or not (port is None or 0 < port < 2**16):
        raise Unusable(f"DATABASE_URL has no such host or port; {FORMS}, what is special in it written as %XX.")
    return address


def _make(file: Path) -> None:
    """Create a missing file, readable by this user alone; SQLite's files beside it get the same mode."""
    try:
        if file.parent == DATA:
            DATA.mkdir(exist_ok=True)
        # An existing file is not opened: closing it would release this process's locks on it.
        os.close(os.open(file, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        if not file.is_file():
            raise Unusable("DATABASE_URL names something that is no file; it must be a file of SQLite's.") from None
    except OSError as error:  # its own text would name the path
        raise Unusable(f"DATABASE_URL: the file cannot be made: {error.strerror}.") from None


def _narrow(file: Path) -> None:
    """Let this user alone read the file and SQLite's files beside it: an earlier version let others."""
    try:
        for each in (file, file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}-shm")):
            if each.exists() and stat.S_IMODE(each.stat().st_mode) & 0o077:
                each.chmod(0o600)
    except OSError as error:
        raise Unusable(f"DATABASE_URL: others may read the file, and it stays so: {error.strerror}.") from None


def _share_sqlite(connection: sqlite3.Connection, _: object) -> None:
    """Set up a connection: readers do not wait for writers, writers wait for one another, and commits are on disk.

    Deleted data is overwritten, since it may be a secret.
    """
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def empty_log(engine: sa.Engine) -> None:
    """Empty SQLite's write-ahead log, which holds earlier contents of rows; PostgreSQL's is the operator's business."""
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


def _blame_data(context: sa.ExceptionContext) -> Exception | None:
    """A StatementError for data that the driver cannot send, such as half a character: some raise Python's errors."""
    error = context.original_exception
    if not isinstance(error, ValueError | OverflowError | RecursionError):
        return None
    return StatementError("The data cannot be sent.", None, None, error)


def _alembic(connection: sa.Connection) -> Config:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "cluster:migrations")
    return config


def _has_our_tables(connection: sa.Connection) -> bool:
    """Whether there are tables of BEFORE_REVISIONS; Unusable, with the differences, where they are not the same."""
    with sa.create_engine("sqlite://").begin() as scratch:
        command.upgrade(_alembic(scratch), BEFORE_REVISIONS)
        expected = sa.MetaData()
        expected.reflect(scratch, only=lambda name, _: name != "alembic_version")
    if not expected.tables.keys() & set(sa.inspect(connection).get_table_names()):
        return False
    names = {"compare_type": False, "compare_server_default": False}
    wrong, indexes = [], []
    for difference in compare_metadata(MigrationContext.configure(connection, opts=names), expected):
        match difference:
            case ("add_index", index):
                indexes.append(index)
            case ("add_table", table):
                wrong.append(f"the table {table.name} is missing")
            case ("add_column", _, table, column):
                wrong.append(f"{table} has no column {column.name}")
            case ("remove_column", _, table, column):
                wrong.append(f"{table} has another column, {column.name}")
            case [("modify_nullable", _, table, column, *_, null)]:
                wrong.append(f"{table}.{column} must {'' if null else 'not '}take null")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise Unusable(
            f"DATABASE_URL: the tables are not those of a cluster: {', '.join(wrong[:5])}{more}; it must name an empty "
            "database, or one that a cluster has made."
        )
    for index in indexes:
        index.create(connection)
    return True


def _judge(current: str, newest: str) -> None:
    """Accept an unknown revision that is a newer expansion of ours; Unusable for any other."""
    number, ours = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", current), newest.partition(".")[0]
    if number and int(number[1]) > int(ours):
        raise Unusable(
            f"DATABASE_URL: the tables are at revision {current}, and this version of the cluster knows those up to "
            f"{newest} and later ones that begin with {ours}; a newer version must be started."
        )
    if not number or number[1] != ours or int(number[2]) <= int(newest.partition(".")[2]):
        raise Unusable(
            f"DATABASE_URL: the tables are at revision {current[:40]!r}, which no version of the cluster has made; it "
            "must name an empty database, or one that a cluster has made."
        )
