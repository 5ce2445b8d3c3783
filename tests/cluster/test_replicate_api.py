"""Replicate's API, as its own clients see it."""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

import httpx
import replicate
from replicate.exceptions import ModelError, ReplicateError

from harness.cluster import Cluster, Hooks, Server
from service.data_uri import uri
from tests.cluster.databases import rows
from tests.cluster.small_cluster import TOKEN
from tests.support.processes import finished

MODEL = "someone/some-model"


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


def ask(cluster: Cluster, inputs: dict[str, Any], **fields: object) -> dict[str, Any]:
    """A prediction that has ended, asked for as by curl."""
    body = {"version": MODEL, "input": inputs, **fields}
    status, _, text = cluster.request("POST", "/v1/predictions", body, {"Prefer": "wait"})
    assert status == 201, text
    return json.loads(text)


def test_run_gives_files_that_the_front_keeps(cluster: Cluster) -> None:
    (url,) = ask(cluster, {"prompt": "a", "steps": 2})["output"]
    assert url.startswith(f"{cluster.url}/files/")
    assert url.endswith("/output.webp")
    answered = httpx.get(url)  # without a token: whoever knows the address may see the file
    assert (answered.text, answered.headers["content-type"]) == ("a 2 dev", "image/webp")
    assert httpx.get(url.replace("/files/", "/files/x")).status_code == 404


def test_replicates_clients_see_files_where_others_see_urls(client: replicate.Client, cluster: Cluster) -> None:
    (file,) = client.run(MODEL, input={"prompt": "a", "steps": 2})
    assert (file.url.partition(",")[0], file.read()) == ("data:image/webp;base64", b"a 2 dev")
    with Hooks() as hooks:
        made = ask(cluster, {"prompt": "b", "steps": 2}, webhook=hooks.url)
        (*_, told) = hooks.until_ended(made["id"])
    (listed,) = (known for known in client.predictions.list() if known.id == made["id"])
    assert listed.output == told["output"] == made["output"]
    known = client.predictions.get(made["id"])
    assert known.output == client.predictions.cancel(made["id"]).output == [uri(b"b 2 dev", "image/webp")]
    assert known.dict() == {**listed.dict(), "output": known.output}


def test_a_version_may_be_named_in_every_form(client: replicate.Client, cluster: Cluster) -> None:
    assert len(client.run(f"{MODEL}:{'0' * 64}", input={"prompt": "a"})) == 1
    made = client.predictions.create(version="0" * 64, input={"prompt": "a"})
    assert (made.status, made.version) == ("starting", "0" * 64)
    status, _, text = cluster.request("POST", "/v1/predictions", {"input": {"prompt": "a"}})
    assert (status, json.loads(text)["detail"]) == (422, "- version is required\n")


@pytest.mark.parametrize(
    "version", ["a/b/c", "a" * 129, "a/b:" + "c" * 129, "a\nb", "é/b", "../..", "a/b:", "a:b", ":a", "a/b:c:d"]
)
def test_a_version_that_is_none_is_refused(cluster: Cluster, version: str) -> None:
    body = {"version": version, "input": {"prompt": "a"}}
    status, headers, text = cluster.request("POST", "/v1/predictions", body)
    assert (status, headers["content-type"]) == (422, "application/problem+json")
    assert "; it must be a version's id, owner/name or owner/name:id" in json.loads(text)["detail"]


