"""A connection is bounded: what it may send before it is heard, and how long it may take."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cluster import connections
from harness.waiting import wait_until
from local_cog.server import LOOPBACK
from tests.cluster.served import exchange, received, served

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
LARGE = 50 * 1024**2


async def answer(request: Request) -> Response:
    body = await request.body() if request.method == "PUT" else b""
    if "echo" in request.query_params:
        return Response(body)
    await asyncio.sleep(float(request.query_params.get("seconds", 0)))
    return PlainTextResponse("a" * int(request.query_params.get("size", 2)))


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "PATIENCE_SECONDS", 0.5)
        with served(Starlette(routes=[Route("/", answer, methods=["GET", "POST", "PUT"])])) as port:
            yield port


@pytest.mark.parametrize(
    "pieces",
    [
        [GET + b"X: " + b"a" * 65_536 + b"\r\n\r\n"],
        [GET + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 90) for i in range(700)) + b"\r\n"],
        [GET + b"X: "] + [b"a" * 4096] * 100,
        [b"GET /"] + [b"a" * 4096] * 100,
        [b"GET /" + b"a" * 65_536 + b" HTTP/1.1\r\nHost: a\r\n\r\n"],
        [GET + b"\r\n", b"GET /" + b"a" * 400_000],
    ],
    ids=range(6),
)
def test_headers_without_end_are_refused(port: int, pieces: list[bytes]) -> None:
    *_, head = exchange(port, *pieces).split(b"HTTP/1.1 ")
    assert head.startswith(b"431 ")
    assert head.endswith(b"A request line and its headers may have 65536 bytes together.")


def test_headers_below_the_limit_are_read(port: int) -> None:
    assert exchange(port, GET + b"Connection: close\r\nX: " + b"a" * 65_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("pieces", "answers"),
    [
        ([], 0),
        ([b"G"], 0),
        ([b"GET /", *[b"a"] * 15], 0),
        ([GET, *[b"X: y\r\n"] * 15], 0),
        ([GET + b"\r\n", GET, *[b"X: y\r\n"] * 15], 1),
        # The rest of a body that nobody reads.
        ([b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n", *[b"a"] * 15], 1),
        # All of it.
        ([b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n", b"a", b"a"], 1),
        # No beginning of a request.
        ([GET + b"\r\n", b"\r\n"], 1),
    ],
    ids=range(8),
)
def test_a_request_that_does_not_come_is_given_up(port: int, pieces: list[bytes], answers: int) -> None:
    started = time.monotonic()
    said = exchange(port, *pieces, pause=0.1)
    assert said.count(b"HTTP/1.1 200") == answers
    assert 0.4 < time.monotonic() - started < 10


def test_a_client_that_receives_nothing_is_given_up(port: int) -> None:
    with socket.create_connection((LOOPBACK, port), timeout=30) as connection:
        connection.sendall(b"GET /?size=%d HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % LARGE)
        wait_until(lambda: connections.Connection.unsent)
        wait_until(lambda: not connections.Connection.unsent)
        assert len(received(connection)) < LARGE


def test_what_all_clients_leave_unreceived_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "UNSENT_BYTES", 2 * LARGE)
    monkeypatch.setattr(connections, "PATIENCE_SECONDS", 30)
    with served(Starlette(routes=[Route("/", answer)])) as port, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((LOOPBACK, port), timeout=30)) for _ in range(5)]
        for client in clients:
            client.sendall(b"GET /?size=%d HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % LARGE)
            client.recv(1)
        # The last two have their answers, and those before, who have been waited for longer, make room.
        assert [len(received(client)) > LARGE for client in clients] == [False, False, False, True, True]


def test_a_client_may_receive_slowly_and_keep_its_connection(port: int) -> None:
    with socket.create_connection((LOOPBACK, port), timeout=30) as connection:
        connection.sendall(b"GET /?size=%d HTTP/1.1\r\nHost: a\r\n\r\n" % (LARGE // 5))
        content = b""
        while len(content) < LARGE // 5:
            content += connection.recv(1024**2)
            time.sleep(0.01)
        time.sleep(1)
        connection.sendall(GET + b"\r\n")
        assert connection.recv(9) == b"HTTP/1.1 "


def test_many_clients_that_say_nothing_shut_nobody_out(port: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(socket.create_connection((LOOPBACK, port), timeout=30))
        assert exchange(port, GET + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "pieces",
    [
        [b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03"],
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
        [b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n"],
        [b"GET http://[a/ HTTP/1.1\r\nHost: a\r\n\r\n"],
        [b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n"],
        [b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"],
        [b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"zz\r\n"],
        [b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n"],
        [b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n"],
        [b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n"],
        [GET + b"X: a\x00b\r\n\r\n"],
    ],
    ids=range(11),
)
def test_what_is_no_http_is_refused(port: int, pieces: list[bytes]) -> None:
    assert exchange(port, *pieces, pause=0.1).startswith(b"HTTP/1.1 400 ")


def test_chunks_without_end_are_not_kept(port: int) -> None:
    head = b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    for endless in (b"1;" + b"a" * 400_000, b"1\r\na\r\n0\r\nX: " + b"a" * 400_000):
        assert exchange(port, head, endless).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(("size", "status"), [(1, b"400"), (63, b"400"), (64, b"200")])
def test_a_body_of_small_chunks_is_refused(port: int, size: int, status: bytes) -> None:
    head = b"PUT / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"%x\r\n%s\r\n" % (size, b"a" * size) * 2000
    said = exchange(port, head, chunks + b"0\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 " + status)
    if status == b"400":
        assert said.endswith(b"chunks of the body are too small: they must have 64 bytes on average.")


def test_a_few_small_chunks_are_taken_and_come_whole(port: int) -> None:
    head = b"PUT /?echo=1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    letters = bytes(range(65, 91)) * 30
    chunks = [b"1\r\n%c\r\n" % letter for letter in letters]
    said = exchange(port, head, b"".join(chunks[:300]), b"".join(chunks[300:]), b"0\r\n\r\n", pause=0.05)
    assert said.endswith(b"\r\n\r\n" + letters)


def test_an_upgrade_is_not_taken_and_ends_the_connection(port: int) -> None:
    upgrade = GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    said = exchange(port, upgrade)
    assert said.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in said


def test_requests_ahead_of_their_answers_are_bounded(port: int, caplog: pytest.LogCaptureFixture) -> None:
    one, last = GET + b"\r\n", GET + b"Connection: close\r\n\r\n"
    assert exchange(port, one * 5 + last).count(b"HTTP/1.1 200 ") == 6
    assert exchange(port, one * 10_000 + last).count(b"HTTP/1.1 200 ") < 20
    exchange(port, b"GET /?seconds=0.1 HTTP/1.1\r\nHost: a\r\n\r\n" + one * 10_000)
    time.sleep(0.2)
    assert not caplog.records  # an answer that is ready when the connection has been closed
