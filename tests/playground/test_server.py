"""The page's server: what it serves, what it passes on and to whom, and that it lets go of whoever has gone."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import playground.server
from harness.hosts import Host, status
from harness.waiting import wait_until
from local_cog.server import LOOPBACK, CogServer, free_port
from playground.server import HEADERS, PAGE, page_files
from playground.target import NoAnswerError, Target
from settings import ROOT
from tests.support.playground import own_address, served
from tests.support.processes import finished

# A minimal predictor: its setup takes a moment or fails, and it draws slowly if asked to.
PREDICTOR = """
import os
import time

from cog import BasePredictor, Input, Path
from tqdm import tqdm


class Predictor(BasePredictor):
    def setup(self) -> None:
        print("Looking for a brush")
        if os.environ.get("BROKEN"):
            raise ValueError("BROKEN is set; it must not be.")
        time.sleep(float(os.environ.get("SETUP_SECONDS", 0)))

    def predict(self, prompt: str = Input(description="slow, endless or not")) -> Path:
        for _ in tqdm(range(10**6 if prompt == "endless" else 20), mininterval=0):
            time.sleep(0.1 if prompt in ("slow", "endless") else 0)
        output = Path("out.webp")
        output.write_text(prompt)
        return output
"""
SLOW, QUICK = {"input": {"prompt": "slow"}}, {"input": {"prompt": "a"}}
PLAIN = "it must be an http or https URL without a login, a query and a fragment, such as http://127.0.0.1:5000."
HEALTHY = status(200, body=b'{"status": "READY"}')


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's server beside a small predictor."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("local_cog", "playground", "service", "sources"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "settings.py", folder)
    (folder / "predict.py").write_text(PREDICTOR)
    return folder


@pytest.fixture
def page(cog: CogServer) -> Iterator[int]:
    """The port of the page's server before a Cog server."""
    with served(f"http://{LOOPBACK}:{cog.port}") as server:
        yield server.port


