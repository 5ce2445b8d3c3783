"""Cog's contract: what one coglet answers, the cluster answers."""

import base64
import http.client
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from harness.cluster import ENDS, Cluster, Hooks, Server
from tests.cluster.small_cluster import comparable

JSON = {"Content-Type": "application/json"}
CHARSET = {"Content-Type": "application/json; charset=utf-8"}
ASYNC = {"Prefer": "respond-async"}
CASES: dict[str, tuple[Any, ...]] = {
    "schema": ("GET", "/openapi.json"),
    "post": ("POST", "/predictions", {"input": {"prompt": "a"}}),
    "post-with-an-id": ("POST", "/predictions", {"id": "case-1", "input": {"prompt": "a"}, "unknown": 1}),
    "post-with-charset": ("POST", "/predictions", '{"input":{"prompt":"a"}}', CHARSET),
    "post-async": ("POST", "/predictions", {"id": "case-2", "input": {"prompt": "a"}}, ASYNC),
    "put": ("PUT", "/predictions/case-3", {"input": {"prompt": "a", "steps": 2, "model": "schnell"}}),
    "put-with-its-id": ("PUT", "/predictions/case-4", {"id": "case-4", "input": {"prompt": "a"}}),
    "put-with-another-id": ("PUT", "/predictions/case-5", {"id": "other", "input": {"prompt": "a"}}),
    "put-async": ("PUT", "/predictions/case-6", {"input": {"prompt": "a"}}, ASYNC),
    "put-with-a-space": ("PUT", "/predictions/case%207", {"input": {"prompt": "a"}}),
    "a-file": ("POST", "/predictions", {"input": {"prompt": "a", "image": "data:image/png;base64,aGVsbG8="}}),
    "a-file-that-is-not-there": ("POST", "/predictions", {"input": {"prompt": "a", "image": "http://127.0.0.1:9/a.png"}}),
    "an-unknown-input": ("POST", "/predictions", {"input": {"prompt": "a", "promt": "b"}}),
    "an-error": ("POST", "/predictions", {"input": {"prompt": "fail"}}),
    "output-file-prefix": ("POST", "/predictions", {"input": {"prompt": "a"}, "output_file_prefix": "http://127.0.0.1:9"}),
    "too-large-a-number": ("POST", "/predictions", {"input": {"prompt": "a", "steps": 51}}),
    "too-large-a-number-async": ("POST", "/predictions", {"input": {"prompt": "a", "steps": 51}}, ASYNC),
    "three-problems": ("POST", "/predictions", {"input": {"prompt": "a", "steps": 0, "model": "x", "image": None}}),
    "a-type": ("POST", "/predictions", {"input": {"prompt": 3}}),
    "a-missing-input": ("PUT", "/predictions/case-8", {"input": {"steps": 1}}),
    "no-input": ("POST", "/predictions", {}),
    "null-input": ("POST", "/predictions", {"input": None}),
    "a-list-of-inputs": ("POST", "/predictions", {"input": [1]}),
    "no-body": ("POST", "/predictions"),
    "a-list": ("POST", "/predictions", [1]),
    "an-id-that-is-a-number": ("POST", "/predictions", {"id": 3, "input": {"prompt": "a"}}),
    "a-webhook-that-is-a-number": ("POST", "/predictions", {"webhook": 3, "input": {"prompt": "a"}}),
    "a-webhook-that-is-no-url": ("POST", "/predictions", {"webhook": "no url", "input": {"prompt": "a"}}),
    "an-unknown-event": ("POST", "/predictions", {"webhook_events_filter": ["x"], "input": {"prompt": "a"}}),
    "no-json": ("POST", "/predictions", "{no", JSON),
    "an-empty-body": ("POST", "/predictions", "", JSON),
    "another-content-type": ("POST", "/predictions", '{"input":{"prompt":"a"}}', {"Content-Type": "text/plain"}),
    "events": ("POST", "/predictions", {"input": {"prompt": "a"}}, {"Accept": "text/event-stream"}),
    "another-preference": ("POST", "/predictions", {"input": {"prompt": "a"}}, {"Prefer": "respond-async, wait=1"}),
    "cancel-nothing": ("POST", "/predictions/nobody/cancel"),
    "get-predictions": ("GET", "/predictions"),
    "get-a-prediction": ("GET", "/predictions/case-1"),
    "get-cancel": ("GET", "/predictions/case-1/cancel"),
    "delete": ("DELETE", "/predictions"),
    "post-health": ("POST", "/health-check"),
    "nowhere": ("GET", "/nowhere"),
    "a-slash-too-many": ("GET", "/health-check/"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_cluster_answers_as_one_coglet_does(case: str, coglet: Server, cluster: Cluster) -> None:
    expected = coglet.request(*CASES[case])
    assert comparable(cluster.request(*CASES[case])) == comparable(expected)


def test_the_discovery_document_lacks_only_the_shutdown(coglet: Server, cluster: Cluster) -> None:
    expected = json.loads(coglet.request("GET", "/")[2])
    del expected["shutdown_url"]
    assert json.loads(cluster.request("GET", "/")[2]) == expected
    assert cluster.request("POST", "/shutdown")[0] == 404


def test_health_is_a_workers(coglet: Server, cluster: Cluster) -> None:
    expected, seen = (json.loads(server.request("GET", "/health-check")[2]) for server in (coglet, cluster))
    assert seen.keys() == expected.keys()
    assert (seen["status"], seen["version"]) == (expected["status"], expected["version"])


def test_a_body_above_100_mib_is_refused(coglet: Server, cluster: Cluster) -> None:
    body = b'{"input":{"prompt":"' + b"a" * 100 * 1024**2 + b'"}}'
    expected = coglet.request("POST", "/predictions", body, JSON)
    assert comparable(cluster.request("POST", "/predictions", body, JSON)) == comparable(expected)


def test_cancelling_ends_a_prediction_as_coglet_does(coglet: Server, cluster: Cluster) -> None:
    ends = []
    for server in (coglet, cluster):
        with Hooks() as hooks:
            started = time.monotonic()
            server.predict({"prompt": "slow", "steps": 50}, "to-cancel", webhook=hooks.url)
            hooks.until(lambda body: "1/50" in body["logs"])
            assert server.request("POST", "/predictions/to-cancel/cancel")[::2] == (200, "{}")
            end = hooks.until_ended("to-cancel")[-1]
            assert end["logs"].startswith("Asked for slow\n")
            assert 0 < end["metrics"].pop("predict_time") < time.monotonic() - started
            ends.append({key: value for key, value in end.items() if key != "logs"} | {"keys": sorted(end)})
            assert server.request("POST", "/predictions/to-cancel/cancel")[::2] == (404, "{}")
    assert ends[0] == ends[1]


def test_a_running_prediction_is_shown_and_not_run_again(coglet: Server, cluster: Cluster) -> None:
    shown = []
    for server in (coglet, cluster):
        server.predict({"prompt": "slow", "steps": 50}, "running")
        logs = ""
        while "1/50" not in logs:
            status, _, text = server.request("PUT", "/predictions/running", {"input": {"prompt": "other"}})
            state = json.loads(text)
            assert (status, state["status"] in ENDS) == (202, False)
            logs = state.pop("logs")
            time.sleep(0.05)
        assert logs.startswith("Asked for slow\n")
        shown.append(state)
        server.request("POST", "/predictions/running/cancel")
    assert shown[0] == shown[1]


def test_of_many_predictions_at_once_none_is_forgotten(cluster: Cluster) -> None:
    def ended(_: int) -> tuple[int, str]:
        status, _, text = cluster.request("POST", "/predictions", {"input": {"prompt": "a", "steps": 1}})
        return status, json.loads(text)["status"]

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ended, range(200))) == {(200, "succeeded")}


