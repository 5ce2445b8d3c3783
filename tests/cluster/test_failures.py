"""Whatever goes wrong with a prediction has an end, in which its client reads what it was, and nothing is drawn twice
for it: the dispatcher, the database, the files and the webhooks as they are, and a stand-in for Ray's handle alone."""

import asyncio
import logging
import pickle
import resource
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

import aiohttp
import ray
from aiohttp import web
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from sqlalchemy import select, text
from sqlalchemy.exc import OperationalError
from starlette.requests import Request

from cluster import predictions, webhooks, worker
from cluster.api_common import exception_handlers
from cluster.dispatcher import Dispatcher
from cluster.failures import Again, Failure
from cluster.files import Files
from cluster.forms import Forms
from cluster.front import Front
from cluster.metrics import Metrics
from cluster.predictions import Prediction, Predictions, now
from cluster.run import MAX_ADOPTIONS, Means
from cluster.webhooks import Webhooks, open_client
from cluster.worker import CogWorker
from harness.cluster import Hooks
from harness.postgres import Postgres
from harness.waiting import until
from local_cog.server import Verdict
from service.data_uri import uri
from tests.cluster.databases import run

STARTED = {"status": "processing", "logs": "begun", "metrics": {}}
DRAWN = {"status": "succeeded", "logs": "done", "metrics": {"predict_time": 1.0}, "output": [uri(b"a picture")]}
# None of these can be sent to: a host that does not answer is another matter.
BAD_URLS = [
    "http://a..b/",
    "http://%E2%82%AC:p@h/",
    "http://€:s3cret@a..b/?token=s3cret",
    "http://[x",
    "http://host:99999/",
    "ftp://host/",
    "//host",
    "http://" + "a" * 100_000,
    "no URL",
]