WRONG: dict[str, tuple[bytes, int, str]] = {
    "nan": (b'{"input":{"prompt":"a","strength":NaN}}', 400, "it has NaN, which is no number in JSON."),
    "surrogate": (rb'{"input":{"prompt":"\ud800"}}', 400, "it has half of a surrogate pair, U+D800"),
    "twice": (b'{"input":{"prompt":"a"},"input":{"prompt":"b"}}', 400, "it has the name 'input' twice in one object."),
    "list": (b"[1]", 422, "The body must be an object whose input is one."),
    "input": (b'{"input":3}', 422, "The body must be an object whose input is one."),
    "events": (
        b'{"input":{"prompt":"a"},"webhook_events_filter":[[1],{}]}',
        422,
        "webhook_events_filter must be a list of",
    ),
    "text": (
        b'{"input":{"prompt":"a"},"webhook_events_filter":"start"}',
        422,
        "webhook_events_filter must be a list of",
    ),
    "webhook": (
        b'{"input":{"prompt":"a"},"webhook":"http://u:s3cret@a..b/"}',
        422,
        "webhook is 'http://a..b/'; it must be",
    ),
    "number": (b'{"input":{"prompt":"a"},"webhook":3}', 422, "webhook must be a string."),
    "completed": (b'{"input":{"prompt":"a"},"webhook_completed":"ftp://h/"}', 422, "webhook is 'ftp://h/'; it must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_body_is_told_in_replicates_form(cluster: Cluster, case: str) -> None:
    body, status, sentence = WRONG[case]
    answered = cluster.request("POST", "/v1/models/a/b/predictions", body)
    assert (answered[0], answered[1]["content-type"]) == (status, "application/problem+json")
    assert sentence in json.loads(answered[2])["detail"]


@pytest.mark.parametrize("wait", ["9" * 5000, "0" * 5000, "-1", "1e400", "²"])
def test_any_wait_is_a_number_or_none(cluster: Cluster, wait: str) -> None:
    body = {"input": {"prompt": "a", "steps": 1}}
    status = cluster.request("POST", "/v1/models/a/b/predictions", body, {"Prefer": f"wait={wait}"})[0]
    assert status in (201, 202)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/%00/b", "/v1/models/../b", "/v1/models/a/" + "b" * 129, "/v1/deployments/a%0A/b",
        "/v1/files/x/stream/%C3%A9", "/v1/files/..%2Fx", "/files/x%00/y", "/files/../etc", "/v1/predictions/%FF",
        "/v1/models/a/b/versions/%20", "/v1/files/%C3%A9",
    ],
)  # fmt: skip
def test_what_has_no_name_is_not_found(cluster: Cluster, path: str) -> None:
    assert cluster.request("GET", path)[0] == 404


@pytest.mark.parametrize("cursor", ["%00", "n~%00~x", "n~~", "n~2026~a%0A", "%FF", "a" * 60_000, "x~2026~a"])
def test_a_cursor_that_is_none_is_refused(cluster: Cluster, cursor: str) -> None:
    assert cluster.request("GET", f"/v1/predictions?cursor={cursor}")[0] == 400


def test_others_than_a_proxy_cannot_say_where_files_are(cluster: Cluster) -> None:
    headers = {"X-Forwarded-Host": "evil.com", "X-Forwarded-Proto": "https"}
    body = {"input": {"prompt": "a", "steps": 1}}
    made = json.loads(cluster.request("POST", "/v1/models/a/b/predictions", body, {**headers, "Prefer": "wait"})[2])
    assert made["urls"]["get"] == f"{cluster.url}/v1/predictions/{made['id']}"
    assert made["output"][0].startswith(f"{cluster.url}/files/")
    status, _, text = cluster.request("POST", "/v1/models/a/b/predictions", body, {"Host": "[x"})
    assert (status, json.loads(text)["detail"][:14]) == (400, "Host is '[x'; ")


def upload(cluster: Cluster, name: bytes, kind: bytes = b"image/png", metadata: bytes = b"{}") -> tuple[int, str]:
    field = b'--x\r\nContent-Disposition: form-data; name="%s"'
    file = field % b"content" + b'; filename="%s"\r\nContent-Type: %s\r\n\r\nabc\r\n' % (name, kind)
    form = file + field % b"metadata" + b"\r\n\r\n" + metadata + b"\r\n--x--\r\n"
    return cluster.request("POST", "/v1/files", form, {"Content-Type": "multipart/form-data; boundary=x"})[::2]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        (b"a\0b.png", "a?b.png"),
        (b"../../etc/passwd", "passwd"),
        ("a\u2028b\x85c\x1b[2K.png".encode(), "a?b?c?[2K.png"),
        (b"C:\\\\x\\\\y.png", "y.png"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
        (b"a" * 4000, "a" * 128),
        (b"", "file"),
    ],
)
def test_a_file_has_a_safe_name(cluster: Cluster, name: bytes, kept: str) -> None:
    status, text = upload(cluster, name)
    assert (status, json.loads(text)["name"]) == (201, kept)


@pytest.mark.parametrize(
    ("kind", "metadata", "status", "sentence"),
    [
        (b"no type", b"{}", 422, "The file's Content-Type is 'no type'; it must be like image/png."),
        (b"a" * 100 + b"/b", b"{}", 422, "it must be like image/png."),
        (b"image/png", b"{", 422, "metadata must be JSON, and it is no JSON"),
        (b"image/png", rb'{"a":"\ud800"}', 422, "metadata must be JSON, and it has half of a surrogate pair"),
        (b"image/png", b"[NaN]", 422, "metadata must be JSON, and it has NaN"),
        (b"image/png", b"[1]", 422, "metadata must be an object of JSON."),
        (b"image/png", b'"' + b"a" * 70_000 + b'"', 413, "metadata has 70002 bytes; it may have 65536."),
    ],
)
def test_a_wrong_upload_is_refused(cluster: Cluster, kind: bytes, metadata: bytes, status: int, sentence: str) -> None:
    answered, text = upload(cluster, b"a.png", kind, metadata)
    assert (answered, sentence in json.loads(text)["detail"]) == (status, True), text


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