def test_an_id_is_remembered_when_its_prediction_has_ended(cluster: Cluster) -> None:
    first = cluster.request("PUT", "/predictions/once", {"input": {"prompt": "a", "steps": 7}})
    again = cluster.request("PUT", "/predictions/once", {"input": {"prompt": "b"}})
    assert (again[0], again[2]) == (first[0], first[2])


def test_a_client_that_leaves_cancels_what_it_waited_for(cluster: Cluster) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port)
    body = json.dumps({"input": {"prompt": "slow", "steps": 50}})
    connection.request("PUT", "/predictions/left", body, {**JSON, **cluster.headers})

    def wait_for(status: str) -> None:
        give_up = time.monotonic() + 20
        # Until it is known, this lacks its input.
        while (state := json.loads(cluster.request("PUT", "/predictions/left", {})[2])).get("status") != status:
            assert time.monotonic() < give_up, state
            time.sleep(0.1)

    wait_for("processing")
    connection.close()
    wait_for("canceled")


def test_wrong_input_is_refused_at_once_while_all_workers_are_busy(cluster: Cluster) -> None:
    names = [f"busy-{i}" for i in range(4)]
    for name in names:
        cluster.predict({"prompt": "slow", "steps": 50}, name)
    for headers in ({}, ASYNC):
        started = time.monotonic()
        assert cluster.request("POST", "/predictions", {"input": {"steps": 3}}, headers)[0] == 422
        assert time.monotonic() - started < 2  # each of the others takes 25
    for name in names:  # those that wait are cancelled as well as those that run
        assert cluster.request("POST", f"/predictions/{name}/cancel")[0] == 200


def test_pictures_may_have_many_megabytes(cluster: Cluster) -> None:
    content = os.urandom(20 * 1024**2)
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    status, _, text = cluster.request("POST", "/predictions", {"input": {"prompt": "a", "image": uri}})
    assert status == 200
    (output,) = json.loads(text)["output"]
    assert base64.b64decode(output.partition(",")[2]) == content
