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
from harness.waiting import wait_until
from settings import VERSION
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
    "a-file": ("POST", "/predictions", {"input": {"prompt": "a", "image": "data:image/png;base64,aGVsbG8="}}),
    "a-file-that-is-not-there": ("POST", "/predictions", {"input": {"prompt": "a", "image": "http://127.0.0.1:9/a.png"}}),
    "an-error": ("POST", "/predictions", {"input": {"prompt": "fail"}}),
    "output-file-prefix": ("POST", "/predictions", {"input": {"prompt": "a"}, "output_file_prefix": "http://127.0.0.1:9"}),
    "too-large-a-number": ("POST", "/predictions", {"input": {"prompt": "a", "steps": 51}}),
    "too-large-a-number-async": ("POST", "/predictions", {"input": {"prompt": "a", "steps": 51}}, ASYNC),
    "three-problems": ("POST", "/predictions", {"input": {"prompt": "a", "steps": 0, "model": "x", "image": 3}}),
    "a-type": ("POST", "/predictions", {"input": {"prompt": 3}}),
    "a-missing-input": ("PUT", "/predictions/case-8", {"input": {"steps": 1}}),
    "no-input": ("POST", "/predictions", {}),
    "null-input": ("POST", "/predictions", {"input": None}),
    "a-list-of-inputs": ("POST", "/predictions", {"input": [1]}),
    "no-body": ("POST", "/predictions"),
    "a-list": ("POST", "/predictions", [1]),
    "an-id-that-is-a-number": ("POST", "/predictions", {"id": 3, "input": {"prompt": "a"}}),
    "a-webhook-that-is-a-number": ("POST", "/predictions", {"webhook": 3, "input": {"prompt": "a"}}),
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


