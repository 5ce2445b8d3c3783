"""Webhooks: a coglet's, in a coglet's order."""

import asyncio
import contextlib
import json
import threading
import time
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

import aiohttp

from cluster import webhooks
from cluster.files import Files, Inlined
from cluster.predictions import Prediction, now
from cluster.webhooks import Webhooks, check_url, open_client
from harness.cluster import Cluster, Hooks, Server
from local_cog.server import LOOPBACK
from tests.cluster.small_cluster import comparable


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


ANSWERS = {
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000, False),
    "a long page": (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 500_000, True),
    "nothing": (b"HTTP/1.1 204 No Content\r\n\r\n", True),
    "elsewhere": (b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", False),
    "headers": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000, False),
}


@pytest.mark.parametrize(("answer", "arrived"), ANSWERS.values(), ids=ANSWERS)
def test_of_an_answer_little_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, arrived: bool
) -> None:
    """However much a receiver sends, the event loop goes on, and the next try comes soon."""
    monkeypatch.setattr(webhooks, "TRIES", 3)
    asked = 0

    class Receiver(StreamRequestHandler):
        def handle(self) -> None:
            nonlocal asked
            asked += 1
            while self.rfile.readline() != b"\r\n":
                pass
            assert self.rfile.read(7) == b'{"a":1}'
            with contextlib.suppress(ConnectionError):
                for _ in range(200 if len(answer) > 1000 else 1):
                    self.wfile.write(answer)

    async def show(_: Prediction) -> Inlined:
        return Inlined(Files(str(tmp_path)), [b'{"a"', b":1}"], 7)

    async def story(port: int) -> float:
        slowest, before = 0.0, time.monotonic()
        async with open_client() as client:
            prediction = Prediction("one", "front", now(), {}, {}, "cog", webhook=f"http://{LOOPBACK}:{port}/")
            delivering = asyncio.create_task(Webhooks(client, "secret", show).deliver(prediction))
            while not delivering.done():
                await asyncio.sleep(0.01)
                slowest, before = max(slowest, time.monotonic() - before), time.monotonic()
        return slowest

    with ThreadingTCPServer((LOOPBACK, 0), Receiver) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            slowest = asyncio.run(asyncio.wait_for(story(server.server_address[1]), 60))
        finally:
            server.shutdown()
    assert slowest < 3  # without a bound it is as long as the receiver goes on
    assert asked == (1 if arrived else 3)


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


SENDABLE = [
    "http://127.0.0.1:9/hook", "HTTP://127.0.0.1:9", "http://user:pass@127.0.0.1:9/a?token=s3cret#b", "http://[::1]:9/",
    "http://%C3%BC:p@127.0.0.1:9/", "http://127.0.0.1:9/%zz?ü=%0a", "http://münchen.invalid/", "http://a_b.invalid./",
    "http://127.0.0.1:9/" + "a" * 2000,
]  # fmt: skip
UNSENDABLE = {
    "no url": "without spaces and control characters.",
    "": "with a host, and where it has a port, one from 1 to 65535.",
    "http://": "with a host, and where it has a port, one from 1 to 65535.",
    "http:h": "with a host, and where it has a port, one from 1 to 65535.",
    "//h/": "with a host, and where it has a port, one from 1 to 65535.",
    "ftp://h/": "with a host, and where it has a port, one from 1 to 65535.",
    "file:///etc/passwd": "with a host, and where it has a port, one from 1 to 65535.",
    "http://h:0/": "with a host, and where it has a port, one from 1 to 65535.",
    "http://h:65536/": "such as https://example.com/hook.",
    "http://h:b/": "such as https://example.com/hook.",
    "http://[::1": "such as https://example.com/hook.",
    "http://%/": "with a host that can be looked up.",
    "http://a..b/": "with a host that can be looked up.",
    "http://" + "a" * 64 + ".com/": "with a host that can be looked up.",
    "http://999.1.1.1/": "with a host that can be looked up.",
    "http://1.2.3/": "with a host that can be looked up.",
    "http://%E2%82%AC:s3cret@h/?s3cret": "whose user and password are in Latin-1.",
    "http://u%3Au:s3cret@h/?s3cret": "whose user has no colon.",
    "http://h/\n": "without spaces and control characters.",
    "http://h/a b?s3cret": "without spaces and control characters.",
    "http://\u200b/": "without spaces and control characters.",
    "http://h/" + "a" * 2040: "of at most 2048 characters, not 2049.",
    "http://h/?s3cret" + "a" * 10**6: "of at most 2048 characters, not 1000016.",
}


@pytest.mark.parametrize("url", SENDABLE)
def test_a_webhook_is_accepted_where_it_can_be_sent(url: str) -> None:
    async def send() -> None:
        async with aiohttp.ClientSession() as client:
            await client.post(url, data=b"a", timeout=aiohttp.ClientTimeout(total=5))

    check_url(url)
    with pytest.raises((aiohttp.ClientError, TimeoutError)) as failed:  # nobody listens there
        asyncio.run(send())
    assert not isinstance(failed.value, aiohttp.InvalidURL)


@pytest.mark.parametrize(("url", "sentence"), UNSENDABLE.items(), ids=range(len(UNSENDABLE)))
def test_a_webhook_that_cannot_be_sent_is_refused_in_a_sentence(url: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^webhook is .*; it must be an http or https URL") as refused:
        check_url(url)
    assert str(refused.value).endswith(sentence)
    assert "s3cret" not in str(refused.value)
    assert len(str(refused.value)) < 300
