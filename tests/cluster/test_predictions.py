import asyncio
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="the cluster needs cluster/requirements.txt")

from sqlalchemy import event

from cluster.files import Files
from cluster.predictions import Prediction, Predictions, now
from harness.postgres import Postgres
from tests.cluster.databases import rows, run

Database = Callable[[], Predictions]


@pytest.fixture
def database(database_url: str) -> Database:
    """Opens an empty database, again and again the same one."""
    return partial(Predictions, database_url)


def made(name: str, owner: str = "front-1", **fields: object) -> Prediction:
    inputs = {"prompt": name}
    given = {"id": name, "owner": owner, "created_at": now(), "secret_input": inputs, "shown_input": inputs}
    return Prediction(**given | {"api": "replicate"} | fields)


async def test_an_id_is_taken_once(database: Database) -> None:
    async with database() as known:
        first, other = made("one"), made("one", secret_input={"prompt": "other"})
        assert await known.create(first) == (first, True)
        assert (await known.create(first))[1]  # the same one again, as after a broken connection
        found, created = await known.create(other)
        assert (created, found.created_at) == (False, first.created_at)


async def test_a_prediction_ends_once_whoever_tries(database: Database, database_url: str) -> None:
    async with database() as known, database() as elsewhere:
        prediction = made("one")
        await known.create(prediction)
        ends = [
            (front, {"status": status, "completed_at": now()})
            for front in (known, elsewhere)
            for status in ("succeeded", "failed", "canceled")
        ]
        won = await asyncio.gather(*(front.finish(prediction, [], **end) for front, end in ends))
        assert won.count(True) == 1
        (_, end) = ends[won.index(True)]
        kept = await known.get("one")
        assert (kept.status, kept.completed_at) == (end["status"], end["completed_at"])
        assert rows(database_url, "SELECT request FROM predictions") == [(None,)]
        assert await known.finish(prediction, [], **end)  # the same one again, as after a broken connection
        assert not await known.record(prediction, logs="too late")
        assert not await known.cancel("one")


async def test_where_webhooks_go_is_kept_until_the_last_is_delivered_and_no_longer(
    database: Database, database_url: str
) -> None:
    def kept() -> dict[str, str | None]:
        return dict(rows(database_url, "SELECT id, webhook FROM predictions"))

    url = "https://example.com/hook?token=s3cret"
    async with database() as known:
        await known.beat("front-2")
        due, told = made("due", webhook=url), made("told", webhook=url)
        for prediction in (due, told, made("runs", webhook=url)):
            assert "s3cret" not in repr(prediction)
            await known.create(prediction)
        await known.record(due, status="processing")
        assert kept() == {"due": url, "told": url, "runs": url}
        await known.finish(due, [], status="succeeded", completed_at=now(), webhook_due=True)
        await known.finish(told, [], status="failed", completed_at=now(), webhook_due=False)
        assert kept() == {"due": url, "told": None, "runs": url}
        adopted = {prediction.id: prediction for prediction in await known.adopt("front-2", ["front-1"], [], 20)}
        assert {name: prediction.webhook for name, prediction in adopted.items()} == {"due": url, "runs": url}
        await known.delivered(adopted["due"])
        assert kept() == {"due": None, "told": None, "runs": url}
        assert [prediction.id for prediction in await known.adopt("front-3", ["front-2"], [], 20)] == ["runs"]


async def test_no_file_of_sqlite_keeps_what_is_forgotten(tmp_path: Path) -> None:
    async with Predictions(f"sqlite:///{tmp_path / 'predictions.db'}") as known:
        for i in range(20):
            secret = {"prompt": f"s3cret-{i}" * 50}
            await known.create(made(f"one-{i}", secret_input=secret, shown_input={}, webhook="https://h/s3cret"))
        assert any(b"s3cret" in file.read_bytes() for file in tmp_path.iterdir())
        for i in range(20):
            await known.finish(made(f"one-{i}"), [], status="succeeded", completed_at=now())
        await known.expire()
        assert [file.name for file in tmp_path.iterdir() if b"s3cret" in file.read_bytes()] == []


async def test_what_belongs_to_no_living_front_is_adopted_once(database: Database) -> None:
    async with database() as known:
        for front in ("front-1", "front-2", "front-3"):
            await known.beat(front)
        orphans = [made(f"orphan-{i}") for i in range(10)]
        for prediction in [*orphans, made("theirs", "front-2"), made("left", None), made("mine", "front-3")]:
            await known.create(prediction)
        await known.finish(orphans[0], [], status="succeeded", completed_at=now())
        await known.finish(orphans[1], [], status="succeeded", completed_at=now(), webhook_due=True)
        shares = await asyncio.gather(
            *(known.adopt(f, ["front-1"], ["theirs", "mine"], 100) for f in ("front-2", "front-3"))
        )
        taken = [prediction.id for share in shares for prediction in share]
        assert sorted(taken) == sorted(["left", *(prediction.id for prediction in orphans[1:])])
        assert not await known.record(orphans[2], logs="from the dead")  # the old owner may write no more
        # A prediction that its front owns but does not run has lost its task.
        assert [p.id for p in await known.adopt("front-2", [], [i for i in taken if i != "left"], 100)] in (
            ["theirs"],
            ["left", "theirs"],
            ["theirs", "left"],
        )
        await known.leave("front-2")
        assert "theirs" in [p.id for p in await known.adopt("front-3", [], taken, 100)]


