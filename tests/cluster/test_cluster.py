import asyncio
import base64
import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

import httpx
import replicate
import yaml
from replicate.exceptions import ModelError, ReplicateError

from cluster.local import RAY, descendants
from cluster.predictions import Prediction, Predictions, now
from harness.cluster import ENDS, Cluster, Hooks, Server
from local_cog.server import LOOPBACK, CogServer
from settings import ROOT

TOKEN = "t0ken-of-the-tests"
QUEUE = 60
# As much as a cluster needs of a predictor: it draws, fails, takes long, or takes its process with it.
PREDICTOR = """
import os
import time

from cog import BasePredictor, Input, Path
from tqdm import tqdm


class Predictor(BasePredictor):
    def setup(self) -> None:
        self.made = 0

    def predict(
        self,
        prompt: str = Input(description="what to do"),
        image: Path | None = Input(default=None),
        steps: int = Input(default=4, ge=1, le=50),
        strength: float = Input(default=1),
        model: str = Input(default="dev", choices=["dev", "schnell"]),
        replicate_weights: str | None = Input(default=None),
    ) -> list[Path]:
        print("Asked for", prompt)
        self.record_metric("timing.denoise", 1.5)
        if prompt == "fail":
            raise ValueError("A mask needs an image.")
        if prompt == "crash":
            os._exit(3)
        for _ in tqdm(range(steps)):
            time.sleep(0.5 if prompt == "slow" else 0.01)
        self.made += 1
        output = Path("/tmp") / f"flux-sprites-{os.getpid()}-{self.made % 4}.webp"
        output.write_bytes(image.read_bytes() if image else f"{prompt} {steps} {model}".encode())
        return [output]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("project")
    (directory / "predict.py").write_text(PREDICTOR)
    return directory


@pytest.fixture(scope="module")
def cog_server(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    with CogServer(project, log=tmp_path_factory.mktemp("coglet") / "log") as running:
        yield running


@pytest.fixture
def coglet(cog_server: CogServer) -> Server:
    """One Cog server, as it is, ready for a prediction."""
    give_up = time.monotonic() + 60
    while (status := cog_server.health()["status"]) != "READY":
        assert time.monotonic() < give_up, status
        time.sleep(0.01)
    return Server(cog_server.port)


async def leave_predictions(database: str) -> None:
    """What a front leaves that dies with all others: one that waits, one that runs, one that was to be cancelled."""
    async with Predictions(database) as known:
        await known.beat("dead")
        for name in ("waiting", "running", "unwanted"):
            inputs = {"prompt": name}
            made = Prediction(f"left-{name}", "dead", now(), secret_input=inputs, shown_input=inputs, api="cog")
            await known.create(made)
        await known.record(Prediction("left-running", "dead", now(), {}, {}, "cog"), status="processing", logs="a half")
        await known.cancel("left-unwanted")


@pytest.fixture(scope="module")
def cluster(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three workers and two fronts on two nodes, over SQLite; a cluster that died has left predictions there."""
    data = tmp_path_factory.mktemp("cluster")
    asyncio.run(leave_predictions(f"sqlite:///{data / 'predictions.db'}"))
    environment = {
        "DATABASE_URL": f"sqlite:///{data / 'predictions.db'}",
        "FILES_URL": str(data / "files"),
        "API_TOKENS": f"another,{TOKEN}",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    options = ("--project", str(project), "--workers", "3", "--nodes", "2", "--queue", str(QUEUE))
    with Cluster(*options, environment=environment, log=data / "log", token=TOKEN) as running:
        yield running


# ---- Cog's contract: what one coglet answers, the cluster answers

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


def comparable(answer: tuple[int, dict[str, str], str]) -> tuple[Any, ...]:
    """An answer without what differs from one time to the next, and without where a parser gave up on what."""
    status, headers, text = answer
    text = re.sub(r'"id":"(pred_[0-9a-f]+|[a-z2-7]{26})"', '"id":"…"', text)
    text = re.sub(r'"predict_time":[0-9.e-]+', '"predict_time":…', text)
    text = re.sub(r"\[[0-9:]+<[^]]*\]", "[…]", text)  # tqdm's times
    text = re.sub(r" at line \d+ column \d+$", "", text)
    text = re.sub(r"(the request body as JSON): .*", r"\1: …", text)
    text = re.sub(r"(into the target type): (\[0\]: )?invalid (type|length).*", r"\1: …", text)
    return status, headers.get("content-type"), headers.get("allow"), text


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


@pytest.mark.parametrize(
    ("inputs", "events"),
    [
        ({"prompt": "slow", "steps": 3}, None),
        ({"prompt": "slow", "steps": 3}, ["start", "completed"]),
        ({"prompt": "a"}, ["output"]),
        ({"prompt": "fail"}, ["completed"]),
        ({"prompt": "a"}, []),
    ],
)
def test_webhooks_are_coglets(
    inputs: dict[str, Any], events: list[str] | None, coglet: Server, cluster: Cluster
) -> None:
    name = f"hooked-{len(inputs)}-{inputs['prompt']}-{'-'.join(events if events is not None else ['all'])}"
    said = []
    for server in (coglet, cluster):
        with Hooks() as hooks:
            fields = {} if events is None else {"webhook_events_filter": events}
            server.predict(inputs, name, webhook=hooks.url, **fields)
            if events is None or "completed" in events:
                hooks.until_ended(name)
            elif events:
                hooks.until(lambda body: "output" in body)
            else:
                time.sleep(1)
            bodies = sorted({json.dumps(body, sort_keys=True) for _, body in hooks.received}, key=len)
            said.append([comparable((200, {}, body.replace(": ", ":")))[-1] for body in bodies])
    expected, seen = said
    if events is None:  # how often the log is told depends on the clock
        expected, seen = ([said[0], said[-1]] for said in (expected, seen))
    assert seen == expected


def test_an_output_is_told_before_the_end(cluster: Cluster) -> None:
    names = [f"drawn-{i}" for i in range(30)]  # of coglet's webhooks one in five comes after the end's
    with Hooks() as hooks:
        for name in names:
            events = {"webhook_events_filter": ["output", "completed"]}
            cluster.predict({"prompt": "a", "steps": 1}, name, webhook=hooks.url, **events)
        for name in names:
            told, end = hooks.until_ended(name)
            assert (told["status"], end["status"], told["output"]) == ("processing", "succeeded", end["output"])


def test_the_end_is_the_last_that_a_slow_listener_hears(cluster: Cluster) -> None:
    with Hooks(seconds=0.5) as hooks:
        cluster.predict({"prompt": "a"}, "told-slowly", webhook=hooks.url)
        said = hooks.until_ended("told-slowly")
        time.sleep(1)
        assert len(hooks.received) == len(said) > 1
    assert [body["status"] for body in said] == ["processing"] * (len(said) - 1) + ["succeeded"]


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


# ---- Replicate's API, as its own clients see it


@contextlib.contextmanager
def replicate_client(cluster: Cluster, token: str = TOKEN) -> Iterator[replicate.Client]:
    """The official client, whose connections are closed, which it leaves to the garbage collector."""
    client = replicate.Client(api_token=token, base_url=cluster.url)
    with client._client:
        yield client


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[replicate.Client]:
    with replicate_client(cluster) as client:
        yield client


MODEL = "someone/some-model"


def test_run_gives_files_that_the_front_keeps(client: replicate.Client) -> None:
    (url,) = client.run(MODEL, input={"prompt": "a", "steps": 2})
    assert url.endswith("/output.webp")
    answered = httpx.get(url)  # without a token: whoever knows the address may see the file
    assert (answered.text, answered.headers["content-type"]) == ("a 2 dev", "image/webp")
    assert httpx.get(url.replace("/files/", "/files/x")).status_code == 404


def test_a_version_may_be_named_in_every_form(client: replicate.Client, cluster: Cluster) -> None:
    assert len(client.run(f"{MODEL}:{'0' * 64}", input={"prompt": "a"})) == 1
    made = client.predictions.create(version="0" * 64, input={"prompt": "a"})
    assert (made.status, made.version) == ("starting", "0" * 64)
    status, _, text = cluster.request("POST", "/v1/predictions", {"input": {"prompt": "a"}})
    assert (status, json.loads(text)["detail"]) == (422, "- version is required\n")


def test_a_failure_is_the_models(client: replicate.Client) -> None:
    with pytest.raises(ModelError, match=r"A mask needs an image\."):
        client.run(MODEL, input={"prompt": "fail"})


def test_wrong_input_is_told_in_replicates_form(client: replicate.Client) -> None:
    with pytest.raises(ReplicateError) as refused:
        client.run(MODEL, input={"prompt": "a", "steps": 1000})
    assert (refused.value.status, refused.value.title) == (422, "Input validation failed")
    assert refused.value.detail == "- input.steps: 1000 is greater than the maximum of 50\n"


def test_the_status_and_the_progress_can_be_watched(client: replicate.Client) -> None:
    prediction = client.models.predictions.create(MODEL, input={"prompt": "slow", "steps": 6})
    seen = []
    while prediction.status in ("starting", "processing"):
        seen.append((prediction.status, prediction.progress and prediction.progress.current))
        time.sleep(0.1)
        prediction.reload()
    assert prediction.status == "succeeded"
    assert ("starting", None) in seen
    watched = [current for status, current in seen if status == "processing" and current]
    assert watched == sorted(watched)
    assert len(set(watched)) > 1
    assert prediction.created_at < prediction.started_at < prediction.completed_at
    assert prediction.metrics["predict_time"] > 2


def test_a_prediction_streams_its_events(client: replicate.Client) -> None:
    prediction = client.models.predictions.create(MODEL, input={"prompt": "slow", "steps": 2})
    events = [(event.event.value, event.data) for event in prediction.stream()]
    kinds = [kind for kind, _ in events]
    assert set(kinds[:-2]) == {"logs"}
    assert kinds[-2:] == ["output", "done"]
    assert "Asked for slow" in "".join(data for _, data in events)


def test_cancelling_is_seen_by_every_front(client: replicate.Client) -> None:
    prediction = client.models.predictions.create(MODEL, input={"prompt": "slow", "steps": 50})
    time.sleep(0.7)
    prediction.cancel()
    prediction.wait()
    assert prediction.status == "canceled"
    assert client.predictions.get(prediction.id).output is None


def test_waiting_ends_in_time(client: replicate.Client, cluster: Cluster) -> None:
    started = time.monotonic()
    body = {"version": MODEL, "input": {"prompt": "slow", "steps": 50}}
    status, _, text = cluster.request("POST", "/v1/predictions", body, {"Prefer": "wait=1"})
    assert 0.9 < time.monotonic() - started < 5
    assert (status, json.loads(text)["status"]) == (202, "starting")  # clients take any other status for the end
    client.predictions.cancel(json.loads(text)["id"])


def test_the_list_has_pages_without_gaps(client: replicate.Client, cluster: Cluster) -> None:
    quick = {"prompt": "a", "steps": 1}
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: client.models.predictions.create(MODEL, input=quick, wait=True).id, range(110)))
    first = client.predictions.list()
    second = client.predictions.list(first.next)
    assert len(first) == 100
    listed = [prediction.id for prediction in [*first, *second]]
    assert set(made) <= set(listed)
    assert len(set(listed)) == len(listed)
    assert [p.id for p in client.predictions.list(second.previous)] == [p.id for p in first]
    assert cluster.request("GET", "/v1/predictions?cursor=nonsense")[0] == 400


