"""Opening the database: its URL, its file, the revision of its tables, and which of its errors may pass by themselves.

Whoever starts first runs what is missing of `cluster/migrations`, under a lock. This module knows both databases, their
drivers and alembic; it knows no table.
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

# Transactions of one front at a time in PostgreSQL, each with a thread and a connection of its own.
CONNECTIONS = 16
DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
}
FORMS = "it must be sqlite:///<path of a file> or postgresql://<user>:<password>@<host>:<port>/<name>"
# The advisory lock of PostgreSQL under which migrations run: a number that only has to be the same for all fronts.
MIGRATION_LOCK = 0x666C7578
# What all databases have that were made before there were revisions.
BEFORE_REVISIONS = "1.0"
# How many characters of a string become JSON at a time.
PIECE_CHARACTERS = 1_000_000
AWAY, FULL, FAILED = "database is away", "database's disk is full", "database reports an error"
# SQLite's primary result codes; the first three are other connections' doing.
SQLITE_PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
SQLITE_LASTING = {
    sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_NOTADB: "database's file is no SQLite database",
    sqlite3.SQLITE_CORRUPT: "database's file is damaged",
    sqlite3.SQLITE_CANTOPEN: "database's file cannot be opened, or its folder cannot be written",
    sqlite3.SQLITE_READONLY: "database's file cannot be written",
    sqlite3.SQLITE_IOERR: "database's file cannot be read or written",
}
SQLITE_REPAIRABLE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
)
# PostgreSQL's, beside class 08, a broken connection: two transactions in each other's way, too many connections, a lock
# that was not to be had, a server that stops or starts.
POSTGRESQL_PASSING = ("40001", "40P01", "53300", "55P03", "57P01", "57P02", "57P03")
POSTGRESQL_FULL, POSTGRESQL_READ_ONLY = "53100", "25006"
# The driver has no code for a connection that is refused, only text; most of these reasons pass, but not these.
MISTAKES = re.compile(r"does not exist|authentication failed|no password supplied|pg_hba\.conf|invalid port")


class Unusable(Exception):  # noqa: N818 (a state, not an accident)
    """A database that cannot be used as it is: a sentence for whoever starts the cluster."""


def open_engine(url: str) -> sa.Engine:
    """An engine for a URL of SQLAlchemy's; a file of SQLite's is made, for this user alone.

    Raises:
        Unusable: the URL cannot be read or names another kind of database, or the file cannot be made.
    """
    address = _parse(url)
    sqlite = address.drivername == "sqlite"
    if sqlite:
        _make(Path(address.database).resolve())
    # SQLite lets one connection write while the others poll: here all callers queue for a single connection.
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
    """Bring the tables to our newest revision, within the transaction of this connection: all of it or nothing.

    An expansion (1.1 after 1.0) leaves them usable for those who do not know it, so a newer one is left as it is.

    Raises:
        Unusable: tables that are called like ours and are not, or a revision with which we cannot work.
    """
    sqlite = connection.dialect.name == "sqlite"
    if sqlite:
        if (found := connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()) != "ok":
            raise Unusable(
                f"DATABASE_URL: the {SQLITE_LASTING[sqlite3.SQLITE_CORRUPT]}: {found.splitlines()[-1].rstrip('.')}."
            )
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
    """Whether the same may succeed soon, with nobody's help: a lost connection, a restart, another's lock."""
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        return _sqlite_code(cause) in SQLITE_PASSING
    state = getattr(cause, "sqlstate", None)
    if state is None and isinstance(error, OperationalError):
        return not MISTAKES.search(str(cause))
    return error.connection_invalidated or (state is not None and (state[:2] == "08" or state in POSTGRESQL_PASSING))


def may_be_repaired(error: DBAPIError) -> bool:
    """Whether the same may succeed after somebody has made room, or let the database be written again."""
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        return _sqlite_code(cause) in SQLITE_REPAIRABLE
    return getattr(cause, "sqlstate", None) in (POSTGRESQL_FULL, POSTGRESQL_READ_ONLY)


def describe(error: DBAPIError) -> str:
    """What is wrong, for clients, such as `database is away`: nothing of what it was told or has answered."""
    cause = error.orig
    if isinstance(cause, sqlite3.Error) and (said := SQLITE_LASTING.get(_sqlite_code(cause))):
        return said
    if getattr(cause, "sqlstate", None) == POSTGRESQL_FULL:
        return FULL
    return AWAY if may_pass(error) else FAILED


def unusable(error: DBAPIError) -> Unusable:
    """The same for whoever starts the cluster, with what the database says."""
    said = (str(error.orig).splitlines() or [""])[0].rpartition("failed: ")[2]
    return Unusable(f"DATABASE_URL: the {describe(error)}: {said[:200].rstrip('.')}.")


def _to_json(value: Any) -> str:  # noqa: ANN401 (JSON)
    """JSON as it stands in the tables.

    A string of an input may have hundreds of megabytes: written at once, or copied more often than once, it would hold
    Python's lock for seconds.
    """
    return "".join(_json_pieces(value))


def _json_pieces(value: Any) -> Iterator[str]:  # noqa: ANN401 (JSON)
    match value:
        case dict() if any(isinstance(item, str) and len(item) > PIECE_CHARACTERS for item in value.values()):
            before = "{"
            for key, item in value.items():
                yield before
                yield from _json_pieces(key)
                yield ": "
                yield from _json_pieces(item)
                before = ", "
            yield "}"
        case str() if len(value) > PIECE_CHARACTERS:
            yield '"'
            for start in range(0, len(value), PIECE_CHARACTERS):
                yield json.dumps(value[start : start + PIECE_CHARACTERS], ensure_ascii=False)[1:-1]
            yield '"'
        case _:
            yield json.dumps(value, ensure_ascii=False, allow_nan=False)


def _from_json(text: str) -> Any:  # noqa: ANN401 (JSON)
    """What stands in the tables, fit to be shown; null for what an older version should not have taken.

    Whatever it is, other rows must still be read.
    """
    try:
        return storable(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _sqlite_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for an error of Python's module."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _parse(url: str) -> sa.URL:
    """The URL with its driver; no message repeats more of it than the scheme, for the rest may hold the password."""
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
    """Make the file where there is none, for this user alone; so will be what SQLite puts beside it."""
    try:
        if file.parent == DATA:
            DATA.mkdir(exist_ok=True)
        # An existing file is not opened: closing it would drop the locks that this process may hold on it.
        os.close(os.open(file, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        if not file.is_file():
            raise Unusable("DATABASE_URL names something that is no file; it must be a file of SQLite's.") from None
    except OSError as error:  # its own text would name the path
        raise Unusable(f"DATABASE_URL: the file cannot be made: {error.strerror}.") from None


def _narrow(file: Path) -> None:
    """Let this user alone read the file, and what SQLite puts beside it, which an earlier version let others read."""
    try:
        for each in (file, file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}-shm")):
            if each.exists() and stat.S_IMODE(each.stat().st_mode) & 0o077:
                each.chmod(0o600)
    except OSError as error:
        raise Unusable(f"DATABASE_URL: others may read the file, and it stays so: {error.strerror}.") from None


def _share_sqlite(connection: sqlite3.Connection, _: object) -> None:
    """Several processes write: readers do not wait for them, writers queue, and a commit is on the disk.

    What is forgotten is overwritten, since it may be a secret.
    """
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def empty_log(engine: sa.Engine) -> None:
    """Empty SQLite's write-ahead log, in which rows stand as they were before; PostgreSQL's is its operator's."""
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


def _blame_data(context: sa.ExceptionContext) -> Exception | None:
    """One error for data that a driver cannot even send, such as half a character: some raise Python's own."""
    error = context.original_exception
    if isinstance(error, ValueError | OverflowError | RecursionError):
        return StatementError("The data cannot be sent.", None, None, error)
    return None


def _alembic(connection: sa.Connection) -> Config:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "cluster:migrations")
    return config


def _has_our_tables(connection: sa.Connection) -> bool:
    """Whether there are tables of BEFORE_REVISIONS; Unusable, with the differences, where they are not quite those."""
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
    """Let a newer expansion pass, which we do not know; Unusable where the revision is anything else."""
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