# Requests that coglet takes and the cluster refuses: the status, and the answer's text.
AN_ID = "it must have 1 to 128 letters, digits and _ . ~ - of ASCII, and begin with a letter or digit."
A_BODY = {"input": {"prompt": "a", "steps": 1}}
REFUSED: dict[str, tuple[tuple[Any, ...], int, str]] = {
    **{f"put-{name}": (("PUT", f"/predictions/{name}", A_BODY), 422, AN_ID) for name in (
        "case%207", ".", "..", "%2e%2e", "%252e", "a" * 129, "a" * 256, "a%0a", "a%00", "%01", "%C3%A9", "%FF", "-a",
        "a%3Fb",
    )},
    **{f"post-{index}": (("POST", "/predictions", {**A_BODY, "id": name}), 422, AN_ID) for index, name in enumerate(
        ["", ".", "..", "../../x", "a/b", "a" * 129, "a\n", "\x01", "é", "%2e", " a"]
    )},
    "a-webhook-that-is-no-url": (("POST", "/predictions", {**A_BODY, "webhook": "no url"}), 422, "webhook is 'no url'"),
    "a-webhook-without-a-host": (("POST", "/predictions", {**A_BODY, "webhook": "http://a..b/"}), 422, "'http://a..b/'"),
    **{f"json-{index}": (("POST", "/predictions", body, JSON), 400, sentence) for index, (body, sentence) in enumerate([
        (b'{"input":{"prompt":"a","strength":NaN}}', "it has NaN, which is no number in JSON."),
        (b'{"input":{"prompt":"a","x":[' + b"[]," * 10_000 + b"1]}}", "it has more than 10000 values"),
    ])},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_cluster_answers_as_one_coglet_does(case: str, coglet: Server, cluster: Cluster) -> None:
    expected = coglet.request(*CASES[case])
    assert comparable(cluster.request(*CASES[case])) == comparable(expected)


@pytest.mark.parametrize("case", REFUSED)
def test_the_cluster_refuses_what_coglet_takes_and_cannot_use(case: str, cluster: Cluster) -> None:
    request, status, sentence = REFUSED[case]
    answered = cluster.request(*request)
    assert (answered[0], sentence in answered[2]) == (status, True), answered[2]
    if status == 422:
        assert json.loads(answered[2])["detail"][0]["loc"] in (["body", "id"], ["body", "webhook"])


def test_an_id_may_have_128_characters_and_is_decoded_once(cluster: Cluster) -> None:
    name = "0" + "a_.~-" * 25 + "Zz"
    assert len(name) == 128
    first = cluster.request("PUT", f"/predictions/{name.replace('~', '%7E')}", {"input": {"prompt": "a", "steps": 1}})
    assert json.loads(first[2])["id"] == name
    assert cluster.request("PUT", f"/predictions/{name}", {})[2] == first[2]


@pytest.mark.parametrize("name", ["..", "%252e", "a%0a", "a" * 129, "%00"])
def test_what_cannot_be_an_id_is_not_found(cluster: Cluster, name: str) -> None:
    assert cluster.request("POST", f"/predictions/{name}/cancel")[::2] == (404, "{}")
    assert cluster.request("GET", f"/v1/predictions/{name}")[0] == 404


@pytest.mark.parametrize(
    "prompt", ["//[a://b", "http://[x", "http://[::1", "http://a:b@c:d?e", "\u2028\ud83d\ude00", "a" * 10**6]
)
def test_odd_prompts_and_large_numbers_are_drawn(cluster: Cluster, prompt: str) -> None:
    inputs = {"prompt": prompt, "steps": 1, "strength": 2**64, "unknown": ["a" * 10_000], "replicate_weights": prompt}
    status, _, text = cluster.request("POST", "/predictions", {"input": inputs, "webhook_events_filter": []})
    assert (status, json.loads(text)["status"]) == (200, "succeeded")


UNKNOWN = "The inputs promt (did you mean prompt?) and 'a?b' are unknown and have no effect.\n"


def test_unknown_inputs_are_named_in_the_log_and_change_nothing_else(coglet: Server, cluster: Cluster) -> None:
    asked = ("POST", "/predictions", {"input": {"prompt": "a", "promt": "b", "a\nb": 1, "negative_prompt": None}})
    status, headers, text, log = _without_log(coglet.request("POST", "/predictions", {"input": {"prompt": "a"}}))
    assert _without_log(cluster.request(*asked)) == (status, headers, text, UNKNOWN + log)
    with Hooks() as hooks:
        inputs = asked[2]["input"]
        cluster.predict(inputs, "unknown-inputs", webhook=hooks.url)
        heard = [body["logs"] for body in hooks.until_ended("unknown-inputs")]
    assert {logs.count(UNKNOWN) for logs in heard} == {1}
    assert all(logs.startswith(UNKNOWN) for logs in heard)
    assert json.loads(cluster.request("PUT", "/predictions/unknown-inputs", {})[2])["logs"] == heard[-1]


def _without_log(answer: tuple[int, dict[str, str], str]) -> tuple[int, Any, dict[str, Any], str]:
    """An answer as it may be compared, and the part of its log that is the same each time."""
    status, kind, _, text = comparable(answer)
    body = json.loads(text.replace('"predict_time":…', '"predict_time":0'))
    log = body.pop("logs")
    return status, kind, body, log.partition("  0%")[0]


def test_null_is_absence(cluster: Cluster) -> None:
    absent = dict.fromkeys(("image", "steps", "model", "replicate_weights", "unknown"))
    cluster.predict({"prompt": "a", **absent}, "null")
    ended = json.loads(cluster.request("PUT", "/predictions/null", {})[2])
    assert "input" not in ended or ended["input"] == {"prompt": "a"}
    status, _, text = cluster.request("POST", "/predictions", {"input": {"prompt": "a", **absent}})
    output = json.loads(text)["output"][0]
    assert (status, base64.b64decode(output.partition(",")[2])) == (200, b"a 4 dev")
    assert json.loads(text)["logs"].startswith("Asked for a\n")
    status, _, text = cluster.request("POST", "/predictions", {"input": {"prompt": None, "steps": None}})
    problem = {"loc": ["body", "input", "prompt"], "msg": "Field required", "type": "value_error.missing"}
    assert (status, json.loads(text)) == (422, {"detail": [problem]})


def test_what_is_shown_of_an_input_is_short_and_known(cluster: Cluster) -> None:
    inputs = {"prompt": "slow " * 10**5, "steps": 1, "unknown": "a" * 10**6}
    cluster.predict({"prompt": "slow", "steps": 50}, "before-the-long-one")
    cluster.predict(inputs, "the-long-one")
    shown = json.loads(cluster.request("PUT", "/predictions/the-long-one", {})[2])
    assert "unknown" not in shown.get("input", {})
    assert len(shown.get("input", {}).get("prompt", "")) < 11_000
    cluster.request("POST", "/predictions/before-the-long-one/cancel")


def test_the_discovery_document_lacks_the_shutdown_and_says_what_else_is_here(coglet: Server, cluster: Cluster) -> None:
    expected = json.loads(coglet.request("GET", "/")[2])
    del expected["shutdown_url"]
    ours = {"name": "flux-sprites", "version": VERSION, "replicate_predictions_url": "/v1/predictions"}
    assert json.loads(cluster.request("GET", "/")[2]) == expected | ours
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

    def status() -> str | None:  # None until it is known: then this request lacks its input
        return json.loads(cluster.request("PUT", "/predictions/left", {})[2]).get("status")

    wait_until(lambda: status() == "processing", pause=0.1)
    connection.close()
    wait_until(lambda: status() == "canceled", pause=0.1)


def test_wrong_input_is_refused_at_once_while_all_workers_are_busy(cluster: Cluster) -> None:
    names = [f"busy-{i}" for i in range(4)]
    for name in names:
        cluster.predict({"prompt": "slow", "steps": 50}, name)
    for headers in ({}, ASYNC):
        started = time.monotonic()
        assert cluster.request("POST", "/predictions", {"input": {"steps": 3}}, headers)[0] == 422
        assert time.monotonic() - started < 10  # each of the others takes 25
    for name in names:  # those that wait are cancelled as well as those that run
        assert cluster.request("POST", f"/predictions/{name}/cancel")[0] == 200


def test_pictures_may_have_many_megabytes(cluster: Cluster) -> None:
    content = os.urandom(20 * 1024**2)
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    status, _, text = cluster.request("POST", "/predictions", {"input": {"prompt": "a", "image": uri}})
    assert status == 200
    (output,) = json.loads(text)["output"]
    assert base64.b64decode(output.partition(",")[2]) == content
