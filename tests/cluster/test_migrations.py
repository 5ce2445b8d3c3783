"""The tables over time: made, brought forward, left to newer versions, shared with older ones, or refused."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("sqlalchemy", reason="the cluster needs cluster/requirements.txt")

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from cluster.database import Unusable, open_engine
from cluster.predictions import Base, Prediction, Predictions, now
from tests.cluster.databases import older, rows, run

NEWEST = "1.3"
REVISION = "SELECT version_num FROM alembic_version"
# Every column that fronts had before there were revisions.
BEFORE = (
    "id, owner, created_at, request, input, api, model, version, base_url, webhook, webhook_events, webhook_due, "
    "cancel_requested, deaths, status, output, error, logs, metrics, started_at, completed_at"
)


def start(url: str) -> None:
    """Open the database as a front does first."""

    async def opened() -> None:
        async with Predictions(url):
            pass

    asyncio.run(opened())


@contextlib.contextmanager
def connected(url: str) -> Iterator[sa.Connection]:
    """A connection that leaves none behind."""
    engine = open_engine(url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def refusal(url: str) -> str:
    """The sentence with which a database is refused; at once, not after it has been waited for."""
    started = time.monotonic()
    with pytest.raises(Unusable) as refused:
        start(url)
    assert time.monotonic() - started < 30
    return str(refused.value)


@pytest.mark.parametrize("before", ["empty", "older"])
def test_the_newest_revision_is_what_the_code_has(database_url: str, before: str) -> None:
    if before == "older":
        run(database_url, older(database_url))
        run(database_url, "DROP INDEX ix_predictions_status")  # its first start had been cut off
    start(database_url)
    with connected(database_url) as connection:
        compared = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(compared, Base.metadata) == []
    start(database_url)
    assert rows(database_url, REVISION) == [(NEWEST,)]
    assert len(rows(database_url, "SELECT id FROM predictions WHERE adoptions = 0")) == 14 * (before == "older")


async def test_fronts_of_the_version_before_run_beside_new_ones(database_url: str) -> None:
    """A front from before names the columns that it knows, and only these: it starts, adds, reads, adopts and ends."""
    await asyncio.to_thread(start, database_url)
    row = (
        f"'{now()}', '{{}}', '{{}}', 'cog', '', '', '', NULL, '[]', false, false, 0, 'starting', NULL, NULL, '', '{{}}'"
    )
    run(database_url, "INSERT INTO fronts (id, beat) VALUES ('old', 0)")
    run(database_url, f"INSERT INTO predictions ({BEFORE}) VALUES ('by-old', 'old', {row}, NULL, NULL)")
    async with Predictions(database_url) as known:
        await known.beat("new")
        made = Prediction("by-new", "new", now(), {"prompt": "a"}, {}, "cog")
        await known.create(made)
        assert [(p.id, p.adoptions) for p in await known.adopt("new", ["old"], ["by-new"], 20)] == [("by-old", 1)]
        assert await known.finish(
            Prediction("by-old", "new", now(), {}, {}, "cog"), [], status="succeeded", completed_at=now()
        )
    assert rows(database_url, f"SELECT {BEFORE} FROM predictions WHERE id = 'by-new'")[0][1] == "new"
    run(database_url, "UPDATE predictions SET owner = 'old' WHERE id = 'by-new' AND owner = 'new'")
    run(database_url, "UPDATE predictions SET status = 'failed', request = NULL WHERE id = 'by-new' AND owner = 'old'")
    assert rows(database_url, "SELECT id, status FROM predictions ORDER BY id") == [
        ("by-new", "failed"),
        ("by-old", "succeeded"),
    ]


async def test_tables_that_a_newer_version_has_expanded_are_used_as_they_are(database_url: str) -> None:
    await asyncio.to_thread(start, database_url)
    run(
        database_url,
        "ALTER TABLE predictions ADD COLUMN later INTEGER NOT NULL DEFAULT 7; CREATE TABLE later (id INTEGER);"
        "UPDATE alembic_version SET version_num = '1.12'",
    )
    async with Predictions(database_url) as known:
        assert (await known.create(Prediction("one", "front", now(), {}, {}, "cog")))[1]
        assert (await known.get("one")).owner == "front"
    assert rows(database_url, REVISION) == [("1.12",)]
    assert rows(database_url, "SELECT later FROM predictions") == [(7,)]


@pytest.mark.parametrize(
    ("revision", "words"),
    [
        ("2.0", f"at revision 2.0, and this version of the cluster knows those up to {NEWEST} and"),
        ("10.3", "at revision 10.3, and"),
        ("1.01", "'1.01', which no version"),
        ("0.9", "'0.9', which no version"),
        ("ae1027a6acf", "'ae1027a6acf', which no version"),
    ],
)
def test_other_revisions_are_refused(database_url: str, revision: str, words: str) -> None:
    start(database_url)
    run(database_url, f"UPDATE alembic_version SET version_num = '{revision}'")
    said = refusal(database_url)
    assert words in said
    assert "\n" not in said
    assert rows(database_url, REVISION) == [(revision,)]


def test_tables_of_other_programs_are_left_as_they_are(database_url: str) -> None:
    run(database_url, "CREATE TABLE albums (id INTEGER); INSERT INTO albums VALUES (7)")
    start(database_url)
    assert rows(database_url, REVISION) == [(NEWEST,)]
    assert rows(database_url, "SELECT id FROM albums") == [(7,)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("ALTER TABLE predictions DROP COLUMN deaths", "predictions has no column deaths"),
        ("ALTER TABLE files ADD COLUMN owner VARCHAR", "files has another column, owner"),
        ("DROP TABLE secrets", "the table secrets is missing"),
        (
            "DROP TABLE fronts; CREATE TABLE fronts (id VARCHAR PRIMARY KEY, beat INTEGER)",
            "fronts.beat must not take null",
        ),
    ],
)
def test_tables_without_a_revision_that_are_not_ours_are_refused(database_url: str, change: str, words: str) -> None:
    run(database_url, older(database_url))
    run(database_url, change)
    said = refusal(database_url)
    assert words in said
    assert "\n" not in said
    run(database_url, "CREATE TABLE alembic_version (version_num VARCHAR(32))")  # it had not been made


@pytest.mark.parametrize("before", ["empty", "older"])
def test_fronts_that_start_together_migrate_once(database_url: str, before: str) -> None:
    if before == "older":
        run(database_url, older(database_url))
    together = multiprocessing.get_context("fork")
    fronts = [together.Process(target=_accept, args=[database_url, f"front-{i}"]) for i in range(6)]
    for front in fronts:
        front.start()
    for front in fronts:
        front.join()
    assert [front.exitcode for front in fronts] == [0] * 6
    assert rows(database_url, REVISION) == [(NEWEST,)]
    assert rows(database_url, "SELECT count(*) FROM predictions WHERE owner LIKE 'front-_'") == [(6,)]


def _accept(url: str, front: str) -> None:
    async def story() -> None:
        async with Predictions(url) as known:
            assert (await known.create(Prediction(f"of-{front}", front, now(), {}, {}, "cog")))[1]

    asyncio.run(story())


@pytest.mark.parametrize(
    ("before", "statement"),
    [("empty", "CREATE TABLE predictions"), ("older", "ALTER TABLE"), ("older", "UPDATE alembic")],
)
def test_a_migration_that_is_killed_leaves_nothing_behind(database_url: str, before: str, statement: str) -> None:
    if before == "older":
        run(database_url, older(database_url))
    killed = multiprocessing.get_context("fork").Process(target=_die_after, args=[database_url, statement])
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    with connected(database_url) as connection:
        left = sa.inspect(connection).get_table_names()
    assert sorted(left) == (["files", "fronts", "predictions", "secrets"] if before == "older" else [])
    start(database_url)
    assert rows(database_url, REVISION) == [(NEWEST,)]


def _die_after(url: str, statement: str) -> None:
    """Begin to start, and end by force when the database has run a statement of the migrations."""

    def die(*call: object) -> None:
        if str(call[2]).strip().startswith(statement):
            os.kill(os.getpid(), signal.SIGKILL)

    async def story() -> None:
        known = Predictions(url)
        sa.event.listen(known.engine, "after_cursor_execute", die)
        await known.__aenter__()

    asyncio.run(story())
