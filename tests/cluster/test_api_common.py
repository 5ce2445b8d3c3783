"""Answers that both APIs share: expensive requests take turns, and an answer may end early."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cluster.api_common import Authorised, InputSchema, Streamed, Turns, exception_handlers
from harness.waiting import wait_until
from local_cog import schema
from local_cog.server import LOOPBACK
from settings import ROOT
from tests.cluster.served import exchange, served

GET = b"GET /v1/%s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


OURS = InputSchema(schema.derive((ROOT / "predict.py").read_text()))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], None),
        (["hf_lora"], "The input hf_lora (did you mean replicate_weights?) is unknown and has no effect.\n"),
        (
            ["lora_weights", "negative_prompt"],
            "The inputs lora_weights (did you mean replicate_weights?) and negative_prompt are unknown and have no "
            "effect.\n",
        ),
        (
            ["CFG_scale", "num_steps", "widht", "aspectRatio"],
            "The inputs CFG_scale (did you mean guidance_scale?), num_steps (did you mean num_inference_steps?), "
            "widht (did you mean width?) and aspectRatio (did you mean aspect_ratio?) are unknown and have no "
            "effect.\n",
        ),
        (
            ["enable_safety_checker", "neg_prompt", "unmask", "guidance_rescale", "image2"],  # alike, but other words
            "The inputs enable_safety_checker, neg_prompt, unmask, guidance_rescale and image2 are unknown and have "
            "no effect.\n",
        ),
        (
            ["mask_image", "num_images", "scheduler", "sampler"],
            "The inputs mask_image (did you mean mask?), num_images (did you mean num_outputs?), scheduler and sampler "
            "are unknown and have no effect.\n",
        ),
        (["a\nb\u2028\x1b[1m"], "The input 'a?b??[1m' is unknown and has no effect.\n"),
        (["", "a and b"], "The inputs '' and 'a and b' are unknown and have no effect.\n"),
        (["https://u:p@h/a?token=s3cret"], "The input 'https://h/a' is unknown and has no effect.\n"),
        (["hf_abcdefghijklmnopqrstuvwxyz"], "The input '***' is unknown and has no effect.\n"),
        (["a" * 300], f"The input '{'a' * 197}...' is unknown and has no effect.\n"),
        (["a" * 10**6], f"The input '{'a' * 197}...' is unknown and has no effect.\n"),
        (
            [f"x{i}" for i in range(9_000)],
            "The inputs x0, x1, x2, x3, x4, x5, x6, x7 and 8992 more are unknown and have no effect.\n",
        ),
    ],
)
def test_unknown_inputs_are_named_on_one_line(names: list[str], said: str | None) -> None:
    known = {"prompt": "a", "seed": 1}
    given = known | dict.fromkeys(names, "b") | {"image": None, "lora": None}
    assert OURS.read(given) == (known, said)


def test_a_name_of_another_predictors_is_suggested_only_where_it_is_known() -> None:
    document = schema.derive("class Predictor:\n    def predict(self, prompt: str) -> Path: ...\n")
    said = "The input hf_lora is unknown and has no effect.\n"
    assert InputSchema(document).read({"hf_lora": 1}) == ({}, said)


def test_what_takes_much_has_turns() -> None:
    turns, go_on, running, most = Turns(2, 3), threading.Event(), 0, 0

    async def slow(request: Request) -> Response:
        nonlocal running, most
        async with turns.take(request):
            running += 1
            most = max(most, running)
            while not go_on.is_set():
                await asyncio.sleep(0.01)
            running -= 1
        return PlainTextResponse("done")

    application = Starlette(routes=[Route("/v1/slow", slow)], exception_handlers=exception_handlers())
    with served(application) as port, ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(exchange, port, GET % b"slow", seconds=60) for _ in range(5)]
        wait_until(lambda: turns.asked == 5, 60)
        refused = exchange(port, GET % b"slow", seconds=60)
        go_on.set()
        assert {answer.result()[9:12] for answer in waiting} == {b"200"}
        assert (most, turns.asked) == (2, 0)
    head, _, body = refused.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5" in head
    assert json.loads(body)["detail"] == "Too many ask for this at once. Try again later."


def test_who_has_left_has_no_turn() -> None:
    turns, go_on, took = Turns(1, 9), threading.Event(), 0

    async def slow(request: Request) -> Response:
        nonlocal took
        async with turns.take(request):
            took += 1
            while not go_on.is_set():
                await asyncio.sleep(0.01)
        return PlainTextResponse("done")

    application = Starlette(routes=[Route("/v1/slow", slow)], exception_handlers=exception_handlers())
    with served(application) as port:
        clients = [socket.create_connection((LOOPBACK, port)) for _ in range(5)]
        for client in clients:
            client.sendall(GET % b"slow")
        wait_until(lambda: turns.asked == 5, 60)
        for client in clients:
            client.close()
        time.sleep(0.5)  # until the server has heard of it
        go_on.set()
        wait_until(lambda: turns.asked == 0, 60)
    assert took == 1


def test_an_answer_that_cannot_be_made_to_its_end_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"some"
        raise PermissionError(13, "Permission denied", "/s3cret/path")

    async def cut(_: Request) -> Response:
        return Streamed(pieces(), headers={"content-length": "9"})

    with served(Starlette(routes=[Route("/v1/cut", cut)])) as port:
        said = exchange(port, GET % b"cut")
    assert said.startswith(b"HTTP/1.1 200 ")
    assert said.endswith(b"\r\n\r\nsome")
    assert [record.levelno for record in caplog.records if record.name == "ray.serve"] == [logging.WARNING]
    assert "s3cret" not in caplog.text
    assert "Traceback" not in caplog.text


@contextmanager
def guarded(*tokens: str) -> Iterator[int]:
    """The port of a front's door, with these tokens; behind it each request is told how long its body is."""

    async def told(request: Request) -> Response:
        return PlainTextResponse(f"{len(await request.body())} bytes")

    door = Middleware(Authorised, tokens=frozenset(tokens))
    with served(Starlette(routes=[Route("/{path:path}", told, methods=["GET", "POST"])], middleware=[door])) as port:
        yield port


