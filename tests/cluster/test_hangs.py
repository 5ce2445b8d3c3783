"""What stands still is no better than what has ended: stopped processes of every kind, and predictions that hang."""

import contextlib
import http.client
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from cluster.local import descendants
from harness.cluster import Cluster, Hooks
from harness.postgres import find_programs
from local_cog.server import CogServer
from tests.cluster.processes import runs, state, status, works
from tests.cluster.small_cluster import PREDICTOR, TOKEN
from tests.support.waiting import wait_until

WORKERS, FRONTS = 4, 2
# What a predictor would have for its pictures, its LoRAs and its work, and what the cluster adds.
PREDICTION_SECONDS, LONGEST_SECONDS = 1, 33
# By what its command line holds: a Cog server has no title of its own.
KINDS = ("CogWorker", "cog.server.http", "import coglet", "Front")


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
    while not (workers := set(drawing(cluster)) - {spared}):
        time.sleep(0.1)
    worker = workers.pop()
    return worker if kind == "CogWorker" else cluster.processes(kind, below=worker)[0]


def draw(cluster: Cluster, hooks: Hooks, *names: str, **inputs: object) -> Callable[[], list[dict[str, Any]]]:
    """Have predictions drawn that take five seconds each; what is returned waits for their ends."""
    for name in names:
        ask(cluster, hooks, name, {"prompt": "slow", "steps": 10, **inputs})
    return lambda: [hooks.until_ended(name, 240)[-1] for name in names]


def ask(cluster: Cluster, hooks: Hooks, name: str, inputs: dict[str, object]) -> None:
    """Have one prediction accepted; a front may be stopped before it has answered, so it is asked for again."""
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up:
        with contextlib.suppress(OSError, http.client.HTTPException):
            body = {"input": inputs, "webhook": hooks.url, "webhook_events_filter": ["start", "completed"]}
            if cluster.request("PUT", f"/predictions/{name}", body, {"Prefer": "respond-async"})[0] in (200, 202):
                return
        time.sleep(0.2)
    raise TimeoutError(name)


def story(url: str, folder: Path, project: Path) -> None:
    """One cluster, in which one process after another stands still."""
    environment = {
        "DATABASE_URL": url,
        "FILES_URL": str(folder / "files"),
        "API_TOKENS": TOKEN,
        "PREDICTION_SECONDS": str(PREDICTION_SECONDS),
        "WEBHOOKS_ALLOW_PRIVATE_HOSTS": "1",
    }
    options = ("--project", str(project), "--workers", str(WORKERS), "--fronts", str(FRONTS))
    with Cluster(*options, environment=environment, log=folder / "log", token=TOKEN) as cluster, Hooks() as hooks:
        wait_until(lambda: whole(cluster), 120)
        what_goes_on_in_time_is_left_alone(cluster, hooks)
        began = time.monotonic()
        woken = draw(cluster, hooks, "sleeping", prompt=f"sleep {folder / 'slept'}")
        wait_until(lambda: len(drawing(cluster)) == 1)
        (sleeper,) = drawing(cluster)
        ask(cluster, hooks, "hanging", {"prompt": "hang"})
        for kind in KINDS:
            what_stands_still_is_replaced(cluster, hooks, kind, sleeper)
        assert [end["status"] for end in woken()] == ["succeeded"]
        assert time.monotonic() - began > LONGEST_SECONDS
        ask(cluster, hooks, "stalling", {"prompt": "stall"})
        what_hangs_has_one_more_attempt(hooks, folder / "log")


def what_goes_on_in_time_is_left_alone(cluster: Cluster, hooks: Hooks) -> None:
    """Each process is stopped for two seconds, while all workers draw."""
    ended = draw(cluster, hooks, *(f"brief-{i}" for i in range(WORKERS)))
    stopped = [process for kind in KINDS for process in cluster.processes(kind)]
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    time.sleep(2)
    for process in stopped:
        os.kill(process, signal.SIGCONT)
    assert [end["status"] for end in ended()] == ["succeeded"] * WORKERS
    assert all(map(runs, stopped))


def what_stands_still_is_replaced(cluster: Cluster, hooks: Hooks, kind: str, spared: int) -> None:
    """One process is stopped while all workers draw: it is ended, and what it had is drawn elsewhere."""
    ended = draw(cluster, hooks, *(f"{kind[:3]}-{i}" for i in range(WORKERS)))
    stopped = pick(cluster, kind, spared)
    os.kill(stopped, signal.SIGSTOP)
    with ThreadPoolExecutor(8) as pool:
        slowest = max(pool.map(lambda _: seconds_until_answered(cluster), range(64)))
    assert slowest < 45  # a share of the port is a stopped front's, until it is ended
    assert [end["status"] for end in ended()] == ["succeeded"] * WORKERS
    wait_until(lambda: not runs(stopped), 120)
    wait_until(lambda: whole(cluster), 120)


def seconds_until_answered(cluster: Cluster) -> float:
    """How long a health check takes, or until its connection is broken."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionError, http.client.HTTPException):
        cluster.request("GET", "/health-check")
    return time.monotonic() - began


def what_hangs_has_one_more_attempt(hooks: Hooks, log: Path) -> None:
    for name in ("hanging", "stalling"):
        end = hooks.until_ended(name, 240)[-1]
        assert (end["status"], end.get("error")) == ("failed", "The prediction was given up: it hung twice.")
    wait_until(lambda: attempts(log) == {"hanging": 2, "stalling": 2, "sleeping": 1})


def attempts(log: Path) -> Counter[str]:
    """How often each prediction hung, by the cluster's log, which comes a little later than what it tells."""
    told = r"An attempt at prediction '(hanging|stalling|sleeping)' came to nothing: RayTaskError\(Failure\)"
    return Counter(re.findall(told, log.read_text()))


def slow_project(folder: Path) -> Path:
    """A project whose predictor takes a minute to set up."""
    (project := folder / "slow").mkdir()
    (project / "predict.py").write_text(PREDICTOR.replace("self.made = 0", "self.made = time.sleep(60)"))
    return project


def what_is_stopped_while_it_starts_is_given_up(project: Path) -> None:
    with CogServer(project, log=project / "log") as server:
        wait_until(lambda: status(server.process.pid) == "STARTING")
        os.kill(server.process.pid, signal.SIGSTOP)
        with pytest.raises(RuntimeError, match=r"The server has not answered for 60 seconds\."):
            server.wait_until_ready()


def test_whatever_stands_still_nothing_waits_for_ever(
    tmp_path: Path, project: Path, request: pytest.FixtureRequest
) -> None:
    """Both databases at once, since a story mostly waits."""
    urls = [f"sqlite:///{tmp_path / 'predictions.db'}"]
    if find_programs() is not None:
        urls.append(request.getfixturevalue("postgres").url)
    with ThreadPoolExecutor(3) as pool:
        starting = pool.submit(what_is_stopped_while_it_starts_is_given_up, slow_project(tmp_path))
        folders = [tmp_path / str(number) for number in range(len(urls))]
        for folder in folders:
            folder.mkdir()
        for told in [pool.submit(story, url, folder, project) for url, folder in zip(urls, folders, strict=True)]:
            told.result()
        starting.result()
