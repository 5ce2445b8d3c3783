"""Webhooks: a coglet's, in a coglet's order."""

import asyncio
import contextlib
import json
import logging
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

import aiohttp
import uvloop

from cluster import webhooks
from cluster.api_common import InputSchema
from cluster.files import Files, Inlined
from cluster.front import Front
from cluster.metrics import Metrics
from cluster.predictions import Prediction, Predictions, now
from cluster.settings import ClusterSettings
from cluster.webhooks import Webhooks, check_url, open_client
from harness.cluster import Cluster, Hooks, Server
from harness.waiting import until
from local_cog import schema
from local_cog.server import LOOPBACK, free_port
from tests.cluster.small_cluster import PREDICTOR, comparable
from tests.support.certificates import serving


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

    async def story(prediction: Prediction, told: Webhooks) -> float:
        slowest, before = 0.0, time.monotonic()
        delivering = asyncio.create_task(told.deliver(prediction))
        while not delivering.done():
            await asyncio.sleep(0.01)
            slowest, before = max(slowest, time.monotonic() - before), time.monotonic()
        return slowest

    with receiver(answer, 200 if len(answer) > 1000 else 1) as (port, asked):
        slowest = told_of(tmp_path, f"http://{LOOPBACK}:{port}/", story)
    assert slowest < 3  # without a bound it is as long as the receiver goes on
    assert len(asked) == (1 if arrived else 3)


@contextmanager
def receiver(answer: bytes, times: int = 1, tls: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[str]]]:
    """A receiver of webhooks that sends an answer so many times; its port, and the paths that it was asked for."""
    asked: list[str] = []

    class Receiver(StreamRequestHandler):
        def handle(self) -> None:
            asked.append(self.rfile.readline().decode().split(" ")[1])
            while self.rfile.readline() != b"\r\n":
                pass
            assert self.rfile.read(7) == b'{"a":1}'
            with contextlib.suppress(ConnectionError):
                for _ in range(times):
                    self.wfile.write(answer)

    with ThreadingTCPServer((LOOPBACK, 0), Receiver) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()  # it looks so often whether to end
        try:
            yield server.server_address[1], asked
        finally:
            server.shutdown()


def told_of(
    files: Path, url: str, story: Callable[[Prediction, Webhooks], Awaitable[Any]], *, allow_private: bool = True
) -> Any:  # noqa: ANN401 (the story's)
    """The result of a story about a prediction with a webhook, on an event loop like Ray Serve's replicas have."""

    async def show(_: Prediction) -> Inlined:
        return Inlined(Files(str(files)), [b'{"a"', b":1}"], 7)

    async def told() -> Any:  # noqa: ANN401 (the story's)
        events = ["start", "logs", "completed"]
        prediction = Prediction("one", "front", now(), {}, {}, "cog", webhook=url, webhook_events=events)
        async with open_client(allow_private=allow_private) as client:
            return await asyncio.wait_for(story(prediction, Webhooks(client, "secret", show)), 60)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(told())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_counts_as_not_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(webhooks, "TRIES", 2)
    with receiver(b"HTTP/1.1 204 No Content\r\n\r\n") as (elsewhere, asked_there):
        location = f"http://{LOOPBACK}:{elsewhere}/there"
        answer = f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
        with receiver(answer.encode()) as (port, asked):
            told_of(tmp_path, f"http://{LOOPBACK}:{port}/here", lambda prediction, told: told.deliver(prediction))
    assert (asked, asked_there) == (["/here", "/here"], [])