@dataclass
class Workers:
    """Stands in for Ray's handle of the workers: each attempt at a prediction goes as is said here.

    A prediction is named for its case, such as "case-3"; in what is said of it are states and exceptions, and a case
    that is not named is drawn.
    """

    cases: dict[str, list[Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    @property
    def predict(self) -> "Workers":
        return self

    def remote(self, prediction_id: str, inputs: dict[str, Any], loras: str) -> "Response":
        self.asked.append(prediction_id)
        return Response(self.cases.get(prediction_id.rpartition("-")[0], [STARTED, DRAWN]))

    def attempts(self, prediction_id: str) -> int:
        return self.asked.count(prediction_id)


class Response:
    def __init__(self, said: list[Any]) -> None:
        self.said = iter(said)

    def __aiter__(self) -> "Response":
        return self

    async def __anext__(self) -> list[dict[str, Any]]:
        await asyncio.sleep(0)
        for said in self.said:
            if isinstance(said, BaseException):
                raise said
            if callable(said):
                await said()
                continue
            return [said]
        raise StopAsyncIteration

    def cancel(self) -> None:
        raise ActorDiedError  # Serve raises here what it has raised before


@asynccontextmanager
async def front(folder: Path, workers: Workers, url: str | None = None) -> AsyncIterator[Dispatcher]:
    """A front's dispatcher with a database of its own, or another one, and files in a folder."""
    async with Predictions(url or f"sqlite:///{folder / 'db'}") as known, open_client(allow_private=True) as client:
        store = Files(str(folder / "files"))
        told = Webhooks(client, "secret", Forms(store, "secret").show)
        yield Dispatcher("front", Means(workers, known, store, told, Metrics(), "none"), 1000)


def made(name: str, **fields: Any) -> Prediction:  # noqa: ANN401
    fields = {"owner": "dead", "secret_input": {"prompt": "s3cret"}, "shown_input": {}, "api": "cog", **fields}
    return Prediction(name, created_at=now(), **fields)


async def all_done(dispatcher: Dispatcher) -> None:
    """Adopt twenty at a time, as a front does at each beat, until there is nothing to adopt or to do."""

    async def done() -> bool:
        await dispatcher.adopt([], 20)
        return not dispatcher.runs

    await until(done)


def in_worker(cause: BaseException) -> RayTaskError:
    """Ray's error for an exception in a worker."""
    trace = 'Traceback (most recent call last):\n  File "/opt/s3cret/worker.py", line 7, in predict\nKeyError'
    return RayTaskError("predict", trace, cause, pid=1, ip="127.0.0.1").as_instanceof_cause()


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    with Hooks() as running:
        yield running


async def test_a_front_that_holds_much_leaves_what_is_to_be_adopted_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.dispatcher.ADOPTING_BYTES", 2_000_000)
    monkeypatch.setattr("cluster.run.LARGE_BYTES", 10_000_000)  # there is no Ray
    workers = Workers({"large": [lambda: asyncio.sleep(60)]})
    async with front(tmp_path, workers) as dispatcher:
        with dispatcher.means.predictions.session.begin() as session:
            session.add_all([made(f"large-{i}", secret_input={"prompt": "a" * 1_500_000}) for i in range(20)])
        await dispatcher.adopt(["dead"], 20)
        await dispatcher.adopt(["dead"], 20)
        assert len(dispatcher.runs) == 2
        assert 3_000_000 <= dispatcher.held < 3_100_000
        for run in dispatcher.runs.values():
            run.stop()
            run.task.cancel()
        await until(lambda: not dispatcher.runs)


async def test_a_cancelled_prediction_does_not_wait_for_a_worker_that_stands_still(tmp_path: Path) -> None:
    workers = Workers({"stopped": [STARTED, lambda: asyncio.sleep(600)]})
    async with front(tmp_path, workers) as dispatcher:
        prediction, _ = await dispatcher.accept(made("stopped-1", owner="front"))
        await until(lambda: prediction.status == "processing")
        for _ in range(3):  # each beat of the front repeats it
            assert await dispatcher.cancel(prediction.id)
            await asyncio.sleep(0.5)
        assert (await dispatcher.ended(prediction, 60)).status == "canceled"
        await until(lambda: not dispatcher.runs)
        assert (await dispatcher.means.predictions.get(prediction.id)).status == "canceled"


async def test_large_inputs_wait_in_turn_and_small_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.run.LARGE_BYTES", 10_000)
    monkeypatch.setattr(ray, "put", lambda inputs: inputs)  # it was not started
    workers = Workers({"large": [lambda: asyncio.sleep(60)]})
    async with front(tmp_path, workers) as dispatcher:
        for i in range(10):
            await dispatcher.accept(made(f"large-{i}", owner="front", secret_input={"prompt": "a" * 20_000}))
        await dispatcher.accept(made("small-0", owner="front"))
        await until(lambda: "small-0" not in dispatcher.runs)
        assert workers.asked.count("small-0") == 1
        await until(lambda: len(workers.asked) == 5)
        await asyncio.sleep(0.6)
        assert len(workers.asked) == 5  # four large ones
        waiting = next(name for name in dispatcher.runs if name not in workers.asked)
        await dispatcher.cancel(waiting)
        await until(lambda: waiting not in dispatcher.runs)
        assert (await dispatcher.means.predictions.get(waiting)).status == "canceled"
        for run in dispatcher.runs.values():
            run.stop()
            run.task.cancel()
        await until(lambda: not dispatcher.runs)


async def test_what_the_front_says_stays_above_what_any_worker_tells(tmp_path: Path, hooks: Hooks) -> None:
    """Also where one front dies with a prediction, and under the next one a worker."""
    told = {"webhook": hooks.url, "webhook_events": ["start", "logs", "completed"]}

    async def next_attempt() -> None:
        workers.cases["said"] = [STARTED, DRAWN]

    workers = Workers({"said": [STARTED, next_attempt, ActorDiedError()]})
    async with front(tmp_path, workers) as dispatcher:
        known = dispatcher.means.predictions
        await known.create(made("said-0", notice="Of the front.\n", **told))
        await known.record(made("said-0"), status="processing", logs="a half")
        assert (await known.get("said-0")).whole_log == "Of the front.\na half"
        await dispatcher.adopt(["dead"], 20)
        await until(lambda: not dispatcher.runs)
        end = await known.get("said-0")
    assert (end.status, end.whole_log, workers.attempts("said-0")) == ("succeeded", "Of the front.\ndone", 2)
    heard = [body["logs"] for body in hooks.until_ended("said-0")]
    assert heard[-1] == "Of the front.\ndone"
    assert set(heard) <= {f"Of the front.\n{logs}" for logs in ("", "a half", "begun", "done")}


async def test_poison_that_a_dead_front_has_left_ends_and_keeps_nothing_from_being_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, hooks: Hooks
) -> None:
    """Twenty-five of each sort, all older than one that is good."""
    caplog.set_level(logging.INFO, "ray.serve")
    expired = {"image": "http://front/v1/files/gone"}
    sorts: dict[str, dict[str, Any]] = {
        f"unsendable{i}": {"status": "succeeded", "webhook_due": True, "webhook": address, "webhook_events": []}
        for i, address in enumerate(BAD_URLS)
    }
    sorts |= {
        "no\nid": {"webhook": f"{hooks.url}?token=s3cret", "webhook_events": ["start", "completed"]},
        "no-input": {"secret_input": None},
        "list": {"secret_input": [1]},
        "expired": {"secret_input": expired, "base_url": "http://front"},
        "bug": {},
        "refused": {},
        "deadly": {"adoptions": MAX_ADOPTIONS},
        "deadly-and-unwanted": {"adoptions": MAX_ADOPTIONS, "cancel_requested": True},
    }
    workers = Workers(
        {
            "bug": [in_worker(KeyError("s3cret"))],
            "refused": [in_worker(Failure("Cog refused the prediction with 422: no."))],
        }
    )
    sorted_names = {sort: [f"{sort}-{i}" for i in range(25)] for sort in sorts}
    async with front(tmp_path, workers) as dispatcher:
        with dispatcher.means.predictions.engine.connect() as connection:
            connection.connection.driver_connection.execute("PRAGMA synchronous = OFF")  # 900 commits
        rows = [made(name, **sorts[sort]) for sort, some in sorted_names.items() for name in some]
        with dispatcher.means.predictions.session.begin() as session:
            session.add_all([*rows, made("good-0")])
        await all_done(dispatcher)
        assert not dispatcher.stuck
        with dispatcher.means.predictions.session() as session:
            ends = {end.id: end for end in session.scalars(select(Prediction))}
    assert ends["good-0"].status == "succeeded"
    said = {sort: {(ends[name].status, ends[name].error) for name in some} for sort, some in sorted_names.items()}
    assert said == {
        **{sort: {("succeeded", None)} for sort in sorts if "unsendable" in sort},
        "no\nid": {("failed", "The prediction's id must have 1 to 128 letters, digits and _ . ~ -.")},
        "no-input": {("failed", "The cluster failed with AttributeError; its log says where.")},
        "list": {("failed", "The cluster failed with AttributeError; its log says where.")},
        "expired": {("failed", "The file in image has expired; send it again.")},
        "bug": {("failed", "The cluster failed with KeyError; its log says where.")},
        "refused": {("failed", "Cog refused the prediction with 422: no.")},
        "deadly": {("failed", "The prediction was given up: 6 fronts ended while they had it.")},
        "deadly-and-unwanted": {("canceled", None)},
    }
    assert max(map(workers.attempts, workers.asked)) == 1
    assert "s3cret" not in caplog.text
    assert "RayTaskError(KeyError) at worker.py:7 predict" in caplog.text


async def test_each_failure_has_its_sentence_and_is_tried_again_only_where_that_helps(tmp_path: Path) -> None:
    ended = "The prediction was given up: 3 workers ended while they ran it."
    full = "The memory in which the cluster passes files on is full; try again later."
    busy = Failure("Cog refused the prediction with 503: no.", Again.UNDRAWN)
    cases = {
        "died": ([ActorDiedError()], 3, ended),
        "died-drawing": ([STARTED, ActorDiedError()], 3, ended),
        "unavailable": (
            [ActorUnavailableError("gone", None)],
            3,
            "The prediction was given up: 3 attempts came to nothing (ActorUnavailableError).",
        ),
        "crashed": ([STARTED, WorkerCrashedError()], 3, ended),
        "node": ([STARTED, NodeDiedError("gone")], 3, ended),
        "cut": (
            [asyncio.CancelledError()],
            3,
            "The prediction was given up: 3 attempts came to nothing (CancelledError).",
        ),
        "ray": ([RaySystemError("x")], 3, "The prediction was given up: 3 attempts came to nothing (RaySystemError)."),
        "full": ([ObjectStoreFullError()], 3, full),
        "full-drawing": ([STARTED, in_worker(ObjectStoreFullError())], 1, full),
        "disk": ([OutOfDiskError()], 3, "The disk of one of the cluster's machines is full; try again later."),
        "busy": ([in_worker(busy)], 3, busy.sentence),
        "bug-drawing": (
            [STARTED, in_worker(ValueError("x"))],
            1,
            "The cluster failed with ValueError; its log says where.",
        ),
        "silent": ([STARTED], 1, "The cluster failed with RuntimeError; its log says where."),
        "garbage": ([{"logs": 3}], 1, "The cluster failed with TypeError; its log says where."),
    }
    workers = Workers({case: said for case, (said, _, _) in cases.items()})
    async with front(tmp_path, workers) as dispatcher:
        accepted = [(await dispatcher.accept(made(f"{case}-0", owner="front")))[0] for case in cases]
        ends = [await dispatcher.ended(prediction) for prediction in accepted]
    found = {end.id[:-2]: (workers.attempts(end.id), end.error, end.status) for end in ends}
    assert found == {case: (attempts, said, "failed") for case, (_, attempts, said) in cases.items()}
    # Only a worker that has begun may have died of the prediction.
    assert {end.id[:-2]: end.deaths for end in ends if end.deaths} == {"died-drawing": 3, "crashed": 3, "node": 3}


async def test_where_there_is_no_worker_a_prediction_waits(tmp_path: Path) -> None:
    workers = Workers({"wait": [BackPressureError(1, 1)], "none": [DeploymentUnavailableError("x")]})
    async with front(tmp_path, workers) as dispatcher:
        for case in ("wait", "none"):
            await dispatcher.accept(made(f"{case}-0", owner="front"))
        await until(lambda: len(workers.asked) == 2)
        assert all(run.failures == 0 for run in dispatcher.runs.values())  # that is no attempt that failed
        workers.cases.clear()
        for run in [*dispatcher.runs.values()]:
            assert (await dispatcher.ended(run.prediction, 5)).status == "succeeded"


@pytest.mark.parametrize("state", ["is full", "cannot be written to"])
async def test_what_cannot_be_kept_is_drawn_once(state: str, tmp_path: Path) -> None:
    large = {**DRAWN, "output": [uri(bytes(4_000_000))]}
    workers, limits = Workers({"large": [STARTED, large]}), resource.getrlimit(resource.RLIMIT_FSIZE)
    async with front(tmp_path, workers) as dispatcher:
        if state == "is full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))  # the database is smaller
        else:
            (tmp_path / "files").rmdir()
            (tmp_path / "files").touch()
        try:
            prediction, _ = await dispatcher.accept(made("large-0", owner="front"))
            end = await dispatcher.ended(prediction, 5)
            known = await dispatcher.means.predictions.get("large-0")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (known.status, known.output) == ("failed", None)
    assert (end.status, end.error) == ("failed", f"The cluster's store of files {state}; try again later.")
    assert workers.asked == ["large-0"]


async def test_an_end_is_kept_until_a_full_database_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(predictions, "SECONDS_WITHOUT_DATABASE", 0)
    monkeypatch.setattr("cluster.run.RECORD_SECONDS", 0)
    long = {**STARTED, "logs": "x" * 100_000}
    workers = Workers()
    async with front(tmp_path, workers) as dispatcher:

        def limit(pages: int) -> None:
            with dispatcher.means.predictions.engine.connect() as connection:
                connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        async def fill() -> None:
            await asyncio.to_thread(limit, 1)  # as many as there are

        workers.cases["long"] = [fill, long, {**long, "logs": "y" * 100_000}, {**DRAWN, "logs": "z" * 100_000}]
        prediction, _ = await dispatcher.accept(made("long-0", owner="front"))
        await until(lambda: prediction.finished)
        await asyncio.sleep(1.5)
        await dispatcher.adopt([], 20)
        assert not (await dispatcher.means.predictions.get("long-0")).finished
        assert dispatcher.unfinished == 1
        await asyncio.to_thread(limit, 1_000_000)
        assert (await dispatcher.ended(prediction, 5)).status == "succeeded"
        known = await dispatcher.means.predictions.get("long-0")
        assert (known.status, known.logs[0]) == ("succeeded", "z")
    assert workers.asked == ["long-0"]
    assert "The progress of prediction 'long-0' is not written: OperationalError" in caplog.text


async def test_a_result_that_the_database_cannot_hold_ends_without_it(tmp_path: Path) -> None:
    workers = Workers({"long": [STARTED, {**DRAWN, "logs": "s3cret" * 20_000}]})
    async with front(tmp_path, workers) as dispatcher:
        with dispatcher.means.predictions.engine.connect() as connection:
            connection.connection.driver_connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 50_000)
        await dispatcher.accept(made("long-0", owner="front"))
        await until(lambda: not dispatcher.runs)
        end = await dispatcher.means.predictions.get("long-0")
    assert (end.status, end.error) == ("failed", "The database cannot store the result (DataError).")
    assert (end.logs, end.output, workers.asked) == ("", None, ["long-0"])