async def test_only_the_death_of_a_front_counts_as_an_adoption(database: Database) -> None:
    async with database() as known:
        for front in ("front-1", "front-2", "front-3"):
            await known.beat(front)
        for name, owner in (("died", "front-1"), ("left", "front-2"), ("released", None), ("lost", "front-3")):
            await known.create(made(name, owner))
        await known.leave("front-2")
        taken = await known.adopt("front-3", ["front-1"], [], 20)
        assert {p.id: p.adoptions for p in taken} == {"died": 1, "left": 0, "released": 0, "lost": 0}
        assert [p.adoptions for p in await known.adopt("front-4", ["front-3"], [], 20)] == [1, 1, 1, 2]
        assert (await known.get("died")).adoptions == 2


async def test_what_fronts_die_of_keeps_nothing_else_from_being_adopted(database: Database) -> None:
    """Each front dies with the five that it has taken: the newest come to be taken, though older ones are there."""
    async with database() as known:
        for i in range(5):
            await known.create(made(f"poison-{i}", "front-0"))
        for i in range(4):
            await known.beat(f"front-{i}")
        assert len(await known.adopt("front-1", ["front-0"], [], 5)) == 5
        for i in range(3):
            await known.create(made(f"later-{i}", "front-1"))
        taken = await known.adopt("front-2", ["front-1"], [], 5)
        assert [p.id for p in taken] == ["later-0", "later-1", "later-2", "poison-0", "poison-1"]
        # What it cannot even begin with, again and again, is its own: the rest comes first.
        for i in range(4):
            await known.create(made(f"stuck-{i}", "front-2"))
        assert [p.id for p in await known.adopt("front-2", [], [], 4)][:3] == ["poison-2", "poison-3", "poison-4"]


async def test_whole_inputs_are_read_by_the_front_that_adopts_alone(database: Database) -> None:
    """They may have 100 MB, and every look at a prediction would read them."""
    said = []
    async with database() as known:
        event.listen(known.engine, "before_cursor_execute", lambda *call: said.append(call[2]))
        await known.create(made("one", None))
        await known.create(made("one", secret_input={"prompt": "other"}))
        await known.get("one")
        await known.page()
        await known.beat("front-1")
        assert len(said) > 6
        assert [statement for statement in said if "predictions.request" in statement] == []
        (adopted,) = await known.adopt("front-1", [], [], 1)
        assert adopted.secret_input == {"prompt": "one"}
        assert "s3cret" not in repr(made("two", secret_input={"image": "https://host/?token=s3cret"}))


async def test_what_is_no_json_in_an_older_row_is_read_as_null(tmp_path: Path) -> None:
    """SQLite had taken it: NaN has broken every list with it since."""
    url = f"sqlite:///{tmp_path / 'predictions.db'}"
    async with Predictions(url) as known:
        await known.create(made("one"))
        run(url, """UPDATE predictions SET input = '{"a": NaN}', metrics = '{"b": [-Infinity, 1]}'""")
        (found,) = (await known.page()).predictions
        assert (found.shown_input, found.metrics) == ({"a": None}, {"b": [None, 1]})


async def test_a_front_that_goes_keeps_what_it_draws_alone(database: Database) -> None:
    async with database() as known:
        await known.beat("front-1")
        for name in ("drawing", "waiting"):
            await known.create(made(name, "front-1"))
        await known.release("front-1", ["drawing"])
        assert [p.id for p in await known.adopt("front-2", [], [], 20)] == ["waiting"]


async def test_what_a_front_has_left_goes_to_one_of_the_others(database: Database) -> None:
    async with database() as known, database() as elsewhere:
        fronts = {f"front-{i}": (known, elsewhere)[i % 2] for i in range(8)}
        for name, front in fronts.items():
            await front.beat(name)
        for i in range(30):
            await known.create(made(f"left-{i}", None))
        shares = await asyncio.gather(*(front.adopt(name, [], [], 30) for name, front in fronts.items()))
        taken = [prediction.id for share in shares for prediction in share]
        assert sorted(taken) == sorted(f"left-{i}" for i in range(30))


