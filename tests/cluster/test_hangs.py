"""Processes of every kind that are stopped are treated as ended; and predictions that hang."""

import contextlib
import http.client
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from cluster.local import descendants
from harness.cluster import Cluster, Hooks
from harness.postgres import find_programs
from harness.waiting import wait_until
from local_cog.server import CogServer
from tests.cluster.databases import rows, run
from tests.cluster.processes import accepted, runs, state, status, works
from tests.cluster.small_cluster import PREDICTOR, TOKEN

T = TypeVar("T")
WORKERS, FRONTS = 4, 2
# A predictor has as much for its pictures, its LoRAs and its work each; the cluster gives a prediction 33 seconds.
PREDICTION_SECONDS = 1
GIVEN_UP = "The prediction was given up: two attempts at it did not end in time."
# By what its command line holds: a Cog server has no title of its own.
KINDS = ("CogWorker", "cog.server.http", "Front", "import coglet")


@dataclass(frozen=True)
class Story:
    """One cluster, in which one process after another stands still."""

    cluster: Cluster
    hooks: Hooks


def whole(cluster: Cluster) -> bool:
    """Whether all workers have done their setup, and all fronts are there."""
    ready = sum(map(works, cluster.processes("cog.server.http")))
    return ready == WORKERS and len(cluster.processes("Front")) == FRONTS


def drawing(cluster: Cluster) -> list[int]:
    """The workers that draw, but for those of which something has been stopped already."""
    moving = [worker for worker in cluster.processes("CogWorker") if "T" not in map(state, descendants(worker))]
    return [worker for worker in moving if "BUSY" in map(status, cluster.processes("cog.server.http", below=worker))]


def pick(cluster: Cluster, kind: str, spared: int) -> int:
    """A process of a kind; of a worker's, one that draws, but not the one that is to be spared."""
    if kind == "Front":
        return cluster.processes(kind)[0]
    worker = min(wait_until(lambda: set(drawing(cluster)) - {spared}))
    return worker if kind == "CogWorker" else cluster.processes(kind, below=worker)[0]


def draw(story: Story, *names: str, **inputs: object) -> Callable[[], list[dict[str, Any]]]:
    """Have predictions drawn that take five seconds each; what is returned waits for their ends."""
    for name in names:
        ask(story, name, {"prompt": "slow", "steps": 10, **inputs})
    return lambda: [story.hooks.until_ended(name, 90)[-1] for name in names]


def ask(story: Story, name: str, inputs: dict[str, object]) -> None:
    """Have one prediction accepted; a front may be stopped before it has answered, so it is asked for again."""
    body = {"input": inputs, "webhook": story.hooks.url, "webhook_events_filter": ["start", "completed"]}
    wait_until(lambda: accepted(story.cluster, name, body), 60, pause=0.2)


def seconds_until_answered(cluster: Cluster) -> float:
    """How long a health check takes, or until its connection is broken."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionError, http.client.HTTPException):
        cluster.request("GET", "/health-check")
    return time.monotonic() - began


def attempts(log: Path) -> Counter[str]:
    """How often each prediction hung, by the cluster's log, which comes a little later than what it tells."""
    told = r"An attempt at prediction '(hanging|stalling|sleeping)' came to nothing: RayTaskError\(Failure\)"
    return Counter(re.findall(told, log.read_text()))