async def test_what_cannot_be_ended_is_left_alone_and_keeps_nothing_from_being_drawn(tmp_path: Path) -> None:
    workers = Workers()
    refuse = """CREATE TRIGGER refuse BEFORE UPDATE OF status ON predictions WHEN NEW.id LIKE 'poison-%'
        BEGIN SELECT RAISE(ABORT, 'no'); END"""
    async with front(tmp_path, workers) as dispatcher:
        with dispatcher.means.predictions.session.begin() as session:
            session.add_all([made(f"poison-{i}", owner=None) for i in range(25)])
            session.execute(text(refuse))
        await dispatcher.means.predictions.beat("front")
        for _ in range(3):
            await all_done(dispatcher)
        await dispatcher.accept(made("good-0", owner="front"))
        await until(lambda: not dispatcher.runs)
        assert (await dispatcher.means.predictions.get("good-0")).status == "succeeded"
        assert len(dispatcher.stuck) == 25
    assert sorted(workers.asked) == sorted(["good-0", *(f"poison-{i}" for i in range(25))])


async def test_postgresql_takes_what_a_predictor_says_and_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: Postgres
) -> None:
    monkeypatch.setattr(predictions, "SECONDS_WITHOUT_DATABASE", 0)
    odd = {"logs": "a\0b\ud83d\ude00\udcff", "metrics": {"a\0": float("nan")}, "output": ["\ud800"], "error": "\0"}
    workers = Workers({"odd": [STARTED, {**STARTED, **odd}, {**DRAWN, **odd}]})
    run(postgres.url, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    async with front(tmp_path, workers, postgres.url) as dispatcher:

        async def stop() -> None:
            await asyncio.to_thread(postgres.stop)

        workers.cases["away"] = [STARTED, stop, STARTED, DRAWN]
        for name in ("odd-0", "away-0"):
            await dispatcher.accept(made(name, owner="front"))
            await until(lambda name=name: name not in dispatcher.runs or dispatcher.runs[name].prediction.finished)
            if name == "away-0":
                await asyncio.sleep(0.5)
                assert dispatcher.unfinished == 1
                await asyncio.to_thread(postgres.start)
            await until(lambda: not dispatcher.runs)
            known = await dispatcher.means.predictions.get(name)
            assert known.status == "succeeded"
            if name == "odd-0":
                assert (known.logs, known.metrics) == ("a\ufffdb\U0001f600\ufffd", {"a\ufffd": None})
                assert (known.output, known.error) == (["\ufffd"], "\ufffd")
    assert workers.asked == ["odd-0", "away-0"]


async def test_what_the_database_refuses_is_not_accepted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "SECONDS_WITHOUT_DATABASE", 0)
    async with front(tmp_path, Workers()) as dispatcher:
        with dispatcher.means.predictions.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE predictions RENAME TO away")
        with pytest.raises(OperationalError):
            await dispatcher.accept(made("one"))
        await until(lambda: not dispatcher.runs)
        dispatcher.means.predictions.threads.shutdown()
        with pytest.raises(RuntimeError):  # before the task of the run has begun
            await dispatcher.accept(made("two"))
        await until(lambda: not dispatcher.runs)


