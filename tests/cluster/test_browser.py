"""Attempts of a real browser's pages on a cluster without tokens, which only loopback protects."""

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import MSG_PEEK
from socketserver import BaseRequestHandler, ThreadingTCPServer

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

import replicate

from harness.cluster import Cluster, Server
from harness.hosts import Host, relay, status
from harness.waiting import wait_until
from local_cog.server import LOOPBACK
from tests.cluster.databases import rows
from tests.support.browser import browsing, find_browser, look

BROWSER = find_browser()
needs_browser = pytest.mark.skipif(BROWSER is None, reason="neither Chromium nor Chrome is installed")

# Takes one step after the other, and reports what each has come to, as far as the browser lets the page know.
PAGE = """<!DOCTYPE html><iframe name="frame"></iframe><script type="module">
const cluster = "CLUSTER", told = {}
const asked = prompt => JSON.stringify({version: "a", input: {prompt}})
const upload = name => {
    const form = new FormData()
    form.append("content", new File(["a"], name, {type: "image/png"}))
    return form
}
STEPS
for (const [name, step] of Object.entries(steps))
    told[name] = await step().then(
        async answer => answer?.type === "basic" ? `${answer.status} ${await answer.text()}` : "sent", () => "failed")
await fetch("REPORT", {method: "POST", mode: "no-cors", body: JSON.stringify(told)})
</script>"""

# Requests of a page to another origin: they are sent, but the page sees no answer.
FOREIGN = """
const post = (path, body, more) => fetch(cluster + path, {method: "POST", mode: "no-cors", body, ...more})
const submit = () => new Promise(resolve => {
    const form = document.createElement("form"), field = document.createElement("input")
    Object.assign(form, {action: cluster + "/v1/predictions", method: "post", enctype: "text/plain", target: "frame"})
    Object.assign(field, {name: asked("form").replace(/}$/, ',"a":"'), value: '"}'})
    document.querySelector("iframe").onload = resolve
    form.append(field)
    document.body.append(form)
    form.submit()
})
const steps = {
    "Cog, text": () => post("/predictions", asked("Cog, text")),
    "text": () => post("/v1/predictions", asked("text")),
    "no type": () => post("/v1/predictions", new Blob([asked("no type")])),
    "hidden origin": () => post("/v1/predictions", asked("hidden origin"), {referrerPolicy: "no-referrer"}),
    "form": submit,
    "upload": () => post("/v1/files", upload("foreign.png")),
    "JSON": () => fetch(cluster + "/v1/predictions",
        {method: "POST", body: asked("JSON"), headers: {"content-type": "application/json"}}),
    "read": () => fetch(cluster + "/v1/predictions"),
}"""

# Requests of a page to its own origin.
OWN = """
const send = (method, path, prompt) =>
    fetch(path, {method, body: asked(prompt), headers: {"content-type": "application/json"}})
const steps = {
    "create": () => send("POST", "/v1/predictions", "create NAME"),
    "Cog, create": () => send("PUT", "/predictions/NAME", "Cog, create NAME"),
    "cancel": () => fetch("/predictions/unknown/cancel", {method: "POST"}),
    "upload": () => fetch("/v1/files", {method: "POST", body: upload("NAME.png")}),
    "predictions": () => fetch("/v1/predictions"),
    "files": () => fetch("/v1/files"),
    "secret": () => fetch("/v1/webhooks/default/secret"),
    "health": () => fetch("/health-check"),
    "probe": () => fetch("/-/healthz"),
}"""


