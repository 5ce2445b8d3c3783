"""Bodies are bounded while they come, each and in sum, and taken apart beside the event loop."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cluster import bodies
from cluster.api_common import exception_handlers
from cluster.bodies import Bodies, read_form
from harness.waiting import wait_until
from local_cog.server import LOOPBACK
from settings import MIB
from tests.cluster.served import exchange, received, served

LIMIT = 8 * MIB


class Reader:
    """An application that reads bodies and says how many bytes they have; both APIs' paths lead to it."""

    def __init__(self) -> None:
        self.waiting = 0
        self.parsed: list[tuple[float, float]] = []
        self.bodies = Bodies(LIMIT, lambda: self.waiting)
        ways = {"/predictions": self.read, "/v1/files": self.read, "/slow": self.read_slowly}
        routes = [Route(path, way, methods=["POST"]) for path, way in ways.items()]
        self.application = Starlette(routes=routes, exception_handlers=exception_handlers())

    async def read(self, request: Request) -> Response:
        async with self.bodies.read(request, len) as size:
            return PlainTextResponse(f"{size} of {self.bodies.held}")

    async def read_slowly(self, request: Request) -> Response:
        def parse(_: bytes) -> None:
            started = time.monotonic()
            time.sleep(2)
            self.parsed.append((started, time.monotonic()))

        async with self.bodies.read(request, parse):
            return PlainTextResponse("done")


@pytest.fixture(scope="module")
def served_reader() -> Iterator[tuple[Reader, int]]:
    reader = Reader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "PACE_SECONDS", 0.5)
        patch.setattr(bodies, "HELD_BYTES", 4 * LIMIT)
        with served(reader.application) as port:
            yield reader, port


@pytest.fixture
def reader(served_reader: tuple[Reader, int]) -> Iterator[Reader]:
    reader, _ = served_reader
    yield reader
    reader.waiting = 0
    wait_until(lambda: not reader.bodies.held, 5)  # whatever has happened, its memory is given back


@pytest.fixture
def port(served_reader: tuple[Reader, int], reader: Reader) -> int:
    return served_reader[1]


def head(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: a", "Connection: close", *headers, "", ""]).encode()


def sized(size: int, path: str = "/predictions") -> bytes:
    return head(path, f"Content-Length: {size}")


def chunked(content: bytes) -> bytes:
    chunk = b"%x\r\n%s\r\n" % (len(content), content) if content else b""
    return head("/predictions", "Transfer-Encoding: chunked") + chunk + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [0, 1, MIB + 1, LIMIT])
def test_a_body_up_to_the_limit_is_read(port: int, size: int) -> None:
    for request in (sized(size) + b"a" * size, chunked(b"a" * size)):
        assert exchange(port, request).endswith(f"{size} of {size}".encode())


def test_a_larger_one_is_refused_as_its_api_does(port: int) -> None:
    asked = [sized(LIMIT + 1), sized(2**63), chunked(b"a" * (LIMIT + 1)), sized(LIMIT + 1) + b"a" * (LIMIT + 1)]
    for request in asked:
        said = exchange(port, request)
        assert said.startswith(b"HTTP/1.1 413 ")
        assert said.endswith(b"\r\n\r\nFailed to buffer the request body: length limit exceeded")
    said = exchange(port, sized(LIMIT + 1, "/v1/files"))
    assert json.loads(said.partition(b"\r\n\r\n")[2]) == {
        "title": "Body too large",
        "detail": "The body is larger than 8 MiB, the limit here.",
        "status": 413,
    }


def test_a_body_that_does_not_come_is_given_up(port: int) -> None:
    for pieces in ([b"a" * MIB], [b"a" * MIB, *[b"a"] * 15]):
        started = time.monotonic()
        said = exchange(port, sized(LIMIT), *pieces, pause=0.1)
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in said
        assert said.endswith(b"The body did not come: less than 256 KiB of it in 0.5 seconds.")
        assert time.monotonic() - started < 30


