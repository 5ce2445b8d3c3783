"""Opening a database, and telling its errors apart: those that pass are waited for, all others are said at once."""

import asyncio
import sqlite3
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

import aiohttp
import sqlalchemy as sa
import uvicorn
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, StatementError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.database import Unusable, open_engine
from cluster.predictions import Prediction, Predictions, now
from harness.postgres import Postgres
from local_cog.server import LOOPBACK, listen
from tests.cluster.databases import run


def opened(url: str, then: Callable[[Predictions], Awaitable[object]] | None = None) -> None:
    async def story() -> None:
        async with Predictions(url) as known:
            if then:
                await then(known)

    asyncio.run(story())


def made(name: str, **fields: object) -> Prediction:
    return Prediction(
        **{"id": name, "owner": "front", "created_at": now(), "secret_input": {}, "shown_input": {}, "api": "cog"}
        | fields
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "DATABASE_URL cannot be read; it must be sqlite:///<path of a file> or postgresql://"),
        ("s3cret", "DATABASE_URL cannot be read; "),
        ("postgresql://user:s3cret/with@:a@host/name", "DATABASE_URL"),
        ("postgresql://user:s3@cret@host/name", "DATABASE_URL has no such host or port; "),
        ("postgresql://user:s3cret@host:port/name", "DATABASE_URL cannot be read; "),
        ("postgresql://user:s3cret@host:99999/name", "DATABASE_URL has no such host or port; "),
        ("mysql://user:s3cret@host/name", "DATABASE_URL begins with 'mysql'; it must be sqlite:///"),
        ("sqlite+aiosqlite:///predictions.db", "DATABASE_URL begins with 'sqlite+aiosqlite'; it must be sqlite:///"),
        ("sqlite://", "DATABASE_URL names no file; "),
        ("sqlite:///:memory:", "DATABASE_URL names no file; "),
        ("sqlite:////nowhere/predictions.db", "DATABASE_URL: the file cannot be made: No such file or directory."),
        ("sqlite:////dev/null", "DATABASE_URL names something that is no file; "),
    ],
)
def test_a_url_is_refused_without_the_password_in_it(url: str, said: str) -> None:
    with pytest.raises(Unusable) as refused:
        open_engine(url)
    assert str(refused.value).startswith(said)
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ('{"a": NaN, "b": 1e999}', {"a": None, "b": None}),
        ('{"a": "\\ud800"}', {"a": "\ufffd"}),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", None),
        ("no JSON", None),
    ],
    ids=range(4),
)
async def test_what_an_older_version_should_not_have_taken_can_be_read_and_adopted(
    tmp_path: Path, stored: str, read: object
) -> None:
    url = f"sqlite:///{tmp_path / 'predictions.db'}"
    async with Predictions(url) as known:
        await known.create(made("odd", api="replicate"))
        await known.create(made("good"))
        run(url, f"UPDATE predictions SET request = '{stored}', input = '{stored}' WHERE id = 'odd'")
        (listed,) = (await known.page()).predictions
        assert listed.shown_input == read
        adopted = await known.adopt("other", [], [], 20)
        assert {each.id: each.secret_input for each in adopted} == {"odd": read, "good": {}}


@pytest.mark.parametrize("kind", ["text", "truncated", "overwritten", "nothing but a header"])
def test_a_file_that_is_damaged_is_one_sentence(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "predictions.db"
    url = f"sqlite:///{file}"
    opened(url)
    run(url, "PRAGMA wal_checkpoint(TRUNCATE)")
    content = file.read_bytes()
    half = len(content) // 2
    damaged = {
        "text": b"no database at all " * 1000,
        "truncated": content[:half],
        "overwritten": content[:half] + b"\xa5" * (len(content) - half),
        "nothing but a header": content[:100],
    }
    file.write_bytes(damaged[kind])
    file.chmod(0o644)
    started = time.monotonic()
    with pytest.raises(
        Unusable, match=r"^DATABASE_URL: the database's file is (damaged|no SQLite database): [^\n]*\.$"
    ):
        opened(url)
    assert time.monotonic() - started < 30
    assert stat.S_IMODE(file.stat().st_mode) == 0o644  # what is not ours is left as it was


def test_nobody_else_may_read_the_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'predictions.db'}"

    def modes() -> dict[str, int]:
        return {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}

    async def look(known: Predictions) -> None:
        await known.create(made(now()))
        assert modes() == dict.fromkeys(("predictions.db", "predictions.db-wal", "predictions.db-shm"), 0o600)

    opened(url, look)
    # The state that an earlier version leaves when it is killed.
    (tmp_path / "predictions.db").chmod(0o644)
    other = sqlite3.connect(tmp_path / "predictions.db", isolation_level=None)
    other.execute("UPDATE fronts SET beat = 1")
    assert set(modes().values()) == {0o644}
    opened(url, look)
    other.close()