def ask(port: int, request: str, *headers: str, body: str = "") -> tuple[str, str, str]:
    """Status, type and text of an answer."""
    lines = [f"{request} HTTP/1.1", *headers, "Connection: close", "", body]
    head, _, text = exchange(port, "\r\n".join(lines).encode()).decode().partition("\r\n\r\n")
    (kind,) = (line.partition(": ")[2] for line in head.splitlines() if line.lower().startswith("content-type: "))
    return head[9:12], kind, text


OWN, FOREIGN, TEXT = "Host: localhost", "Origin: http://evil.example", "Content-Type: text/plain"
# Of a body that never comes: who waits for it, does not answer.
UNSENT = "Content-Length: 9"


@pytest.mark.parametrize(
    ("request_line", "headers", "status", "sentence"),
    [
        ("GET /v1/predictions", ["Host: evil.example"], 403, "Host is 'evil.example'; it must be localhost, [::1] or "),
        ("GET http://localhost/v1/predictions", ["Host: evil.example"], 403, "Host is 'evil.example'; it must be "),
        ("GET /health-check", ["Host: evil.example"], 403, "Host is 'evil.example'; it must be localhost, [::1] or "),
        ("GET /files/a/b.png", ["Host: evil.example"], 403, "Host is 'evil.example'; it must be localhost, [::1] or "),
        ("GET /v1/files/a/stream/b", ["Host: evil.example"], 403, "Host is 'evil.example'; it must be localhost, [::1"),
        ("GET /", [OWN, OWN], 403, "Host is 'localhost,localhost'; it must be localhost, [::1] or 127.0.0.1, with or "),
        ("POST /v1/files", [OWN, FOREIGN, UNSENT], 403, "Origin is 'http://evil.example'; it must be that of Host, "),
        ("POST /predictions/a/cancel", [OWN, FOREIGN], 403, "Origin is 'http://evil.example'; it must be that of Host"),
        (
            "POST /v1/predictions",
            [OWN, TEXT, UNSENT],
            415,
            "Content-Type is 'text/plain'; it must be application/json.",
        ),
        ("POST /predictions", [OWN, UNSENT], 415, "Content-Type is ''; it must be application/json."),
        ("POST /v1/files/a", [OWN, TEXT, UNSENT], 415, "Content-Type is 'text/plain'; it must be application/json."),
    ],
)
def test_without_tokens_a_foreign_page_is_refused_before_its_body_comes(
    request_line: str, headers: list[str], status: int, sentence: str
) -> None:
    """The refusal has the form of the API that is asked."""
    with guarded() as port:
        code, kind, text = ask(port, request_line, *headers)
    assert code == str(status)
    if "/v1/" in request_line:
        said = json.loads(text)
        assert (kind, said["status"]) == ("application/problem+json", status)
        assert said["title"] == {403: "Forbidden", 415: "Unsupported Media Type"}[status]
        text = said["detail"]
    else:
        assert kind == "text/plain; charset=utf-8"
    assert text.startswith(f"API_TOKENS is not set, and {sentence}")


@pytest.mark.parametrize(
    ("request_line", "headers"),
    [
        ("GET /-/healthz", ["Host: evil.example", FOREIGN]),
        ("GET /v1/predictions", [OWN]),
        ("POST /predictions", ["Host: [::1]:8000", "Content-Type: application/json"]),
        ("POST /v1/predictions", [OWN, "Origin: http://localhost", "Content-Type: application/json"]),
        ("POST /v1/predictions/a/cancel", [OWN]),
        ("POST /v1/files", [OWN, "Content-Type: multipart/form-data; boundary=a"]),
    ],
)
def test_without_tokens_this_machines_clients_are_answered(request_line: str, headers: list[str]) -> None:
    sent = ["Content-Length: 1"] if "Content-Type" in headers[-1] else []
    with guarded() as port:
        assert ask(port, request_line, *headers, *sent, body="a" * len(sent))[::2] == ("200", f"{len(sent)} bytes")


def test_with_tokens_a_token_counts_and_nothing_else() -> None:
    foreign = ["Host: evil.example", FOREIGN, TEXT, "Content-Length: 1"]
    with guarded("t0ken") as port:
        assert ask(port, "POST /v1/predictions", *foreign, "Authorization: Bearer t0ken", body="a")[0] == "200"
        assert ask(port, "POST /v1/predictions", OWN, UNSENT)[0] == "401"
        for path in ("/-/healthz", "/health-check", "/files/a/b.png", "/v1/files/a/stream/b"):
            assert ask(port, f"GET {path}", "Host: evil.example")[0] == "200"


async def test_without_tokens_nothing_is_asked_over_a_network() -> None:
    network = httpx.ASGITransport(Authorised(PlainTextResponse("told"), frozenset()))
    async with httpx.AsyncClient(transport=network, base_url="http://10.0.0.1") as client:
        refused = await client.get("/v1/predictions", headers={"Host": "localhost"})
        assert (refused.status_code, refused.json()["title"]) == (401, "Unauthenticated")
        assert (await client.get("/health-check")).text == "told"