def send(
    port: int, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> http.client.HTTPConnection:
    """A request that nobody waits for yet; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=30)
    sent = dict(headers or {})
    if body is not None and not isinstance(body, bytes):
        body, sent = json.dumps(body).encode(), {"Content-Type": "application/json", **sent}
    connection.request(method, path, body, sent)
    return connection


def ask(
    port: int, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Mapping[str, str], bytes]:
    with closing(send(port, method, path, body, headers)) as connection:
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def detail(port: int, method: str, path: str, *words: Any) -> tuple[int, str]:  # noqa: ANN401
    code, _, text = ask(port, method, path, *words)
    return code, json.loads(text)["detail"]


def raw(port: int, request: bytes) -> bytes:
    """The bytes of the answer until the connection is closed."""
    with socket.create_connection((LOOPBACK, port), timeout=30) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


# The page


def test_the_page_and_all_its_files_come_with_what_guards_them(page: int) -> None:
    kinds = {"": "text/html", ".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
    assert {"index.html", "main.js", "vendor/lit-html.js"} <= page_files().keys()
    for name in ("", *page_files()):
        code, headers, text = ask(page, "GET", f"/playground/{name}?v=1")
        assert (code, text) == (200, (PAGE / (name or "index.html")).read_bytes())
        kind = "text/plain" if name == "vendor/LICENSE" else kinds[Path(name).suffix]
        assert headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert set(headers.items()) >= set(HEADERS.items())
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_the_addresses_above_the_page_lead_to_it(page: int) -> None:
    for path, code in (("/", 307), ("/playground", 308)):
        found, headers, _ = ask(page, "GET", path)
        assert (found, headers["Location"]) == (code, "playground/")


@pytest.mark.parametrize(
    "path",
    [
        "../server.py", "..%2fserver.py", "%2e%2e/server.py", "vendor/../../server.py", "/etc/passwd", "vendor",
        "vendor/", ".hidden.js", "missing.js", "index.html/", "INDEX.HTML", "index.html%00", "main.js\\",
        "../headers.json",
    ],
)  # fmt: skip
def test_nothing_but_the_pages_files_is_served(
    cog: CogServer, path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(PAGE, tmp_path / "page")
    (tmp_path / "page" / ".hidden.js").touch()
    (tmp_path / "server.py").touch()
    monkeypatch.setattr(playground.server, "PAGE", tmp_path / "page")
    with served(f"http://{LOOPBACK}:{cog.port}") as server:
        assert ask(server.port, "GET", "/playground/main.js")[0] == 200
        assert ask(server.port, "GET", f"/playground/{path}")[0] == 404


@pytest.mark.parametrize(
    ("headers", "code", "begin"),
    [
        ({"Host": "rebound.example"}, 403, "Host is 'rebound.example'; "),
        ({"Origin": "http://evil.example"}, 403, "Origin is 'http://evil.example'; "),
        ({"Content-Type": "text/plain"}, 415, "Content-Type is 'text/plain'; "),
    ],
)
@pytest.mark.parametrize("path", ["/predictions/a", "/playground/webhooks/a/a", "/playground/"])
def test_what_a_foreign_page_may_have_sent_is_refused(
    page: int, headers: Mapping[str, str], code: int, begin: str, path: str
) -> None:
    method = "PUT" if path.startswith("/predictions") else "POST"
    found, sentence = detail(page, method, path, QUICK, headers)
    assert (found, sentence[: len(begin)]) == (code, begin)


def test_the_browsers_own_page_is_answered(page: int) -> None:
    assert ask(page, "PUT", "/predictions/a", QUICK, {"Origin": f"http://{LOOPBACK}:{page}"})[0] == 200


# Requests that are passed on


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/shutdown"),
        ("GET", "/shutdown"),
        ("POST", "/health-check"),
        ("GET", "/predictions/a"),
        ("PUT", "/predictions"),
        ("POST", "/predictions"),
        ("PUT", "/predictions/..%2fshutdown"),
        ("PUT", "/predictions/../shutdown"),
        ("PUT", f"/predictions/{'a' * 129}"),
        ("POST", "/predictions/../cancel"),
        ("POST", "/predictions/a/cancel/"),
        ("PUT", "/trainings/a"),
        ("GET", "/docs"),
    ],
)
def test_no_other_endpoint_is_reached(page: int, cog: CogServer, method: str, path: str) -> None:
    body = None if method == "GET" else QUICK
    assert detail(page, method, path, body) == (404, "There is no such address here.")
    assert cog.health()["status"] == "READY"


def test_what_cog_answers_comes_as_it_is(page: int, cog: CogServer) -> None:
    assert json.loads(ask(page, "GET", "/health-check")[2]) == cog.health()
    assert json.loads(ask(page, "GET", "/openapi.json")[2]) == cog.schema()
    code, headers, text = ask(page, "PUT", "/predictions/b", QUICK)
    assert (code, headers["Content-Type"], headers["X-Content-Type-Options"]) == (200, "application/json", "nosniff")
    assert json.loads(text)["output"] == "data:image/webp;base64,YQ=="
    problem = {"loc": ["body", "input", "prompt"], "msg": "Field required", "type": "value_error.missing"}
    code, _, text = ask(page, "PUT", "/predictions/b", {"input": {}})
    assert (code, json.loads(text)) == (422, {"detail": [problem]})
    assert ask(page, "POST", "/predictions/unknown/cancel")[0] == 404


def test_the_target_gets_no_cookie_no_origin_and_its_own_host(host: Host) -> None:
    host.routes = {"/a/b/health-check": HEALTHY}
    sent = {
        "Authorization": "Bearer a", "Accept": "application/json", "User-Agent": "browser", "Cookie": "a=b",
        "Referer": "http://localhost/", "X-Forwarded-For": "127.0.0.1", "Connection": "keep-alive, x-a", "X-A": "a",
    }  # fmt: skip
    with served(f"{host.address}/a/b/") as server:
        sent["Origin"] = f"http://{LOOPBACK}:{server.port}"
        assert ask(server.port, "GET", "/health-check?a=b", None, sent)[0] == 200
    (seen,) = host.seen
    assert (seen.path, seen.query) == ("/a/b/health-check", {})
    assert dict(seen.headers) == {
        "Host": host.address.removeprefix("http://"), "Accept-Encoding": "identity", "Authorization": "Bearer a",
        "Accept": "application/json", "User-Agent": "browser",
    }  # fmt: skip


def test_a_target_that_refuses_is_heard(host: Host) -> None:
    host.routes = {
        "/health-check": status(401),
        "/openapi.json": status(401, {"WWW-Authenticate": "Basic", "Set-Cookie": "a=b"}, b"{}"),
        "/predictions/a/cancel": status(429, {"Retry-After": "7"}, b"{}"),
    }
    with served(host.address) as server:
        about = json.loads(ask(server.port, "GET", "/playground/about.json")[2])
        assert (about["server"], about["tokens"], about["progress"]) == ("cog", True, None)
        code, headers, _ = ask(server.port, "GET", "/openapi.json")
        assert (code, headers["WWW-Authenticate"], headers["Set-Cookie"]) == (401, None, None)
        code, headers, _ = ask(server.port, "POST", "/predictions/a/cancel")
        assert (code, headers["Retry-After"]) == (429, "7")


def test_what_does_not_answer_or_is_something_else_is_said_and_asked_again(host: Host) -> None:
    port = free_port()
    address = f"http://{LOOPBACK}:{port}"
    with served(address) as server:
        for method, path in (
            ("GET", "/health-check"), ("PUT", "/predictions/a"), ("GET", "/playground/about.json"),
            ("GET", "/playground/loras.json"),
        ):  # fmt: skip
            body = None if method == "GET" else QUICK
            assert detail(server.port, method, path, body) == (502, f"{address} does not answer: Connection refused.")
    with served(host.address) as server:
        sentence = f"{host.address} answers as neither a Cog server nor a cluster's front does."
        assert detail(server.port, "GET", "/playground/about.json") == (502, sentence)
        host.routes |= {"/health-check": HEALTHY, "/playground/about.json": status(503)}
        assert detail(server.port, "GET", "/playground/about.json") == (502, sentence)
        del host.routes["/playground/about.json"]
        assert json.loads(ask(server.port, "GET", "/playground/about.json")[2])["server"] == "cog"
        host.routes["/predictions/a/cancel"] = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)
        sentence = f"{host.address} does not answer: it broke off the connection."
        assert detail(server.port, "POST", "/predictions/a/cancel") == (502, sentence)


# Targets that are broken or mean ill


@contextmanager
def answering(answer: bytes, *, held: bool = False) -> Iterator[str]:
    """The address of what answers each request with these bytes, and then closes the connection or never does."""
    with socket.create_server((LOOPBACK, 0)) as listening:
        connections = []

        def serve() -> None:
            with suppress(OSError):  # the end
                while connections.append(listening.accept()[0]) is None:
                    connections[-1].recv(2**16)
                    connections[-1].sendall(answer)
                    if not held:
                        connections[-1].close()

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://{LOOPBACK}:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for connection in connections:
                connection.close()


OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 9\r\n\r\n{}",
        OK + CHUNKED + b"\r\n2\r\n{}\r\n",
        OK + CHUNKED + b"\r\n2\r\n{}\r\nzz\r\n",
    ],
)
def test_an_answer_that_is_cut_off_does_not_come_as_a_whole_one(answer: bytes) -> None:
    with answering(answer) as address, served(address) as server:
        with pytest.raises(http.client.IncompleteRead):
            ask(server.port, "GET", "/health-check")
        assert detail(server.port, "GET", "/playground/about.json")[0] == 502


def test_an_answer_of_unknown_length_is_whole_and_nothing_that_a_browser_runs() -> None:
    answer = OK + CHUNKED + b"Content-Length: 1\r\nContent-Type: text/html\r\nRetry-After: 1\r\n X: a\r\n\r\n"
    with answering(answer + b"2\r\n{}\r\n0\r\n\r\n") as address, served(address) as server:
        code, headers, text = ask(server.port, "GET", "/health-check")
        assert (code, headers["Content-Length"], text) == (200, None, b"{}")
        assert (headers["Content-Type"], headers["Retry-After"]) == ("text/plain; charset=utf-8", "1 X: a")
        old = raw(server.port, f"GET /health-check HTTP/1.0\r\nHost: {LOOPBACK}\r\n\r\n".encode())
        assert old.endswith(b"\r\n\r\n{}")


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK + b"\r\n{}", OK + b"A: b\r\n" * 200],
)
def test_what_speaks_no_http_is_said(answer: bytes) -> None:
    with answering(answer) as address, served(address) as server:
        for path in ("/health-check", "/playground/about.json"):
            sentence = f"{address} does not answer: what it sends cannot be understood."
            assert detail(server.port, "GET", path) == (502, sentence)
    with answering(answer) as address, served(address.replace("http", "https")) as server:
        assert detail(server.port, "GET", "/health-check")[1].endswith(": no secure connection could be made.")


def test_json_without_end_is_no_health() -> None:
    with answering(OK + b"\r\n" + b"[" * 200_000) as address, served(address) as server:
        sentence = f"{address} answers as neither a Cog server nor a cluster's front does."
        assert detail(server.port, "GET", "/playground/about.json") == (502, sentence)


def test_who_answers_drop_by_drop_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Target.exchange.__wrapped__.__kwdefaults__, "seconds", 0.2)
    with answering(OK[:9], held=True) as address, served(address) as server:
        for path in ("/health-check", "/playground/about.json"):
            assert detail(server.port, "GET", path) == (502, f"{address} does not answer: it takes too long.")

    def drip(handler: Any) -> None:  # noqa: ANN401
        while True:
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.05)

    with Host({"/playground/about.json": drip}) as host, served(host.address) as server:
        sentence = f"{host.address} does not answer: it takes too long."
        assert detail(server.port, "GET", "/playground/about.json") == (502, sentence)


def test_another_server_at_the_same_address_is_known_by_the_next_page(host: Host) -> None:
    host.routes = {"/health-check": HEALTHY}
    with served(host.address) as server:
        assert json.loads(ask(server.port, "GET", "/playground/about.json")[2])["server"] == "cog"
        host.routes["/playground/about.json"] = status(200, body=b'{"server": "front"}')
        assert json.loads(ask(server.port, "GET", "/playground/about.json")[2])["server"] == "front"


def test_addresses_of_this_machine_are_known_in_every_form() -> None:
    assert all(Target(f"http://{host}").is_loopback() for host in ("localhost", "0.0.0.0", "[::1]", "[::]"))
    with pytest.raises(NoAnswerError, match=r"^http://\[::1\] does not answer: (Connection refused|Cannot assign)"):
        Target("http://[::1]").get("/")


# How far a prediction is, and who has gone


def listen(port: int, prediction_id: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = send(port, "GET", f"/playground/events/{prediction_id}")
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream")
    return connection, answer


def next_event(answer: http.client.HTTPResponse) -> dict[str, Any] | None:
    """None at the end."""
    while (line := answer.readline()) and not line.startswith(b"data: "):
        pass
    return json.loads(line.removeprefix(b"data: ")) if line else None


def test_a_page_hears_how_far_its_own_prediction_is_while_it_is_drawn(page: int) -> None:
    (_, mine), (other, theirs) = listen(page, "mine"), listen(page, "other")
    with closing(send(page, "PUT", "/predictions/mine", SLOW)) as drawing:
        assert next_event(mine) == {"status": "processing", "logs": "", "metrics": {}}
        event = next_event(mine)
        assert "/20 [" in event["logs"]
        assert ask(page, "PUT", "/predictions/other", QUICK)[0] == 409
        assert next_event(theirs) is None
        answer = json.loads(drawing.getresponse().read())
    assert answer["status"] == "succeeded"
    assert answer["logs"].startswith(event["logs"])
    logs = [event["logs"] for event in iter(lambda: next_event(mine), None)]
    assert logs == sorted(logs, key=len)
    other.close()


def test_where_the_page_would_have_webhooks_sent_does_not_count(page: int, host: Host) -> None:
    hooked = SLOW | {"webhook": f"{host.address}/hook", "webhook_events_filter": ["completed"]}
    connection, heard = listen(page, "c")
    with closing(connection), closing(send(page, "PUT", "/predictions/c", hooked)):
        assert next_event(heard)["status"] == "processing"  # Cog tells one address alone, and that is the page's
    assert host.seen == []


def test_nobody_else_tells_of_a_prediction(cog: CogServer) -> None:
    with served(f"http://{LOOPBACK}:{cog.port}") as server:
        secret, told = server.secret, {"status": "processing", "logs": "a", "metrics": {}}
        assert ask(server.port, "POST", f"/playground/webhooks/{secret}/d", told)[0] == 404
        connection, heard = listen(server.port, "d")
        with closing(send(server.port, "PUT", "/predictions/d", SLOW)):
            assert next_event(heard)["logs"] == ""
            assert ask(server.port, "POST", f"/playground/webhooks/{secret[::-1]}/d", told)[0] == 404
            assert ask(server.port, "POST", f"/playground/webhooks/{secret}/e", told)[0] == 404
            assert ask(server.port, "POST", f"/playground/webhooks/{secret}/d", [told])[0] == 400
            assert ask(server.port, "POST", f"/playground/webhooks/{secret}/d", b"{")[0] == 415
            assert ask(server.port, "POST", f"/playground/webhooks/{secret}/d", told | {"logs": "b" * 9999})[0] == 200
            assert next_event(heard) == told | {"logs": "b" * 9999}
        connection.close()
        wait_until(lambda: ask(server.port, "POST", f"/playground/webhooks/{secret}/d", told)[0] == 404)


def test_who_goes_while_its_picture_is_drawn_cancels_it(page: int, cog: CogServer) -> None:
    drawing = send(page, "PUT", "/predictions/f", {"input": {"prompt": "endless"}})
    wait_until(lambda: cog.health()["status"] == "BUSY")
    drawing.close()
    wait_until(lambda: cog.health()["status"] == "READY")


def test_a_prediction_is_cancelled_by_its_id(page: int, cog: CogServer) -> None:
    with closing(send(page, "PUT", "/predictions/g", SLOW)) as drawing:
        wait_until(lambda: cog.health()["status"] == "BUSY")
        assert ask(page, "POST", "/predictions/g/cancel")[0] == 200
        assert json.loads(drawing.getresponse().read())["status"] == "canceled"


def test_who_has_gone_is_not_told_and_too_many_are_refused(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playground.events, "MOST_LISTENERS", 2)
    (first, _), (second, _) = listen(page, "h"), listen(page, "h")
    sentence = "Too many pages listen already; close some of them."
    assert detail(page, "GET", "/playground/events/h") == (503, sentence)
    first.close()
    wait_until(lambda: ask_events(page) == 200, 5)
    second.close()


def ask_events(port: int) -> int:
    with closing(send(port, "GET", "/playground/events/h")) as connection:
        return connection.getresponse().status


def test_a_silent_stream_shows_that_it_is_there(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playground.server, "SECONDS_BETWEEN_SIGNS", 0.5)
    connection, heard = listen(page, "i")
    assert heard.readline() == b":\n"
    connection.close()


# Limits


def test_what_is_no_request_that_can_be_passed_on_is_refused(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"Content-Type": "application/json"}
    sentence = "The body must be JSON, and it has NaN, which is no number in JSON."
    assert detail(page, "PUT", "/predictions/a", b'{"input": NaN}', kind) == (400, sentence)
    for length in ("-1", "1e3", "9" * 5000):
        assert detail(page, "PUT", "/predictions/a", b"{}", kind | {"Content-Length": length})[0] == 400
    assert detail(page, "PUT", "/predictions/a", None, kind | {"Transfer-Encoding": "chunked"})[0] == 411
    assert ask(page, "PUT", "/predictions/a", [], kind)[0] == 422
    monkeypatch.setattr(playground.server, "MOST_BYTES", 2**20)
    sentence = "The body has 30000000 bytes; it must have at most 1 MiB."
    assert detail(page, "PUT", "/predictions/a", b"a" * 30_000_000, kind) == (413, sentence)
    assert raw(page, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200).startswith(b"HTTP/1.1 431 ")
    assert raw(page, b"OPTIONS / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 501 ")
    host = f" HTTP/1.1\r\nHost: {LOOPBACK}\r\n".encode()
    for path in (b"x/health-check", b"health-check", b"http://localhost/health-check", b"shutdown#/openapi.json"):
        assert raw(page, b"GET " + path + host + b"\r\n").startswith(b"HTTP/1.1 400 ")
    twice = b"Content-Type: application/json\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} "
    assert raw(page, b"PUT /predictions/a" + host + twice).startswith(b"HTTP/1.1 400 ")


def test_who_sends_slowly_is_cut_off(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playground.server, "SECONDS_FOR_REQUEST", 0.3)
    head = f"PUT /predictions/a HTTP/1.1\r\nHost: {LOOPBACK}\r\n"
    begun = time.monotonic()
    for sent in ("", head, f"{head}Content-Type: application/json\r\nContent-Length: 99\r\n\r\n"):
        assert raw(page, sent.encode()) == b""
    assert time.monotonic() - begun < 5


def test_only_so_many_are_answered_at_once(cog: CogServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playground.server, "MOST_CONNECTIONS", 2)
    with served(f"http://{LOOPBACK}:{cog.port}") as server:
        held = [socket.create_connection((LOOPBACK, server.port)) for _ in range(2)]
        request = f"GET /playground/ HTTP/1.1\r\nHost: {LOOPBACK}\r\n\r\n".encode()
        assert raw(server.port, b"") == b""
        for connection in held:
            connection.close()
        wait_until(lambda: raw(server.port, request).startswith(b"HTTP/1.1 200"))


# Which server is behind it


def test_beside_a_cog_server_of_this_machine_there_are_events_and_the_library(
    page: int, cog: CogServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    about = json.loads(ask(page, "GET", "/playground/about.json")[2])
    address = f"http://{LOOPBACK}:{cog.port}"
    assert about == {"server": "cog", "progress": "events", "address": address, "tokens": False, "log": False}
    assert ask(page, "GET", "/playground/setup.log")[0] == 404
    assert json.loads(ask(page, "GET", "/playground/loras.json")[2]) == []
    (tmp_path / "mine.safetensors").touch()
    monkeypatch.setenv("LORAS_DIR", str(tmp_path))
    assert json.loads(ask(page, "GET", "/playground/loras.json")[2]) == ["mine"]
    monkeypatch.setenv("LORA_MAX_GB", "many")
    assert detail(page, "GET", "/playground/loras.json")[1].startswith("LORA_MAX_GB is 'many'; ")


def test_a_cog_server_elsewhere_is_sent_no_webhook(project: Path, tmp_path: Path) -> None:
    here = own_address()
    with (
        CogServer(project, log=tmp_path / "log", host=here) as running,
        served(f"http://{here}:{running.port}") as server,
    ):
        running.wait_until_ready()
        about = json.loads(ask(server.port, "GET", "/playground/about.json")[2])
        assert (about["server"], about["progress"], about["tokens"]) == ("cog", None, False)
        assert json.loads(ask(server.port, "GET", "/playground/loras.json")[2]) == []
        _, heard = listen(server.port, "a")
        assert json.loads(ask(server.port, "PUT", "/predictions/a", QUICK)[2])["status"] == "succeeded"
        assert next_event(heard) is None


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("127.0.0.1:5000", "127.0.0.1:5000"),
        ("ftp://127.0.0.1", "ftp://127.0.0.1"),
        ("http://me:s3cret@host", "http://host"),
        ("http://host/?token=s3cret", "http://host/"),
        ("http://host/a#s3cret", None),
        ("http://host:0", "http://host:0"),
        ("http://host:65536", "http://host:65536"),
        ("http://", "http://"),
        ("http:///a", "http:///a"),
        ("http://ho st", "http://ho st"),
        ("http://host/a b", None),
        ("http://[::1", "http://***"),
        ("http://a..b", "http://a..b"),
        (f"http://{'a' * 64}.de", None),
        ("http://host\n", None),
        ("", ""),
    ],
)
def test_a_target_that_is_no_plain_address_is_refused_with_a_sentence(target: str, shown: str | None) -> None:
    with pytest.raises(ValueError, match=r"^--target is '") as refused:
        Target(target)
    said = str(refused.value)
    assert "s3cret" not in said
    assert said.endswith(f"; {PLAIN}")
    assert shown is None or said == f"--target is {shown!r}; {PLAIN}"


# The command


@contextmanager
def command(project: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command, and the port at which its page answers; stopped as by an operator, with all that it has started."""
    command = [sys.executable, "-P", "-m", "playground.server", *options]
    given = {**os.environ, "PYTHONPATH": str(project), **environment}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=project, env=given, **streams) as process:
        try:
            ready = process.stdout.readline()
            port = int(ready.partition(f"{LOOPBACK}:")[2].partition("/")[0])
            assert ready == f"Ready: http://{LOOPBACK}:{port}/playground/ (Ctrl-C stops it)\n"
            yield process, port
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 128 + signal.SIGTERM


