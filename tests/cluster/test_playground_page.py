"""The playground behind a front, and the front behind the playground's own server."""

import json
from typing import Any

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from starlette.applications import Starlette
from starlette.testclient import TestClient

from cluster.api_common import OPEN_PATHS
from cluster.playground_page import FILES, PlaygroundPage
from harness.cluster import ENDS, Cluster, Server
from harness.waiting import wait_until
from playground.server import HEADERS, page_files
from tests.cluster.small_cluster import TOKEN
from tests.support.playground import served

BEARER = {"Authorization": f"Bearer {TOKEN}"}


def test_the_page_needs_no_token_and_comes_as_beside_a_cog_server(cluster: Cluster) -> None:
    stranger = Server(cluster.port)
    assert FILES.keys() == page_files().keys()
    for name in ("", *FILES):
        status, headers, text = stranger.request("GET", f"/playground/{name}")
        assert (status, text) == (200, page_files()[name or "index.html"].read_text())
        assert headers.items() >= HEADERS.items()
    assert stranger.request("GET", "/playground/")[1]["content-type"] == "text/html; charset=utf-8"
    assert stranger.request("GET", "/playground/main.js")[1]["content-type"] == "text/javascript; charset=utf-8"
    status, headers, _ = stranger.request("GET", "/playground")
    assert (status, headers["location"]) == (308, "playground/")


def test_the_page_learns_what_is_behind_it_and_the_library_with_a_token(cluster: Cluster) -> None:
    status, _, text = Server(cluster.port).request("GET", "/playground/about.json")
    about = {"server": "front", "progress": "poll", "address": None, "tokens": True, "log": False}
    assert (status, json.loads(text)) == (200, about)
    assert Server(cluster.port).request("GET", "/playground/loras.json")[0] == 401
    status, headers, text = cluster.request("GET", "/playground/loras.json")
    assert (status, headers["content-type"], text) == (200, "application/json", "[]")


def test_a_variable_that_is_wrong_is_told_in_place_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    async def health() -> dict[str, Any]:
        return {"status": "READY"}

    monkeypatch.setenv("LORA_MAX_GB", "many")
    page = TestClient(Starlette(routes=PlaygroundPage(tokens=False, health=health).routes()))
    answer = page.get("/playground/loras.json")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/json")
    assert answer.json()["detail"].startswith("LORA_MAX_GB is 'many'; ")


@pytest.mark.parametrize("path", ["loras.json", "missing.js", "index.html/", "..", "../docs", ".hidden", "main.js\n"])
def test_nothing_else_below_the_page_is_open(path: str) -> None:
    assert not OPEN_PATHS.fullmatch(f"/playground/{path}")


def test_nothing_but_the_pages_files_is_served(cluster: Cluster) -> None:
    for path in ("missing.js", "vendor/", "index.html/", "../server.py", "%2e%2e/server.py", "/etc/passwd"):
        assert Server(cluster.port).request("GET", f"/playground/{path}")[0] == 401
        assert cluster.request("GET", f"/playground/{path}")[0] == 404


def test_the_pages_own_server_may_stand_before_a_front(cluster: Cluster) -> None:
    with served(cluster.url) as server:
        page = Server(server.port)
        about = {"server": "front", "progress": "poll", "address": cluster.url, "tokens": True, "log": False}
        assert json.loads(page.request("GET", "/playground/about.json")[2]) == about
        asked = {"input": {"prompt": "a"}}, {"Prefer": "respond-async"}
        for method, path, *rest in (("GET", "/playground/loras.json"), ("PUT", "/predictions/before-a-front", *asked)):
            assert page.request(method, path, *rest)[0] == 401
        page.headers = BEARER
        assert page.request("GET", "/playground/loras.json")[::2] == (200, "[]")
        assert page.request("GET", "/openapi.json")[0] == 200
        assert page.predict({"prompt": "a"}, "before-a-front")["status"] == "starting"
        wait_until(lambda: page.request("PUT", "/predictions/before-a-front", {"input": {}})[0] == 200)
        answer = json.loads(page.request("PUT", "/predictions/before-a-front", {"input": {}})[2])
        assert answer["status"] in ENDS
        assert answer["output"][0].startswith("data:image/webp;base64,")