async def test_a_deadline_reaches_the_owner(database: Database) -> None:
    async with database() as known:
        for name, seconds in (("past", -1), ("future", 600)):
            await known.create(made(name, cancel_at=now(timedelta(seconds=seconds))))
        assert (await known.beat("front-1"))[1] == ["past"]
        assert (await known.beat("front-2"))[1] == []


async def test_a_cancellation_reaches_the_owner(database: Database) -> None:
    async with database() as known:
        await known.create(made("one"))
        await known.create(made("two", "front-2"))
        assert await known.cancel("one")
        assert await known.cancel("one")
        assert not await known.cancel("nobody")
        assert await known.beat("front-1") == ({"front-1": 0}, ["one"])
        assert (await known.beat("front-2"))[1] == []
        assert (await known.beat("front-1"))[0] == {"front-1": 1, "front-2": 0}


async def test_pages_have_no_gaps_while_predictions_are_added(database: Database) -> None:
    async with database() as known:
        for i in range(25):
            await known.create(made(f"old-{i:02}"))
        page = await known.page(size=10)
        assert page.previous is None
        seen = list(page.predictions)
        while page.next:
            await known.create(made(f"new-{len(seen)}"))
            page = await known.page(page.next, size=10)
            seen += page.predictions
        assert [p.id for p in seen] == [f"old-{i:02}" for i in reversed(range(25))]
        back = await known.page(page.previous, size=10)
        assert [p.id for p in back.predictions] == [f"old-{i:02}" for i in reversed(range(5, 15))]
        with pytest.raises(ValueError, match="cursor is 'x'"):
            await known.page("x")


async def test_what_has_been_kept_for_its_time_is_forgotten(database: Database, tmp_path: Path) -> None:
    async with database() as known:
        files = Files(str(tmp_path / "files"))
        old, fresh = made("old"), made("fresh")
        for prediction, age in ((old, timedelta(days=-2)), (fresh, timedelta(hours=-2))):
            await known.create(prediction)
            file = await files.write(b"picture", "output.webp", "image/webp")
            file.expires_at = now(timedelta(seconds=-1))
            await known.finish(prediction, [file], status="succeeded", completed_at=now(age))
        kept = await files.write(b"upload", "a.png", "image/png", about={})
        await known.add_file(kept)
        expired = await known.expire()
        await files.delete(expired)
        assert (await known.get("old"), (await known.get("fresh")).id) == (None, "fresh")
        assert len(expired) == 2
        assert [file.id for file in await known.uploads()] == [kept.id]
        assert [path.name for path in (tmp_path / "files").iterdir()] == [kept.id]


def test_a_beat_costs_the_same_however_many_predictions_are_kept(tmp_path: Path) -> None:
    """No statement reads a table from its beginning to its end, nor all predictions that a front has ended."""
    asked = []

    async def story() -> list[str]:
        async with Predictions(f"sqlite:///{tmp_path / 'predictions.db'}") as known:
            event.listen(known.engine, "before_cursor_execute", lambda *call: asked.append(call[2:4]))
            await known.beat("front-1")
            await known.create(made("orphan", None))
            await known.adopt("front-1", ["front-2"], ["mine"], 20)
            await known.expire()
            await known.leave("front-1")
            with known.engine.connect() as connection:
                plans = [connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {said}", given) for said, given in [*asked]]
                return [step.detail for plan in plans for step in plan if " predictions" in step.detail]

    steps = asyncio.run(story())
    ways = {"id=?", "status=?", "webhook_due=?", "completed_at<?"}
    assert {step.rpartition("(")[2].rstrip(")") for step in steps} == ways


async def test_a_restart_of_the_database_is_waited_for(postgres: Postgres) -> None:
    async with Predictions(postgres.url) as known:
        written = [asyncio.create_task(known.create(made(f"before-{i}"))) for i in range(10)]
        await asyncio.to_thread(postgres.stop)
        during = [asyncio.create_task(known.create(made(f"during-{i}"))) for i in range(10)]
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in during)
        await asyncio.to_thread(postgres.start)
        assert all(created for _, created in await asyncio.gather(*written, *during))
        unfinished = {prediction.id for prediction in await known.adopt("front-1", [], [], 1000)}
        assert unfinished >= {f"{when}-{i}" for when in ("before", "during") for i in range(10)}


async def test_all_fronts_share_a_secret(database: Database) -> None:
    async with database() as known, database() as elsewhere:
        drawn = await asyncio.gather(*(front.secret("webhooks") for front in (known, elsewhere)))
        assert len(set(drawn)) == 1
        assert drawn[0] != await known.secret("other")


def test_a_file_outside_of_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret")
    files = Files(str(tmp_path / "files"))
    for file_id in ("../secret", "..", "", "a/b"):
        with pytest.raises(FileNotFoundError):
            asyncio.run(files.read(file_id))
