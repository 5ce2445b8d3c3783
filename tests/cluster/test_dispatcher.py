"""Nothing accepted is lost, and everything ends once: whatever is cancelled, replaced or killed."""

import base64
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from functools import partial

from cluster.local import descendants
from cluster.run import _lora_key
from harness.cluster import ENDS, Cluster, Hooks
from harness.waiting import wait_until
from tests.cluster.processes import accepted, runs, works
from tests.cluster.small_cluster import QUEUE, WORKERS

ASYNC = {"Prefer": "respond-async"}


def test_what_a_dead_cluster_has_left_is_taken_up(cluster: Cluster) -> None:
    def end(name: str) -> dict[str, Any] | None:
        state = json.loads(cluster.request("PUT", f"/predictions/{name}", {})[2])
        return state if state["status"] in ENDS else None

    names = ("left-waiting", "left-running", "left-unwanted", "poison-0")
    ends = {name: wait_until(partial(end, name), 120) for name in names}
    assert {
        name: (state["status"], state.get("error") or ("output" in state and cog_output(state)))
        for name, state in ends.items()
    } == {
        "left-waiting": ("succeeded", "waiting 4 dev"),
        "left-running": ("succeeded", "running 4 dev"),
        "left-unwanted": ("canceled", False),
        "poison-0": ("failed", "The cluster failed with AttributeError; its log says where."),
    }


def test_a_full_queue_is_told_when_to_ask_again(cluster: Cluster) -> None:
    accepted, answer = [], (202, {}, "")
    while answer[0] == 202:
        assert len(accepted) <= 2 * QUEUE
        name = f"queued-{len(accepted)}"
        answer = cluster.request("PUT", f"/predictions/{name}", {"input": {"prompt": "slow", "steps": 50}}, ASYNC)
        accepted += [name] if answer[0] == 202 else []
    assert (answer[0], answer[1]["retry-after"]) == (503, "5")
    assert len(accepted) > QUEUE // 2  # some places may be those of predictions before
    with ThreadPoolExecutor(8) as pool:
        cancelled = pool.map(lambda name: cluster.request("POST", f"/predictions/{name}/cancel")[0], accepted)
    assert set(cancelled) <= {200, 404}  # on a slow machine some have ended by now


def test_what_waits_for_a_worker_is_cancelled_at_once(cluster: Cluster) -> None:
    with Hooks() as hooks:
        for i in range(5):
            cluster.predict({"prompt": "slow", "steps": 50}, f"crowd-{i}", webhook=hooks.url)
        waiting = "crowd-4"
        assert cluster.request("POST", f"/predictions/{waiting}/cancel")[0] == 200
        assert hooks.until_ended(waiting, 20)[-1]["status"] == "canceled"
        for i in range(5):
            cluster.request("POST", f"/predictions/crowd-{i}/cancel")
            hooks.until_ended(f"crowd-{i}")


def test_an_update_finishes_what_is_being_drawn(cluster: Cluster, project: Path) -> None:
    before = {title: cluster.processes(title) for title in ("CogWorker", "Front")}
    with ThreadPoolExecutor(12) as pool:
        body = {"input": {"prompt": "slow", "steps": 6}}
        answers = [pool.submit(cluster.request, "POST", "/predictions", body) for _ in range(12)]
        time.sleep(1)
        with Hooks() as hooks:
            for i in range(12):
                cluster.predict({"prompt": "slow", "steps": 2}, f"updated-{i}", webhook=hooks.url)
            cluster.update(project=str(project), workers=WORKERS, gpus_per_worker=0, queue=QUEUE)
            for i in range(12):
                assert hooks.until_ended(f"updated-{i}")[-1]["status"] == "succeeded"
        told = [answer.result() for answer in answers]
    assert [status for status, _, _ in told] == [200] * 12, told
    assert {json.loads(text)["status"] for _, _, text in told} == {"succeeded"}
    for title, old in before.items():
        wait_until(lambda title=title, old=old: not set(old).intersection(cluster.processes(title)), 120, pause=0.1)
    assert cluster.request("POST", "/predictions", {"input": {"prompt": "a"}})[0] == 200


def test_a_worker_that_is_killed_takes_its_cog_server_and_its_predictor_along(cluster: Cluster) -> None:
    worker = cluster.wait_for("CogWorker")[-1]
    for title in ("cog.server.http", "import coglet"):
        cluster.wait_for(title, below=worker)
    own = descendants(worker)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not any(map(runs, own)), 60)


def test_a_predictor_that_always_crashes_is_given_up(cluster: Cluster) -> None:
    with Hooks() as hooks:
        cluster.predict({"prompt": "crash"}, "crashing", webhook=hooks.url, webhook_events_filter=["completed"])
        end = hooks.until_ended("crashing", 300)[-1]
    assert (end["status"], end["error"]) == (
        "failed",
        "The prediction was given up: 3 workers ended while they ran it.",
    )


def test_every_accepted_prediction_ends_once_whatever_is_killed(cluster: Cluster) -> None:
    """A Cog server stands still, and workers, a Cog server, a front and a node end by force, during 60 predictions."""
    names = [f"survivor-{i}" for i in range(60)]
    with Hooks() as hooks, ThreadPoolExecutor(6) as pool:

        def ask(name: str) -> None:
            body = {"input": {"prompt": name, "steps": 20}, "webhook": hooks.url}
            wait_until(lambda: accepted(cluster, name, body), 120, pause=0.2)

        asked = [pool.submit(ask, name) for name in names]
        # Those that crashed before are being replaced, and one that stands still while it starts is given ten minutes.
        wait_until(lambda: sum(map(works, cluster.processes("cog.server.http"))) == WORKERS, 120)
        stopped = cluster.processes("cog.server.http")[0]
        os.kill(stopped, signal.SIGSTOP)
        for title in ("CogWorker", "cog.server.http", "Front", "raylet/raylet"):
            time.sleep(1.5)
            cluster.kill_one(title)
        for done in asked:
            done.result()
        for name in names:
            hooks.until_ended(name, 120)
        wait_until(lambda: not runs(stopped), 120)  # its worker is asked every 5 seconds, and waits for 10
        deliveries = {headers["webhook-id"]: body for headers, body in hooks.received if body["status"] in ENDS}
    ends = [body["id"] for body in deliveries.values()]
    assert sorted(ends) == sorted(names)  # each has one end, though its news may have come twice
    for body in deliveries.values():
        assert (body["status"], cog_output(body)) == ("succeeded", f"{body['id']} 20 dev")
        again = json.loads(cluster.request("PUT", f"/predictions/{body['id']}", {})[2])
        assert again["output"] == body["output"]


def cog_output(body: dict[str, Any]) -> str:
    (uri,) = body["output"]
    return base64.b64decode(uri.partition(",")[2]).decode()


def test_the_key_of_loras_knows_neither_their_order_nor_their_strength() -> None:
    main, extra = "fofr/cars*0.8", "https://huggingface.co/a/b"
    same = (
        {"replicate_weights": main, "extra_lora": extra, "lora_scale": 0.3},
        {"replicate_weights": extra, "extra_lora": "replicate.com/fofr/cars"},
        {"extra_lora": f"{extra}*-1 + {main} + fofr/cars"},
        {"replicate_weights": json.dumps([{"path": extra, "blocks": {"single_blocks": 0}}, {"path": "fofr/cars"}])},
    )
    assert len(set(map(_lora_key, same))) == 1
    assert _lora_key({"replicate_weights": main}) not in (_lora_key(same[0]), "")
    assert _lora_key({"prompt": "a", "extra_lora": ""}) == ""