def test_a_receivers_certificate_that_does_not_count_is_told_to_the_operator(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with receiver(b"HTTP/1.1 204 No Content\r\n\r\n", tls=serving(tmp_path)) as (port, asked):
        told_of(tmp_path, f"https://localhost:{port}/t0ken", lambda prediction, told: told.deliver(prediction))
    assert asked == []
    assert caplog.messages == [
        "A webhook of prediction 'one' cannot be sent: its receiver's certificate is not valid: self-signed "
        "certificate; whoever runs the server can name a file with the right authority in SSL_CERT_FILE."
    ]


# Written in this way, they lead to this machine, or to others that strangers cannot reach.
PRIVATE_HOSTS = [
    "127.0.0.1", "public.example@127.0.0.1", "127.0.0.1:80@localhost", "127.1.2.3", "[::1]", "[::ffff:127.0.0.1]",
    "[0:0::1]", "0.0.0.0", "[::]", "localhost", "LocalHost", "Ⓛocalhost", "0x7f.1", "0x7F000001", "0177.0.0.0x1",
    "１２７.0.0.1", "169.254.169.254", "168.63.129.16", "10.0.0.1", "192.168.1.1", "[fe80::1]", "[fd00::1]",
    "[64:ff9b::7f00:1]",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_webhooks_go_to_public_addresses_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str) -> None:
    """Also those that were accepted by an older front, whatever their host's name leads to."""

    async def story(prediction: Prediction, told: Webhooks) -> None:
        for event in ("start", "logs"):
            await told.notify(prediction, event)
        await told.deliver(prediction)
        assert not told.wanted(prediction, "completed")

    with receiver(b"HTTP/1.1 204 No Content\r\n\r\n") as (port, asked):
        told_of(tmp_path, f"http://{host}:{port}/t0ken?s3cret", story, allow_private=False)
    assert asked == []
    (line,) = caplog.messages
    assert line.startswith("The webhooks of prediction 'one' are given up: this server connects to public addresses")
    with pytest.raises(ValueError, match="whose host is public: this server connects to public addresses") as refused:
        check_url(f"http://{host}/t0ken?s3cret", allow_private=False)
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("host", ["localhost", "0x7f.1"])
def test_a_private_host_is_told_where_the_operator_allows_it(tmp_path: Path, host: str) -> None:
    with receiver(b"HTTP/1.1 204 No Content\r\n\r\n") as (port, asked):
        told_of(tmp_path, f"http://{host}:{port}/here", lambda prediction, told: told.deliver(prediction))
    assert asked == ["/here"]


@pytest.mark.parametrize("host", ["localhost.", "a.localhost", "a.LOCALHOST.", "127.0.0.1.", "2130706433.", "0x7f.1."])
def test_hosts_that_may_be_private_are_refused(host: str) -> None:
    """Whether these are looked up at all differs from one system to another."""
    with pytest.raises(ValueError, match=r"^webhook is "):
        check_url(f"http://{host}/", allow_private=False)


@pytest.mark.parametrize(
    "host", ["example.com", "1.1.1.1", "[2606:4700::1111]", "localhost.example.com", "nolocalhost", "0x08.8.8.8", "a_b"]
)
def test_hosts_that_may_be_public_are_accepted(host: str) -> None:
    check_url(f"https://{host}/hook", allow_private=False)


def test_a_front_refuses_private_webhooks_and_gives_up_those_that_an_older_one_took(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A front as it is without any setting, but for Ray: its workers have nothing to do."""
    caplog.set_level(logging.INFO)
    database = f"sqlite:///{tmp_path / 'db'}"
    front = _front({"DATABASE_URL": database, "FILES_URL": str(tmp_path / "files")})

    async def story(webhook: str) -> list[tuple[int, dict[str, str], str]]:
        async with Predictions(database) as known:
            due = {"webhook": webhook, "webhook_events": ["completed"], "webhook_due": True, "status": "succeeded"}
            await known.create(Prediction("due", None, now(), None, {}, "cog", **due))
            async with Front.func_or_class._live(front):
                ask = partial(asyncio.to_thread, Server(front.address[1]).request)
                body = {"input": {"prompt": "a"}, "version": "a/b", "webhook": webhook}
                doors = [("POST", "/predictions"), ("PUT", "/predictions/one"), ("POST", "/v1/predictions")]
                answers = [await ask(*door, body) for door in doors]

                async def given_up() -> bool:
                    return (await known.get("due")).webhook is None

                with contextlib.suppress(TimeoutError):  # raised in here, it would keep the front from ending
                    await until(given_up, 10)
            assert await given_up()
            return answers

    running = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    with receiver(b"HTTP/1.1 204 No Content\r\n\r\n") as (port, asked), running as runner:
        answers = runner.run(story(f"http://{LOOPBACK}:{port}/t0ken"))
    assert asked == []
    assert [status for status, _, _ in answers] == [422] * 3
    assert all("unless whoever runs it sets WEBHOOKS_ALLOW_PRIVATE_HOSTS=1" in text for _, _, text in answers)
    assert caplog.text.count("The webhooks of prediction 'due' are given up") == 1
    assert "t0ken" not in caplog.text


def _front(environment: dict[str, str]) -> SimpleNamespace:
    async def health() -> dict[str, Any]:
        return {"status": "READY"}

    handle = SimpleNamespace(options=lambda **_: handle, health=SimpleNamespace(remote=health))
    settings = ClusterSettings.from_environment(environment)
    arguments = {"workers": handle, "address": (LOOPBACK, free_port()), "linger": 0, "queue": 10, "affinity": "none"}
    front = SimpleNamespace(id="front", settings=settings, worker_health=None, leaving=False, **arguments)
    front.predictions, front.files = Predictions(settings.database_url), Files(settings.files_url)
    front.schema, front.metrics = InputSchema(schema.derive(PREDICTOR)), Metrics()
    for name in ("_build", "_beat", "_ask_health", "_tidy", "_probe", "_health"):
        setattr(front, name, partial(getattr(Front.func_or_class, name), front))
    return front


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

    check_url(url, allow_private=True)
    with pytest.raises((aiohttp.ClientError, TimeoutError)) as failed:  # nobody listens there
        asyncio.run(send())
    assert not isinstance(failed.value, aiohttp.InvalidURL)


@pytest.mark.parametrize(("url", "sentence"), UNSENDABLE.items(), ids=range(len(UNSENDABLE)))
def test_a_webhook_that_cannot_be_sent_is_refused_in_a_sentence(url: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^webhook is .*; it must be an http or https URL") as refused:
        check_url(url, allow_private=False)
    assert str(refused.value).endswith(sentence)
    assert "s3cret" not in str(refused.value)
    assert len(str(refused.value)) < 300
