"""What both APIs answer alike: what takes much has turns, and an answer may end early."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cluster.api_common import InputSchema, Streamed, Turns, exception_handlers
from local_cog import schema
from local_cog.server import LOOPBACK
from settings import ROOT
from tests.cluster.served import exchange, served
from tests.support.waiting import wait_until

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