async def test_a_webhook_whose_picture_cannot_be_read_is_sent_later_or_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hooks: Hooks
) -> None:
    monkeypatch.setattr(webhooks, "TRIES", 4)
    async with front(tmp_path, Workers()) as dispatcher:
        file = await dispatcher.means.files.write(b"a picture", "output.webp", "image/webp")
        place, away = tmp_path / "files", tmp_path / "away"
        for name, comes_back in (("later-0", True), ("never-0", False)):
            place.rename(away)
            place.touch()
            due = {"status": "succeeded", "output": [f"/files/{file.id}/output.webp"], "webhook": hooks.url}
            with dispatcher.means.predictions.session.begin() as session:
                session.add(made(name, **due, webhook_due=True, webhook_events=["completed"]))
            await dispatcher.adopt([], 20)
            await dispatcher.means.webhooks.notify(dispatcher.runs[name].prediction, "completed")
            await asyncio.sleep(0.1)
            if comes_back:
                place.unlink()
                away.rename(place)
            await all_done(dispatcher)
    assert [body["output"] for _, body in hooks.received] == [[uri(b"a picture", "image/webp")]]


async def test_a_beat_that_fails_is_told_once_and_followed_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(predictions, "SECONDS_WITHOUT_DATABASE", 0)
    monkeypatch.setattr("cluster.front.BEAT_SECONDS", 0.02)
    async with front(tmp_path, Workers()) as dispatcher:
        means = dispatcher.means
        parts = {"dispatcher": dispatcher, "predictions": means.predictions, "metrics": means.metrics}
        beating = SimpleNamespace(id="front", leaving=False, **parts)  # a whole one needs Ray
        with dispatcher.means.predictions.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE predictions RENAME TO away")
        heart = asyncio.create_task(Front.func_or_class._beat(beating))
        await asyncio.sleep(0.5)
        with dispatcher.means.predictions.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE away RENAME TO predictions")
        await dispatcher.means.predictions.create(made("left-0"))

        async def drawn() -> bool:
            return (await dispatcher.means.predictions.get("left-0")).finished

        await until(drawn)
        heart.cancel()
    assert caplog.text.count("Beats fail") == 1