def test_a_body_may_come_slowly(port: int) -> None:
    pieces = [b"a" * (MIB // 4)] * 16
    assert exchange(port, sized(4 * MIB), *pieces, pause=0.1).endswith(b"4194304 of 4194304")


def test_a_client_that_leaves_is_forgotten(port: int, reader: Reader) -> None:
    with socket.create_connection((LOOPBACK, port)) as connection:
        connection.sendall(sized(LIMIT) + b"a" * MIB)
        wait_until(lambda: reader.bodies.held >= MIB)


@pytest.mark.parametrize("path", ["/predictions", "/v1/files"])
def test_where_much_is_held_small_bodies_come_in(port: int, reader: Reader, path: str) -> None:
    reader.waiting = 3 * LIMIT
    said = exchange(port, sized(LIMIT, path) + b"a" * LIMIT)
    assert said.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5" in said
    assert b"Too many large requests wait. Try again later." in said
    assert exchange(port, sized(MIB, path) + b"a" * MIB).endswith(b"1048576 of 1048576")
    reader.waiting = 4 * LIMIT
    assert exchange(port, sized(1, path) + b"a").startswith(b"HTTP/1.1 503 ")


def test_bodies_that_come_at_once_count_together(port: int) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((LOOPBACK, port), timeout=30)) for _ in range(4)]
        ends = []
        for client in clients:
            with contextlib.suppress(ConnectionError):
                client.sendall(sized(LIMIT) + b"a" * (LIMIT - 1))
        for client in clients:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"a")
            ends.append(received(client)[9:12])
    assert set(ends) == {b"200", b"503"}


def test_a_body_is_parsed_beside_the_event_loop_and_large_ones_in_turn(port: int, reader: Reader) -> None:
    with ThreadPoolExecutor(3) as pool:
        parsed = [pool.submit(exchange, port, sized(2 * MIB, "/slow") + b"a" * 2 * MIB) for _ in range(3)]
        longest = 0.0
        while not all(each.done() for each in parsed):
            started = time.monotonic()
            assert exchange(port, sized(1) + b"a").startswith(b"HTTP/1.1 200 ")
            longest = max(longest, time.monotonic() - started)
    assert {each.result()[9:12] for each in parsed} == {b"200"}
    assert longest < 1.8
    starts, ends = sorted(reader.parsed)[1:], sorted(reader.parsed)[:-1]
    assert all(end <= start for (start, _), (_, end) in zip(starts, ends, strict=True))


DISPOSITION = b'Content-Disposition: form-data; name="%s"'


def form(*parts: tuple[bytes, bytes]) -> bytes:
    return b"".join(b"--x\r\n%s\r\n\r\n%s\r\n" % part for part in parts) + b"--x--\r\n"


ONE = form((DISPOSITION % b"content", b"abc"))
MULTIPART = "multipart/form-data; boundary=x"


@pytest.mark.parametrize("charset", ["", "; charset=zlib", "; charset=rot13", "; charset=\xff", '; a="' + ";" * 5000])
def test_a_form_is_read_whatever_else_its_type_says(charset: str) -> None:
    content = b"\r\n--y\r\n" + bytes(range(256))
    parts = form((DISPOSITION % b"content" + b'; filename="a.png"', content), (DISPOSITION % b"metadata", b"{}"))
    read = read_form(parts, MULTIPART + charset)
    assert {name: part.content for name, part in read.items()} == {"content": content, "metadata": b"{}"}
    assert [part.option(b"filename") for part in read.values()] == ["a.png", None]


@pytest.mark.parametrize(
    ("content", "kind", "sentence"),
    [
        (ONE, "", "with the boundary in its Content-Type, which is ''."),
        (ONE, "multipart/form-data", "with the boundary in its Content-Type, which is 'multipart/form-data'."),
        (ONE, 'multipart/form-data; boundary=""', "with the boundary in its Content-Type, which is "),
        (ONE, "application/json; boundary=x", "with the boundary in its Content-Type, which is "),
        (ONE, "multipart/form-data; boundary=" + "x" * 60_000, "and is none: Boundary length 60000 exceeds"),
        (ONE[:-5], MULTIPART, "and ends before its last boundary."),
        (ONE[:20], MULTIPART, "and ends before its last boundary."),
        (b"", MULTIPART, "and ends before its last boundary."),
        (b"\r\n" * 10**7, MULTIPART, "and ends before its last boundary."),
        (b"{}", MULTIPART, "and is none: "),
        (form(*[(DISPOSITION % b"content", b"abc")] * 5000), MULTIPART, "of at most 8 parts; it has more."),
        (b"--x\r\nX: y\r\n\r\n" + b"\r\n--xz" * 10**6, MULTIPART, "of at most 8 parts; it has more."),
        (form((b"X: " + b"a" * 10**6, b"abc")), MULTIPART, "and is none: Maximum header size exceeded."),
        (form((b"\r\n".join([b"X: a"] * 10**5), b"abc")), MULTIPART, "and is none: Maximum header count exceeded."),
    ],
    ids=range(14),
)
def test_what_is_no_form_is_refused_soon(content: bytes, kind: str, sentence: str) -> None:
    started = time.thread_time()
    with pytest.raises(ValueError, match=re.escape(f"The body must be a form, multipart/form-data, {sentence}")):
        read_form(content, kind)
    assert time.thread_time() - started < 2