def test_an_unknown_role_is_said_at_once(postgres: Postgres) -> None:
    started = time.monotonic()
    with pytest.raises(
        Unusable, match=r'^DATABASE_URL: the database reports an error: FATAL:  role "nobody" does not exist\.$'
    ):
        opened(postgres.url.replace("postgres@", "nobody:s3cret@"))
    assert time.monotonic() - started < 30


async def test_a_lock_of_another_process_is_waited_for(tmp_path: Path) -> None:
    """Longer than SQLite itself waits for it: the driver's patience is made short here."""
    url = f"sqlite:///{tmp_path / 'predictions.db'}"
    async with Predictions(url) as known:

        def impatient(connection: sqlite3.Connection, *_: object) -> None:
            connection.execute("PRAGMA busy_timeout=0")

        sa.event.listen(known.engine, "checkout", impatient)
        other = sqlite3.connect(tmp_path / "predictions.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        writing = asyncio.create_task(known.create(made("one")))
        await asyncio.sleep(0.5)
        assert not writing.done()
        other.execute("COMMIT")
        other.close()
        assert (await writing)[1]


async def fill_the_disk(known: Predictions) -> None:
    """As far as each database can be told so: SQLite that it may not grow, PostgreSQL by a trigger with its code."""
    with known.engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA max_page_count=1")
        else:
            full = "BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END"
            connection.exec_driver_sql(f"CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $${full}$$")
            connection.exec_driver_sql(
                "CREATE TRIGGER full_disk BEFORE INSERT ON predictions FOR EACH ROW EXECUTE FUNCTION full_disk()"
            )


async def drop_a_column(known: Predictions) -> None:
    with known.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE predictions DROP COLUMN deaths")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("harm", "fields", "error", "status", "said"),
    [
        (fill_the_disk, {"logs": "x" * 100_000}, OperationalError, 503, "The database's disk is full; try again."),
        (drop_a_column, {}, DBAPIError, 503, "The database reports an error; try again."),
        (None, {"created_at": None}, IntegrityError, 503, "The database reports an error; try again."),
        (None, {"metrics": {"score": float("nan")}}, StatementError, 422, "that the database cannot store."),
        (None, {"logs": "\ud800"}, StatementError, 422, "that the database cannot store."),
    ],
    ids=["full disk", "no such column", "not the id", "NaN", "half a character"],
)
async def test_what_does_not_pass_is_said_at_once(
    database_url: str,
    harm: Callable[[Predictions], Awaitable[None]] | None,
    fields: dict[str, object],
    error: type[Exception],
    status: int,
    said: str,
) -> None:
    async with Predictions(database_url) as known:
        if harm:
            await harm(known)
        started = time.monotonic()
        with pytest.raises(error):
            await known.create(made("one", **fields))
        answer, text = await _answer(known, made("two", **fields))
        assert time.monotonic() - started < 30
        assert (answer.status, answer.headers.get("retry-after")) == (status, "5" if status == 503 else None)
        assert said in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_a_null_character_is_the_requests_fault(database_url: str) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("SQLite stores it")
    async with Predictions(database_url) as known:
        answer, text = await _answer(known, made("a\0b"))
        assert (answer.status, "cannot store" in text) == (422, True)


async def _answer(known: Predictions, prediction: Prediction) -> tuple[aiohttp.ClientResponse, str]:
    """A front's answer to a request during which a prediction is written."""

    from cluster.api_common import exception_handlers  # here: it imports Ray, which uses what pydantic deprecates

    async def write(_: Request) -> Response:
        await known.create(prediction)
        return Response()

    application = Starlette(routes=[Route("/", write)], exception_handlers=exception_handlers())
    server = uvicorn.Server(uvicorn.Config(application, lifespan="off", log_config=None))
    with listen(LOOPBACK, 0) as listening:
        serving = asyncio.create_task(server.serve([listening]))
        address = f"http://{LOOPBACK}:{listening.getsockname()[1]}/"
        async with aiohttp.ClientSession() as client, client.get(address) as answer:
            text = await answer.text()
        server.should_exit = True
        await serving
    return answer, text