async def test_a_worker_says_how_cog_refuses_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker as it is, before a stand-in for Cog that is always ready and answers as is said here."""
    monkeypatch.setattr(worker, "SECONDS_FOR_END", 1)
    answers: list[int] = []
    inputs = {"image": "https://host/a.png?token=s3cret"}

    async def put(request: web.Request) -> web.Response:
        said = await request.json()
        status = answers.pop(0)
        if status == 0:
            request.transport.close()
        if status == 202 and request.match_info["id"] != "silent":
            async with aiohttp.ClientSession() as client:
                await client.post(said["webhook"], data="no JSON")
                await client.post(said["webhook"], json={"status": "succeeded"})
        return web.Response(status=status or 500, text="It failed at /opt/cog/a.py: /a.png?token=s3cret")

    async def ready(_: web.Request) -> web.Response:
        return web.json_response({"status": "READY"})

    async def attempt(running: CogWorker, name: str, *said: int) -> Any:  # noqa: ANN401
        answers[:] = said
        try:
            return [state async for state in running.predict(name, inputs, "")]
        except Failure as failure:
            return failure.sentence, failure.again

    cog = web.Application()
    cog.router.add_put("/predictions/{id}", put)
    cog.router.add_get("/health-check", ready)
    runners: list[web.AppRunner] = []
    setup = web.AppRunner.setup

    async def kept(runner: web.AppRunner) -> None:
        runners.append(runner)
        await setup(runner)

    monkeypatch.setattr(web.AppRunner, "setup", kept)
    runner = web.AppRunner(cog)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    running = object.__new__(CogWorker.func_or_class)
    running.server = SimpleNamespace(port=runner.addresses[0][1], process=SimpleNamespace(poll=lambda: None))
    await running._listen()
    said = "It failed at a.py: /a.png"
    drawn = [[{"status": "succeeded"}]]
    assert await attempt(running, "a", 202) == drawn
    assert await attempt(running, "a", 409, 409, 202) == drawn
    assert await attempt(running, "a", 422) == (f"Cog refused the prediction with 422: {said}", Again.NEVER)
    assert await attempt(running, "a", 503) == (f"Cog refused the prediction with 503: {said}", Again.UNDRAWN)
    busy = (f"Cog refused the prediction with 409: {said}", Again.UNDRAWN)
    assert await attempt(running, "a", 409, 409, 409) == busy
    broken = ("Cog broke off the connection when it was given the prediction.", Again.UNDRAWN)
    assert await attempt(running, "a", 0, 0) == broken
    assert await attempt(running, "silent", 202) == (
        "Cog has ended the prediction without saying how.",
        Again.NEVER,
    )
    assert await attempt(running, "a", 202) == drawn
    await running.settling
    del running.server  # there is none to be ended
    await running.client.close()
    for runner in runners:
        await runner.cleanup()


def test_a_failure_of_the_clusters_own_is_answered_503_with_retry_after() -> None:
    request = Request({"type": "http", "path": "/v1/files", "headers": [], "method": "POST"})
    answered = exception_handlers()[Failure](request, Failure("The store is full."))
    assert (answered.status_code, answered.headers["retry-after"]) == (503, "5")
    assert b"The store is full." in answered.body


def test_a_failure_comes_whole_from_a_worker() -> None:
    failure = pickle.loads(pickle.dumps(Failure("A sentence.", Again.UNDRAWN)))
    assert (failure.sentence, failure.again) == ("A sentence.", Again.UNDRAWN)


def test_no_line_of_the_log_is_a_predictor_s_own(caplog: pytest.LogCaptureFixture) -> None:
    said = "Healthcheck failed: ValueError: no http://u:s3cret@h/a\n\x1b[1mERROR forged\u202e\x85"
    running = object.__new__(CogWorker.func_or_class)
    running.verdict = Verdict(SimpleNamespace(scratch=SimpleNamespace(name="/")))
    running._ask = partial(asyncio.sleep, 0, {"status": "UNHEALTHY", "user_healthcheck_error": said})
    running._end_if = lambda defunct, hung: None
    asyncio.run(running.check_health())
    assert caplog.messages == ["The predictor cannot go on: no http://h/a??[1mERROR forged??"]