def test_unknown_inputs_are_named_in_the_log_and_null_is_absence(client: replicate.Client) -> None:
    inputs = {"prompt": "a", "steps": None, "image": None, "hf_lora": "a/b", "strenght": 1}
    said = (
        "The inputs hf_lora (did you mean replicate_weights?) and strenght (did you mean strength?) are unknown and "
        "have no effect.\n"
    )
    prediction = client.models.predictions.create(MODEL, input=inputs)
    streamed = "".join(event.data for event in prediction.stream() if event.event.value == "logs")
    prediction.reload()
    for logs in (prediction.logs, f"{streamed}\n"):
        assert logs.startswith(f"{said}Asked for a\n")
        assert logs.count(said) == 1
    assert (prediction.input, prediction.status) == ({"prompt": "a"}, "succeeded")


def test_cancelling_is_seen_by_every_front(client: replicate.Client) -> None:
    prediction = client.models.predictions.create(MODEL, input={"prompt": "slow", "steps": 50})
    time.sleep(0.7)
    prediction.cancel()
    prediction.wait()
    assert prediction.status == "canceled"
    assert client.predictions.get(prediction.id).output is None


def test_a_prediction_is_cancelled_after_the_time_that_its_client_gives_it(
    client: replicate.Client, cluster: Cluster
) -> None:
    body = {"version": MODEL, "input": {"prompt": "slow", "steps": 50}}  # takes 25 seconds
    asked = [cluster.request("POST", "/v1/predictions", body, {"Cancel-After": after}) for after in ("5", "1h5s")]
    cut, uncut = (client.predictions.get(json.loads(text)["id"]) for _, _, text in asked)
    cut.wait()
    assert cut.status == "canceled"
    ended, created = (datetime.fromisoformat(time) for time in (cut.completed_at, cut.created_at))
    assert ended - created >= timedelta(seconds=5)
    uncut.reload()
    assert uncut.status in ("starting", "processing", "succeeded")
    uncut.cancel()


@pytest.mark.parametrize("after", ["", "4s", "24h1s", "-5s", "1.5m", "5 m", "1s5m", "m", "soon", "9" * 30 + "s", "٣٠"])
def test_a_time_that_is_none_is_refused(cluster: Cluster, after: str) -> None:
    body = {"version": MODEL, "input": {"prompt": "a"}}
    status, _, text = cluster.request(
        "POST", "/v1/predictions", body, {"Cancel-After": after.encode().decode("latin-1")}
    )
    detail = json.loads(text)["detail"]
    assert status == 422
    assert detail.startswith("Cancel-After is ")
    assert detail.endswith("; it must be a time from 5 seconds to 24 hours, such as 30s or 1h30m.")


def test_waiting_ends_in_time(client: replicate.Client, cluster: Cluster) -> None:
    started = time.monotonic()
    body = {"version": MODEL, "input": {"prompt": "slow", "steps": 50}}
    status, _, text = cluster.request("POST", "/v1/predictions", body, {"Prefer": "wait=1"})
    assert 0.9 < time.monotonic() - started < 15
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
        (drawn,) = client.run(MODEL, input={"prompt": "a", "image": opened})
    assert drawn.read() == bytes(range(256))
    file = client.files.create(photo)
    assert (file.name, file.size, file.content_type) == ("photo.png", 256, "image/png")
    assert file.id in [known.id for known in client.files.list()]
    assert client.files.get(file.id).checksums == file.checksums
    assert client.files.delete(file.id)
    with pytest.raises(ReplicateError, match="no such file"):
        client.files.get(file.id)


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
    query = f"SELECT * FROM predictions WHERE id IN ('tokens', '{made.id}')"
    kept = repr(rows(cluster.environment["DATABASE_URL"], query))
    for shown in (text, kept, repr(made.dict())):
        assert "127.0.0.1" in shown
        assert not re.search("s3cret|user:pass|hf_abc", shown)


