"""How Replicate's API shows outputs: to whom as data URIs, and what cannot be shown so."""

import asyncio
import json
import mimetypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

import replicate
from starlette.applications import Starlette

from cluster.addresses import Addresses
from cluster.files import Files
from cluster.forms import INLINE_BYTES, Forms
from cluster.predictions import Prediction, Predictions, now
from cluster.settings import ClusterSettings
from harness.cluster import Server
from service.data_uri import uri
from tests.cluster.served import served

# Ray Serve warns when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
PYTHON, JAVASCRIPT = {"User-Agent": "replicate-python/1.0.7"}, {"User-Agent": "replicate-javascript/1.4.0"}
PROXY = {**PYTHON, "X-Forwarded-Host": "example.com", "X-Forwarded-Proto": "https"}


def keep(folder: Path, *contents: bytes, **fields: object) -> Prediction:
    """A prediction that has drawn files of these contents."""

    async def story() -> Prediction:
        files = Files(str(folder / "files"))
        data = [uri(content, "image/webp") for content in contents]
        fields.setdefault("output", await files.store_output(data, {}))
        inputs = {"image": "/files/an_input/output.webp", "mask": "data:,sha256-0123456789abcdef"}
        made = {"status": "succeeded", "logs": "a bar\r", "base_url": "http://hook", **fields}
        prediction = Prediction("one", "front", now(), {}, inputs, "replicate", **made)
        async with Predictions(f"sqlite:///{folder / 'predictions.db'}") as predictions:
            await predictions.create(prediction)
        return prediction

    return asyncio.run(story())


@contextmanager
def front(folder: Path, **variables: str) -> Iterator[Server]:
    """Replicate's API over what was kept."""
    # Here, for Ray Serve warns when it is imported.
    from cluster.api_common import exception_handlers
    from cluster.replicate_api import ReplicateApi

    settings = ClusterSettings.from_environment(variables)
    predictions, files = Predictions(f"sqlite:///{folder / 'predictions.db'}"), Files(str(folder / "files"))
    addresses, forms = Addresses(settings.public_url, settings.trusted_proxies), Forms(files, "")
    parts = (None, predictions, files, forms, None, None, None, False, addresses, "", settings.outputs)
    try:
        routes = ReplicateApi(*parts).routes()
        with served(Starlette(routes=routes, exception_handlers=exception_handlers())) as port:
            yield Server(port)
    finally:
        predictions.engine.dispose()