def test_a_file_is_uploaded_and_drawn_with(client: replicate.Client, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(bytes(range(256)))
    with photo.open("rb") as opened:
        (url,) = client.run(MODEL, input={"prompt": "a", "image": opened})
    assert httpx.get(url).content == bytes(range(256))
    file = client.files.create(photo)
    assert (file.name, file.size, file.content_type) == ("photo.png", 256, "image/png")
    assert file.id in [known.id for known in client.files.list()]
    assert client.files.get(file.id).checksums == file.checksums
    assert client.files.delete(file.id)
    with pytest.raises(ReplicateError, match="no such file"):
        client.files.get(file.id)


def test_pictures_may_have_many_megabytes(cluster: Cluster) -> None:
    content = os.urandom(20 * 1024**2)
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    status, _, text = cluster.request("POST", "/predictions", {"input": {"prompt": "a", "image": uri}})
    assert status == 200
    (output,) = json.loads(text)["output"]
    assert base64.b64decode(output.partition(",")[2]) == content


def test_the_image_has_the_settings_of_the_local_cluster() -> None:
    dockerfile = (ROOT / "cluster" / "deploy" / "Dockerfile").read_text()
    assert {name: dockerfile.partition(f"{name}=")[2].split()[0] for name in RAY} == RAY


def test_the_asynchronous_client_runs(cluster: Cluster) -> None:
    async def run_twice() -> list[list[str]]:
        client = replicate.Client(api_token=TOKEN, base_url=cluster.url)
        async with client._async_client:
            return await asyncio.gather(*(client.async_run(MODEL, input={"prompt": name}) for name in "ab"))

    urls = asyncio.run(run_twice())
    assert [httpx.get(url).text for (url,) in urls] == ["a 4 dev", "b 4 dev"]


def test_models_versions_and_deployments_are_described(client: replicate.Client) -> None:
    model = client.models.get(MODEL)
    assert (model.owner, model.name) == ("someone", "some-model")
    assert "prompt" in model.latest_version.openapi_schema["components"]["schemas"]["Input"]["properties"]
    assert [version.id for version in model.versions.list()] == [model.latest_version.id]
    prediction = client.deployments.get("someone/deployed").predictions.create(input={"prompt": "a"})
    prediction.wait()
    assert prediction.status == "succeeded"
    assert client.accounts.current().username == "flux-sprites"


def test_only_who_has_a_token_may_ask(cluster: Cluster) -> None:
    stranger = Server(cluster.port)
    for method, path in [("POST", "/predictions"), ("GET", "/v1/predictions"), ("GET", "/openapi.json"), ("GET", "/")]:
        assert stranger.request(method, path)[0] == 401
        assert stranger.request(method, path, headers={"Authorization": "Bearer wrong"})[0] == 401
    assert stranger.request("GET", "/health-check")[0] == 200
    assert Server(cluster.port, {"Authorization": "Token another"}).request("GET", "/v1/account")[0] == 200
    with replicate_client(cluster, "wrong") as client, pytest.raises(ReplicateError) as refused:
        client.run(MODEL, input={"prompt": "a"})
    assert (refused.value.status, refused.value.title) == (401, "Unauthenticated")


def test_no_token_is_shown_or_kept(cluster: Cluster, client: replicate.Client) -> None:
    secret = "http://user:pass@127.0.0.1:9/a.png?token=s3cret"
    inputs = {"prompt": "hf_abcdefghijklmnopqrstuvwxyz0123", "image": secret, "replicate_weights": secret}
    status, _, text = cluster.request("POST", "/predictions", {"id": "tokens", "input": inputs})
    assert status == 200
    made = client.models.predictions.create(MODEL, input=inputs)
    made.wait()
    database = cluster.environment["DATABASE_URL"].removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        kept = repr(connection.execute("SELECT * FROM predictions WHERE id IN ('tokens', ?)", [made.id]).fetchall())
    for shown in (text, kept, repr(made.dict())):
        assert "127.0.0.1" in shown
        assert not re.search("s3cret|user:pass|hf_abc", shown)


@pytest.fixture(scope="module")
def javascript() -> Path:
    """Replicate's client for JavaScript, as its registry has it."""
    directory = Path(__file__).parent / "replicate_client"
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    # Without a network it gives up in seconds, not in minutes.
    install = ["npm", "ci", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000"]
    done = subprocess.run(install, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm could not install replicate: {done.stderr[-200:]}")
    return directory / "client.mjs"


def test_the_javascript_client_works_unchanged(javascript: Path, cluster: Cluster) -> None:
    environment = {**os.environ, "TOKEN": TOKEN, "BASE_URL": f"{cluster.url}/v1"}
    done = subprocess.run(["node", javascript], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    progress = seen.pop("progress")
    assert (progress[0], progress[-1]) == ("starting", "succeeded")
    assert seen.pop("pages") >= 1
    assert seen.pop("webhooks") == [["processing", True, False], ["succeeded", True, False]]
    assert seen == {
        "run": "a 3 dev",
        "versioned": 1,
        "failure": "Prediction failed: Prediction failed: Prediction failed: ValueError: A mask needs an image.",
        "refused": [422, True],
        "canceled": "canceled",
        "file": 6,
        "picture": "picture",
        "deleted": True,
        "stream": ["logs", "output", "done"],
        "account": "flux-sprites",
        "model": "3.0.2",
        "deployment": "succeeded",
    }


def test_nothing_listens_beyond_this_machine(cluster: Cluster) -> None:
    own = set()
    for process in [cluster.process.pid, *descendants(cluster.process.pid)]:
        for file in Path(f"/proc/{process}/fd").glob("*"):
            with contextlib.suppress(OSError):
                own.add(file.readlink().name)
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in own:
                listening.append(address.partition(":")[0])
    assert len(listening) > 5
    assert {address[-8:] for address in listening} == {"0100007F"}  # 127.0.0.1, as the kernel writes it


def start_of_cluster(*options: str) -> str:
    """What `script/cluster` says when it does not start."""
    command = [sys.executable, "-m", "cluster.local", *options]
    environment = {name: value for name, value in os.environ.items() if name != "API_TOKENS"}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    return ended.stderr


def test_others_than_this_machine_need_tokens() -> None:
    assert start_of_cluster("--host", "0.0.0.0") == (
        "--host is 0.0.0.0; API_TOKENS must be set before others than this machine may ask.\n"
    )


def test_a_port_that_is_taken_is_not_shared() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port is {port}; it must be one that is free" in start_of_cluster("--port", str(port))


# ---- Nothing accepted is lost


def test_what_a_dead_cluster_has_left_is_taken_up(cluster: Cluster) -> None:
    ends = {}
    give_up = time.monotonic() + 30
    while len(ends) < 3:
        assert time.monotonic() < give_up, ends
        for name in ("waiting", "running", "unwanted"):
            state = json.loads(cluster.request("PUT", f"/predictions/left-{name}", {})[2])
            if state["status"] in ENDS:
                ends[name] = (state["status"], "output" in state and cog_output(state))
    assert ends == {
        "waiting": ("succeeded", "waiting 4 dev"),
        "running": ("succeeded", "running 4 dev"),
        "unwanted": ("canceled", False),
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
        assert hooks.until_ended(waiting, 10)[-1]["status"] == "canceled"
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
            cluster.update(project=str(project), workers=3, gpus_per_worker=0, queue=QUEUE)
            for i in range(12):
                assert hooks.until_ended(f"updated-{i}")[-1]["status"] == "succeeded"
        told = [(status, json.loads(text)["status"]) for status, _, text in (answer.result() for answer in answers)]
    assert told == [(200, "succeeded")] * 12
    give_up = time.monotonic() + 30
    for title, old in before.items():
        while left := set(old).intersection(cluster.processes(title)):
            assert time.monotonic() < give_up, (title, left)
            time.sleep(0.1)
    assert cluster.request("POST", "/predictions", {"input": {"prompt": "a"}})[0] == 200


def test_a_worker_that_is_killed_takes_its_cog_server_and_its_predictor_along(cluster: Cluster) -> None:
    worker = cluster.processes("CogWorker")[-1]
    own = descendants(worker)
    commands = [Path(f"/proc/{process}/cmdline").read_text() for process in own]
    assert any("cog.server.http" in command for command in commands)
    assert any("import coglet" in command for command in commands)
    os.kill(worker, signal.SIGKILL)
    give_up = time.monotonic() + 10
    while left := [process for process in own if _runs(process)]:
        assert time.monotonic() < give_up, left
        time.sleep(0.1)


def _runs(process: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_predictor_that_always_crashes_is_given_up(cluster: Cluster) -> None:
    with Hooks() as hooks:
        cluster.predict({"prompt": "crash"}, "crashing", webhook=hooks.url, webhook_events_filter=["completed"])
        end = hooks.until_ended("crashing", 120)[-1]
    assert (end["status"], end["error"]) == (
        "failed",
        "The prediction was given up: 3 workers ended while they ran it.",
    )


def test_every_accepted_prediction_ends_once_whatever_is_killed(cluster: Cluster) -> None:
    """Workers, their Cog servers, a front and a node end by force while 60 predictions are made."""
    names = [f"survivor-{i}" for i in range(60)]
    with Hooks() as hooks, ThreadPoolExecutor(6) as pool:

        def accepted(name: str) -> None:
            give_up = time.monotonic() + 60
            while time.monotonic() < give_up:
                # A front may die before it has answered: then the client does not know, and asks again.
                with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
                    cluster.predict({"prompt": name, "steps": 20}, name, webhook=hooks.url)
                    return
                time.sleep(0.2)
            raise TimeoutError(name)

        asked = [pool.submit(accepted, name) for name in names]
        for title in ("CogWorker", "cog.server.http", "Front", "raylet/raylet"):
            time.sleep(1.5)
            cluster.kill_one(title)
        for done in asked:
            done.result()
        for name in names:
            hooks.until_ended(name, 120)
        time.sleep(1)
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


# ---- What runs it elsewhere


def test_prometheus_hears_what_the_dashboard_draws(cluster: Cluster) -> None:
    dashboard = (ROOT / "cluster" / "deploy" / "grafana.json").read_text()
    drawn = set(re.findall(r"ray_(flux_\w+?)(?:_bucket|_sum|_count|_total)?\b", dashboard))
    give_up = time.monotonic() + 30
    told: set[str] = set()
    # These have not happened on every node that tells; a kept-back picture never does here.
    while missing := drawn - told - {"flux_safety_dropped", "flux_retries", "flux_adopted"}:
        assert time.monotonic() < give_up, f"Prometheus was not told of {missing}"
        # Each worker's first one is a load, its second a hit.
        cluster.request("POST", "/predictions", {"input": {"prompt": "a", "replicate_weights": "owner/name"}})
        time.sleep(0.5)
        told = set(
            re.findall(r"^ray_(flux_\w+?)(?:_bucket|_sum|_count|_total)?\{", httpx.get(cluster.metrics_url).text, re.M)
        )


def test_the_manifests_hold_the_same_configuration() -> None:
    configuration = yaml.safe_load((ROOT / "cluster" / "deploy" / "serve.yaml").read_text())
    service, address, _ = yaml.safe_load_all((ROOT / "cluster" / "deploy" / "rayservice.yaml").read_text())
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == configuration
    deployments = {each["name"]: each for each in configuration["applications"][0]["deployments"]}
    assert deployments["CogWorker"]["max_ongoing_requests"] == 1
    nodes = service["spec"]["rayClusterConfig"]
    assert f"ray[serve]=={nodes['rayVersion']}\n" in (ROOT / "cluster" / "requirements.txt").read_text()
    workers, fronts = (group["template"] for group in nodes["workerGroupSpecs"])
    assert address["spec"]["selector"] == fronts["metadata"]["labels"]
    pod = workers["spec"]
    patience = [deployments[name]["graceful_shutdown_timeout_s"] for name in ("CogWorker", "Front")]
    assert patience[0] < patience[1] < pod["terminationGracePeriodSeconds"]