def test_no_form_of_a_reference_is_shown_or_kept_with_its_secret(cluster: Cluster) -> None:
    references = [
        "http://u:ab/s3cret@127.0.0.1:9/x",
        "https://u:12/s3cret@h",
        "u:p\\s3cret@h",
        " \ncivitai.com/models/1?token=s3cret",
        "www.h.com/x.png?s3cret",
        "civitai.com/models/1#token=s3cret",
        "https://h.com/x%3Ftoken%3Ds3cret",
        " data:image/png;base64,s3cret",
        "\ufeffDATA: image/png ;base64,s3cret",
    ]
    shown, names = [], []
    with Hooks() as hooks:
        for number, reference in enumerate(references):
            inputs = {"prompt": f"a fox as in {reference} please", "steps": 1, "replicate_weights": reference}
            body = {"id": f"form-{number}", "input": inputs, "webhook": hooks.url}
            status, _, text = cluster.request("POST", "/predictions", body)
            assert status == 200
            shown += [text, *map(str, hooks.until_ended(body["id"]))]
            names.append(body["id"])
            wrong = {"input": {"prompt": "a", "steps": reference, "model": reference, "strength": [reference]}}
            status, _, refused = cluster.request("POST", "/v1/predictions", {"version": "a" * 64, **wrong})
            assert status == 422
            shown += [refused, cluster.request("POST", "/predictions", wrong)[2]]
    shown += [cluster.request("GET", f"/v1/predictions/{name}")[2] for name in names]
    shown.append(cluster.request("GET", "/v1/predictions")[2])
    shown.append(repr(rows(cluster.environment["DATABASE_URL"], "SELECT * FROM predictions WHERE id LIKE 'form-%'")))
    assert [text for text in shown if "s3cret" in text] == []
    assert "civitai.com/models/1" in shown[-1]


CLIENTS = Path(__file__).parent / "replicate_client"


def told_by(program: str, script: str, cluster: Cluster, folder: Path) -> dict[str, Any]:
    """The output of a script with Replicate's client; its files are in a folder."""
    variables = {"REPLICATE_API_TOKEN": TOKEN, "REPLICATE_BASE_URL": cluster.url, "BASE_URL": f"{cluster.url}/v1"}
    environment = {**os.environ, **variables}
    done = finished([program, CLIENTS / script], env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def documented(program: str, script: str, cluster: Cluster, folder: Path) -> dict[str, Any]:
    """What Replicate's documentation sees beside what it sees in each language."""
    (folder / "photo.png").write_bytes(bytes(range(256)))
    seen = told_by(program, script, cluster, folder)
    assert (folder / "polled_0.webp").read_text() == "polled 4 dev"
    assert (folder / "upscaled.webp").read_bytes() == bytes(range(256))
    assert seen.pop("strings") == [uri(b"a 1 dev", "image/webp")]
    assert seen.pop("statuses") == ["starting", "succeeded"]
    assert seen.pop("output") == [uri(b"slow 1 dev", "image/webp")]
    ((listed,),), (told,) = seen.pop("listed"), seen.pop("webhook")
    for url in (listed, told):
        assert url.startswith(f"{cluster.url}/files/")
    assert seen.pop("pages") >= 1
    return seen


def test_replicates_documentation_works_in_python(cluster: Cluster, tmp_path: Path) -> None:
    seen = documented(sys.executable, "documented.py", cluster, tmp_path)
    for name in ("read", "chunks", "aread"):
        assert (tmp_path / f"{name}.webp").read_text() == f"{name} 4 dev"
    assert [(tmp_path / f"achunks_{index}.webp").read_text() for index in (0, 1)] == [
        "two unicorns 4 dev",
        "four unicorns 4 dev",
    ]
    # An event that is a file has no text there, so that events have URLs.
    assert seen.keys() == {"stream", "events", "astream"}
    for text in seen.values():
        assert text.startswith(f"{cluster.url}/files/")


@pytest.mark.usefixtures("node_modules")
def test_replicates_documentation_works_in_javascript(cluster: Cluster, tmp_path: Path) -> None:
    seen = documented("node", "documented.mjs", cluster, tmp_path)
    assert [(tmp_path / f"{name}.webp").read_text() for name in ("written", "streamed")] == [
        "written 4 dev",
        "streamed 4 dev",
    ]
    assert seen.pop("stream").startswith(f"{cluster.url}/files/")
    assert seen == {"url": "data:", "blob": ["image/webp", "blob 4 dev"], "valid": True}


@pytest.mark.usefixtures("node_modules")
def test_the_javascript_client_works_unchanged(cluster: Cluster, tmp_path: Path) -> None:
    seen = told_by("node", "client.mjs", cluster, tmp_path)
    progress = seen.pop("progress")
    assert (progress[0], progress[-1]) == ("starting", "succeeded")
    assert seen.pop("webhooks") == [["processing", True, False], ["succeeded", True, False]]
    assert seen == {
        "failure": "Prediction failed: Prediction failed: Prediction failed: ValueError: A mask needs an image.",
        "refused": [422, True],
        "canceled": "canceled",
        "file": 6,
        "deleted": True,
        "stream": ["logs", "output", "done"],
        "account": "flux-sprites",
        "model": "3.0.2",
        "deployment": "succeeded",
    }