def get(server: Server, path: str = "/one", headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    status, answered, text = server.request("GET", f"/v1/predictions{path}", headers=headers)
    assert (status, answered["content-type"], int(answered["content-length"])) == (
        200,
        "application/json",
        len(text.encode()),
    )
    return json.loads(text)


def told(folder: Path, prediction: Prediction) -> dict[str, Any]:
    """The body of a webhook."""

    async def story() -> list[bytes]:
        shown = await Forms(Files(str(folder / "files")), "").show(prediction)
        return [piece async for piece in shown.pieces()]

    return json.loads(b"".join(asyncio.run(story())))


@pytest.mark.parametrize(
    ("variables", "headers", "base"),
    [
        ({}, {}, "http://{host}"),
        ({}, PYTHON, None),
        ({}, JAVASCRIPT, None),
        ({}, {"User-Agent": "an-app/2 replicate-python/1.0.7"}, None),
        ({}, {"User-Agent": "not-replicate-python/1"}, "http://{host}"),
        ({}, {"User-Agent": "replicate-python/0.25.1"}, "http://{host}"),
        ({}, {"User-Agent": "replicate-javascript/0.34.1"}, "http://{host}"),
        ({}, PROXY, None),
        ({"TRUSTED_PROXIES": "127.0.0.1"}, PROXY, "https://example.com"),
        ({"PUBLIC_URL": "https://example.com/flux"}, PYTHON, "https://example.com/flux"),
        ({"PUBLIC_URL": "http://example.com"}, PYTHON, "http://example.com"),
        ({"OUTPUTS": "url"}, JAVASCRIPT, "http://{host}"),
        ({"OUTPUTS": "data"}, {}, None),
        ({"OUTPUTS": "data", "PUBLIC_URL": "https://example.com"}, {}, None),
    ],
)
def test_who_sees_outputs_as_urls(
    variables: dict[str, str], headers: dict[str, str], base: str | None, tmp_path: Path
) -> None:
    """A list and a webhook have URLs, whoever asks; and nothing but the output differs."""
    kept = keep(tmp_path, b"drawn")
    (path,) = kept.output
    with front(tmp_path, **variables) as server:
        alone = get(server, headers=headers)
        (listed,) = get(server, "", headers)["results"]
    host = f"127.0.0.1:{server.port}"
    shown = uri(b"drawn", "image/webp") if base is None else base.format(host=host) + path
    assert alone == {**listed, "output": [shown]}
    assert listed["output"] == [listed["urls"]["get"].replace("/v1/predictions/one", path)]
    assert told(tmp_path, kept)["output"] == [f"http://hook{path}"]
    assert alone["input"]["image"] == "/files/an_input/output.webp"


@pytest.mark.parametrize("status", ["processing", "failed", "canceled"])
def test_what_has_not_succeeded_has_no_files_inside(status: str, tmp_path: Path) -> None:
    (path,) = keep(tmp_path, b"drawn", status=status).output
    with front(tmp_path, OUTPUTS="data") as server:
        assert get(server)["output"] == [server.url + path]


@pytest.mark.parametrize("output", [None, "a täxt", {"n": [1, None, "a"]}])
def test_an_output_that_is_no_file_is_shown_as_it_is(output: object, tmp_path: Path) -> None:
    keep(tmp_path, output=output)
    with front(tmp_path) as server:
        assert get(server, headers=PYTHON) == get(server)


def test_a_text_of_any_length_is_no_file(tmp_path: Path) -> None:
    keep(tmp_path, output="a" * (INLINE_BYTES + 1))
    with front(tmp_path) as server:
        assert get(server, headers=PYTHON)["logs"] == "a bar\n"


def test_as_much_as_can_be_drawn_is_shown_inside_and_more_by_urls(tmp_path: Path) -> None:
    picture = bytes(1440 * 1440 * 3 + 9999)  # a PNG that nothing compresses
    kept = keep(tmp_path, *(picture + bytes([number]) for number in range(4)))
    with front(tmp_path) as server, replicate.Client(base_url=server.url)._client as client:
        shown = client.get("/v1/predictions/one").json()
        assert shown["output"] == [uri(picture + bytes([number]), "image/webp") for number in range(4)]
        assert shown["logs"] == "a bar\n"
        (tmp_path / f"files/{kept.output[0].split('/')[2]}").write_bytes(bytes(INLINE_BYTES // 2))
        shown = client.get("/v1/predictions/one").json()
        assert shown["output"] == [server.url + path for path in kept.output]
        said = "The outputs are shown as URLs: as data URIs they are 56 MiB, and may be 48.\n"
        assert shown["logs"] == f"{said}a bar\n"
        assert get(server)["logs"] == "a bar\n"


def unreadable(file: Path) -> None:
    file.unlink()
    file.mkdir()


def without_store(file: Path) -> None:
    file.parent.rename(file.parent.with_name("elsewhere"))
    file.parent.touch()


@pytest.mark.parametrize(("harm", "left"), [(Path.unlink, True), (unreadable, True), (without_store, False)])
def test_a_file_that_cannot_be_read_keeps_its_url(harm: Callable[[Path], object], left: bool, tmp_path: Path) -> None:
    """It has expired, or the store fails; the others are inside."""
    first, second = keep(tmp_path, b"drawn", b"drawn too").output
    with front(tmp_path) as server:
        harm(tmp_path / "files" / first.split("/")[2])
        other = uri(b"drawn too", "image/webp") if left else server.url + second
        assert get(server, headers=PYTHON)["output"] == [server.url + first, other]
        status, headers, text = server.request("GET", first)
        assert (status, headers.get("retry-after")) == ((404, None) if harm is Path.unlink else (503, "5"))
        assert harm is Path.unlink or "The cluster's store of files cannot be read; try again later." in text


def test_webp_is_known_where_the_system_knows_no_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in most containers."""
    with monkeypatch.context() as patched:
        patched.setattr(mimetypes, "knownfiles", [])
        mimetypes.init()
    try:
        (path,) = keep(tmp_path, b"drawn").output
        with front(tmp_path) as server:
            assert get(server, headers=PYTHON)["output"] == [uri(b"drawn", "image/webp")]
            assert server.request("GET", path)[1]["content-type"] == "image/webp"
    finally:
        mimetypes.init()