@pytest.fixture(scope="module")
def open_cluster(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One worker and one front, without tokens."""
    data = tmp_path_factory.mktemp("open")
    variables = {"DATABASE_URL": f"sqlite:///{data / 'predictions.db'}", "FILES_URL": str(data / "files")}
    options = ("--project", str(project), "--workers", "1", "--fronts", "1")
    with Cluster(*options, environment={**variables, "API_TOKENS": ""}, log=data / "log") as running:
        yield running


@contextmanager
def rebound(first: int, then: int) -> Iterator[int]:
    """A port whose first connection leads to one port of this machine, and every later one to another."""
    ports = itertools.chain([first], itertools.repeat(then))

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            if self.request.recv(1, MSG_PEEK):  # browsers open connections that they do not use
                relay(self.request, next(ports))

    with ThreadingTCPServer((LOOPBACK, 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def visit(name: str, cluster: Cluster, steps: str, folder: Path) -> dict[str, str]:
    """The report of a page that a browser shows under a name; once it is loaded, the name leads to the cluster."""
    with Host({"/report": status(204)}) as host:
        steps = steps.replace("NAME", name)
        page = PAGE.replace("STEPS", steps).replace("CLUSTER", cluster.url).replace("REPORT", host.url("/report"))
        host.routes["/"] = status(200, {"Content-Type": "text/html", "Connection": "close"}, page.encode())
        own = int(host.address.rpartition(":")[2])
        with rebound(own, cluster.port) as port, browsing(BROWSER, f"http://{name}:{port}/", folder):
            wait_until(lambda: host.asked("/report") != [], 120)
        return json.loads(host.asked("/report")[0].form)


def made(cluster: Cluster) -> set[str]:
    """The prompts of all predictions, and the names of all uploads, that the database knows."""
    database = cluster.environment["DATABASE_URL"]
    prompts = rows(database, "SELECT json_extract(input, '$.prompt') FROM predictions")
    return {text for (text,) in [*prompts, *rows(database, "SELECT name FROM files WHERE about IS NOT NULL")]}


@needs_browser
def test_a_foreign_page_makes_nothing(open_cluster: Cluster, tmp_path: Path) -> None:
    before = made(open_cluster)
    told = visit("evil.example", open_cluster, FOREIGN, tmp_path)
    sent = ("Cog, text", "text", "no type", "hidden origin", "form", "upload")
    assert told == dict.fromkeys(sent, "sent") | {"JSON": "failed", "read": "failed"}
    assert made(open_cluster) == before


@needs_browser
def test_a_name_that_leads_here_afterwards_is_told_nothing(open_cluster: Cluster, tmp_path: Path) -> None:
    before = made(open_cluster)
    told = visit("rebound.example", open_cluster, OWN, tmp_path)
    assert told.pop("probe") == "200 success"
    assert len(told) == 8
    for answer in told.values():
        assert answer.startswith("403 ")
        assert "API_TOKENS is not set, and Host is 'rebound.example:" in answer
    assert made(open_cluster) == before


@needs_browser
@pytest.mark.parametrize("name", [LOOPBACK, "localhost"])
def test_a_page_of_this_host_is_served(open_cluster: Cluster, tmp_path: Path, name: str) -> None:
    told = visit(name, open_cluster, OWN, tmp_path)
    assert {step: answer.partition(" ")[0] for step, answer in told.items()} == {
        **dict.fromkeys(told, "200"),
        "create": "201",
        "upload": "201",
        "cancel": "404",
    }
    assert f"create {name}" in told["predictions"]
    assert f"{name}.png" in told["files"]
    assert "whsec_" in told["secret"]
    assert {f"create {name}", f"Cog, create {name}", f"{name}.png"} <= made(open_cluster)


@needs_browser
def test_the_page_about_the_apis_is_shown_where_it_was_asked_for_and_has_its_style(
    open_cluster: Cluster, tmp_path: Path
) -> None:
    """The console would tell of a style or a link that the page's policy forbids."""
    page, console = look(BROWSER, open_cluster.url, tmp_path)
    assert console == []
    assert f"curl {open_cluster.url}/predictions " in page
    assert "<dt><code>replicate_weights</code><span>string</span><span>optional</span></dt>" in page


def test_clients_are_served_that_are_no_browsers(open_cluster: Cluster, tmp_path: Path) -> None:
    """The official client, as documented, and bare HTTP; a probe by any Host."""
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"a picture")
    client = replicate.Client(api_token="any", base_url=open_cluster.url)
    with client._client, picture.open("rb") as opened:
        (file,) = client.run("owner/name", input={"prompt": "official", "image": opened})
        client.predictions.create(version="a", input={"prompt": "slow", "steps": 50}).cancel()
        assert client.files.create(picture).id in [file.id for file in client.files.list()]
    assert file.read() == b"a picture"
    open_cluster.predict({"prompt": "slow", "steps": 50}, "to-cancel")
    assert open_cluster.request("POST", "/predictions/to-cancel/cancel")[0] == 200
    other = Server(open_cluster.port, {"Host": "10.0.0.1:8000"})
    assert other.request("GET", "/-/healthz")[0] == 200
    assert other.request("GET", "/health-check")[0] == 403