def health(port: int) -> str:
    return json.loads(ask(port, "GET", "/health-check")[2])["status"]


def test_the_page_is_there_before_its_predictor_which_ends_with_it(project: Path) -> None:
    with command(project, "--port", "0", SETUP_SECONDS="1") as (_, port):
        assert ask(port, "GET", "/playground/")[0] == 200
        assert health(port) == "STARTING"
        about = json.loads(ask(port, "GET", "/playground/about.json")[2])
        its_port = int(about.pop("address").rpartition(":")[2])
        assert about == {"server": "cog", "progress": "events", "tokens": False, "log": True}
        wait_until(lambda: "Looking for a brush\n" in ask(port, "GET", "/playground/setup.log")[2].decode())
        assert health(port) == "STARTING"
        wait_until(lambda: health(port) == "READY")
        assert json.loads(ask(port, "PUT", "/predictions/a", QUICK)[2])["status"] == "succeeded"
        assert "100%|" not in ask(port, "GET", "/playground/setup.log")[2].decode()  # that is the prediction's
    with pytest.raises(ConnectionRefusedError):
        ask(its_port, "GET", "/health-check")


def test_a_predictor_that_cannot_start_or_has_ended_is_told_by_the_page(project: Path) -> None:
    with command(project, "--port", "0", BROKEN="1") as (process, port):
        wait_until(lambda: health(port) == "SETUP_FAILED")
        assert "BROKEN is set; it must not be." in ask(port, "GET", "/playground/setup.log")[2].decode()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (server,) = [it for it in children if b"cog.server.http" in Path(f"/proc/{it}/cmdline").read_bytes()]
        os.kill(int(server), signal.SIGKILL)
        sentence = "The predictor's server ended with code -9; start script/playground anew."
        wait_until(lambda: json.loads(ask(port, "GET", "/health-check")[2]) == {"detail": sentence})
        assert ask(port, "GET", "/playground/about.json")[0] == 200


def test_an_option_that_is_wrong_gets_a_sentence(project: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port, free = taken.getsockname()[1], free_port()
        in_use = "it must be one that is free at 127.0.0.1: Address already in use."
        for options, sentence in (
            (["--target", "http://host?a"], f"--target is 'http://host'; {PLAIN}"),
            (["--port", str(port)], f"--port is {port}; {in_use}"),
            (
                ["--target", f"http://localhost:{free}", "--port", str(free)],
                f"--target is http://localhost:{free}; it must be another server than the page's own.",
            ),
            (["--port", "65536"], "--port is 65536; it must be at most 65535, and not negative."),
        ):
            command = [sys.executable, "-P", "-m", "playground.server", *options]
            environment = {**os.environ, "PYTHONPATH": str(project)}
            done = finished(command, env=environment, cwd=None)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.splitlines()[-1] == f"script/playground: error: {sentence}"