@pytest.fixture(scope="module")
def stories(
    tmp_path_factory: pytest.TempPathFactory, project: Path, request: pytest.FixtureRequest
) -> Iterator[list[Story]]:
    """A cluster over each database; both at once, since most of the time is waited."""
    urls = [f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'predictions.db'}"]
    if find_programs() is not None:
        urls.append(request.getfixturevalue("postgres").url)
        run(urls[-1], "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    options = ("--project", str(project), "--workers", str(WORKERS), "--fronts", str(FRONTS))
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        made = []
        for url in urls:
            folder = tmp_path_factory.mktemp("hangs")
            environment = {"DATABASE_URL": url, "FILES_URL": str(folder / "files"), "API_TOKENS": TOKEN}
            environment |= {"PREDICTION_SECONDS": str(PREDICTION_SECONDS)}
            made.append(Cluster(*options, environment=environment, log=folder / "log", token=TOKEN))
        started = [pool.submit(cluster.__enter__) for cluster in made]
        for cluster in [done.result() for done in started]:
            stack.push(cluster)
        yield [Story(cluster, stack.enter_context(Hooks())) for cluster in made]


def everywhere(part: Callable[[Story], T], stories: list[Story]) -> list[T]:
    """The same in each story, at once."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(part, stories))


@pytest.fixture(scope="module")
def sleepers(stories: list[Story]) -> dict[int, int]:
    """By its cluster's port, a worker whose predictor answers, and whose prediction does not end; another one hangs."""

    def begin(story: Story) -> int:
        wait_until(lambda: whole(story.cluster), 60)
        draw(story, "sleeping", prompt=f"sleep {story.cluster.log.with_name('slept')}")
        wait_until(lambda: len(drawing(story.cluster)) == 1)
        (sleeper,) = drawing(story.cluster)
        ask(story, "hanging", {"prompt": "hang"})
        return sleeper

    return dict(zip((story.cluster.port for story in stories), everywhere(begin, stories), strict=True))


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[str]]:
    """The log about a Cog server that is stopped while its predictor sets up; it takes a minute."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "predict.py").write_text(PREDICTOR.replace("self.made = 0", "self.made = time.sleep(60)"))

    def start() -> str:
        with CogServer(folder, log=folder / "log") as server:
            wait_until(lambda: status(server.process.pid) == "STARTING")
            os.kill(server.process.pid, signal.SIGSTOP)
            with pytest.raises(RuntimeError) as told:
                server.wait_until_ready()
        return str(told.value)

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(start)


def test_what_goes_on_in_time_is_left_alone(stories: list[Story], refused: Future[str]) -> None:
    """Each process is stopped for two seconds, while all workers draw."""

    def stop(story: Story) -> None:
        wait_until(lambda: whole(story.cluster), 60)
        ended = draw(story, *(f"brief-{i}" for i in range(WORKERS)))
        stopped = [process for kind in KINDS for process in story.cluster.processes(kind)]
        for process in stopped:
            os.kill(process, signal.SIGSTOP)
        time.sleep(2)
        for process in stopped:
            os.kill(process, signal.SIGCONT)
        assert [end["status"] for end in ended()] == ["succeeded"] * WORKERS
        assert all(map(runs, stopped))

    everywhere(stop, stories)


def test_what_stands_still_is_replaced(stories: list[Story], sleepers: dict[int, int]) -> None:
    """One process is stopped while all workers draw: it is ended, and what it had is drawn elsewhere.

    The clusters share the kinds of processes: no database has a part in how a process is replaced.
    """

    def stop(story: Story, kind: str) -> None:
        cluster = story.cluster
        ended = draw(story, *(f"{kind[:3]}-{i}" for i in range(WORKERS)))
        stopped = pick(cluster, kind, sleepers[cluster.port])
        os.kill(stopped, signal.SIGSTOP)
        with ThreadPoolExecutor(8) as pool:
            slowest = max(pool.map(lambda _: seconds_until_answered(cluster), range(64)))
        assert slowest < 45  # a share of the port is a stopped front's, until it is ended
        assert [end["status"] for end in ended()] == ["succeeded"] * WORKERS
        wait_until(lambda: not runs(stopped), 60)
        wait_until(lambda: whole(cluster), 60)

    def stop_its_share(story: Story) -> None:
        for kind in KINDS[stories.index(story) :: len(stories)]:
            stop(story, kind)

    everywhere(stop_its_share, stories)


@pytest.mark.usefixtures("sleepers")
def test_what_hangs_has_one_more_attempt(stories: list[Story]) -> None:
    """One hangs at each attempt, one ends its predictor after longer than it may take, one hangs the first time."""

    def wait(story: Story) -> None:
        ask(story, "stalling", {"prompt": "stall"})
        for name in ("hanging", "stalling"):
            end = story.hooks.until_ended(name, 90)[-1]
            assert (end["status"], end.get("error")) == ("failed", GIVEN_UP)
        assert story.hooks.until_ended("sleeping", 90)[-1]["status"] == "succeeded"
        wait_until(lambda: attempts(story.cluster.log) == {"hanging": 2, "stalling": 2, "sleeping": 1})

    everywhere(wait, stories)


def test_what_waits_behind_cancelled_hangs_is_drawn(stories: list[Story]) -> None:
    """Its workers end while it waits for them to be free, and none of that is its doing."""

    def wait(story: Story) -> None:
        wait_until(lambda: whole(story.cluster), 60)
        hung = [f"unwanted-{i}" for i in range(WORKERS)]
        for name in hung:
            ask(story, name, {"prompt": "hang"})
            story.hooks.until(lambda body, name=name: body["id"] == name)  # it has begun
        patient = [f"patient-{i}" for i in range(WORKERS)]
        ended = draw(story, *patient, prompt="a")
        for name in hung:
            story.cluster.request("POST", f"/predictions/{name}/cancel")
        assert [story.hooks.until_ended(name)[-1]["status"] for name in hung] == ["canceled"] * WORKERS
        assert [end["status"] for end in ended()] == ["succeeded"] * WORKERS
        query = "SELECT deaths FROM predictions WHERE id LIKE 'patient-%'"
        assert rows(story.cluster.environment["DATABASE_URL"], query) == [(0,)] * WORKERS

    everywhere(wait, stories)


def test_a_server_that_is_stopped_while_it_starts_is_given_up(refused: Future[str]) -> None:
    assert refused.result(120) == "The server has not answered for 60 seconds."
